"""The dtype of training: what the machine is fast with, unless the run or the user says another."""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path

import pytest
import torch

from harness import study
from vlmamba import train
from vlmamba.training import precision
from vlmamba.training.arguments import RunArguments
from vlmamba.training.plan import resolve
from vlmamba_core.errors import UserError


@pytest.fixture(params=[True, False], ids=["fast", "slow"])
def fast(request, monkeypatch) -> bool:
    """Whether the machine multiplies bfloat16 itself."""
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda cpu=False: request.param)
    return request.param


def planned(out: Path, *flags: str) -> str:
    arguments = ["--preset", "nano", "--stage", "finetune", "--out", str(out), *flags]
    return resolve(*RunArguments.parse(arguments, None)).hyper.dtype


def begun(out: Path, dtype: str) -> Path:
    (out / "checkpoints" / "step-00000002").mkdir(parents=True)
    (out / "config.json").write_text(json.dumps({"hyperparameters": {"dtype": dtype}}))
    return out


def test_a_run_is_in_what_the_machine_multiplies_itself(fast, tmp_path):
    assert planned(tmp_path) == ("bf16" if fast else "fp32")
    assert planned(tmp_path, "--dtype", "float32") == "fp32"


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_run_goes_on_in_what_it_was_begun_with(fast, tmp_path, dtype):
    assert planned(begun(tmp_path, dtype)) == dtype


def test_settings_without_a_checkpoint_bind_nobody(fast, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"hyperparameters": {"dtype": "bf16"}}))
    assert planned(tmp_path) == ("bf16" if fast else "fp32")


def test_bf16_on_a_machine_without_it_is_said_to_be_slow(fast):
    if fast:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            precision.warn_if_slow("bf16", cpu=True)
    else:
        with pytest.warns(UserWarning, match="slower here than with --dtype fp32"):
            precision.warn_if_slow("bf16", cpu=True)


def test_an_estimate_for_another_machine_does_not_warn(fast, capsys):
    command = ["--preset", "cobra-3b", "--stage", "finetune", "--dtype", "bf16", "--estimate"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert train.main(command) == 0
    assert "bf16" in capsys.readouterr().out


def test_the_study_s_cells_are_all_in_one(fast, tmp_path):
    args = study.build_parser().parse_args(["--out", str(tmp_path)])
    assert study._study(args).train == (() if fast else ("--dtype", "fp32"))
    args = study.build_parser().parse_args(["--train-args", "--dtype bf16"])
    assert study._study(args).train == ("--dtype", "bf16")


def test_records_of_the_other_one_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda cpu=False: False)
    args = study.build_parser().parse_args(["--out", str(tmp_path)])
    kept = Path(__file__).parents[1] / "results" / "runs" / "study"
    with pytest.raises(UserError, match="made with other settings .in bf16 or not"):
        study.run(study._study(args), 1, None, kept)


def test_a_plan_says_that_records_are_of_the_other_one(fast, tmp_path, capsys):
    kept = Path(__file__).parents[1] / "results" / "runs" / "study"
    command = ["--plan", "--out", str(tmp_path), "--records", str(kept)]
    assert study.main(command) == 0
    assert ("This command would not go on" in capsys.readouterr().out) is not fast


def test_what_is_chosen_is_the_faster_one():
    """Measured here: a product of a language model's size in either."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.randn(256, 512).to(dtype), torch.randn(512, 512).to(dtype)
        times = []
        for _ in range(12):
            began = time.perf_counter()
            x @ weight
            times.append(time.perf_counter() - began)
        seconds[dtype] = min(times)
    slower = seconds[torch.bfloat16] / seconds[torch.float32]
    assert slower < 2 if precision.multiplies_bfloat16(cpu=True) else slower > 0.2
