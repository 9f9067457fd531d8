"""Names of parts, tasks and types are taken in any case, and numeric types by their short names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tasks
from harness import ablate, profile, run
from harness.data.sources import Source, choose_tasks
from harness.models.registry import eval_models
from harness.models.vlmamba import choose_device, choose_dtype
from harness.scoring import imports
from harness.speed.models import choose_model
from vlmamba import checkpoints, registry
from vlmamba.config import VLMambaConfig
from vlmamba.configs.presets import LANGUAGE_MODELS, VISION_ENCODERS
from vlmamba.demo.world import split_styles
from vlmamba.models.scan2d import SCANS
from vlmamba.training.recipe import Hyperparameters, load_recipe
from vlmamba.training.stages import STAGES, get_stage
from vlmamba_core import names
from vlmamba_core.errors import UserError
from vlmamba_core.launcher import Launcher

NEEDED = {"lr": 1e-3, "batch_size": 2, "micro_batch": 1}  # what has no default


def test_the_exact_name_goes_before_one_in_another_case():
    assert names.choose("part", "A", ["a", "A"]) == "A"
    assert names.choose("part", "b", ["a", "B"]) == "B"
    with pytest.raises(UserError, match="unknown part 'Ab'.*nearest first"):
        names.choose("part", "Ab", ["aB", "AB"])  # either could be meant


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("fp32", torch.float32),
        ("FLOAT", torch.float32),
        ("Float32", torch.float32),
        ("bf16", torch.bfloat16),
        ("BFloat16", torch.bfloat16),
        ("fp16", torch.float16),
        ("half", torch.float16),
    ],
)
def test_numeric_types_have_their_short_names(given, meant):
    assert choose_dtype(given, torch.device("cpu")) == meant
    assert getattr(torch, run.parse(["--tasks", "pope", "--dtype", given]).dtype) == meant
    assert getattr(torch, names.choose_dtype(given, checkpoints.DTYPES)) == meant
    settings = profile._settings(
        profile.build_parser().parse_args(["--dtype", given]), Launcher("local", Path())
    )
    assert getattr(torch, settings.dtype) == meant
    if meant != torch.float16:  # training has no loss scaling
        short = {torch.float32: "fp32", torch.bfloat16: "bf16"}[meant]
        assert Hyperparameters(**NEEDED, dtype=given).dtype == short
    else:
        with pytest.raises(UserError, match="unknown dtype"):
            Hyperparameters(**NEEDED, dtype=given)


def test_a_dtype_of_no_kind_is_an_error_that_lists_the_known_ones():
    for take in (
        lambda name: choose_dtype(name, torch.device("cpu")),
        lambda name: checkpoints.load("nano", dtype=name),
        lambda name: run.parse(["--tasks", "pope", "--dtype", name]),
    ):
        with pytest.raises(UserError, match=r"unknown dtype 'int8'.*bfloat16"):
            take("int8")


def test_every_part_of_a_preset_in_any_case():
    for llm in LANGUAGE_MODELS:
        assert VLMambaConfig.preset(llm.upper()).to_dict() == VLMambaConfig.preset(llm).to_dict()
    for part in (*VISION_ENCODERS, *registry.connectors, *SCANS):
        ours, theirs = (VLMambaConfig.preset(f"nano+{p}").to_dict() for p in (part, part.upper()))
        assert ours == theirs
    assert VLMambaConfig(connector="VSS_L2", scan="Csm").connector == "vss_l2"


def test_stages_recipes_and_schedules():
    assert all(get_stage(name.title()) is stage for name, stage in STAGES.items())
    assert load_recipe("LLaVA-1.5") == load_recipe("llava-1.5")
    assert Hyperparameters(**NEEDED, schedule="COSINE").schedule == "cosine"
    assert Hyperparameters(
        **NEEDED, objective=next(iter(registry.objectives)).upper()
    ).objective in (registry.objectives)


def test_tasks_styles_protocols_and_models_of_a_run():
    given = ["--tasks", "POPE, Mme", "--protocol", "LMMS", "--style", "HeldOut", "--model", "Nano"]
    args = run.parse([*given, "--backend", "Torch"])
    assert (args.tasks, args.protocol, args.style) == ("pope,mme", "lmms", "heldout")
    assert (args.model, args.backend) == ("nano", "torch")
    assert run.parse(["--tasks", "ALL", "--ocr", "First"]).ocr == "first"
    source = Source.parse("Demo", "HELDOUT")
    assert (source.kind, source.style) == ("demo", "heldout")
    assert [task.name for task in choose_tasks("Pope,pope,MME", source)] == ["pope", "mme"]
    assert choose_tasks("All", source) == choose_tasks("all", source)
    assert tasks.load("TextVQA").name == "textvqa"
    assert eval_models.split("HF:org/Name") == ("hf", "org/Name")
    assert split_styles("Seen") == split_styles("seen")
    assert choose_model("Pythia-160M") == "pythia-160m"
    assert choose_device("CPU").type == "cpu"


def test_axes_and_variants_of_a_study():
    ask = ["--axis", "SCAN", "--variants", "BSM,Csm", "--quick"]
    known = ablate._chosen(ablate.build_parser().parse_args(["--axis", "scan"]))
    found = ablate._chosen(ablate.build_parser().parse_args(ask))
    assert {variant.name for variant in found} <= {variant.name for variant in known}
    assert len(found) == 2


def test_the_formats_of_answers():
    assert all(imports.match(name.upper(), imports.formats()) == name for name in imports.formats())
