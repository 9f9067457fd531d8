"""The tables of the controlled study's page, from its records alone."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import numpy as np

from harness.controlled import contrasts, outcomes
from harness.controlled.contrasts import Compared, Contrast, Model
from harness.controlled.design import SIGNS
from harness.controlled.outcomes import Outcome, begins, part, question_values
from harness.controlled.predictions import PREDICTIONS, Verdict, verdict
from harness.controlled.records import Records
from harness.reporting import paper
from harness.reporting.render import Table, p_text
from harness.scoring.hierarchical import hierarchical
from tasks import NAMES, load

KS = (1, 2, 4, 8, 16)
DISTANCES = ("near", "text64", "text256", "pictures2", "pictures4")
COMPARED_HEADERS = (
    *("comparison", "outcome", "difference", "95 % interval", "p", "p corrected"),
    *("seeds", "pictures", "questions"),
)
COMPARED_NOTE = (
    "Mean score of a question, in points of 100, paired by question and seed; interval and p of "
    "the hierarchical bootstrap over seeds, pictures and questions; corrected: Holm, this table."
)
MEAN_NOTE = "Mean over seeds, in parentheses the lowest and the highest."


def all_tables(kept: Records) -> list[Table]:
    """Every table, in the page's order; those that nothing is known of are left out."""
    made = [
        predictions(kept),
        models(kept),
        rates(kept),
        benchmarks(kept),
        retrieval(kept, "k", KS),
        retrieval(kept, "distance", DISTANCES),
        picture_use(kept),
        *comparisons(kept),
        costs(kept),
    ]
    return [table for table in made if table.rows]


def predictions(kept: Records) -> Table:
    """What was expected, and what became of it."""
    rows = []
    for number, prediction in enumerate(PREDICTIONS, 1):
        found = verdict(kept, prediction)
        rows.append(
            [
                str(number),
                prediction.says,
                prediction.because,
                prediction.rule,
                *_verdict_cells(found, 100.0 if prediction.outcome else 1.0),
            ]
        )
    headers = ("", "prediction", "because", "claim", "difference", "interval", "seeds", "verdict")
    return Table("Predictions", headers, rows, "")


def _verdict_cells(found: Verdict, scale: float) -> list[str]:
    if found.value is None or found.low is None or found.high is None:
        return ["-", "-", "-", found.word]
    ends = f"{scale * found.low:+.1f} to {scale * found.high:+.1f}"
    return [f"{scale * found.value:+.1f}", ends, str(found.seeds), found.word]


def models(kept: Records) -> Table:
    """What is compared: size, work and rate of each language model."""
    rates_ = {r["family"]: r["hyperparameters"]["lr"] for r in kept.cells.values()}
    rows = []
    for family in contrasts.names(kept, 0):
        cells = [r for r in kept.cells.values() if r["family"] == family]
        cost = cells[0]["cost"]
        flops = {int(length): value for length, value in cost["flops_per_token"].items()}
        rows.append(
            [
                family,
                f"{cost['language_model_parameters']}",
                *(f"{flops[length] / 1e6:.2f}" for length in (min(flops), max(flops))),
                f"{rates_[family]:g}",
                str(len(cells)),
            ]
        )
    headers = ("language model", "parameters", "MFLOP a token", "at the longest", "rate", "cells")
    note = "FLOPs of a forward pass without the head, at the shortest and longest length measured."
    for family in contrasts.names(kept, 0):
        starts = {r.get("started_from") for r in kept.cells.values() if r["family"] == family}
        if len(starts) > 1:
            note += (
                f" Cells of {family} started from {len(starts)} text pretrainings that differ in "
                "their bits: it was interrupted, and done again elsewhere."
            )
    return Table("Language models", headers, rows, note)


def rates(kept: Records) -> Table:
    """The loss of held-out samples after short runs with each rate."""
    families = list(dict.fromkeys(record["family"] for record in kept.rates.values()))
    tried = sorted({record["rate"] for record in kept.rates.values()})
    losses = {(r["family"], r["rate"]): r["loss"] for r in kept.rates.values()}
    rows = [[family, *(_loss(losses, family, rate) for rate in tried)] for family in families]
    headers = ("language model", *(f"{rate:g}" for rate in tried))
    note = "Held-out loss a label after a short run; the lowest was taken, before anything else."
    return Table("Learning rates", headers, rows, note)


def _loss(losses: dict, family: str, rate: float) -> str:
    if (family, rate) not in losses:
        return "-"
    loss = losses[family, rate]
    return "diverged" if loss is None else f"{loss:.4f}"


def benchmarks(kept: Records) -> Table:
    """The primary metric of each benchmark, of every model."""
    asked = list(dict.fromkeys(task for r in kept.cells.values() for task in r["tasks"]))
    shown = [*paper.in_order(t for t in asked if t in NAMES and t != SIGNS)]
    rows = []
    for model in contrasts.models(kept, None):
        cells = [kept.cells[name] for name in contrasts.seeds_of(kept, model).values()]
        rows.append([*model_cells(model), str(len(cells)), *(_mean(cells, t) for t in shown)])
    named = [paper.benchmarks().get(task, task) for task in shown]
    headers = ("language model", "connector", "order", "seeds", *named)
    note = f"{MEAN_NOTE} In per cent, MME in points."
    return Table("Benchmarks", headers, rows if shown else [], note)


def model_cells(model: Model) -> list[str]:
    """Family, connector and order as a table shows them."""
    return [model[0], model[1], model[2] or "usual"]


def _mean(cells: Sequence[dict], task: str) -> str:
    entries = [cell["tasks"][task] for cell in cells if task in cell["tasks"]]
    values = [entry["value"] for entry in entries if entry["value"] is not None]
    if not values:
        return "-"
    scale = 1.0 if load(task).unit == "points" else 100.0
    return spread_text([scale * value for value in values])


def spread_text(values: Sequence[float], digits: int = 1) -> str:
    """Mean (lowest to highest), the mean alone of one value."""
    mean = f"{fmean(values):.{digits}f}"
    if len(values) < 2:
        return mean
    return f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def retrieval(kept: Records, column: str, values: Sequence[int | str]) -> Table:
    """Accuracy on signs by k or by distance, with existence, text-only control and chance."""
    rows = []
    if kept.questions and kept.cells:
        for model in contrasts.models(kept, None):
            cells = list(contrasts.seeds_of(kept, model).values())
            rows.append([*model_cells(model), *_parts(kept, cells, column, values, True)])
            named = [*model_cells(model)[:2], f"{model[2] or 'usual'}, existence"]
            rows.append([*named, *_parts(kept, cells, column, values, False)])
        every = list(kept.cells)
        blind = _parts(kept, every, column, values, True, "retrieval_blind")
        rows.append(["all, without pictures", "", "", *blind])
        chances = [100 * outcomes.chance(kept, part(column, value)) for value in values]
        shown = ["-" if chance != chance else f"{chance:.1f}" for chance in chances]
        rows.append(["a random sign in view", "", "", *shown])
    headers = ("language model", "connector", "order", *(f"{column} {value}" for value in values))
    note = "Accuracy in per cent, mean over seeds; in brackets the hierarchical bootstrap's 95 %."
    return Table(f"Retrieval by {column}", headers, rows, note)


def _parts(
    kept: Records,
    cells: Sequence[str],
    column: str,
    values: Sequence[int | str],
    signs: bool,
    source: str = "",
) -> list[str]:
    cells_ = []
    for value in values:
        found = accuracy(kept, cells, part(column, value, signs, source))
        cells_.append(f"{found[0]:.1f} [{found[1]:.1f} to {found[2]:.1f}]" if found else "-")
    return cells_


def accuracy(
    kept: Records, cells: Sequence[str], outcome: Outcome
) -> tuple[float, float, float] | None:
    """Mean and interval in per cent; None where nothing was asked."""
    scores, pictures = question_values(kept, cells, outcome)
    if not scores.size or np.isnan(scores).any(axis=0).all():
        return None
    found = hierarchical(scores, pictures)
    low, high = found.interval()
    return 100 * found.mean, 100 * low, 100 * high


def picture_use(kept: Records) -> Table:
    """The update from which on another picture costs at least the threshold."""
    rows = []
    for model in contrasts.models(kept, None):
        cells = list(contrasts.seeds_of(kept, model).values())
        found = begins(kept, cells)
        low, high = (float(end) for end in np.quantile(found.draws, [0.025, 0.975]))
        never = sum(step == found.steps[-1] for step in found.seeds)
        last = [_last_gain(kept, cell) for cell in cells]
        rows.append(
            [
                *model_cells(model),
                f"{found.mean:.0f}",
                f"{low:.0f} to {high:.0f}",
                ", ".join("never" if s == found.steps[-1] else str(s) for s in found.seeds),
                f"{never}/{len(cells)}",
                spread_text(last, 3),
            ]
        )
    headers = ("language model", "connector", "order", "mean", "95 % interval", "by seed")
    note = (
        f"The first update looked at from which on another sample's picture costs at least "
        f"{outcomes.THRESHOLD} nats a label; a seed that never gets there counts as one look "
        "beyond the last. Gain: what another picture costs at the end, in nats a label."
    )
    return Table(
        "Updates until the picture is used", (*headers, "never", "gain at the end"), rows, note
    )


def _last_gain(kept: Records, cell: str) -> float:
    _, gains = kept.cells[cell]["training"]["finetune"]["picture_gains"][-1]
    return fmean(gain for gain in gains if gain is not None)


def comparisons(kept: Records) -> list[Table]:
    """Families, connectors, their interaction, orders: four tables."""
    families, connectors = contrasts.names(kept, 0), contrasts.names(kept, 1)
    told = outcomes.outcomes(kept) if kept.questions else []
    reference = contrasts.REFERENCE
    others = [family for family in families if family != reference]
    of_families = [contrasts.between_families(kept, f, reference) for f in others]
    if {"hybrid", "attention"} <= set(families):
        of_families.append(contrasts.between_families(kept, "hybrid", "attention"))
    changed = [c for c in connectors if c != "mlp"]
    of_connectors = [contrasts.between_connectors(kept, c, "mlp") for c in changed]
    crossed = [contrasts.interaction((c, "mlp"), (reference, f)) for c in changed for f in others]
    ordered = [contrasts.of_order(*model) for model in contrasts.models(kept, None) if model[2]]
    titles: dict[str, Sequence[Contrast]] = {
        "Language models compared": of_families,
        "Connectors compared": of_connectors,
        "Does a connector help one language model more than another?": crossed,
        "Orders compared": ordered,
    }
    return [
        Table(
            title,
            COMPARED_HEADERS,
            [_compared_row(row) for row in contrasts.compared(kept, asked, told)],
            COMPARED_NOTE,
        )
        for title, asked in titles.items()
    ]


def _compared_row(row: Compared) -> list[str]:
    low, high = row.found.interval()
    return [
        row.contrast.says,
        row.outcome.says,
        f"{100 * row.found.mean:+.1f}",
        f"{100 * low:+.1f} to {100 * high:+.1f}",
        p_text(row.found.p_value),
        p_text(row.corrected),
        str(row.found.seeds),
        str(row.found.pictures),
        str(row.found.questions),
    ]


def costs(kept: Records) -> Table:
    """Training speed and memory, prefill, decode and state, mean over a family's cells."""
    rows = []
    for model in contrasts.models(kept):
        cells = [kept.cells[name] for name in contrasts.seeds_of(kept, model).values()]
        points = [cell["cost"]["points"] for cell in cells]
        shortest, longest = points[0][0]["tokens"], points[0][-1]["tokens"]
        tuned = [cell["training"]["finetune"] for cell in cells]
        rows.append(
            [
                *model_cells(model)[:2],
                f"{fmean(run['tokens_per_s'] for run in tuned):.0f}",
                f"{max(run['peak_mem_bytes'] for run in tuned) / 2**30:.2f}",
                *(_point(points, at, "prefill_s", 1e3) for at in (0, -1)),
                *(_point(points, at, "decode_s", 1e3) for at in (0, -1)),
                *(_point(points, at, "state_bytes", 1 / 1024) for at in (0, -1)),
                f"{fmean(cell['questions_per_s'] for cell in cells):.1f}",
            ]
        )
    at = (f"at {shortest}", f"at {longest}") if rows else ("", "")
    headers = ["language model", "connector", "training tokens/s", "peak GiB"]
    for name in ("prefill ms", "decode step ms", "state KiB"):
        headers += [f"{name} {length}" for length in at]
    note = (
        "Mean over seeds; training speed of stage 2, as the trainer logged it beside what else the "
        "machine did; prefill and decode of the language model alone, batch 1; questions/s: the "
        "retrieval run, encoder included."
    )
    return Table("Cost", (*headers, "questions/s"), rows, note)


def _point(points: Sequence[list[dict]], at: int, name: str, scale: float) -> str:
    value = scale * fmean(point[at][name] for point in points)
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
