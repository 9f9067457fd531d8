"""results/tables and results/plots are what results/runs gives: byte for byte, nothing else.

PNG files depend on the image libraries' builds and are only counted; SVG, Markdown, CSV and LaTeX
must be equal.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import tasks
from harness import plots as plots_command
from harness import tables
from harness.runs.store import EvaluationRun

RESULTS = Path(__file__).resolve().parents[1] / "results"


@pytest.mark.parametrize(("name", "main"), [("tables", tables.main), ("plots", plots_command.main)])
def test_committed_files_are_what_the_runs_give(name, main, tmp_path):
    if not (RESULTS / "runs").is_dir():
        pytest.skip("no committed runs")
    assert main(["--from", str(RESULTS / "runs"), "--out", str(tmp_path)]) == 0
    made = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    committed = {file.name: file.read_bytes() for file in (RESULTS / name).glob("*")}
    assert made.keys() == committed.keys(), f"run `make {name}`"
    differing = [n for n in made if not n.endswith(".png") and made[n] != committed[n]]
    assert not differing, f"run `make {name}`"


def test_every_task_is_above_its_blind_baseline():
    sees, blind = (EvaluationRun.read(RESULTS / "runs" / n) for n in ("demo", "demo-blind"))
    every = [task.name for task in map(tasks.load, tasks.NAMES) if task.demo and task.published]
    assert sees.tasks == blind.tasks == every
    for ours, without in zip(sees.results(), blind.results(), strict=True):
        primary_metric = tasks.load(ours.task).primary_metric
        if ours.task == "mmvet":  # its score takes a judge
            assert primary_metric not in ours.metrics
        else:
            assert ours.intervals[primary_metric].low > without.metrics[primary_metric], ours.task
