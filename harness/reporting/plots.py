"""Plots of profiles: latency and memory against sequence length, log-log, crossovers marked.

What all plots share is here too: colors, styles, log axes, legends, files.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.runs.points import VL_MAMBA
from harness.speed import certainty
from harness.speed.sweep.fits import Crossover
from harness.speed.sweep.summary import TIMES, Profile
from vlmamba_core.errors import UserError, unknown
from vlmamba_core.folder import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colors that stay apart for the color-blind (Okabe and Ito): of every plot, and of the page.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = "osD^vP"
PNG_DPI = 300
MOST_LEGEND = 0.5  # of a figure's height
COMMON = {
    "svg.hashsalt": "vlmamba",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "path.simplify": False,
}


@dataclass(frozen=True)
class Style:
    """Sizes for where a plot is shown: a panel in inches, text in points, lines as a factor."""

    panel: tuple[float, float]
    font: float
    line: float


STYLES = {"paper": Style((4.6, 3.6), 9.0, 1.0), "slides": Style((6.4, 4.8), 15.0, 1.8)}


def style(name: str) -> Style:
    """One of STYLES. Raises UserError for another name."""
    if name not in STYLES:
        raise unknown("--style", name, list(STYLES))
    return STYLES[name]


MIB = 2**20
FORMATS = ("svg", "png")
# name of a plot -> (axis label, [(quantity, scale, line style, legend suffix), ...])
PLOTS: dict[str, tuple[str, list[tuple[str, float, str, str]]]] = {
    "latency": ("prefill latency, s", [("prefill_s", 1.0, "-", "")]),
    "decode": ("one decoding step, ms", [("decode_s", 1e-3, "-", "")]),
    "memory": (
        "memory, MiB",
        [
            ("peak_mem_bytes", MIB, "-", ", whole process"),
            ("state_bytes", MIB, ":", ", state or cache"),
            ("weight_bytes", MIB, "-.", ", weights"),
        ],
    ),
}
OF_NUMBERS = "weight_bytes"  # drawn where models were measured in several kinds of numbers


def write_all(folder: Path, files: Mapping[str, str | bytes]) -> str:
    """Write the files; one line on how many, and which others lie there without a run."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        others = sorted(file.name for file in folder.iterdir() if file.name not in files)
        for name, content in files.items():
            if isinstance(content, str):
                write_atomically(folder / name, content)
            else:
                (folder / name).write_bytes(content)
    except OSError as error:
        raise UserError(
            f"cannot write to {folder}: {error.strerror}; give another --out"
        ) from error
    note = f"; of no run here: {', '.join(others)}" if others else ""
    return f"{len(files)} files written to {folder}{note}"


def render(profile: Profile, look: str = "paper") -> dict[str, bytes]:
    """Every plot of a profile: file suffix such as "latency.svg" -> content.

    None of a profile of whole models alone.
    """
    files: dict[str, bytes] = {}
    for name in PLOTS if profile.rows else ():
        for format_ in FORMATS:
            files[f"{name}.{format_}"] = plot(profile, name, format_, look)
    return files


def plot(profile: Profile, name: str, format_: str, look: str = "paper") -> bytes:
    """One plot as "svg" or "png" bytes."""
    batches = profile.batch_sizes()
    with figure_of(look, len(batches)) as figure:
        axes = figure.subplots(1, len(batches), squeeze=False, sharey=True)[0]
        for axis, batch in zip(axes, batches, strict=True):
            _draw(axis, profile, name, batch, style(look).line)
        add_legend(figure, axes)
        return save(figure, format_)


@contextmanager
def figure_of(
    look: str, columns: int, rows: int = 1, shares: tuple[float, float] = (1.0, 1.0)
) -> Iterator[Figure]:
    """A figure of that many panels in one of STYLES, whatever the user's matplotlibrc says.

    shares: a panel's width and height, as shares of the style's.
    """
    import matplotlib
    from matplotlib.figure import Figure

    chosen = style(look)
    width = chosen.panel[0] * columns * shares[0]
    height = chosen.panel[1] * rows * shares[1]
    settings: Any = matplotlib.rcParamsDefault | COMMON | {"backend": "agg"}
    settings |= {"font.size": chosen.font, "axes.linewidth": 0.8 * chosen.line}
    with matplotlib.rc_context(settings):
        yield Figure(figsize=(width, height), layout="constrained")


def add_legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend for all panels, below them; what stands in several is named once."""
    import matplotlib
    from matplotlib.container import ErrorbarContainer

    named: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    if named:
        # bars with their marks are what is compared: they come first, remarks behind
        ordered = sorted(named, key=lambda label: not isinstance(named[label], ErrorbarContainer))
        points_a_letter = 0.5 * float(matplotlib.rcParams["font.size"])  # of small text
        letters = figure.get_figwidth() * 72 / points_a_letter
        columns = max(1, int(letters // (max(map(len, named)) + 8)))  # 8: line and gap
        legend = figure.legend(
            [named[label] for label in ordered],
            ordered,
            loc="outside lower center",
            ncols=min(columns, 3),
            fontsize="small",
        )
        if legend.get_window_extent().width > figure.bbox.width:
            for text in legend.get_texts():
                text.set_text(textwrap.fill(text.get_text(), int(letters)))
        # many models: the figure grows, or no room would be left for the panels
        height = legend.get_window_extent().height / figure.dpi
        figure.set_figheight(
            figure.get_figheight() + max(0.0, height - MOST_LEGEND * figure.get_figheight())
        )


def label_log_axis(axis: Any, low: float, high: float) -> None:
    """Ticks with plain numbers on a logarithmic axis: the fewer decades, the more a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    decades = math.log10(high / low)
    steps = (1, 2, 5) if decades < 2 else (1, 3) if decades < 3.5 else (1,)
    axis.set_major_locator(LogLocator(base=10, subs=steps, numticks=30))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _draw(axis: Axes, profile: Profile, name: str, batch: int, width: float) -> None:
    label, lines = PLOTS[name]
    lines = [line for line in lines if line[0] != OF_NUMBERS or profile.several_numbers]
    for place, model in enumerate(profile.models()):
        for quantity, scale, dashes, suffix in lines:
            look: dict[str, Any] = {
                "color": COLORS[place % len(COLORS)],
                # past the last color, markers go round by one more: no two models look alike
                "marker": MARKERS[(place + place // len(COLORS)) % len(MARKERS)],
                "linestyle": dashes,
                "linewidth": width * (2 if model.startswith(VL_MAMBA) else 1.3),
                "markersize": 4 * width,
                "label": plain(model + suffix),
            }
            _draw_curve(axis, profile, (model, batch, quantity), scale, look)
    _mark_crossovers(axis, profile, batch, *lines[0][:2])
    axis.set(xscale="log", yscale="log", xlabel="tokens in the sequence", ylabel=label)
    axis.set_title(_title(profile, batch), fontsize="medium")
    ticks = sorted({row.seq_len for row in profile.rows})
    axis.set_xticks(ticks, [_short(n) for n in ticks])
    axis.minorticks_off()
    label_log_axis(axis.yaxis, *axis.get_ylim())


def _draw_curve(
    axis: Axes, profile: Profile, which: tuple[str, int, str], scale: float, look: dict[str, Any]
) -> None:
    """Medians with bars to the ends of the repeats; hollow where these differ too much."""
    curve = sorted(profile.curve(*which).items())
    if not curve:
        return
    lengths, values = zip(*curve, strict=True)
    scaled = [value / scale for value in values]
    if which[2] not in TIMES:
        axis.plot(lengths, scaled, **look)
        return
    low, high = profile.bounds(*which)
    below = [y - low[n] / scale for n, y in zip(lengths, scaled, strict=True)]
    above = [high[n] / scale - y for n, y in zip(lengths, scaled, strict=True)]
    bars = {"capsize": look["markersize"] / 2, "elinewidth": look["linewidth"] / 2}
    axis.errorbar(lengths, scaled, yerr=[below, above], **look, **bars)
    noisy = _noisy(profile, *which)
    hollow = [(n, y) for n, y in zip(lengths, scaled, strict=True) if n in noisy]
    if hollow:
        share = f"{certainty.NOISY * 100:.0f} %"
        style_ = {"marker": look["marker"], "markersize": look["markersize"], "linestyle": ""}
        style_ |= {"mfc": "white", "mec": look["color"], "zorder": 5}
        label = f"hollow: runs differ by more than {share}, repeat"
        axis.plot(*zip(*hollow, strict=True), label=label, **style_)


def _noisy(profile: Profile, model: str, batch: int, quantity: str) -> set[int]:
    return {
        row.seq_len
        for row in profile.rows
        if row.result is not None and (row.model, row.batch_size) == (model, batch)
        if certainty.noisy(row.result[quantity])
    }


def _mark_crossovers(axis: Axes, profile: Profile, batch: int, quantity: str, scale: float) -> None:
    """A ring where VL-Mamba begins to cost less than a baseline, with the length beside it.

    A crossing that would lie below the shortest length is no ring: the legend says so.
    """
    ring: dict[str, Any] = {"ms": 11, "mfc": "none", "mec": "black", "mew": 1.2, "linestyle": ""}
    for pair in profile.pairs():
        found = profile.crossover(pair, batch, quantity)
        if found.length is None or found.at_most:
            axis.plot([], [], linestyle="", label=plain(_no_ring(pair, batch, found)))
            continue
        value = _between(profile.curve(pair[1], batch, quantity), found.length) / scale
        label = "ring: from so many tokens on VL-Mamba costs less"
        axis.plot([found.length], [value], marker="o", label=label, **ring)
        axis.annotate(
            f"{found.length:.0f}",
            (found.length, value),
            xytext=(9, -11),
            textcoords="offset points",
            fontsize="small",
        )


def _no_ring(pair: tuple[str, str], batch: int, found: Crossover) -> str:
    """For the legend: why there is no ring for a pair."""
    against = f"against {pair[1]}, batch {batch}"
    if found.length is None:
        return f"{against}: no crossover ({found.note})"
    return f"{against}: less from {found.length:.0f} tokens, the shortest measured"


def _between(curve: Mapping[int, float], length: float) -> float:
    """The curve's value at a length between measured ones, by a straight line in logarithms."""
    import numpy as np

    lengths = sorted(curve)
    logs = np.interp(np.log(length), np.log(lengths), np.log([curve[n] for n in lengths]))
    return float(np.exp(logs))


def _title(profile: Profile, batch: int) -> str:
    machine = profile.machine
    device = machine.get("device", "?")
    where = machine.get("processor", device) if device == "cpu" else device
    dtype = "" if profile.several_numbers else f"{machine.get('dtype', '?')}, "
    return plain(f"batch {batch}, {dtype}{where}")


def plain(text: str) -> str:
    """Text that matplotlib shows as it is: no mathematics between dollars, surrogates escaped."""
    return text.replace("$", r"\$").encode("utf-8", "backslashreplace").decode()


def _short(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def save(figure: Figure, format_: str) -> bytes:
    """The figure without dates or program names."""
    file = io.BytesIO()
    metadata = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}[format_]
    figure.savefig(file, format=format_, dpi=PNG_DPI, metadata=metadata)
    return file.getvalue()
