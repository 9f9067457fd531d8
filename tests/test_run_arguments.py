"""The typed arguments of `vlmamba.train`: a field is a flag, and says what resuming may change."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from vlmamba.training import flags, resume
from vlmamba.training.arguments import RunArguments
from vlmamba.training.flags import OnResume, flag
from vlmamba.training.objectives import Options
from vlmamba.training.objectives.contrastive import ContrastiveOptions
from vlmamba.training.objectives.distillation import DistillationOptions
from vlmamba.training.plan import Plan, resolve
from vlmamba.training.recipe import Hyperparameters
from vlmamba_core.cli import Parser
from vlmamba_core.errors import UserError

START = ["--preset", "nano", "--stage", "finetune", "--data", "a.json", "--out", "o"]


def plan(*more: str) -> Plan:
    return resolve(*RunArguments.parse([*START, *more], None))


def names(owner: type, policy: OnResume) -> set[str]:
    return {field.name for field in flags.fields(owner, policy)}


def test_what_a_resumed_run_may_change():
    assert names(Hyperparameters, OnResume.LENGTH) == {"steps", "epochs"}
    free = {"micro_batch", "save_every", "keep", "gradient_checkpointing", "compile"}
    assert names(Hyperparameters, OnResume.FREE) == free
    fixed = {"stage", "preset", "data", "init", "set"}
    fixed |= {"image_aspect_ratio", "image_layout", "image_place"}
    fixed |= {"drop_repetitive", "jpeg_augmentation"}
    assert names(RunArguments, OnResume.SAME) == fixed
    assert names(RunArguments, OnResume.FREE) == {"images", "recipe"}


def test_a_micro_batch_is_how_unless_the_objective_looks_at_it():
    """The contrast's negatives are the micro-batch's others."""
    sizes = ("--batch-size", "8", "--micro-batch")
    for objective, message in (("cross_entropy", None), ("contrastive", "micro_batch was 8")):
        before, now = (plan("--objective", objective, *sizes, size) for size in ("8", "4"))
        saved = resume.run_settings(before, ["1"])
        resume.check_same_run(saved, before, ["1"], Path("o"))
        if message is None:
            resume.check_same_run(saved, now, ["1"], Path("o"))
        else:
            with pytest.raises(UserError, match=message):
                resume.check_same_run(saved, now, ["1"], Path("o"))


def test_a_new_flag_is_one_field():
    @dataclass(frozen=True)
    class More(Hyperparameters):
        sharpness: str = flag("cross_entropy", help="what is minimised")

    p = Parser(prog="p")
    flags.add_flags(p, More, overriding=True)
    chosen = flags.given(More, p.parse_args(["--sharpness", "focal", "--no-compile"]))
    assert (chosen["sharpness"], chosen["compile"], chosen["lr"]) == ("focal", False, None)
    assert flags.settings(More(1e-3, 2, 1, sharpness="focal"))["sharpness"] == "focal"
    assert "sharpness" in names(More, OnResume.SAME)


def test_arguments_have_the_types_of_their_fields():
    args, hyper = RunArguments.parse(
        [*START, "--data", "a.json", "b.json", "--set", "d_model=8", "--lora", "4", "--cpu"], None
    )
    assert args.data == (Path("a.json"), Path("b.json"))
    assert (args.set, args.images, args.cpu) == (("d_model=8",), None, True)
    assert {name: value for name, value in hyper.items() if value is not None} == {"lora": 4}


def test_a_run_saved_before_a_flag_existed_had_its_default():
    here = plan()
    saved = resume.run_settings(here, ["1"])
    del saved["image_aspect_ratio"], saved["image_layout"], saved["hyperparameters"]["lora_dropout"]
    resume.check_same_run(saved, here, ["1"], Path("o"))
    for other, message in (
        (plan("--image-aspect-ratio", "resize"), "was 'pad' and is now 'resize'"),
        (plan("--lora-dropout", "0.5"), "lora_dropout was 0.0 and is now 0.5"),
    ):
        with pytest.raises(UserError, match=message):
            resume.check_same_run(saved, other, ["1"], Path("o"))


def test_a_run_saved_with_the_settings_of_all_objectives_goes_on():
    """Older versions saved them, whichever objective it was."""
    flat = {"teacher": None, "distill_logits": 1.0, "distill_features": 1.0}
    flat |= {"distill_temperature": 1.0, "contrastive_weight": 1.0, "contrastive_temperature": 0.07}
    plain, taught = plan(), plan("--objective", "distill", "--teacher", "nano")
    for here, theirs in ((plain, flat), (taught, flat | {"teacher": "nano"})):
        saved = resume.run_settings(here, ["1"])
        saved["hyperparameters"] = theirs | saved["hyperparameters"]
        resume.check_same_run(saved, here, ["1"], Path("o"))
        assert Hyperparameters.from_flat(saved["hyperparameters"]) == here.hyper
    assert "teacher" not in resume.run_settings(plain, ["1"])["hyperparameters"]
    saved["hyperparameters"]["teacher"] = "other"
    with pytest.raises(UserError, match="teacher was 'other' and is now 'nano'"):
        resume.check_same_run(saved, taught, ["1"], Path("o"))


def test_a_recipe_may_hold_the_settings_of_several_objectives(tmp_path):
    table = "[finetune]\nlr = 1e-3\nbatch_size = 2\nmicro_batch = 2\ncontrastive_weight = 0.5\n"
    path = tmp_path / "mine.toml"
    path.write_text(table + 'distill_logits = 0.25\nobjective = "distill"\nteacher = "nano"\n')
    chosen = {
        name: plan("--recipe", str(path), *(["--objective", name] if name != "distill" else []))
        for name in ("distill", "contrastive", "cross_entropy")
    }
    assert chosen["distill"].hyper.objective_options == DistillationOptions("nano", 0.25)
    assert chosen["contrastive"].hyper.objective_options == ContrastiveOptions(0.5)
    assert chosen["cross_entropy"].hyper.objective_options == Options()


def test_length_may_change_only_when_asked():
    saved = resume.run_settings(plan(), ["1"])
    longer = plan("--epochs", "9", "--keep", "1", "--micro-batch", "1")
    with pytest.raises(UserError, match="epochs was .* --resume longer to train further"):
        resume.check_same_run(saved, longer, ["1"], Path("o"))
    longer = replace(longer, args=replace(longer.args, resume="longer"))
    resume.check_same_run(saved, longer, ["1"], Path("o"))
    with pytest.raises(UserError, match=r"data file a\.json has changed"):
        resume.check_same_run(saved, longer, ["2"], Path("o"))
