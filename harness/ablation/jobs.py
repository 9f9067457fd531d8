"""A job of a study: commands of this project, each done once; many of them here or on a cluster.

    train = Step("vlmamba.train", (...), folder / "final")
    job = Job("mlp, seed 0", folder, {"lr": 1e-3}, (train,))
    for done in run_jobs([job], 2, where): ...

Every step is a command in a process of its own; a finished one is not repeated, an interrupted one
goes on.  A job's folder keeps the settings that it was begun with, and how long its steps took.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmamba_core import processes
from vlmamba_core.errors import UserError
from vlmamba_core.folder import lock_folder, write_atomically
from vlmamba_core.launcher import Launcher

Execute = Callable[[str, Sequence[str]], int]  # module, arguments -> exit code
SETTINGS, SECONDS, LOG = "cell.json", "seconds.json", "log.txt"
OWN = ".job"  # a job's lock, and which step was begun and has not ended well


@dataclass(frozen=True)
class Step:
    """One command; done: what it leaves before it ends, or as it does.

    again: whether it may be given once more when that is there, to do what was left.
    """

    module: str
    arguments: tuple[str, ...]
    done: Path
    again: bool = True


@dataclass(frozen=True)
class Job:
    """Steps that follow each other.

    settings: what a job that goes on must have in common with the one that was begun, as JSON.
    """

    name: str
    folder: Path
    settings: Mapping[str, Any]
    steps: tuple[Step, ...]

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.steps[-1].done.exists() and not self._begun.exists()

    @property
    def _begun(self) -> Path:
        return self.folder / OWN / "begun.txt"

    def run(self, start: Execute | None = None, quiet: bool = False) -> None:
        """Do what is left; with `quiet`, its progress goes to log.txt in its folder.

        Waits where another process does this job.  Raises UserError where a command fails or the
        settings changed.
        """
        with lock_folder(self.folder / OWN, wait=True):
            check_settings(self.folder / SETTINGS, self.settings)
            start = start or functools.partial(execute, log=self.folder / LOG if quiet else None)
            for step in self.steps:
                self._do(step, start)

    def _do(self, step: Step, start: Execute) -> None:
        """A step, unless it has ended well."""
        mark, key = self._begun, key_of(step, self.folder)
        begun = mark.exists() and mark.read_text(encoding="utf-8").strip() == key
        if step.done.exists() and not (begun and step.again):
            if begun:
                mark.unlink()
            return
        write_atomically(mark, f"{key}\n")
        began = time.perf_counter()
        if code := start(step.module, list(step.arguments)):
            raise UserError(
                f"{self.name}: `python -m {step.module} {' '.join(step.arguments)}` ended with "
                f"code {code}; run the same command again to continue"
            )
        if not begun:
            self._note(step, time.perf_counter() - began)
        mark.unlink()

    def seconds(self) -> dict[str, float]:
        """How long each step took that ended without an interruption, by what it leaves."""
        file = self.folder / SECONDS
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    def _note(self, step: Step, seconds: float) -> None:
        noted = self.seconds() | {key_of(step, self.folder): round(seconds, 1)}
        write_atomically(self.folder / SECONDS, json.dumps(noted, indent=2) + "\n")


def key_of(step: Step, folder: Path) -> str:
    """What a step leaves, as seen from its job's folder."""
    inside = step.done.is_relative_to(folder)
    return (step.done.relative_to(folder) if inside else step.done).as_posix()


def execute(module: str, arguments: Sequence[str], log: Path | None = None) -> int:
    """Run a command of this project; its progress goes to stderr or `log`, its tables nowhere."""
    command = [sys.executable, "-m", module, *arguments]
    if log is None:
        return processes.run(command, stdout=subprocess.DEVNULL).returncode
    with log.open("ab") as file:
        return processes.run(command, stdout=subprocess.DEVNULL, stderr=file).returncode


def check_settings(file: Path, settings: Mapping[str, Any]) -> None:
    """Keep the settings of a new job; refuse to mix an old one with others. Raises UserError.

    What a job that was begun by an older version does not say is not compared.
    """
    now = json.loads(json.dumps(settings))
    if not file.exists():
        write_atomically(file, json.dumps(now, indent=2) + "\n")
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    for key in now:
        if key in before and before[key] != now[key]:
            raise UserError(
                f"{file.parent} was begun with {key} {before[key]!r}, now it is "
                f"{now[key]!r}; give the same flags or another --out"
            )


def run_jobs(jobs: Sequence[Job], at_once: int, where: Launcher) -> Iterator[Job]:
    """Do what is left of the jobs, `at_once` at a time or one job of the cluster each.

    Each job comes as soon as it and those before it are done; raises what the first failure raised.
    """
    return _run_here(jobs, at_once) if where.here else _submit(jobs, where)


def _run_here(jobs: Sequence[Job], at_once: int) -> Iterator[Job]:
    if at_once > 1:  # the children's threads, unless the user has said how many
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // at_once)))

    def run_one(place: int, job: Job) -> None:
        print(f"cell {place} of {len(jobs)}: {job.name}", file=sys.stderr, flush=True)
        job.run(quiet=at_once > 1)

    with ThreadPoolExecutor(at_once) as pool:
        started = [pool.submit(run_one, place, job) for place, job in enumerate(jobs, 1)]
        try:
            for job, one in zip(jobs, started, strict=True):
                one.result()
                yield job
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _submit(jobs: Sequence[Job], where: Launcher) -> Iterator[Job]:
    left = []
    for job in jobs:
        if job.finished:
            job.run()  # nothing but a look at its settings
            yield job
        else:
            left.append(job)
    print(f"{len(left)} of {len(jobs)} cells to do, a job each", file=sys.stderr, flush=True)
    for place, _ in enumerate(where.run(run_quietly, left)):
        print(f"{place + 1} of {len(left)}: {left[place].name}", file=sys.stderr, flush=True)
        yield left[place]


def run_quietly(job: Job) -> None:
    """`Job.run`, with its progress in the job's folder."""
    job.run(quiet=True)
