"""Plots: the same records give the same bytes, in whichever process; crossovers are marked."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from test_profile import MACHINE, sweep_of

from harness import plots as plots_command
from harness.reporting import plots


def write_profile(folder: Path) -> Path:
    """A profile's record with known curves: ours is faster from 1000 tokens on."""
    profile = sweep_of(256, 512, 1024, 2048, 4096)
    folder.mkdir(parents=True)
    record = {
        "schema": 1,
        "kind": "profile",
        "label": None,
        "settings": {"threads": 2},
        "machine": MACHINE | {"device": "cpu", "dtype": "float32", "processor": "Test CPU"},
        "points": [asdict(row) for row in profile.rows],
    }
    (folder / "record.json").write_text(json.dumps(record))
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def test_another_process_writes_the_same_bytes(tmp_path, capsys):
    write_profile(tmp_path / "runs" / "cpu")
    first, second = tmp_path / "first", tmp_path / "second"
    assert plots_command.main(["--from", str(tmp_path / "runs"), "--out", str(first)]) == 0
    assert "6 files written to" in capsys.readouterr().out
    command = [sys.executable, "-m", "harness.plots"]
    command += ["--from", str(tmp_path / "runs"), "--out", str(second)]
    subprocess.run(command, check=True, env={"PYTHONHASHSEED": "7"}, cwd=Path.cwd())
    assert digests(first) == digests(second)
    assert set(digests(first)) == {
        f"cpu.{name}.{kind}" for name in ("latency", "decode", "memory") for kind in ("svg", "png")
    }
    svg = (first / "cpu.latency.svg").read_text()
    assert "date" not in svg.lower()
    assert not any(str(year) in svg for year in range(2024, 2031))


def test_crossovers_are_marked_where_there_are_any(monkeypatch):
    from matplotlib.axes import Axes

    marked: list[str] = []
    annotate = Axes.annotate

    def record(self, text, *args, **kwargs):
        marked.append(text)
        return annotate(self, text, *args, **kwargs)

    monkeypatch.setattr(Axes, "annotate", record)
    plots.plot(sweep_of(256, 512, 1024, 2048), "latency", "svg")
    assert marked == ["1000"]
    plots.plot(sweep_of(2048, 4096), "latency", "svg")  # faster from the first length on
    assert marked == ["1000"]


def test_plots_of_runs_that_are_gone_are_named(tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.latency.svg").write_text("x")
    assert plots_command.main(["--from", str(tmp_path / "runs"), "--out", str(out)]) == 0
    assert "of no run here: old.latency.svg" in capsys.readouterr().out
    assert (out / "old.latency.svg").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--from", "nowhere", "--out", "x"], "no folder 'nowhere'"),
        (["--out", "x"], "--from (see --help)"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, capsys):
    assert plots_command.main(arguments) == 2
    assert message in capsys.readouterr().err
