"""One self-contained HTML page about some runs: scores, the paper's tables, plots, every answer.

The page asks no server for anything: styles, script, plots and pictures are inside; only large
pictures that are too many lie in a folder beside it (harness.reporting.pictures). Everything that
came from a model or from data is shown as text: the template (page_files/page.html) escapes
whatever it is given.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from harness.reporting import compare, costs, paper, plots, publish, render, scores
from harness.reporting.browser import Browser
from harness.reporting.scores import Scores
from harness.runs.schema import Sample
from harness.runs.store import EvaluationRun, Found, distinct_names, read_record, with_those_below
from harness.speed.sweep.summary import Profile
from harness.speed.sweep.tables import tables as profile_tables
from vlmamba_core.errors import UserError

REASONS = {paper.NOT_RECORDED, paper.NOT_REPORTED, "not run"}
SETTINGS = {  # label -> where a record has it
    "label": ("label",),
    "model": ("arguments", "model"),
    "weights, sha256": ("model", "sha256"),
    "parameters": ("model", "parameters"),
    "template": ("model", "template", "name"),
    "data": ("arguments", "data"),
    "style": ("arguments", "style"),
    "protocol": ("protocol",),
    "questions limited to": ("arguments", "limit"),
    "blind": ("arguments", "blind"),
    "commit": ("settings", "commit"),
    "device": ("settings", "device"),
    "device name": ("settings", "device_name"),
    "dtype": ("settings", "dtype"),
    "batch size": ("settings", "batch_size"),
    "scan backend": ("settings", "backend"),
    "threads": ("settings", "threads"),
    "processes": ("settings", "processes"),
    "seeds": ("settings", "seeds"),
    "python": ("settings", "python"),
    "platform": ("settings", "platform"),
    "packages": ("settings", "packages"),
    "finished": ("finished",),
}


@dataclass(frozen=True)
class ReadOnce(EvaluationRun):
    """A run whose answers are read once, however many parts of the page need them."""

    known: dict[str, list[Sample]] = field(default_factory=dict)

    def samples(self, task: str) -> list[Sample]:
        """See EvaluationRun."""
        if task not in self.known:
            self.known[task] = super().samples(task)
        return self.known[task]


@dataclass
class Inputs:
    """The runs to show, by kind."""

    evaluations: list[EvaluationRun] = field(default_factory=list)
    profiles: list[Found] = field(default_factory=list)
    ablations: list[Found] = field(default_factory=list)

    @classmethod
    def read(cls, folders: Sequence[Path]) -> Inputs:
        """A folder of runs stands for these. Raises UserError for one that holds none."""
        found, folders = cls(), with_those_below(folders)
        for folder, name in zip(folders, distinct_names(folders), strict=True):
            record = read_record(folder)
            if record["kind"] == "evaluation":
                found.evaluations.append(ReadOnce(name, folder, record))
            else:
                kind = found.profiles if record["kind"] == "profile" else found.ablations
                kind.append(Found(name, folder, record))
        return found

    def records(self) -> list[tuple[str, Mapping[str, Any]]]:
        """(name, record) of all."""
        found = [(run.marked, run.record) for run in self.evaluations]
        return found + [(run.name, run.record) for run in (*self.profiles, *self.ablations)]


@dataclass(frozen=True)
class Cells:
    """A table of the page: numbers to the right, `measured` rows stand out, `long` cells may break.

    kind: its class in the style sheet.
    """

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    measured: range = range(0)
    kind: str = ""
    long: bool = False

    def right(self) -> list[bool]:
        """Which columns hold numbers, or why there is none."""
        columns = range(len(self.headers))
        return [bool(self.rows) and all(_numeric(row[i]) for row in self.rows) for i in columns]


@dataclass(frozen=True)
class Block:
    """A part of a section: what of heading, note, plots and table there is, in this order.

    heading: its lines. trouble: in place of a table, why there is none. plots: what a picture shows
    -> its data address. caption: what the table is, for those who hear the page. scores: in place
    of a table, the one with runs across.
    """

    heading: Sequence[str] = ()
    note: str = ""
    trouble: str = ""
    plots: Mapping[str, str] = field(default_factory=dict)
    table: Cells | None = None
    caption: str = ""
    scores: Scores | None = None


def page(
    inputs: Inputs,
    browser: Browser,
    title: str = "VL-Mamba report",
    file: Path = paper.FILE,
    paper_tables: bool = False,
) -> str:
    """The whole page as text; jinja2 escapes all but the page's own files and the answers' JSON.

    paper_tables: all of the paper's tables; otherwise its rows stand beside comparable runs alone.
    """
    from markupsafe import Markup

    folder = files("harness.reporting") / "page_files"
    script = (folder / "page.js").read_text(encoding="utf-8")
    sections = {
        "Scores": _scores(inputs.evaluations),
        "Models and cost": _costs(inputs.evaluations),
        "Runs compared": _comparisons(inputs.evaluations),
        "Beside the paper": _paper(inputs.evaluations, file, paper_tables),
        "Ablations": _ablations(inputs.ablations),
        "Speed and memory": _profiles(inputs.profiles),
        "Settings": _settings(inputs),
    }
    present = {name: blocks for name, blocks in sections.items() if blocks}
    return (
        _environment()
        .get_template("page.html")
        .render(
            title=title,
            policy=_policy(f"\n{script}\n", browser.folder is not None),
            css=Markup((folder / "page.css").read_text(encoding="utf-8")),
            colors=plots.COLORS,
            look=scores.look,
            labels=dict.fromkeys(str(r["label"]) for _, r in inputs.records() if r.get("label")),
            links={name: _id(name) for name in [*present, *["Answers"] * bool(browser.tasks)]},
            sections=present,
            reasons=REASONS,
            runs=inputs.evaluations,
            answers=browser.tasks,
            notes=browser.notes,
            data=Markup(browser.to_json()),
            script=Markup(script),
        )
    )


def _environment() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("harness.reporting", "page_files"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _policy(script: str, with_files: bool) -> str:
    """What the page may do: this one script, inline styles, inlined pictures; no requests.

    with_files: pictures beside the page too.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    images = "data: 'self' file:" if with_files else "data:"
    allowed = f"script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src {images}"
    return f"default-src 'none'; base-uri 'none'; form-action 'none'; {allowed}"


def _id(name: str) -> str:
    return "browser" if name == "Answers" else name.lower().replace(" ", "-")


def _numeric(cell: str) -> bool:
    return cell in REASONS or cell.startswith("no score") or render.is_number(cell)


def _scores(runs: Sequence[EvaluationRun]) -> list[Block]:
    """Every metric of every run with its interval: runs across, metrics down."""
    return [Block(scores=Scores.of(runs))] if runs else []


def _costs(runs: Sequence[EvaluationRun]) -> list[Block]:
    """What each run's model is, how it was asked, and what a question costs."""
    if not runs:
        return []
    table = costs.table(runs)
    return [Block([table.title], table.note, table=Cells(table.headers, table.rows))]


def _comparisons(runs: Sequence[EvaluationRun]) -> list[Block]:
    """The first run against each other one."""
    note = (
        "Mean score of a question in per cent and the paired difference; the interval is robust to "
        "questions sharing an image, p is of the sign-flip test over images, for one look."
    )
    blocks = [Block(note=note)] if len(runs) > 1 else []
    for other in runs[1:]:
        heading = [f"A: {runs[0].title}", f"B: {other.title}"]
        try:
            table = Cells(compare.HEADERS, compare.rows(compare.compare(runs[0], other)))
            blocks.append(Block(heading, table=table, caption=" against ".join(heading)))
        except UserError as error:
            blocks.append(Block(heading, trouble=f"not comparable: {error}"))
    return blocks


def _paper(runs: Sequence[EvaluationRun], file: Path, asked: bool) -> list[Block]:
    """The paper's tables, measured runs below the first; an empty cell says why it is empty.

    Not asked for, only the first, and of it the columns that comparable runs fill: a run with a
    label ("demo: not comparable with published numbers") is not.
    """
    below = runs if asked else [run for run in runs if not run.record.get("label")]
    note = (
        "Shaded rows are measured here, with the settings below; the others are quoted. In per "
        "cent, MME in points. “Not reported”: the paper has no number."
    )
    blocks = []
    for name, title in paper.TITLES.items() if asked else [("main", paper.TITLES["main"])]:
        added = below if name == "main" else ()
        headers, rows = paper.table(name, added, file)
        if not asked:
            headers, rows = _filled(headers, rows, len(added))
        measured = range(len(rows) - len(added), len(rows))
        if asked or rows:
            table = Cells(headers, rows, measured, "paper")
            blocks.append(Block([title], paper.NOTES[name], table=table, caption=title))
    return [Block(note=note), *blocks] if blocks else []


def _filled(
    headers: Sequence[str], rows: Sequence[Sequence[str]], measured: int
) -> tuple[list[str], list[list[str]]]:
    """The columns in which a measured run has a number, and the rows with a number in one."""
    first, last = len(paper.SETUP), len(headers) - 1  # benchmarks stand between setup and source
    below = rows[len(rows) - measured :] if measured else []
    numbers = [i for i in range(first, last) if any(render.is_number(row[i]) for row in below)]
    kept = [*range(first), *numbers, last]
    shown = [
        row
        for place, row in enumerate(rows)
        if numbers
        and (place >= len(rows) - measured or any(render.is_number(row[i]) for i in numbers))
    ]
    return [headers[i] for i in kept], [[row[i] for i in kept] for row in shown]


def _ablations(found: Sequence[Found]) -> list[Block]:
    return [
        Block(
            [table.title], table.note, table=Cells(table.headers, table.rows), caption=table.title
        )
        for one in found
        for table in publish.ablation_tables(one).values()
    ]


def _profiles(found: Sequence[Found]) -> list[Block]:
    """Plots as pictures, tables below."""
    blocks = []
    for one in found:
        profile = Profile.from_record(one.name, one.record)
        images = {
            f"{name} against sequence length": "data:image/svg+xml;base64,"
            + base64.b64encode(plots.plot(profile, name, "svg")).decode()
            for name in (plots.PLOTS if profile.rows else ())
        }
        blocks.append(Block([one.name], plots=images))
        for title, headers, rows in profile_tables(profile):
            caption = f"{one.name}: {title}"
            blocks.append(Block([title], table=Cells(headers, rows), caption=caption))
    return blocks


def _settings(inputs: Inputs) -> list[Block]:
    """Under which settings each run was made: one column a run."""
    named = inputs.records()
    rows = []
    for label, path in SETTINGS.items():
        values = [_term(record, path) for _, record in named]
        if any(values):
            rows.append([label, *(value or "-" for value in values)])
    table = Cells(["setting", *(name for name, _ in named)], rows, long=True)
    return [Block(table=table, caption="Settings of every run")]


def _term(record: Mapping[str, Any], path: Sequence[str]) -> str:
    value: Any = record
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {one}" for key, one in value.items())
    return "" if value is None or value is False else str(value)
