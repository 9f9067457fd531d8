"""The typed arguments of `vlmamba.train`: a field is a flag, and says what resuming may change."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from vlmamba.training import flags, resume
from vlmamba.training.arguments import RunArguments
from vlmamba.training.flags import OnResume, flag
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


def test_length_may_change_only_when_asked():
    saved = resume.run_settings(plan(), ["1"])
    longer = plan("--epochs", "9", "--keep", "1", "--micro-batch", "1")
    with pytest.raises(UserError, match="epochs was .* --resume longer to train further"):
        resume.check_same_run(saved, longer, ["1"], Path("o"))
    longer = replace(longer, args=replace(longer.args, resume="longer"))
    resume.check_same_run(saved, longer, ["1"], Path("o"))
    with pytest.raises(UserError, match=r"data file a\.json has changed"):
        resume.check_same_run(saved, longer, ["2"], Path("o"))
