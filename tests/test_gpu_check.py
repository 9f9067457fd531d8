"""The command for the day a GPU is at hand: its steps are what the commands take."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from harness import bench, profile
from tools import gpu_check, time_gpu_parts

ROOT = Path(__file__).parent.parent
PARSERS = {"harness.bench": bench, "harness.profile": profile}


@pytest.mark.parametrize(("device", "tiny"), [("cuda", False), ("cpu", True)])
def test_every_step_is_a_command_that_exists(device, tiny, tmp_path):
    found = gpu_check.steps(device, tiny, tmp_path)
    for _, limit, command in found:
        assert limit <= 400
        assert command[0] == "-m" or (ROOT / command[0]).is_file()
        if command[1] in PARSERS:
            PARSERS[command[1]].build_parser().parse_args(command[2:])
    assert {"tests", "parts", "profile 130m", "profile 2.8b", "tables", "plots"} <= {
        n for n, _, _ in found
    }
    assert sum(limit for _, limit, _ in found) <= 20 * 60


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


def test_every_part_is_measured_on_a_cpu_too(tmp_path, capsys):
    """Tiny: scan, step, prefill, decoding and an update of each stage, by every backend here."""
    out = tmp_path / "parts.json"
    assert time_gpu_parts.main(["--device", "cpu", "--tiny", "--out", str(out)]) == 0
    found = json.loads(read(out))
    assert list(found) == [
        *("scan 130m 16", "scan training 130m 16", "step 130m 2", "language 130m"),
        *("pretrain 130m", "finetune 130m"),
    ]
    names = time_gpu_parts.backends("cpu")
    assert "torch" in names and "reference" not in names
    for part in ("scan 130m 16", "scan training 130m 16", "step 130m 2"):
        assert list(found[part]) == names and all(s > 0 for s in found[part].values())
    language = found["language 130m"]
    assert {"transformers Mamba", "pythia-160m, sdpa"} <= language.keys()
    assert all(calls["prefill"] > 0 and calls["decode"] > 0 for calls in language.values())
    for stage in ("pretrain", "finetune"):
        assert found[f"{stage} 130m"]["finite"] and found[f"{stage} 130m"]["peak_bytes"] > 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"parts": 6, "failed": []}
    assert time_gpu_parts.PROMPT == 1024  # as before


def test_a_part_that_fails_says_why(tmp_path, monkeypatch):
    def broken():
        raise RuntimeError("no kernel image\nfor this card")

    monkeypatch.setattr(
        time_gpu_parts, "parts", lambda *_: [("a", broken), ("b", lambda: {"x": 1})]
    )
    out = tmp_path / "parts.json"
    assert time_gpu_parts.main(["--device", "cpu", "--out", str(out)]) == 1
    assert json.loads(read(out)) == {
        "a": {"failed": "RuntimeError: no kernel image"},
        "b": {"x": 1},
    }


def test_the_bench_refuses_a_gpu_that_is_not_there(capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert bench.main(["--device", "cuda"]) == 2
    assert "no usable GPU" in capsys.readouterr().err


def read(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def test_make_knows_the_command():
    done = subprocess.run(
        ["make", "-n", "gpu-check", "-o", "install"], cwd=ROOT, capture_output=True, text=True
    )
    assert "tools/gpu_check.py" in done.stdout
