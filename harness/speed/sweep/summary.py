"""A finished sweep as a `Profile`, and as the JSON object that `harness.profile` prints last.

Curves are per model and batch size.  `floors` says how far a point is from what the machine allows:
prefill from its FLOPs at the rate measured of matrix products, a decoding step from reading all
weights and the cache once at the measured bandwidth.  What records hold is read without torch.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from harness.runs.points import OK, VL_MAMBA, Row
from harness.speed import certainty
from harness.speed.certainty import four_digits
from harness.speed.sweep import fits

QUANTITIES = {  # what a curve may show -> its value in a result
    "prefill_s": lambda r: statistics.median(r["prefill_s"]),
    "ttft_s": lambda r: statistics.median(r["ttft_s"]),
    "decode_s": lambda r: statistics.median(r["decode_s"]),
    "state_bytes": lambda r: r["state_bytes"],
    "peak_mem_bytes": lambda r: r["peak_mem_bytes"],
    "decode_peak_mem_bytes": lambda r: r["decode_peak_mem_bytes"],
    "weight_bytes": lambda r: r["weight_bytes"],
    "added_mem_bytes": lambda r: r["peak_mem_bytes"] - r["loaded_mem_bytes"],
}
TIMES = ("prefill_s", "ttft_s", "decode_s")  # a list of repeats in a result
CROSSING = ("prefill_s", "ttft_s", "decode_s", "peak_mem_bytes", "state_bytes")

Curve = dict[int, float]  # sequence length -> value


@dataclass(frozen=True)
class Profile:
    """A sweep with the machine's limits and its settings, as record.json holds it."""

    name: str
    machine: Mapping[str, Any]
    settings: Mapping[str, Any]
    rows: Sequence[Row]
    whole: Sequence[Mapping[str, Any]] = ()  # of harness.speed.whole

    @classmethod
    def from_record(cls, name: str, record: Mapping[str, Any]) -> Profile:
        """The profile of a record.json of harness.profile."""
        rows = [Row(**row) for row in record["points"]]
        return cls(name, record["machine"], record["settings"], rows, record.get("whole", ()))

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
        """Each model of VL-Mamba with each baseline that multiplies numbers of the same dtype."""
        own = [model for model in self.models() if model.startswith(VL_MAMBA)]
        baselines = [model for model in self.models() if not model.startswith(VL_MAMBA)]
        dtype = {row.model: row.result.get("dtype") for row in self.rows if row.result is not None}
        return [
            (model, baseline)
            for model in own
            for baseline in baselines
            if dtype.get(model) == dtype.get(baseline) or not {model, baseline} <= dtype.keys()
        ]

    @property
    def several_numbers(self) -> bool:
        """Whether a model was measured in more than one kind of numbers."""
        results = [row.result for row in self.rows if row.result is not None]
        return len({(r.get("dtype"), r.get("quantize")) for r in results}) > 1

    def crossover(self, pair: tuple[str, str], batch_size: int, quantity: str) -> fits.Crossover:
        """Where the pair's first begins to cost less; of times, how far repeats leave it open."""
        model, baseline = (self.curve(name, batch_size, quantity) for name in pair)
        found = fits.crossover(model, baseline)
        if quantity not in TIMES:
            return found
        (best, worst), (low, high) = (self.bounds(name, batch_size, quantity) for name in pair)
        early, late = fits.crossover(best, high), fits.crossover(worst, low)
        if (early.length, late.length) == (found.length, found.length):
            return found
        note = f"{found.note}; by the spread of runs {_range(early, late)}"
        return dataclasses.replace(found, note=note)

    def bounds(self, model: str, batch_size: int, quantity: str) -> tuple[Curve, Curve]:
        """The ends of the repeats' range by length, as certainty.spread takes it."""
        ends = {
            row.seq_len: certainty.ends(row.result[quantity])
            for row in self.rows
            if row.result is not None and (row.model, row.batch_size) == (model, batch_size)
        }
        low, high = ({n: pair[side] for n, pair in ends.items()} for side in (0, 1))
        return low, high


def summarize(profile: Profile) -> dict[str, Any]:
    """The object that `harness.profile` prints last; values of the smallest batch size.

    Lengths in tokens, slopes in bytes a token.  A crossover of null comes with the reason;
    crossover_at_most names those that lie at or below the shortest length measured, if anywhere.
    too_noisy: points whose repeats differ too much to be believed; other_load_cores: the most that
    other processes kept busy during a point (None: not recorded).  whole, where there are such:
    new tokens over the whole time of each (None: not measured).
    """
    vlms = {row["model"]: (row.get("cost") or {}).get("tokens_per_s") for row in profile.whole}
    batch = profile.batch_sizes()[0] if profile.rows else 1  # whole models answer one question
    crossings = {
        " / ".join(pair): {q: profile.crossover(pair, batch, q) for q in CROSSING}
        for pair in profile.pairs()
    }
    return {
        "batch_size": batch,
        "models": {model: growth(profile, model, batch) for model in profile.models()},
        "crossover_len": {
            pair: {q: four_digits(c.length) for q, c in found.items()}
            for pair, found in crossings.items()
        },
        "crossover_note": {
            pair: {q: c.note for q, c in found.items()} for pair, found in crossings.items()
        },
        "crossover_at_most": {
            pair: [q for q, c in found.items() if c.at_most] for pair, found in crossings.items()
        },
        "too_noisy": [
            f"{r.model} {r.batch_size}x{r.seq_len}: {why}"
            for r in profile.rows
            if (why := verdict(r))
        ],
        "other_load_cores": _most_other_load(profile.rows),
        "not_measured": [
            f"{r.model} {r.batch_size}x{r.seq_len}: {r.status}"
            for r in profile.rows
            if r.status != OK
        ],
        **({"whole": {name: four_digits(rate) for name, rate in vlms.items()}} if vlms else {}),
    }


def growth(profile: Profile, model: str, batch: int) -> dict[str, Any]:
    """Exponents and slopes of one model at one batch size."""
    curves = {quantity: profile.curve(model, batch, quantity) for quantity in QUANTITIES}
    if not curves["prefill_s"]:
        return {}
    longest = max(curves["prefill_s"])
    prefill = curves["prefill_s"]
    return {
        "prefill_exponent": _fit(fits.power_law(list(prefill), list(prefill.values()))),
        "prefill_last_step": _fit(fits.last_step(prefill)),
        "memory_exponent": _fit(_power(curves["added_mem_bytes"])),
        "state_bytes": {str(n): int(v) for n, v in sorted(curves["state_bytes"].items())},
        "state_bytes_per_token": _fit(_line(curves["state_bytes"])),
        "decode_memory_slope": _fit(_line(curves["decode_peak_mem_bytes"])),
        "decode_tok_per_s_longest": four_digits(batch / curves["decode_s"][longest]),
        "longest_seq_len": longest,
        "weight_bytes": int(curves["weight_bytes"][longest]),
    }


def _power(curve: Curve) -> fits.Fit | None:
    return fits.power_law(list(curve), list(curve.values()))


def _line(curve: Curve) -> fits.Fit | None:
    return fits.line([float(n) for n in curve], list(curve.values()))


def _fit(fit: fits.Fit | fits.Step | None) -> dict[str, Any] | None:
    return None if fit is None else {key: four_digits(value) for key, value in asdict(fit).items()}


def _range(early: fits.Crossover, late: fits.Crossover) -> str:
    first = "never" if early.length is None else "at most " * early.at_most + f"{early.length:.0f}"
    last = "never" if late.length is None else f"{late.length:.0f}"
    return f"{first} to {last}" if first != last else first


def verdict(row: Row) -> str:
    """What to do about repeats that differ too much; empty where they do not."""
    result = row.result or {}
    return certainty.verdict({n: result.get(f"{n}_s", ()) for n in ("prefill", "decode")})


def _most_other_load(rows: Sequence[Row]) -> float | None:
    loads = [(row.result or {}).get("other_load_cores") for row in rows]
    return max((load for load in loads if load is not None), default=None)


def floors(row: Row, machine: Mapping[str, Any]) -> dict[str, float]:
    """How many times longer than the machine's floor: prefill and a decoding step.

    No "prefill" where the rate of products in the point's dtype was not measured.
    """
    result = row.result or {}
    bandwidth = max(machine["copy_bytes_per_s"], machine["read_bytes_per_s"])
    step_s = (result["weight_bytes"] + result["state_bytes"]) / bandwidth
    found = {"decode": QUANTITIES["decode_s"](result) / step_s}
    rate = _product_rate(result.get("dtype"), machine)
    if rate is not None:
        prefill_s = result["prefill_flops"] / rate
        found["prefill"] = QUANTITIES["prefill_s"](result) / prefill_s
    return found


def _product_rate(dtype: str | None, machine: Mapping[str, Any]) -> float | None:
    """FLOPs a second of products in that dtype; a machine is measured in one, and in bfloat16."""
    if dtype in (None, machine.get("dtype", dtype)):
        return machine["gemm_flops_per_s"]
    return machine.get("gemm_bf16_flops_per_s") if dtype == "bfloat16" else None
