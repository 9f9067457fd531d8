"""The pictures of the controlled study's page: curves, and accuracy against cost."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np

from harness.controlled import contrasts, outcomes
from harness.controlled.design import SIGNS
from harness.controlled.outcomes import RETRIEVAL, part
from harness.controlled.records import Records
from harness.controlled.tables import DISTANCES, KS, accuracy
from harness.reporting.plots import COLORS, MARKERS, add_legend, figure_of, save

FORMAT = "svg"


def all_pictures(kept: Records) -> dict[str, bytes]:
    """File name -> content; none before a cell is finished."""
    if not kept.cells:
        return {}
    made = {
        SIGNS: _retrieval,
        "picture_use": _picture_use,
        "loss": _loss,
        "pareto": _pareto,
    }
    return {f"{name}.{FORMAT}": draw(kept) for name, draw in made.items()}


def _families(kept: Records, start: int | None = None) -> list[tuple[int, str, list[str]]]:
    """(place, family, its cells of the usual order); start: None for all text pretrainings."""
    usual = {n: r for n, r in kept.cells.items() if not r["order"] and start in (None, r["start"])}
    return [
        (place, family, [name for name, record in usual.items() if record["family"] == family])
        for place, family in enumerate(contrasts.names(kept, 0))
    ]


def _style(place: int) -> dict[str, Any]:
    return {"color": COLORS[place % len(COLORS)], "marker": MARKERS[place % len(MARKERS)]}


def _retrieval(kept: Records) -> bytes:
    """Accuracy against k and against distance, all connectors and seeds of a family together.

    From the first text pretraining: another one's cells may be of some families alone.
    """
    with figure_of("paper", 2) as figure:
        axes = figure.subplots(1, 2, sharey=True)
        asked: tuple[tuple[str, Sequence[int | str]], ...] = (("k", KS), ("distance", DISTANCES))
        for axis, (column, values) in zip(axes, asked, strict=True):
            places = np.arange(len(values))
            for number, family, cells in _families(kept, contrasts.starts(kept)[0]):
                for signs, line in ((True, "-"), (False, ":")):
                    told = [accuracy(kept, cells, part(column, v, signs)) for v in values]
                    here = [at for at, found in enumerate(told) if found]
                    found = np.array([told[at] for at in here], dtype=float).reshape(-1, 3)
                    bars = np.abs(found[:, 1:].T - found[:, 0])
                    said = family if signs else f"{family}, existence"
                    shift = 0.06 * (number - 1.5)
                    axis.errorbar(
                        places[here] + shift, found[:, 0], bars, ls=line, label=said, ms=4,
                        lw=1.2, capsize=2, alpha=1.0 if signs else 0.6, **_style(number),
                    )  # fmt: skip
            chances = [100 * outcomes.chance(kept, part(column, value)) for value in values]
            axis.plot(places, chances, color="black", ls="--", lw=1, label="a random sign in view")
            axis.set_xticks(places, [str(value) for value in values])
            axis.set(xlabel=column, ylim=(0, 103))
        axes[0].set_ylabel("accuracy, %")
        add_legend(figure, axes)
        return save(figure, FORMAT)


def _curves(kept: Records, label: str, values: Any, level: float | None = None) -> bytes:
    """A panel a connector, a line a cell; values: record -> (n, 2) points."""
    connectors = contrasts.names(kept, 1)
    with figure_of("paper", len(connectors), shares=(0.8, 0.9)) as figure:
        axes = figure.subplots(1, len(connectors), squeeze=False, sharey=True)[0]
        for axis, connector in zip(axes, connectors, strict=True):
            for number, family, cells in _families(kept):
                for cell in cells:
                    if kept.cells[cell]["connector"] == connector:
                        points = np.array(values(kept.cells[cell]), dtype=float).reshape(-1, 2)
                        color = COLORS[number % len(COLORS)]
                        axis.plot(*points.T, color=color, lw=1.1, label=family)
            if level is not None:
                axis.axhline(level, color="black", ls="--", lw=0.8)
            axis.set(xlabel="update", title=connector)
        axes[0].set_ylabel(label)
        add_legend(figure, axes)
        return save(figure, FORMAT)


def _picture_use(kept: Records) -> bytes:
    def gains(record: dict) -> list[tuple[int, float]]:
        logged = record["training"]["finetune"]["picture_gains"]
        return [(step, fmean(g for g in row if g is not None)) for step, row in logged]

    return _curves(kept, "cost of another picture, nats a label", gains, outcomes.THRESHOLD)


def _loss(kept: Records) -> bytes:
    return _curves(
        kept, "held-out loss, nats a label", lambda r: r["training"]["finetune"]["held_out"]
    )


def _pareto(kept: Records) -> bytes:
    """Accuracy on signs against questions a second, and against bytes that a sequence holds."""
    with figure_of("paper", 2) as figure:
        axes = figure.subplots(1, 2, sharey=True)
        families, connectors = (contrasts.names(kept, place) for place in (0, 1))
        for model in contrasts.models(kept):
            family, connector, _, start = model
            own = list(contrasts.seeds_of(kept, model).values())
            found = accuracy(kept, own, RETRIEVAL[0])
            if found is None:
                continue
            records = [kept.cells[name] for name in own]
            speed = fmean(record["questions_per_s"] for record in records)
            state = records[0]["cost"]["points"][-1]["state_bytes"] / 1024
            color = COLORS[families.index(family) % len(COLORS)]
            marker = MARKERS[connectors.index(connector) % len(MARKERS)]
            said = f"{family}, {connector}" + (f", start {start}" if start > 1 else "")
            for axis, x in zip(axes, (speed, state), strict=True):
                axis.errorbar(
                    x, found[0], [[found[0] - found[1]], [found[2] - found[0]]], ls="", ms=5,
                    color=color, marker=marker, mfc=color if start == 1 else "none", capsize=2,
                    label=said,
                )  # fmt: skip
        length = next(iter(kept.cells.values()))["cost"]["points"][-1]["tokens"]
        axes[0].set(xlabel="questions/s", ylabel="accuracy on signs, %")
        axes[1].set(xlabel=f"state of a sequence of {length} tokens, KiB", xscale="log")
        add_legend(figure, axes)
        return save(figure, FORMAT)
