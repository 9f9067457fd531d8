"""A sweep over points: each in a process of its own, finished ones taken from the journal.

A process that runs out of memory, hits its time limit or is killed costs its own point only. Longer
sequences of that model and batch size are then left out, and say so: they would need even more.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from tqdm import tqdm

from harness.runs.points import (
    FAILED,
    KILLED,
    NOT_RUN,
    OK,
    OUT_OF_MEMORY,
    TIME_LIMIT,
    Row,
)
from harness.runs.schema import ROOT
from harness.speed.sweep import worker
from harness.speed.sweep.points import Journal, Point, Settings, row_of
from vlmamba_core import processes
from vlmamba_core.errors import UserError

TOO_MUCH = (OUT_OF_MEMORY, TIME_LIMIT, KILLED)
# how libraries end that do not look whether they were given the memory they asked for
UNCHECKED = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT)
MODULE = "harness.speed.sweep.worker"
MACHINE_LIMIT_S = 180.0

Launch = Callable[[Point], Row]


def launch(point: Point) -> Row:
    """Measure a point in a child process and say what came of it."""
    limit = point.settings.time_limit_s
    try:
        done = _child([point.to_json()], limit)
    except subprocess.TimeoutExpired:
        return row_of(point, TIME_LIMIT, f"not finished after {limit:g} s")
    if done.returncode < 0:
        ended_by, limit_bytes = signal.Signals(-done.returncode), point.settings.memory_limit_bytes
        if limit_bytes is not None and ended_by in UNCHECKED:
            detail = f"ended by {ended_by.name} under its limit of {limit_bytes / 2**30:.3g} GiB"
            return row_of(point, OUT_OF_MEMORY, detail)
        detail = f"ended by {ended_by.name}, most likely because memory ran out"
        return row_of(point, KILLED, detail)
    if done.returncode:  # by a library that ends the process, such as OpenMP without a thread
        status = OUT_OF_MEMORY if worker.exhausted(done.stderr) else FAILED
        return row_of(point, status, _last_line(done.stderr))
    found = json.loads(_last_line(done.stdout))
    return row_of(point, found["status"], found["detail"], found["result"])


def measure_machine(settings: Settings) -> dict[str, Any]:
    """The machine's limits, measured in a child as well. Raises UserError where that fails."""
    try:
        done = _child(["machine", json.dumps(asdict(settings))], MACHINE_LIMIT_S)
        return json.loads(_last_line(done.stdout))
    except (subprocess.TimeoutExpired, ValueError) as error:
        raise UserError(f"the machine's own rates could not be measured: {error}") from error


def run(points: Sequence[Point], journal: Journal, start: Launch | None = None) -> list[Row]:
    """A row for every point, under one progress bar (on stderr)."""
    start = start or launch
    rows: list[Row] = []
    too_much: dict[tuple[str, int], Row] = {}
    with tqdm(points, file=sys.stderr, unit="point") as bar:
        for point in bar:
            bar.set_description(point.name)
            place = point.label, point.batch_size
            if place in too_much:
                shorter = too_much[place]
                row = row_of(point, NOT_RUN, f"{shorter.seq_len} tokens: {shorter.status}")
            else:
                row = journal.get(point) or _measured(point, journal, start)
            if row.status in TOO_MUCH:
                too_much[place] = row
            if row.status != OK:
                bar.write(f"{point.name}: {row.status} ({row.detail})", file=sys.stderr)
            rows.append(row)
    return rows


def _measured(point: Point, journal: Journal, start: Launch) -> Row:
    row = start(point)
    if row.status != FAILED:  # a mistake of the program is not a finding: tried again next time
        journal.add(point, row)
    return row


def _child(arguments: list[str], limit_s: float) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", MODULE, *arguments]
    return processes.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit_s)


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1][:500] if lines and lines[-1][:1] != "{" else (lines or ["no output"])[-1]
