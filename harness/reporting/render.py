"""Tables of results as text, Markdown, CSV and LaTeX, from the same rows."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from harness.runs.schema import TaskResult, with_marks
from harness.scoring.intervals import Interval, NoInterval, too_few
from harness.scoring.paired import Paired
from tasks.common import Unit

HEADERS = ("task", "metric", "value", "95 % interval", "n", "note")


@dataclass(frozen=True)
class Table:
    """Cells under headers; `note` is what a reader must know of them."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def files(self) -> dict[str, str]:
        """Suffix -> content, in every format."""
        markdown = markdown_table(self.headers, self.rows)
        blocks = [f"**{self.title}**", self.note, markdown]
        return {
            "md": "\n\n".join(block for block in blocks if block) + "\n",
            "csv": csv_table(self.headers, self.rows),
            "tex": latex_table(self.headers, self.rows, [self.title, self.note]),
        }


def csv_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Comma-separated, quoted where needed, lines ended by a line feed."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([headers, *rows])
    return file.getvalue()


def latex_table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], comments: Sequence[str] = ()
) -> str:
    """A booktabs tabular, numbers to the right; comments stand above it."""
    numbers = [all(is_number(row[i]) for row in rows) for i in range(len(headers))]
    body = [r"\toprule", _latex_row(headers), r"\midrule", *map(_latex_row, rows), r"\bottomrule"]
    columns = "".join("r" if right else "l" for right in numbers)
    lines = [f"% {line}" for comment in comments for line in comment.splitlines()]
    lines += [rf"\begin{{tabular}}{{{columns}}}", *body, r"\end{tabular}"]
    return "\n".join(lines) + "\n"


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(map(_latex, cells)) + r" \\"


def _latex(cell: str) -> str:
    """Text that LaTeX would read as commands, escaped."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {mark: f"\\{mark}" for mark in "&%$#_{}"} | {"<": r"\textless{}", "\n": " "}
    return "".join(special.get(mark, mark) for mark in cell)


def report(results: Sequence[TaskResult], title: str, markdown: bool = False) -> str:
    """All tables of a run under a title line that carries its settings."""
    render = markdown_table if markdown else text_table
    blocks = [title, render(HEADERS, result_rows(results))]
    for result in results:
        parts = _parts(result)
        if parts:
            headers, rows = parts
            blocks += [f"{result.task} by part", render(headers, rows)]
    notes = [f"{r.task}: {note}" for r in results for note in r.notes]
    if notes:
        bullet = "- " if markdown else "  "
        blocks.append("\n".join(f"{bullet}{note}" for note in notes))
    return "\n\n".join(blocks) + "\n"


def result_rows(results: Sequence[TaskResult]) -> list[list[str]]:
    """Cells under HEADERS: one row per primary metric of each task."""
    return [row for result in results for row in _rows(result)]


def text_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to equal width; numbers to the right."""
    cells = [list(headers), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]
    right = [all(is_number(row[i]) for row in rows) for i in range(len(headers))]

    def line(row: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ]
        return "  ".join(padded).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(headers), rule, *map(line, rows)])


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A GitHub table; pipes, angle brackets and line breaks in cells are escaped."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(map(_escape, row)) + " |" for row in lines)


def value_text(value: float, unit: Unit) -> str:
    """A fraction as per cent with one decimal, points with one decimal."""
    return f"{value:.1f}" if unit == "points" else f"{100 * value:.1f}%"


def interval_text(interval: Interval | NoInterval | None, unit: Unit) -> str:
    """ "low to high", or why there is no interval; a dash where nothing is known of it."""
    if interval is None:
        return "-"
    if isinstance(interval, NoInterval):
        return interval.reason
    low, high = value_text(interval.low, unit), value_text(interval.high, unit)
    return f"{low.rstrip('%')} to {high.rstrip('%')}"


def paired_interval_text(found: Paired) -> str:
    """ "low to high" in per cent, or that there are too few clusters."""
    if found.low is None or found.high is None:
        return too_few(found.clusters).reason
    return f"{100 * found.low:+.1f} to {100 * found.high:+.1f}"


def p_text(p: float) -> str:
    """Two digits; very small ones as a bound."""
    return "<0.0001" if p < 1e-4 else f"{p:.2g}"


def _rows(result: TaskResult) -> list[list[str]]:
    rows = [
        [
            with_marks(result.task, result.marks),
            metric,
            value_text(result.metrics[metric], result.unit),
            interval_text(result.intervals.get(metric), result.unit),
            str(result.metric_n.get(metric, result.n)),
            "",
        ]
        for metric in result.overall_metrics
        if metric in result.metrics
    ]
    if not rows:
        rows.append([with_marks(result.task, result.marks), "-", "-", "-", str(result.n), ""])
    rows[0][-1] = result.counts_note()
    return rows


def _parts(result: TaskResult) -> tuple[list[str], list[list[str]]] | None:
    """Headers and rows of the "part/metric" scores; the part's score gets its interval."""
    parts: dict[str, dict[str, float]] = {}
    for key, value in result.metrics.items():
        part, slash, metric = key.rpartition("/")
        if slash:
            parts.setdefault(part, {})[metric] = value
    if not parts:
        return None
    metrics = list(dict.fromkeys(metric for scores in parts.values() for metric in scores))
    headers = ["part", *metrics]
    return headers, [
        [with_marks(part, result.marks), *_scores(result, part, metrics, parts[part])]
        for part in parts
    ]


def _scores(
    result: TaskResult, part: str, metrics: Sequence[str], scores: Mapping[str, float]
) -> list[str]:
    """A part's values; its first metric carries the interval in brackets."""
    cells = []
    for metric in metrics:
        unit = result.unit if metric == "score" else "fraction"  # MME's acc, beside its points
        cell = value_text(scores[metric], unit) if metric in scores else "-"
        interval = result.intervals.get(f"{part}/{metric}")
        if interval is not None and metric in (metrics[0], "score"):
            cell += f" [{interval_text(interval, unit)}]"
        cells.append(cell)
    return cells


def is_number(cell: str) -> bool:
    """Whether a cell reads as a number, a percentage or a dash."""
    return cell == "-" or cell.rstrip("%").replace(".", "", 1).isdigit()


def _escape(cell: str) -> str:
    for plain, safe in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("\n", " ")):
        cell = cell.replace(plain, safe)
    return cell
