"""What each evaluated model is, how it was asked, and what it costs: a row a run.

Figures come from the record's `cost` (`harness.models.cost`); one that was not measured is a dash,
and the last column says how to get it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from harness.reporting.render import Table
from harness.runs.store import EvaluationRun

NEW_TOKENS = 256  # of harness.models.cost, which loads what this does not need
HEADERS = (
    *("run", "model", "template", "device", "parameters", "questions/s"),
    *("first token s", "peak GiB", "tokens/s", "note"),
)
NOTE = (
    "Questions/s: of the whole run, at its batch size. The others: one question with one image, "
    f"batch 1, from the decoded image on; tokens/s is {NEW_TOKENS} new tokens over the whole time, "
    "image encoder included. Peak memory: of the process or its GPU, weights included."
)
MEASURE = "not measured: run again with --cost"


def table(runs: Sequence[EvaluationRun]) -> Table:
    """All runs under HEADERS."""
    return Table("Models and their cost", HEADERS, [row(run) for run in runs], NOTE)


def row(run: EvaluationRun) -> list[str]:
    """A run's cells under HEADERS."""
    found = cost_of(run.record)
    peak = found.get("peak_mem_bytes")
    return [
        run.marked,
        str(run.record["arguments"]["model"]),
        run.template,
        str(found.get("device") or "-"),
        _number(found.get("parameters")),
        _number(found.get("questions_per_s")),
        _number(found.get("first_token_s")),
        _number(None if peak is None else peak / 2**30),
        _number(found.get("tokens_per_s")),
        note(run.record, found),
    ]


def cost_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record's figures, with what an older record says elsewhere."""
    timing, settings = (record.get(part) or {} for part in ("timing", "settings"))
    found = {
        "parameters": record.get("model", {}).get("parameters"),
        "device": settings.get("device_name") or settings.get("device"),
    }
    if timing.get("questions") and timing.get("generate_s"):
        found["questions_per_s"] = timing["questions"] / timing["generate_s"]
    known = {name: value for name, value in (record.get("cost") or {}).items() if value is not None}
    return found | known


def note(record: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Why a figure is missing, or other than its heading says."""
    if "scored_from" in record:
        return "answers from files: no model was run"
    if found.get("first_token_s") is None:
        return MEASURE
    made = found.get("new_tokens")
    if made is None:
        return "nobody says how many tokens came"
    return "" if made == NEW_TOKENS else f"ended after {made} new tokens"


def _number(value: float | None) -> str:
    """Three digits, or all of a large number."""
    if value is None:
        return "-"
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
