"""One self-contained HTML page about some runs: scores, the paper's tables, plots, every answer.

The page loads nothing: styles, script, plots and small pictures are inside. Everything that came
from a model or from data is shown as text.
"""

from __future__ import annotations

import base64
import hashlib
import html
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from harness.reporting import compare, paper, plots, publish, render
from harness.reporting.browser import Browser
from harness.runs.store import EvaluationRun, Found, distinct_names, read_record
from harness.speed.sweep.summary import Profile
from harness.speed.sweep.tables import tables as profile_tables
from vlmamba_core.errors import UserError

REASONS = {paper.NOT_RECORDED, paper.NOT_REPORTED, "not run"}
TERMS = {  # label -> where a record has it
    "label": ("label",),
    "model": ("arguments", "model"),
    "weights, sha256": ("model", "sha256"),
    "parameters": ("model", "parameters"),
    "data": ("arguments", "data"),
    "style": ("arguments", "style"),
    "protocol": ("protocol",),
    "questions limited to": ("arguments", "limit"),
    "blind": ("arguments", "blind"),
    "commit": ("terms", "commit"),
    "device": ("terms", "device"),
    "device name": ("terms", "device_name"),
    "dtype": ("terms", "dtype"),
    "batch size": ("terms", "batch_size"),
    "scan backend": ("terms", "backend"),
    "threads": ("terms", "threads"),
    "processes": ("terms", "processes"),
    "seeds": ("terms", "seeds"),
    "python": ("terms", "python"),
    "platform": ("terms", "platform"),
    "packages": ("terms", "packages"),
    "finished": ("finished",),
}


@dataclass
class Inputs:
    """The runs to show, by kind."""

    evaluations: list[EvaluationRun] = field(default_factory=list)
    profiles: list[Found] = field(default_factory=list)
    ablations: list[Found] = field(default_factory=list)

    @classmethod
    def read(cls, folders: Sequence[Path]) -> Inputs:
        """Raises UserError for a folder that holds no run."""
        found = cls()
        for folder, name in zip(folders, distinct_names(folders), strict=True):
            record = read_record(folder)
            if record["kind"] == "evaluation":
                found.evaluations.append(EvaluationRun(name, folder, record))
            else:
                kind = found.profiles if record["kind"] == "profile" else found.ablations
                kind.append(Found(name, folder, record))
        return found

    def records(self) -> list[tuple[str, Mapping[str, Any]]]:
        """(name, record) of all."""
        found = [(run.marked, run.record) for run in self.evaluations]
        return found + [(run.name, run.record) for run in (*self.profiles, *self.ablations)]


def page(
    inputs: Inputs, browser: Browser, title: str = "VL-Mamba report", file: Path = paper.FILE
) -> str:
    """The whole page as text."""
    folder = files("harness.reporting") / "page_files"
    script = (folder / "page.js").read_text(encoding="utf-8")
    template = string.Template((folder / "page.html").read_text(encoding="utf-8"))
    sections = {
        "Scores": _scores(inputs),
        "Runs compared": _comparisons(inputs.evaluations),
        "Beside the paper": _paper(inputs.evaluations, file),
        "Ablations": _ablations(inputs.ablations),
        "Speed and memory": _profiles(inputs.profiles),
        "Terms": _terms(inputs),
    }
    present = {name: content for name, content in sections.items() if content}
    labels = dict.fromkeys(str(r["label"]) for _, r in inputs.records() if r.get("label"))
    return template.substitute(
        title=html.escape(title),
        policy=_policy(f"\n{script}\n"),
        css=(folder / "page.css").read_text(encoding="utf-8"),
        labels=" ".join(f'<p class="label">{html.escape(label)}</p>' for label in labels),
        links="".join(f'<a href="#{_id(name)}">{name}</a>' for name in [*present, "Answers"]),
        sections="\n".join(
            f'<h2 id="{_id(name)}">{name}</h2>\n{content}' for name, content in present.items()
        ),
        notes="".join(f'<p class="soft">{html.escape(note)}</p>' for note in browser.notes),
        data=browser.to_json(),
        script=script,
    )


def _policy(script: str) -> str:
    """What the page may do: this one script, inline styles, inlined pictures; no requests."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = f"script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:"
    return f"default-src 'none'; {allowed}"


def _id(name: str) -> str:
    return "browser" if name == "Answers" else name.lower().replace(" ", "-")


def html_table(
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    measured: Sequence[bool] = (),
    kind: str = "",
) -> str:
    """An escaped table, numbers to the right; `measured` rows stand out."""
    right = [bool(rows) and all(_numeric(row[i]) for row in rows) for i in range(len(headers))]
    kinds = [' class="number"' if to_right else "" for to_right in right]
    head = "".join(f"<th{k}>{html.escape(h)}</th>" for k, h in zip(kinds, headers, strict=True))
    lines = []
    for place, row in enumerate(rows):
        mark = ' class="measured"' if place < len(measured) and measured[place] else ""
        cells = "".join(f"<td{k}>{_cell(c)}</td>" for k, c in zip(kinds, row, strict=True))
        lines.append(f"<tr{mark}>{cells}</tr>")
    body = "\n".join(lines)
    return f'<div class="scroll"><table class="{kind}"><tr>{head}</tr>\n{body}</table></div>'


def _numeric(cell: str) -> bool:
    return cell in REASONS or cell.startswith("no score") or render.is_number(cell)


def _cell(text: str) -> str:
    """Escaped; a reason for an empty cell in small print."""
    safe = html.escape(text)
    return f'<span class="why">{safe}</span>' if text in REASONS else safe


def _scores(inputs: Inputs) -> str:
    """Every metric of every run with its interval."""
    rows = []
    for run in inputs.evaluations:
        rows += [[run.name, *row] for row in render.result_rows(run.results())]
    return html_table(["run", *render.HEADERS], rows) if rows else ""


def _comparisons(runs: Sequence[EvaluationRun]) -> str:
    """The first run against each other one."""
    blocks = []
    for other in runs[1:]:
        heading = f"<h3>A: {html.escape(runs[0].title)}<br>B: {html.escape(other.title)}</h3>"
        try:
            table = html_table(compare.HEADERS, compare.rows(compare.compare(runs[0], other)))
        except UserError as error:
            table = f'<p class="why">not comparable: {html.escape(str(error))}</p>'
        blocks.append(heading + table)
    if not blocks:
        return ""
    note = (
        "Mean score of a question in per cent and the paired difference; the interval is robust to "
        "questions sharing an image, p is of the sign-flip test over images, for one look."
    )
    return f'<p class="soft">{note}</p>' + "\n".join(blocks)


def _paper(runs: Sequence[EvaluationRun], file: Path) -> str:
    """The paper's tables, measured runs below the first; an empty cell says why it is empty."""
    blocks = []
    for name, title in paper.TITLES.items():
        below = runs if name == "main" else ()
        headers, rows = paper.table(name, below, file)
        measured = [False] * (len(rows) - len(below)) + [True] * len(below)
        note = f'<p class="soft">{html.escape(paper.NOTES[name])}</p>'
        shown = html_table(headers, rows, measured, "paper")
        blocks.append(f"<h3>{html.escape(title)}</h3>{note}{shown}")
    note = (
        "Shaded rows are measured here, under the terms below; the others are quoted. In per cent, "
        "MME in points. “Not reported”: the paper has no number."
    )
    return f'<p class="soft">{note}</p>' + "\n".join(blocks)


def _ablations(found: Sequence[Found]) -> str:
    blocks = []
    for one in found:
        for table in publish.ablation_tables(one).values():
            heading = f"<h3>{html.escape(table.title)}</h3>"
            note = f'<p class="soft">{html.escape(table.note)}</p>'
            blocks.append(heading + note + html_table(table.headers, table.rows))
    return "\n".join(blocks)


def _profiles(found: Sequence[Found]) -> str:
    """Plots as pictures, tables below."""
    blocks = []
    for one in found:
        profile = Profile.from_record(one.name, one.record)
        images = [
            f'<img alt="{name} against sequence length" src="data:image/svg+xml;base64,'
            f'{base64.b64encode(plots.plot(profile, name, "svg")).decode()}">'
            for name in plots.PLOTS
        ]
        blocks.append(f'<h3>{html.escape(one.name)}</h3><div class="plots">{"".join(images)}</div>')
        for title, headers, rows in profile_tables(profile):
            blocks.append(f"<h3>{html.escape(title)}</h3>{html_table(headers, rows)}")
    return "\n".join(blocks)


def _terms(inputs: Inputs) -> str:
    """Under which terms each run was made: one column a run."""
    named = inputs.records()
    rows = []
    for label, path in TERMS.items():
        values = [_term(record, path) for _, record in named]
        if any(values):
            rows.append([label, *(value or "-" for value in values)])
    table = html_table(["", *(name for name, _ in named)], rows)
    return table.replace("<td>", '<td class="long">')


def _term(record: Mapping[str, Any], path: Sequence[str]) -> str:
    value: Any = record
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {one}" for key, one in value.items())
    return "" if value is None or value is False else str(value)
