"""Tables of results: aligned text for the terminal and Markdown for files, from the same rows.

A benchmark gives one row per metric; scores of its parts ("category/metric" keys) follow in a
table of their own, one row per part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from harness.records import TaskResult
from harness.stats import Interval

HEADERS = ("task", "metric", "value", "95 % interval", "n", "note")


def report(results: Sequence[TaskResult], title: str, markdown: bool = False) -> str:
    """All tables of a run under a title line that carries its terms."""
    render = markdown_table if markdown else text_table
    blocks = [title, render(HEADERS, [row for result in results for row in _rows(result)])]
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


def text_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to equal width; numbers to the right."""
    cells = [list(headers), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]
    right = [all(_is_number(row[i]) for row in rows) for i in range(len(headers))]

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


def value_text(value: float, points: bool) -> str:
    """A fraction as per cent with one decimal, points with one decimal."""
    return f"{value:.1f}" if points else f"{100 * value:.1f}%"


def interval_text(interval: Interval | None, points: bool) -> str:
    """ "low to high", or a dash where there is no interval."""
    if interval is None:
        return "-"
    low, high = value_text(interval.low, points), value_text(interval.high, points)
    return f"{low.rstrip('%')} to {high.rstrip('%')}"


def _rows(result: TaskResult) -> list[list[str]]:
    rows = [
        [
            result.task,
            metric,
            value_text(result.metrics[metric], result.points),
            interval_text(result.intervals.get(metric), result.points),
            str(result.n),
            "",
        ]
        for metric in result.headline_metrics
        if metric in result.metrics
    ]
    if not rows:
        rows.append([result.task, "-", "-", "-", str(result.n), ""])
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
    return headers, [[part, *_scores(result, part, metrics, parts[part])] for part in parts]


def _scores(
    result: TaskResult, part: str, metrics: Sequence[str], scores: Mapping[str, float]
) -> list[str]:
    """A part's values; its first metric carries the interval in brackets."""
    cells = []
    for metric in metrics:
        points = result.points and metric == "score"  # MME: acc is a fraction, score is points
        cell = value_text(scores[metric], points) if metric in scores else "-"
        interval = result.intervals.get(f"{part}/{metric}")
        if interval is not None and metric in (metrics[0], "score"):
            cell += f" [{interval_text(interval, points)}]"
        cells.append(cell)
    return cells


def _is_number(cell: str) -> bool:
    return cell == "-" or cell.rstrip("%").replace(".", "", 1).isdigit()


def _escape(cell: str) -> str:
    for plain, safe in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("\n", " ")):
        cell = cell.replace(plain, safe)
    return cell
