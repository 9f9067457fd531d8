"""The command for the day a GPU is at hand: its steps are what the commands take."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from harness import bench, profile
from tools import gpu_check

PARSERS = {"harness.bench": bench, "harness.profile": profile}


@pytest.mark.parametrize(("device", "tiny"), [("cuda", False), ("cpu", True)])
def test_every_step_is_a_command_that_exists(device, tiny, tmp_path):
    found = gpu_check.steps(device, tiny, tmp_path)
    for _, limit, command in found:
        assert command[0] == "-m" and limit <= 400
        if command[1] in PARSERS:
            PARSERS[command[1]].build_parser().parse_args(command[2:])
    assert {"tests", "profile 130m", "profile 2.8b", "tables", "plots"} <= {n for n, _, _ in found}
    assert sum(limit for _, limit, _ in found) <= 30 * 60


def test_a_step_that_fails_is_recorded_and_the_next_one_runs(tmp_path, monkeypatch, capsys):
    planned = [
        ("good", 60, ["-c", "pass"]),
        ("bad", 60, ["-c", "raise SystemExit(3)"]),
        ("slow", 0.5, ["-c", "import time; time.sleep(60)"]),
        ("last", 60, ["-c", "pass"]),
    ]
    monkeypatch.setattr(gpu_check, "steps", lambda *_: planned)
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--out", str(tmp_path)])
    assert gpu_check.main() == 1
    results = {n: step["result"] for n, step in json.loads(read(tmp_path / "check.json")).items()}
    assert results == {
        "good": "exit code 0",
        "bad": "exit code 3",
        "slow": "took too long",
        "last": "exit code 0",
    }
    assert capsys.readouterr().out.splitlines()[-1] == "failed: bad, slow"


def test_the_bench_refuses_a_gpu_that_is_not_there(capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert bench.main(["--device", "cuda"]) == 2
    assert "no usable GPU" in capsys.readouterr().err


def read(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def test_make_knows_the_command():
    root = Path(__file__).parent.parent
    done = subprocess.run(
        ["make", "-n", "gpu-check", "-o", "install"], cwd=root, capture_output=True, text=True
    )
    assert "tools/gpu_check.py" in done.stdout
