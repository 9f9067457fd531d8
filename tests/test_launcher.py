"""Studies as jobs: sbatch's script, submitit's local and debug executors, the same results."""

from __future__ import annotations

import functools
import math
import os
from pathlib import Path

import pytest
from test_ablate import BUDGET

from harness import ablate, profile
from harness.ablation import cells, jobs
from harness.ablation.cells import Cell
from harness.ablation.variants import variants
from harness.speed.sweep import lengths
from vlmamba_core import launcher, names
from vlmamba_core.errors import UserError
from vlmamba_core.launcher import Launcher

pytest.importorskip("submitit")


def test_the_script_has_sbatchs_own_parameters(tmp_path):
    given = "partition=gpu,gpus-per-node=2,time=90,mem=16G,reservation=mine,exclusive=True"
    lines = Launcher.parse("Slurm", given, tmp_path).script("a cell").splitlines()
    assert lines[0] == "#!/bin/bash"
    for line in (
        "#SBATCH --partition=gpu",
        "#SBATCH --gpus-per-node=2",
        "#SBATCH --time=90",
        "#SBATCH --mem=16G",
        "#SBATCH --reservation=mine",
        "#SBATCH --exclusive",
        "#SBATCH --nodes=1",
    ):
        assert line in lines
    assert Launcher.parse("local", None, tmp_path).here


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("pbs", None, "unknown launcher 'pbs'"),
        ("local", "partition=gpu", "--slurm partition=gpu needs --launcher slurm"),
        ("slurm", "partition", "'partition' is no KEY=VALUE"),
        ("slurm", "=gpu", "'=gpu' is no KEY=VALUE"),
        ("slurm", "gpus_per_node=8,ntasks-per-node=8", "ntasks_per_node=8: a job here is one"),
        ("slurm", "nodes=2", "nodes=2: a job here is one process"),
    ],
)
def test_a_mistake_is_told_before_anything_is_run(name, parameters, message, tmp_path):
    with pytest.raises(UserError, match=message):
        Launcher.parse(name, parameters, tmp_path)


@pytest.mark.parametrize("cluster", ["processes", "debug"])
def test_results_come_in_order_and_mistakes_as_they_are(cluster, tmp_path):
    where = Launcher(cluster, tmp_path)
    assert list(where.run(math.factorial, [5, 3, 4])) == [120, 6, 24]
    choose = functools.partial(names.choose, "part", known=["a", "b"])
    found = where.run(choose, ["A", "c", "b"])
    assert next(found) == "a"
    with pytest.raises(UserError, match="unknown part 'c'; known, nearest first: "):
        next(found)


@pytest.mark.parametrize("interrupted", [False, True])
def test_where_one_job_fails_only_those_that_wait_are_cancelled(interrupted, tmp_path, monkeypatch):
    class Job:
        def __init__(self, state: str) -> None:
            self.state, self.cancelled = state, False

        def done(self) -> bool:
            return self.state == "FAILED"

        def cancel(self, check: bool = True) -> None:
            assert not check
            self.cancelled = True

    made = [Job("FAILED"), Job("RUNNING"), Job("PENDING")]
    given = iter(made)

    class Executor:
        def submit(self, *_) -> Job:
            return next(given)

    def fail(job: Job) -> None:
        raise KeyboardInterrupt if interrupted else UserError("failed")

    monkeypatch.setattr(Launcher, "executor", lambda self: Executor())
    monkeypatch.setattr(launcher, "_result", fail)
    with pytest.raises(KeyboardInterrupt if interrupted else UserError):
        list(Launcher("slurm", tmp_path).run(math.factorial, [1, 2, 3]))
    assert [job.cancelled for job in made] == [False, interrupted, True]


def test_a_job_that_dies_is_told_with_its_log(tmp_path):
    with pytest.raises(UserError, match=r"ended without a result.*log\.err; the same command"):
        list(Launcher("processes", tmp_path).run(os._exit, [3]))


def test_without_a_cluster_slurm_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no srun and sbatch here"):
        list(Launcher.parse("slurm", None, tmp_path).run(math.factorial, [1]))


def test_a_dry_run_shows_cells_points_and_script_and_writes_nothing(tmp_path, capsys):
    slurm = ["--launcher", "slurm", "--slurm", "partition=gpu,gpus_per_node=1", "--dry-run"]
    slurm += ["--out", str(tmp_path / "out")]
    assert ablate.main(["--axis", "scan", "--quick", "--seeds", "2", *slurm]) == 0
    shown = capsys.readouterr().out
    assert "8 cells, a job each:\nraster, seed 0\n" in shown
    assert "#SBATCH --partition=gpu" in shown
    assert profile.main(["--tiny", "--models", "vl-mamba-130m", "--seq-lens", "16,32", *slurm]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("2 points, ") and "#SBATCH --gpus-per-node=1" in shown
    assert not (tmp_path / "out").exists()


def test_points_measured_in_jobs_are_the_local_ones(tmp_path):
    """The journal of jobs is taken up by a local run, which measures nothing anew."""
    small = ["--tiny", "--models", "vl-mamba-130m", "--seq-lens", "16", "--image-tokens", "4"]
    small += ["--decode", "1", "--seconds", "0.1", "--device", "cpu", "--out", str(tmp_path)]
    settings = profile._settings(
        profile.build_parser().parse_args(small), Launcher("local", tmp_path)
    )
    (point,) = profile.plan(["vl-mamba-130m"], [16], [1], settings)
    row = profile._in_job(Launcher("processes", tmp_path / "jobs"), lengths.launch, point)
    assert row.status == "ok" and row.seq_len == 16 and row.model == "vl-mamba-130m"
    rows = lengths.run([point], lengths.Journal(tmp_path / "points.jsonl"), lambda _: row)
    again = lengths.run([point], lengths.Journal(tmp_path / "points.jsonl"), pytest.fail)
    assert rows == again == [row]


def test_cells_done_in_jobs_are_finished_cells(tmp_path, monkeypatch):
    """By submitit's debug executor; neither more jobs nor a local run do anything again."""
    ran = []

    def step(module: str, arguments: list[str], log=None) -> int:
        folder = Path(arguments[arguments.index("--out") + 1])
        ran.append((module, folder.relative_to(tmp_path).as_posix()))
        (folder / "final" if module == "vlmamba.train" else folder).mkdir(parents=True)
        if module == "harness.run":
            (folder / "record.json").write_text("{}")
        return 3 if "seed-2" in ran[-1][1] else 0

    monkeypatch.setattr(jobs, "execute", step)
    where, variant = Launcher("debug", tmp_path / "jobs"), variants("connector", "demo")[0]
    three = [cells.job(Cell(variant, seed), BUDGET, tmp_path) for seed in range(3)]
    assert list(jobs.run_jobs(three[:2], 1, where)) == three[:2]
    assert len(ran) == 6 and {module for module, _ in ran} == {"vlmamba.train", "harness.run"}
    ran.clear()
    assert list(jobs.run_jobs(three[:2], 1, where)) == three[:2]
    assert list(jobs.run_jobs(three[:2], 1, Launcher("local", tmp_path))) == three[:2]
    assert ran == []
    with pytest.raises(UserError, match="seed 2: .* ended with code 3"):
        list(jobs.run_jobs(three[2:], 1, where))
