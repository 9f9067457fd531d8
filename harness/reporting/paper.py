"""The paper's tables (results/paper.csv) beside what was measured here.

    rows = table("main", measured=[EvaluationRun.read(Path("runs/final"))])

A cell of the paper holds a number, "-" (not reported: the paper has none) or nothing (not recorded:
the source at hand does not give it).  Scores are in per cent, MME in points, as printed there.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tasks
from harness.runs.schema import ROOT
from harness.runs.store import EvaluationRun
from tasks.common import PaperColumn
from vlmamba_core.errors import UserError

INSTALLED = Path(__file__).with_name("paper.csv")  # setup.py puts it there in a wheel
FILE = INSTALLED if INSTALLED.is_file() else ROOT / "results" / "paper.csv"
FIRST = "main"  # the table with the most columns
SETUP = ("model", "llm", "vision_encoder", "connector", "scan")
TITLES = {
    "main": "Table 1: all models",
    "llm": "Table 2: language model (CLIP-ViT-L, MLP)",
    "encoder": "Table 3: vision encoder (Mamba-2.8B-Slimpj, MLP)",
    "connector": "Table 4: connector (SigLIP-SO, Mamba-2.8B-Slimpj)",
    "scan": "Table 5: 2D scan (VSS-L2, SigLIP-SO, Mamba-2.8B-Slimpj)",
}
ONE_RUN = (
    "One run a row, without seeds or intervals. From n alone (our estimate) the 95 % interval is "
    "about ±0.8 points for POPE (8,910 questions) and ±5 for MM-Vet (218), wider where questions "
    "share an image"
)
GAPS = (
    f"{ONE_RUN}: many differences here are inside that. A paired test would tell more; it needs "
    "the answers, which are not published."
)
NOTES = {  # table -> what a reader must know of it
    "main": (
        "From the camera-ready paper; version 1 on arXiv has the same figures without MMMU and "
        f"SEED. {ONE_RUN}. The paper measures no latency, throughput or memory."
    ),
    "llm": GAPS,
    "encoder": GAPS,
    "connector": (
        "VSS-L2 is ahead of MLP on 5 of 8 (GQA +0.8, TextVQA +1.4, MME +20.2, MMB +0.6, MM-Vet "
        "+1.7) and behind on 3 (VQAv2 -0.1, SQA-I -0.9, POPE -0.8); VSS-MLP is ahead of MLP on "
        f"POPE alone (+0.1). {GAPS}"
    ),
    "scan": (
        "The paper's text gives MME's figures, 1369.6 and a lead of 5.6 for BSM, once as MMB's and "
        "once as POPE's. By the table BSM leads by 5.6 on MME and by 0.7 on MMB, and CSM by 0.6 on "
        f"POPE. {GAPS}"
    ),
}
NOT_REPORTED = "not reported"
NOT_RECORDED = "not recorded"


@functools.cache
def benchmarks() -> dict[str, str]:
    """Task -> its heading in all of the paper's tables, in the order of their columns."""
    return {name: c.heading for name, c in _columns().items() if not c.first_table_only}


def columns(table: str) -> dict[str, str]:
    """Column of results/paper.csv -> its heading in one of the paper's tables."""
    found = _columns().items()
    return {n: c.heading for n, c in found if table == FIRST or not c.first_table_only}


@functools.cache
def _columns() -> dict[str, PaperColumn]:
    found = [tasks.load(name) for name in tasks.NAMES]
    columns = sorted((t.paper_column, t.name) for t in found if t.paper_column is not None)
    return {column.other or name: column for column, name in columns}


def in_order(names: Iterable[str]) -> list[str]:
    """Tasks, each once: the paper's in the order of its columns, then the others as they come."""
    present = dict.fromkeys(names)
    known = [name for name in benchmarks() if name in present]
    return list(dict.fromkeys([*known, *present]))


@dataclass(frozen=True)
class Cell:
    """A value as printed, or the reason why there is none."""

    text: str
    why: str = ""


@dataclass(frozen=True)
class Line:
    """A row: what the model is, its cells by benchmark, and where they are from."""

    setup: dict[str, str]
    cells: dict[str, Cell]
    source: str
    measured: bool


def read(path: Path = FILE) -> dict[str, list[Line]]:
    """The paper's rows by table. Raises UserError for a missing or altered file."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"cannot read {path} as a table: {error}") from error
    found: dict[str, list[Line]] = {title: [] for title in TITLES}
    for number, row in enumerate(rows, 2):
        if row.get("table") not in TITLES or None in row or None in row.values():
            raise UserError(f"{path} line {number} is not a row of a known table with all columns")
        try:
            cells = {name: _paper_cell(row.get(name, "")) for name in columns(FIRST)}
            cells |= {name: _paper_cell(row[name]) for name in benchmarks()}
            setup = {name: row[name] for name in SETUP}
            found[row["table"]].append(Line(setup, cells, row["source"], measured=False))
        except KeyError as error:
            raise UserError(f"{path} has no column {error}") from error
    return found


def _paper_cell(text: str) -> Cell:
    reasons = {"": NOT_RECORDED, "-": NOT_REPORTED}
    return Cell("", reasons[text]) if text in reasons else Cell(text)


def measured_line(run: EvaluationRun) -> Line:
    """A run as a row of the paper's tables."""
    config = run.record.get("model", {}).get("config", {})
    vision = config.get("vision_config") or {}
    setup = {
        "model": run.marked,
        "llm": str(config.get("language_model_id") or run.record["arguments"]["model"]),
        "vision_encoder": str(config.get("vision_model_id") or vision.get("model_type") or ""),
        "connector": str(config.get("connector", "")),
        "scan": str(config.get("scan", "")),
    }
    label = run.record.get("label")
    measured = "answers from files, scored by " * ("scored_from" in run.record) + "this harness"
    source = f"{measured}, protocol {run.record['protocol']}, template {run.template}"
    cells = {name: _measured_cell(run, name) for name in columns(FIRST)}
    return Line(setup, cells, f"{source}; {label}" if label else source, measured=True)


def _measured_cell(run: EvaluationRun, name: str) -> Cell:
    found = {result.task: result for result in run.results()}
    if name not in found:
        return Cell("", "not run")
    result, metric = found[name], tasks.load(name).primary_metric
    if metric not in result.metrics:
        return Cell("", result.counts_note() or "no score")
    value = result.metrics[metric]
    return Cell(f"{value if result.unit == 'points' else 100 * value:.1f}")


def table(
    name: str, measured: Sequence[EvaluationRun] = (), path: Path = FILE
) -> tuple[list[str], list[list[str]]]:
    """(headers, rows) of one of the paper's tables with the measured runs below."""
    lines = [*read(path)[name], *map(measured_line, measured)]
    shown = columns(name)
    headers = [*(part.replace("_", " ") for part in SETUP), *shown.values(), "source"]
    return headers, [
        [
            *line.setup.values(),
            *(line.cells[column].text or line.cells[column].why for column in shown),
            line.source,
        ]
        for line in lines
    ]
