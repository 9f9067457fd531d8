"""What a run of `harness.bench` shows: a table for reading and one JSON object for machines.

Every `..._speedup` is a ratio of medians, above 1 where VL-Mamba is faster; of several shapes the
smallest. `processor_time` holds the same ratios of processor time, steadier on a busy machine.
`too_noisy` names what to measure again: its runs differ too much (harness.speed.certainty).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.speed import certainty, language_model, numbers, scan, throughput, training
from harness.speed.invariance import Invariance
from harness.speed.machine import Machine
from harness.speed.timing import VL_MAMBA, Comparison

# summary key -> (kind of comparison, baseline, contender)
RATIOS = {
    "scan_forward_speedup": ("scan_forward", scan.TRANSFORMERS, VL_MAMBA),
    "scan_forward_speedup_mamba_ssm": ("scan_forward", scan.MAMBA_SSM, VL_MAMBA),
    "scan_train_speedup": ("scan_train", scan.TRANSFORMERS, VL_MAMBA),
    "scan_train_speedup_mamba_ssm": ("scan_train", scan.MAMBA_SSM, VL_MAMBA),
    "prefill_speedup": ("prefill", language_model.TRANSFORMERS, VL_MAMBA),
    "decode_speedup": ("decode", language_model.TRANSFORMERS_GENERATE, VL_MAMBA),
    "decode_loop_speedup": ("decode", language_model.TRANSFORMERS, VL_MAMBA),
    "decode_generate_speedup": (
        "decode",
        language_model.TRANSFORMERS_GENERATE,
        language_model.VL_MAMBA_GENERATE,
    ),
    **{
        f"{kind}_speedup_{name}": (kind, name, VL_MAMBA)
        for kind in ("prefill", "decode")
        for name in language_model.ATTENTION
    },
    "prefill_bf16_speedup_transformers_fp32": (
        "prefill",
        language_model.TRANSFORMERS,
        language_model.VL_MAMBA_BFLOAT16,
    ),
    "prefill_bf16_speedup": (
        "prefill",
        language_model.TRANSFORMERS_BFLOAT16,
        language_model.VL_MAMBA_BFLOAT16,
    ),
    **{
        f"prefill_{length}{narrow}_speedup_{name}": (f"prefill_{length}{narrow}", name, VL_MAMBA)
        for length in numbers.LENGTHS
        for narrow in ("", numbers.NARROW)
        for name in language_model.ATTENTION
    },
    **{
        f"prefill_{length}_speedup_{name}_same_products": (
            f"prefill_{length}",
            name + numbers.FAST,
            VL_MAMBA,
        )
        for length in numbers.LENGTHS
        for name in language_model.ATTENTION
    },
    **{
        f"decode_{rows}_{key}_speedup_fp32": (f"decode_{rows}", VL_MAMBA, contender)
        for rows in numbers.ROWS
        for key, contender in (
            ("bf16", language_model.VL_MAMBA_BFLOAT16),
            ("int8", numbers.INT8),
        )
    },
    **{f"{kind}_speedup": (kind, training.TRANSFORMERS, VL_MAMBA) for kind in training.KINDS},
    **{
        f"{shape.kind}{narrow}_speedup{suffix}": (f"{shape.kind}{narrow}", other, VL_MAMBA)
        for shape in throughput.SHAPES
        for narrow in ("", numbers.NARROW)
        for suffix, other in (
            ("", throughput.ONE_AT_A_TIME),
            ("_transformers", throughput.TRANSFORMERS_ONE_AT_A_TIME),
        )
    },
}
NOT_INSTALLED = "not installed"
# summary key -> the least that is expected of it on two cores of a server's processor
LIMITS = {
    "scan_forward_speedup": 60.0,
    "prefill_speedup": 9.0,
    "prefill_bf16_speedup_transformers_fp32": 15.0,
    "prefill_bf16_speedup": 11.0,
    "prefill_gemm_fraction": 0.75,
    "prefill_bf16_gemm_fraction": 0.65,
    **{
        f"prefill_{length}_speedup_{name}": 1.5
        for length in numbers.LENGTHS
        for name in language_model.ATTENTION
    },
    **{
        f"prefill_{length}{numbers.NARROW}_speedup_{name}": 1.3 if length >= 1024 else 1.0
        for length in numbers.LENGTHS
        for name in language_model.ATTENTION
    },
    **{f"decode_{rows}_bf16_speedup_fp32": 1.3 for rows in numbers.ROWS},
    "decode_1_int8_speedup_fp32": 1.7,
    "decode_products_read_fraction": 0.75,
    **{
        f"{shape.kind}{narrow}_speedup": least
        for shape, least in zip(throughput.SHAPES, (10.0, 1.7), strict=True)
        for narrow in ("", numbers.NARROW)
    },
}
MOST = {"decode_outside_products_ms": 1.2}  # the most that is expected


@dataclass(frozen=True)
class Results:
    """Everything a run measured; None: that section was not wanted."""

    settings: Mapping[str, Any]
    machine: Machine
    comparisons: Sequence[Comparison]
    scan_errors: Mapping[str, float] | None = None
    logits_error: float | None = None
    invariance: Invariance | None = None


def summary(results: Results) -> dict[str, Any]:
    """The run in one flat object, but for `processor_time` and `too_noisy`."""
    found: dict[str, Any] = {
        **_ratios(results.comparisons, Comparison.speedup),
        **_rates(results.comparisons),
        "copy_bandwidth_gb_per_s": results.machine.copy_bytes_per_s / 1e9,
        "read_bandwidth_gb_per_s": results.machine.read_bytes_per_s / 1e9,
        "gemm_gflop_per_s": results.machine.gemm_flops_per_s / 1e9,
        **_narrow_rate(results.machine),
    }
    if results.scan_errors is not None:
        found["scan_max_rel_error"] = max(results.scan_errors.values())
        found |= {f"scan_rel_error_{k}": v for k, v in results.scan_errors.items()}
    if results.logits_error is not None:
        found["logits_rel_error_transformers"] = results.logits_error
    if results.invariance is not None:
        found |= {
            "batch_invariant": results.invariance.different == 0,
            "batch_invariant_model": results.invariance.model,
            "batch_invariant_questions": results.invariance.questions,
            "batch_logits_rel_error": results.invariance.logits_error,
        }
        for kind, agreement in results.invariance.others.items():
            found[f"batch_invariant_{kind}"] = agreement.different == 0
            found[f"answers_other_than_float32_{kind}"] = agreement.from_float32
    rounded = {k: certainty.four_digits(v) for k, v in found.items()}
    processor = _ratios(results.comparisons, Comparison.processor_speedup)
    processor = {k: certainty.four_digits(v) for k, v in processor.items()}
    return {
        **results.settings,
        **rounded,
        "processor_time": processor,
        "too_noisy": too_noisy(results.comparisons),
    }


def _narrow_rate(limits: Machine) -> dict[str, float]:
    rate = limits.gemm_bf16_flops_per_s
    return {} if math.isnan(rate) else {"gemm_bf16_gflop_per_s": rate / 1e9}


def against_limits(summary_: Mapping[str, Any]) -> list[str]:
    """A line for each of LIMITS and MOST that was measured: the figure, and what is expected."""
    lines = []
    limits = [("at least", 1, LIMITS), ("at most", -1, MOST)]
    for words, sign, key, limit in ((w, s, *item) for w, s, of in limits for item in of.items()):
        value = summary_.get(key)
        if isinstance(value, float):
            missed = "" if sign * value >= sign * limit else "MISSED"
            lines.append(f"  {key:52}{value:10.4g}  {words} {limit:<6g}{missed}")
    return ["limits (on an idle machine):", *lines] if lines else []


def too_noisy(comparisons: Sequence[Comparison]) -> list[str]:
    """`KIND, SHAPE: CONTENDER` of each whose runs differ by more than certainty.NOISY."""
    return [
        f"{c.kind}, {c.shape}: {name}"
        for c in comparisons
        for name, timing in c.timings.items()
        if certainty.noisy(timing.wall_s)
    ]


def _ratios(comparisons: Sequence[Comparison], speedup) -> dict[str, float | str]:
    found: dict[str, float | str] = {}
    for key, (kind, baseline, contender) in RATIOS.items():
        of_kind = [c for c in comparisons if c.kind == kind]
        timed = [speedup(c, baseline, contender) for c in of_kind if baseline in c.timings]
        if timed:
            found[key] = min(timed)
        elif of_kind:
            found[key] = NOT_INSTALLED
    return found


def _rates(comparisons: Sequence[Comparison]) -> dict[str, float]:
    """Absolute rates, and the part of the machine's limit that is reached."""
    found: dict[str, float] = {}
    for c in comparisons:
        seconds = c.timings[VL_MAMBA].median_s
        if c.kind == "prefill":
            found |= {"prefill_ms": seconds * 1e3, "prefill_gemm_fraction": _reached(c)}
            narrow = c.timings[language_model.VL_MAMBA_BFLOAT16].median_s
            found["prefill_bf16_ms"] = narrow * 1e3
            if c.narrow_floor_s is not None:
                found["prefill_bf16_gemm_fraction"] = c.narrow_floor_s / narrow
        elif c.kind == "decode":
            generate = c.timings[language_model.TRANSFORMERS_GENERATE].median_s
            found["decode_tok_per_s"] = 1 / seconds
            found["decode_tok_per_s_transformers"] = 1 / generate
            found["decode_bandwidth_fraction"] = _reached(c)
        elif c.kind == "decode_products":
            products, sums = (c.timings[n].median_s for n in (numbers.PRODUCTS, numbers.SUMS))
            found["decode_outside_products_ms"] = (seconds - products) * 1e3
            found["decode_products_read_fraction"] = sums / products
        elif c.kind in training.KINDS:
            found[f"{c.kind}_tok_per_s"] = 1 / seconds
            found[f"{c.kind}_tok_per_s_transformers"] = (
                1 / c.timings[training.TRANSFORMERS].median_s
            )
            found[f"{c.kind}_peak_memory_ratio"] = c.memory_ratio(training.TRANSFORMERS)
            found[f"{c.kind}_ratios_are_lower_bounds"] = bool(c.stopped)
        elif c.unit == "question":
            names = {"": VL_MAMBA, "_one_at_a_time": throughput.ONE_AT_A_TIME}
            names["_transformers"] = throughput.TRANSFORMERS_ONE_AT_A_TIME
            for suffix, name in names.items():
                found[f"{c.kind}_questions_per_s{suffix}"] = 1 / c.timings[name].median_s
    return found


def _reached(c: Comparison) -> float:
    """The part of the machine's limit that VL-Mamba reaches, where that limit is known."""
    assert c.floor_s is not None
    return c.floor_s / c.timings[VL_MAMBA].median_s


def details(results: Results, summary_: Mapping[str, Any]) -> str:
    """JSON text with the seconds of every run."""
    content = dataclasses.asdict(results) | {"summary": dict(summary_)}
    return json.dumps(content, indent=2, allow_nan=False, default=sorted) + "\n"  # sets


def tables(results: Results) -> str:
    """The run for reading."""
    lines = [", ".join(f"{k} {v}" for k, v in results.settings.items())]
    limits = results.machine
    lines.append(
        f"machine: copies {limits.copy_bytes_per_s / 1e9:.1f} GB/s (read and written), reads "
        f"{limits.read_bytes_per_s / 1e9:.1f} GB/s, multiplies "
        f"{limits.gemm_flops_per_s / 1e9:.0f} GFLOP/s"
    )
    others = float(results.settings.get("other_load_cores", 0.0))
    if certainty.busy(others):
        lines.append(
            f"busy machine: other processes kept {others:.1f} cores from these measurements; "
            "repeat when it is idle"
        )
    for comparison in results.comparisons:
        lines += ["", *_table(comparison)]
    lines += ["", *_notes(results), ""]
    if results.settings.get("device") == "cpu":
        lines += against_limits(summary(results))
    return "\n".join(lines)


def _table(c: Comparison) -> list[str]:
    title = f"{c.kind.replace('_', ' ')}: {c.shape}"
    head = f"  {f'ms a {c.unit}':34}{'median':>10}{'fastest':>10}{'slowest':>10}{'processor':>11}"
    lines = [title, head + f"{'spread':>10}  VL-Mamba is"]
    for name, timing in c.timings.items():
        seconds = (timing.median_s, min(timing.wall_s), max(timing.wall_s))
        line = f"  {name:34}" + "".join(f"{s * 1e3:10.4g}" for s in seconds)
        line += f"{timing.median_processor_s * 1e3:11.4g}"
        line += f"{certainty.spread_text(timing.wall_s):>10}"
        bound = "more than " if name in c.stopped else ""
        lines.append(line + ("" if name == VL_MAMBA else f"  {bound}{c.speedup(name):.3g}x faster"))
    for name, peak in (c.peak_bytes or {}).items():
        bound = "more than " if name in c.stopped else ""
        more = "" if name == VL_MAMBA else f"  {bound}{c.memory_ratio(name):.3g}x VL-Mamba's"
        lines.append(f"  {name + ', peak memory':34}{peak / 2**30:10.4g} GiB{more}")
    if c.floor_s is not None:
        reached = c.floor_s / c.timings[VL_MAMBA].median_s
        lines.append(
            f"  {'machine limit':34}{c.floor_s * 1e3:10.4g}  VL-Mamba reaches {reached:.0%}"
        )
    runs = {name: timing.wall_s for name, timing in c.timings.items()}
    return [*lines, *(f"  {line}" for line in [certainty.verdict(runs)] if line)]


def _notes(results: Results) -> list[str]:
    notes = []
    if results.scan_errors is not None:
        errors = ", ".join(f"{k} {v:.1e}" for k, v in results.scan_errors.items())
        notes.append(f"scan error against float64: {errors}")
    if results.logits_error is not None:
        notes.append(
            f"logits against transformers' Mamba, same weights: {results.logits_error:.1e}"
        )
    if results.invariance is not None:
        i = results.invariance
        notes.append(
            f"batch invariance ({i.model}; {', '.join(i.tasks)}): {i.different} of {i.questions} "
            f"answers differ; logits differ by {i.logits_error:.1e}"
        )
        notes += [
            f"  {kind}: {a.different} differ, {a.from_float32} are other than float32's"
            for kind, a in i.others.items()
        ]
    return notes
