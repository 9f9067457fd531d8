"""Tables: alignment, units, parts, escaping."""

from __future__ import annotations

import re

from harness.records import TaskResult
from harness.stats import Interval
from harness.tables import markdown_table, report, text_table

MME = TaskResult(
    task="mme",
    points=True,
    headline_metrics=("perception", "cognition"),
    metrics={"perception": 190.0, "existence/acc": 0.95, "existence/score": 190.0},
    intervals={
        "perception": Interval(170.25, 200, "bootstrap"),
        "existence/score": Interval(170.25, 200, "bootstrap"),
    },
    n=60,
    n_unparsed=2,
    excluded={"half a pair": 1},
    notes=["cognition: absent"],
)
POPE = TaskResult("pope", False, ("f1",), {"f1": 0.88123}, {}, n=9, n_unparsed=0)


def test_columns_are_aligned():
    lines = text_table(("task", "n"), [("pope", "9"), ("mme", "1234")]).splitlines()
    assert lines == ["task     n", "----  ----", "pope     9", "mme   1234"]


def squeezed(text: str) -> str:
    """Runs of spaces as one."""
    return re.sub(" +", " ", text)


def test_report_has_units_intervals_counts_parts_and_notes():
    text = squeezed(report([MME, POPE], "model x\ndemo: not comparable"))
    assert text.startswith("model x\ndemo: not comparable\n\ntask ")
    counts = "2 not understood; 1 left out: half a pair"
    assert f"mme perception 190.0 170.2 to 200.0 60 {counts}\n" in text
    assert "pope f1 88.1% - 9\n" in text
    assert "existence 95.0% 190.0 [170.2 to 200.0]" in text
    assert "mme: cognition: absent" in text
    assert "mme cognition" not in text  # a total without data has no row


def test_task_without_scores_keeps_a_row():
    nothing = TaskResult("mmvet", True, ("score",), {}, {}, n=0, n_unparsed=0)
    assert "mmvet - - - 0 no score" in squeezed(report([nothing], "t"))


def test_markdown_cells_are_escaped():
    table = markdown_table(("a",), [("x|y <script>\nz & w",)])
    assert table.splitlines()[2] == "| x\\|y &lt;script> z &amp; w |"
    assert report([MME], "t", markdown=True).count("\n| --- |") == 2
