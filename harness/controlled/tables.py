"""The tables of the controlled study's page, from its records alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

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
        lessons(kept),
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
                *_verdict_cells(kept, found, 100.0 if prediction.outcome else 1.0),
                found.word,
            ]
        )
    headers = ("", "prediction", "because", "claim", "difference", "interval")
    return Table("Predictions", (*headers, *_start_header(kept), "seeds", "verdict"), rows, "")


def _verdict_cells(kept: Records, found: Verdict, scale: float) -> list[str]:
    if found.value is None or found.low is None or found.high is None:
        return ["-", "-", *("-" for _ in _start_header(kept)), "-"]
    ends = f"{scale * found.low:+.1f} to {scale * found.high:+.1f}"
    return [f"{scale * found.value:+.1f}", ends, *_start_cell(kept, found.start), str(found.seeds)]


def _start_header(kept: Records) -> list[str]:
    """A column for which text pretraining it is, where there are several."""
    return ["start"] if len(contrasts.starts(kept)) > 1 else []


def _start_cell(kept: Records, start: int) -> list[str]:
    return [str(start)] if _start_header(kept) else []


def models(kept: Records) -> Table:
    """What is compared: size, work and rate of each language model."""
    rows, note = [], ""
    for family, start in _started(kept):
        cells = [r for r in kept.cells.values() if (r["family"], r["start"]) == (family, start)]
        cost = cells[0]["cost"]
        flops = {int(length): value for length, value in cost["flops_per_token"].items()}
        rows.append(
            [
                family,
                *_start_cell(kept, start),
                f"{cost['language_model_parameters']}",
                *(f"{flops[length] / 1e6:.2f}" for length in (min(flops), max(flops))),
                f"{cells[0]['hyperparameters']['lr']:g}",
                str(len(cells)),
            ]
        )
        starts = {cell.get("started_from") for cell in cells}
        if len(starts) > 1:
            note += (
                f" Cells of {family} started from {len(starts)} text pretrainings that differ in "
                "their bits: it was interrupted, and done again elsewhere."
            )
    headers = ("parameters", "MFLOP a token", "at the longest", "rate", "cells")
    said = "FLOPs of a forward pass without the head, at the shortest and longest length measured."
    return Table(
        "Language models", ("language model", *_start_header(kept), *headers), rows, said + note
    )


def _started(kept: Records) -> list[tuple[str, int]]:
    """Family and text pretraining of the finished cells, families in the design's order."""
    return list(dict.fromkeys((model[0], model[3]) for model in contrasts.models(kept)))


def lessons(kept: Records) -> Table:
    """Where each lesson of a text pretraining ended, of those that cells started from."""
    ended = {
        (r["family"], r["start"]): {name: run["loss"][-1][1] for name, run in r["stages"].items()}
        for r in kept.texts.values()
    }
    told = [key for key in _started(kept) if key in ended]
    shown = list(dict.fromkeys(name for key in told for name in ended[key]))
    rows = [
        [key[0], *_start_cell(kept, key[1]), *(_loss(ended[key], name) for name in shown)]
        for key in told
    ]
    note = "Loss of the text lessons, in nats a label, over the last fortieth of each."
    return Table("Text pretraining", ("language model", *_start_header(kept), *shown), rows, note)


def rates(kept: Records) -> Table:
    """The loss of held-out samples after short runs with each rate."""
    records = kept.rates.values()
    tried = sorted({record["rate"] for record in records})
    losses: dict[tuple[str, int], dict[float, float | None]] = {}
    for r in records:
        losses.setdefault((r["family"], r["start"]), {})[r["rate"]] = r["loss"]
    rows = []
    for (family, start), own in losses.items():
        named = family if start == 1 else f"{family}, start {start}"
        rows.append([named, *(_loss(own, rate) for rate in tried)])
    headers = ("language model", *(f"{rate:g}" for rate in tried))
    note = "Held-out loss a label after a short run; the lowest was taken, before anything else."
    return Table("Learning rates", headers, rows, note)


def _loss(losses: Mapping[Any, float | None], key: Any) -> str:
    if key not in losses:
        return "-"
    loss = losses[key]
    return "diverged" if loss is None else f"{loss:.4f}"


def benchmarks(kept: Records) -> Table:
    """The primary metric of each benchmark, of every model."""
    asked = list(dict.fromkeys(task for r in kept.cells.values() for task in r["tasks"]))
    shown = [*paper.in_order(t for t in asked if t in NAMES and t != SIGNS)]
    rows = []
    for model in contrasts.models(kept, None):
        cells = [kept.cells[name] for name in contrasts.seeds_of(kept, model).values()]
        told = (_mean(cells, task) for task in shown)
        rows.append([*_model_cells(kept, model), str(len(cells)), *told])
    named = [paper.benchmarks().get(task, task) for task in shown]
    headers = (*_model_headers(kept), "seeds", *named)
    note = f"{MEAN_NOTE} In per cent, MME in points."
    return Table("Benchmarks", headers, rows if shown else [], note)


def _model_headers(kept: Records) -> list[str]:
    return ["language model", "connector", "order", *_start_header(kept)]


def _model_cells(kept: Records, model: Model, more: str = "") -> list[str]:
    """Family, connector, order and start as a table shows them; more: of its order."""
    family, connector, order, start = model
    return [family, connector, (order or "usual") + more, *_start_cell(kept, start)]


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
            for more, signs in (("", True), (", existence", False)):
                told = _parts(kept, cells, column, values, signs)
                rows.append([*_model_cells(kept, model, more), *told])
        every, empty = list(kept.cells), ["" for _ in _model_headers(kept)[1:]]
        blind = _parts(kept, every, column, values, True, "retrieval_blind")
        rows.append(["all, without pictures", *empty, *blind])
        chances = [100 * outcomes.chance(kept, part(column, value)) for value in values]
        shown = ["-" if chance != chance else f"{chance:.1f}" for chance in chances]
        rows.append(["a random sign in view", *empty, *shown])
    headers = (*_model_headers(kept), *(f"{column} {value}" for value in values))
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
                *_model_cells(kept, model),
                f"{found.mean:.0f}",
                f"{low:.0f} to {high:.0f}",
                ", ".join("never" if s == found.steps[-1] else str(s) for s in found.seeds),
                f"{never}/{len(cells)}",
                spread_text(last, 3),
            ]
        )
    headers = (*_model_headers(kept), "mean", "95 % interval", "by seed")
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
    """Families, connectors, their interaction, orders, text pretrainings: five tables."""
    told = outcomes.outcomes(kept) if kept.questions else []
    asked: dict[str, list[Contrast]] = {}
    for start in contrasts.starts(kept):
        for title, of_start in _within(kept, start).items():
            asked.setdefault(title, []).extend(of_start)
    asked["Text pretrainings compared"] = _between_starts(kept)
    return [
        Table(
            title,
            _compared_headers(kept),
            [_compared_row(kept, row) for row in contrasts.compared(kept, each, told)],
            COMPARED_NOTE,
        )
        for title, each in asked.items()
    ]


def _within(kept: Records, start: int) -> dict[str, list[Contrast]]:
    """By the title of their table, those of cells from one text pretraining."""
    families, connectors = contrasts.names(kept, 0, start), contrasts.names(kept, 1, start)
    reference = contrasts.REFERENCE
    others = [family for family in families if family != reference]
    of_families = [contrasts.between_families(kept, f, reference, start) for f in others]
    if {"hybrid", "attention"} <= set(families):
        of_families.append(contrasts.between_families(kept, "hybrid", "attention", start))
    changed = [c for c in connectors if c != "mlp"]
    pairs = [(reference, f) for f in others]
    return {
        "Language models compared": of_families,
        "Connectors compared": [
            contrasts.between_connectors(kept, c, "mlp", start) for c in changed
        ],
        "Does a connector help one language model more than another?": [
            contrasts.interaction((c, "mlp"), pair, start) for c in changed for pair in pairs
        ],
        "Orders compared": [
            contrasts.of_order(*model) for model in contrasts.models(kept, None, start) if model[2]
        ],
    }


def _between_starts(kept: Records) -> list[Contrast]:
    """The same cells from each text pretraining but the first, and from the one before it."""
    return [
        contrasts.between_starts(family, connector, start, start - 1)
        for family, connector, _, start in contrasts.models(kept)
        if start > 1
    ]


def _compared_headers(kept: Records) -> list[str]:
    comparison, *others = COMPARED_HEADERS
    return [comparison, *_start_header(kept), *others]


def _compared_row(kept: Records, row: Compared) -> list[str]:
    low, high = row.found.interval()
    starts = sorted({model[3] for _, model in row.contrast.terms}, reverse=True)
    return [
        row.contrast.says,
        *([" - ".join(map(str, starts))] if _start_header(kept) else []),
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
                *model[:2],
                *_start_cell(kept, model[3]),
                f"{fmean(run['tokens_per_s'] for run in tuned):.0f}",
                f"{max(run['peak_mem_bytes'] for run in tuned) / 2**30:.2f}",
                *(_point(points, at, "prefill_s", 1e3) for at in (0, -1)),
                *(_point(points, at, "decode_s", 1e3) for at in (0, -1)),
                *(_point(points, at, "state_bytes", 1 / 1024) for at in (0, -1)),
                f"{fmean(cell['questions_per_s'] for cell in cells):.1f}",
            ]
        )
    at = (f"at {shortest}", f"at {longest}") if rows else ("", "")
    headers = ["language model", "connector", *_start_header(kept), "training tokens/s", "peak GiB"]
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
