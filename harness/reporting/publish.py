"""Every table that a folder of runs gives: what `python -m harness.tables` writes.

Evaluations: their own table, one of what each costs, and the paper's tables with all of them below.
Profiles: points, growth, crossovers. Ablations: the tables that the study itself printed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from harness.reporting import costs, paper, render
from harness.reporting.ablation_tables import tables_of
from harness.reporting.render import Table
from harness.runs.store import EvaluationRun, Found
from harness.speed.sweep.summary import Profile
from harness.speed.sweep.tables import tables as profile_tables

COST = "models_and_cost"


def all_tables(found: Sequence[Found], paper_file: Path = paper.FILE) -> dict[str, Table]:
    """File name without suffix -> table."""
    evaluations = [EvaluationRun(f.name, f.path, f.record) for f in found if f.kind == "evaluation"]
    made = paper_tables(evaluations, paper_file)
    if evaluations:
        made[COST] = costs.table(evaluations)
    for run in evaluations:
        made[run.name] = evaluation_table(run)
    for one in found:
        if one.kind == "profile":
            made |= _profile(one)
        elif one.kind == "ablation":
            made |= ablation_tables(one)
    return made


def paper_tables(evaluations: Sequence[EvaluationRun], path: Path = paper.FILE) -> dict[str, Table]:
    """The paper's tables; Table 1 has the measured runs below."""
    made = {}
    for name, title in paper.TITLES.items():
        headers, rows = paper.table(name, evaluations if name == "main" else (), path)
        made[f"paper_{name}"] = Table(title, headers, rows, paper.NOTES[name])
    return made


def evaluation_table(run: EvaluationRun) -> Table:
    """The scores of one run with intervals."""
    label = str(run.record.get("label") or "")
    return Table(run.title, render.HEADERS, render.result_rows(run.results()), label)


def ablation_tables(one: Found) -> dict[str, Table]:
    """The study's tables as its record holds them."""
    scores, paired = tables_of(one.record)
    return {one.name: scores, f"{one.name}.paired": paired}


def _profile(one: Found) -> dict[str, Table]:
    profile = Profile.from_record(one.name, one.record)
    label = str(one.record.get("label") or "")
    return {
        f"{one.name}.{title.split()[0]}": Table(f"{one.name}: {title}", headers, rows, label)
        for title, headers, rows in profile_tables(profile)
    }
