"""A finished sweep: one JSON object, and tables for reading.

Curves are per model and batch size.  `FLOORS` says how far a point is from what the machine allows:
prefill from its matrix products at the measured rate, a decoding step from reading all weights and
the cache once at the measured bandwidth.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from harness.speed.sweep import fits
from harness.speed.sweep.points import OK, Row

OURS = "vl-mamba-"
QUANTITIES = {  # what a curve may show -> its value in a result
    "prefill_s": lambda r: statistics.median(r["prefill_s"]),
    "ttft_s": lambda r: statistics.median(r["ttft_s"]),
    "decode_s": lambda r: statistics.median(r["decode_s"]),
    "state_bytes": lambda r: r["state_bytes"],
    "peak_mem_bytes": lambda r: r["peak_mem_bytes"],
    "decode_peak_mem_bytes": lambda r: r["decode_peak_mem_bytes"],
    "added_mem_bytes": lambda r: r["peak_mem_bytes"] - r["loaded_mem_bytes"],
}
CROSSING = ("prefill_s", "ttft_s", "decode_s", "peak_mem_bytes", "state_bytes")

Curve = dict[int, float]  # sequence length -> value


@dataclass(frozen=True)
class Profile:
    """A sweep with the machine's limits and its terms, as record.json holds it."""

    name: str
    machine: Mapping[str, Any]
    terms: Mapping[str, Any]
    rows: Sequence[Row]

    @classmethod
    def from_record(cls, name: str, record: Mapping[str, Any]) -> Profile:
        """The profile of a record.json of harness.profile."""
        rows = [Row(**row) for row in record["points"]]
        return cls(name, record["machine"], record["terms"], rows)

    def models(self) -> list[str]:
        """In the order of the sweep."""
        return list(dict.fromkeys(row.model for row in self.rows))

    def batch_sizes(self) -> list[int]:
        """In ascending order."""
        return sorted({row.batch_size for row in self.rows})

    def curve(self, model: str, batch_size: int, quantity: str) -> Curve:
        """The measured values of a quantity by length."""
        value: Callable[[Mapping[str, Any]], float] = QUANTITIES[quantity]
        return {
            row.seq_len: value(row.result)
            for row in self.rows
            if row.result is not None and (row.model, row.batch_size) == (model, batch_size)
        }

    def pairs(self) -> list[tuple[str, str]]:
        """Each of our models with each of the others."""
        ours = [model for model in self.models() if model.startswith(OURS)]
        return [(o, m) for o in ours for m in self.models() if not m.startswith(OURS)]

    def crossover(self, pair: tuple[str, str], batch_size: int, quantity: str) -> fits.Crossover:
        """Where our model begins to cost less."""
        ours, theirs = (self.curve(model, batch_size, quantity) for model in pair)
        return fits.crossover(ours, theirs)


def summarize(profile: Profile) -> dict[str, Any]:
    """The object that `harness.profile` prints last; values of the smallest batch size.

    Lengths in tokens, slopes in bytes a token; a crossover of null comes with the reason.
    """
    batch = profile.batch_sizes()[0]
    crossings = {
        f"{ours} / {theirs}": {q: profile.crossover((ours, theirs), batch, q) for q in CROSSING}
        for ours, theirs in profile.pairs()
    }
    return {
        "batch_size": batch,
        "models": {model: _growth(profile, model, batch) for model in profile.models()},
        "crossover_len": {
            pair: {q: _round(c.length) for q, c in found.items()}
            for pair, found in crossings.items()
        },
        "crossover_note": {
            pair: {q: c.note for q, c in found.items()} for pair, found in crossings.items()
        },
        "not_measured": [
            f"{r.model} {r.batch_size}x{r.seq_len}: {r.status}"
            for r in profile.rows
            if r.status != OK
        ],
    }


def _growth(profile: Profile, model: str, batch: int) -> dict[str, Any]:
    """Exponents and slopes of one model at one batch size."""
    curves = {quantity: profile.curve(model, batch, quantity) for quantity in QUANTITIES}
    if not curves["prefill_s"]:
        return {}
    longest = max(curves["prefill_s"])
    prefill = curves["prefill_s"]
    return {
        "prefill_exponent": _fit(fits.power_law(list(prefill), list(prefill.values()))),
        "prefill_exponent_last_doubling": _round(
            fits.last_doubling(list(prefill), list(prefill.values()))
        ),
        "memory_exponent": _fit(_power(curves["added_mem_bytes"])),
        "state_bytes": {str(n): int(v) for n, v in sorted(curves["state_bytes"].items())},
        "state_bytes_per_token": _fit(_line(curves["state_bytes"])),
        "decode_memory_slope": _fit(_line(curves["decode_peak_mem_bytes"])),
        "decode_tok_per_s_longest": _round(batch / curves["decode_s"][longest]),
        "longest_seq_len": longest,
    }


def _power(curve: Curve) -> fits.Fit | None:
    return fits.power_law(list(curve), list(curve.values()))


def _line(curve: Curve) -> fits.Fit | None:
    return fits.line([float(n) for n in curve], list(curve.values()))


def _fit(fit: fits.Fit | None) -> dict[str, Any] | None:
    return None if fit is None else {key: _round(value) for key, value in asdict(fit).items()}


def _round(value: float | None) -> float | None:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def floors(row: Row, machine: Mapping[str, Any]) -> dict[str, float]:
    """How many times longer than the machine's floor: prefill and a decoding step."""
    result = row.result or {}
    bandwidth = max(machine["copy_bytes_per_s"], machine["read_bytes_per_s"])
    prefill_s = result["prefill_flops"] / machine["gemm_flops_per_s"]
    step_s = (result["weight_bytes"] + result["state_bytes"]) / bandwidth
    return {
        "prefill": QUANTITIES["prefill_s"](result) / prefill_s,
        "decode": QUANTITIES["decode_s"](result) / step_s,
    }


POINT_HEADERS = (
    *("model", "batch", "tokens", "image", "prefill s", "ttft s", "decode tok/s"),
    *("peak MiB", "state MiB", "prefill / floor", "decode / floor", "runs", "note"),
)
GROWTH_HEADERS = (
    *("model", "batch", "prefill exponent", "last doubling", "memory exponent"),
    *("state bytes a token", "decode memory, bytes a token"),
)
CROSSOVER_HEADERS = ("pair", "batch", "quantity", "ours costs less from", "where")
MIB = 2**20


def point_rows(profile: Profile) -> list[list[str]]:
    """One line a point, measured or not."""
    return [_point_row(row, profile.machine) for row in profile.rows]


def _point_row(row: Row, machine: Mapping[str, Any]) -> list[str]:
    head = [row.model, str(row.batch_size), str(row.seq_len), str(row.image_tokens)]
    if row.result is None:
        return [*head, *["-"] * 8, f"{row.status}: {row.detail}"]
    r, ratio = row.result, floors(row, machine)
    return [
        *head,
        f"{QUANTITIES['prefill_s'](r):.4g}",
        f"{QUANTITIES['ttft_s'](r):.4g}",
        f"{r['decode_tok_per_s']:.4g}",
        f"{r['peak_mem_bytes'] / MIB:.0f}",
        f"{r['state_bytes'] / MIB:.2f}",
        f"{ratio['prefill']:.2f}",
        f"{ratio['decode']:.2f}",
        str(len(r["prefill_s"])),
        "",
    ]


def growth_rows(profile: Profile) -> list[list[str]]:
    """One line a model and batch size: exponents and slopes with intervals."""
    rows = []
    for batch in profile.batch_sizes():
        for model in profile.models():
            found = _growth(profile, model, batch)
            if found:
                keys = ("state_bytes_per_token", "decode_memory_slope")
                rows.append(
                    [
                        model,
                        str(batch),
                        _fit_text(found["prefill_exponent"]),
                        str(found["prefill_exponent_last_doubling"] or "-"),
                        _fit_text(found["memory_exponent"]),
                        *(_fit_text(found[key]) for key in keys),
                    ]
                )
    return rows


def crossover_rows(profile: Profile) -> list[list[str]]:
    """One line a pair, batch size and quantity."""
    return [
        [f"{pair[0]} / {pair[1]}", str(batch), quantity, _tokens(found.length), found.note]
        for batch in profile.batch_sizes()
        for pair in profile.pairs()
        for quantity in CROSSING
        for found in [profile.crossover(pair, batch, quantity)]
    ]


def _tokens(length: float | None) -> str:
    return "-" if length is None else f"{length:.0f} tokens"


def _fit_text(fit: Mapping[str, Any] | None) -> str:
    if fit is None:
        return "-"
    interval = "" if fit["low"] is None else f" [{fit['low']:.4g} to {fit['high']:.4g}]"
    return f"{fit['value']:.4g}{interval}"


def tables(profile: Profile) -> list[tuple[str, Sequence[str], list[list[str]]]]:
    """(title, headers, rows) of everything a profile has to say."""
    return [
        ("points", POINT_HEADERS, point_rows(profile)),
        ("growth with sequence length", GROWTH_HEADERS, growth_rows(profile)),
        ("crossovers", CROSSOVER_HEADERS, crossover_rows(profile)),
    ]
