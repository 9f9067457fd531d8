"""The paper's tables (results/paper.csv) beside what was measured here.

    rows = table("main", measured=[EvaluationRun.read(Path("runs/final"))])

A cell of the paper holds a number, "-" (not reported: the paper has none) or nothing (not recorded:
the source at hand does not give it).  Scores are in per cent, MME in points, as printed there.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tasks
from harness.records import ROOT
from harness.runs import EvaluationRun
from tasks.errors import UserError

FILE = ROOT / "results" / "paper.csv"
BENCHMARKS = {  # task -> its name in the paper
    "vqav2": "VQAv2",
    "gqa": "GQA",
    "scienceqa": "SQA-I",
    "textvqa": "TextVQA",
    "pope": "POPE",
    "mme": "MME",
    "mmbench": "MMB",
    "mmvet": "MM-Vet",
}
SETUP = ("model", "llm", "vision_encoder", "connector", "scan")
TITLES = {
    "main": "Table 1: all models",
    "llm": "Ablation: language model",
    "encoder": "Ablation: vision encoder",
    "connector": "Ablation: connector",
    "scan": "Ablation: 2D scan",
}
NOT_REPORTED = "not reported"
NOT_RECORDED = "not recorded"


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
            cells = {name: _paper_cell(row[name]) for name in BENCHMARKS}
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
    source = f"this harness, protocol {run.record['protocol']}"
    cells = {name: _measured_cell(run, name) for name in BENCHMARKS}
    return Line(setup, cells, f"{source}; {label}" if label else source, measured=True)


def _measured_cell(run: EvaluationRun, name: str) -> Cell:
    found = {result.task: result for result in run.results()}
    if name not in found:
        return Cell("", "not run")
    result, metric = found[name], tasks.load(name).headline
    if metric not in result.metrics:
        return Cell("", result.counts_note() or "no score")
    value = result.metrics[metric]
    return Cell(f"{value if result.points else 100 * value:.1f}")


def table(
    name: str, measured: Sequence[EvaluationRun] = (), path: Path = FILE
) -> tuple[list[str], list[list[str]]]:
    """(headers, rows) of one of the paper's tables with the measured runs below."""
    lines = [*read(path)[name], *map(measured_line, measured)]
    headers = [*(name.replace("_", " ") for name in SETUP), *BENCHMARKS.values(), "source"]
    return headers, [
        [
            *line.setup.values(),
            *(line.cells[name].text or line.cells[name].why for name in BENCHMARKS),
            line.source,
        ]
        for line in lines
    ]
