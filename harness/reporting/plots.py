"""Plots of profiles: latency and memory against sequence length, log-log, crossovers marked."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.runs.points import VL_MAMBA
from harness.speed.sweep.summary import Profile
from vlmamba_core.errors import UserError
from vlmamba_core.folder import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that stay apart for the colour-blind (Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = "osD^vP"
STYLE = {
    "svg.hashsalt": "vlmamba",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "path.simplify": False,
}
MIB = 2**20
# name of a plot -> (axis label, [(quantity, scale, line style, legend suffix), ...])
PLOTS: dict[str, tuple[str, list[tuple[str, float, str, str]]]] = {
    "latency": ("prefill latency, s", [("prefill_s", 1.0, "-", "")]),
    "decode": ("one decoding step, ms", [("decode_s", 1e-3, "-", "")]),
    "memory": (
        "memory, MiB",
        [
            ("peak_mem_bytes", MIB, "-", ", whole process"),
            ("state_bytes", MIB, ":", ", state or cache"),
        ],
    ),
}


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


def render(profile: Profile) -> dict[str, bytes]:
    """Every plot of a profile: file suffix such as "latency.svg" -> content."""
    files: dict[str, bytes] = {}
    for name in PLOTS:
        for format_ in ("svg", "png"):
            files[f"{name}.{format_}"] = plot(profile, name, format_)
    return files


def plot(profile: Profile, name: str, format_: str) -> bytes:
    """One plot as "svg" or "png" bytes."""
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {**matplotlib.rcParamsDefault, **STYLE, "backend": "agg"}
    with matplotlib.rc_context(style):
        batches = profile.batch_sizes()
        figure = Figure(figsize=(4.6 * len(batches), 3.6), layout="constrained")
        axes = figure.subplots(1, len(batches), squeeze=False, sharey=True)[0]
        for axis, batch in zip(axes, batches, strict=True):
            _draw(axis, profile, name, batch)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=7.5)
        return _save(figure, format_)


def _draw(axis: Axes, profile: Profile, name: str, batch: int) -> None:
    label, lines = PLOTS[name]
    for place, model in enumerate(profile.models()):
        look: dict[str, Any] = {
            "color": COLOURS[place % len(COLOURS)],
            "marker": MARKERS[place % len(MARKERS)],
        }
        for quantity, scale, style, suffix in lines:
            curve = sorted(profile.curve(model, batch, quantity).items())
            if curve:
                lengths, values = zip(*curve, strict=True)
                scaled = [value / scale for value in values]
                axis.plot(
                    lengths,
                    scaled,
                    linestyle=style,
                    label=_plain(model + suffix),
                    markersize=4,
                    linewidth=2 if model.startswith(VL_MAMBA) else 1.3,
                    **look,
                )
    _mark_crossovers(axis, profile, batch, *lines[0][:2])
    axis.set(xscale="log", yscale="log", xlabel="tokens in the sequence", ylabel=label)
    axis.set_title(_title(profile, batch), fontsize=9)
    ticks = sorted({row.seq_len for row in profile.rows})
    axis.set_xticks(ticks, [_short(n) for n in ticks])
    axis.minorticks_off()


def _mark_crossovers(axis: Axes, profile: Profile, batch: int, quantity: str, scale: float) -> None:
    """A ring where VL-Mamba begins to cost less than a baseline, with the length beside it."""
    for pair in profile.pairs():
        found = profile.crossover(pair, batch, quantity)
        if found.length is None or found.at_most:
            continue  # never, or from the shortest length on: there is no crossing to see
        value = _between(profile.curve(pair[1], batch, quantity), found.length) / scale
        axis.plot([found.length], [value], "o", ms=11, mfc="none", mec="black", mew=1.2)
        axis.annotate(
            f"{found.length:.0f}",
            (found.length, value),
            xytext=(9, -11),
            textcoords="offset points",
            fontsize=8,
        )


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
    return _plain(f"batch {batch}, {machine.get('dtype', '?')}, {where}")


def _plain(text: str) -> str:
    """Text that matplotlib shows as it is; between two dollars it would read mathematics."""
    return text.replace("$", r"\$")


def _short(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def _save(figure: Figure, format_: str) -> bytes:
    """The figure without dates or program names."""
    file = io.BytesIO()
    metadata = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}[format_]
    figure.savefig(file, format=format_, dpi=160, metadata=metadata)
    return file.getvalue()
