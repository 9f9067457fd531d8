"""A finished sweep as tables for reading: points, growth with length, crossovers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from harness.runs.points import Row
from harness.speed import certainty, whole
from harness.speed.sweep.fits import Crossover
from harness.speed.sweep.summary import CROSSING, QUANTITIES, Profile, floors, growth, verdict

POINT_HEADERS = (
    *("model", "batch", "tokens", "image", "prefill s", "ttft s", "decode tok/s"),
    *("weights MiB", "peak MiB", "state MiB", "prefill / floor", "decode / floor"),
    *("runs", "prefill spread", "decode spread", "other load", "note"),
)
GROWTH_HEADERS = (
    *("model", "batch", "prefill exponent", "last step", "memory exponent"),
    *("state bytes a token", "decode memory, bytes a token"),
)
CROSSOVER_HEADERS = ("pair", "batch", "quantity", "VL-Mamba costs less from", "where")
MIB = 2**20


def point_rows(profile: Profile) -> list[list[str]]:
    """One line a point, measured or not."""
    return [_point_row(row, profile.machine) for row in profile.rows]


def _point_row(row: Row, machine: Mapping[str, Any]) -> list[str]:
    head = [row.model, str(row.batch_size), str(row.seq_len), str(row.image_tokens)]
    if row.result is None:
        unmeasured = ["-"] * (len(POINT_HEADERS) - len(head) - 1)
        return [*head, *unmeasured, f"{row.status}: {row.detail}"]
    r, ratio = row.result, floors(row, machine)
    return [
        *head,
        f"{QUANTITIES['prefill_s'](r):.4g}",
        f"{QUANTITIES['ttft_s'](r):.4g}",
        f"{r['decode_tok_per_s']:.4g}",
        f"{r['weight_bytes'] / MIB:.4g}",
        f"{r['peak_mem_bytes'] / MIB:.0f}",
        f"{r['state_bytes'] / MIB:.2f}",
        f"{ratio['prefill']:.2f}" if "prefill" in ratio else "-",
        f"{ratio['decode']:.2f}",
        str(len(r["prefill_s"])),
        certainty.spread_text(r["prefill_s"]),
        certainty.spread_text(r["decode_s"]),
        _cores(r.get("other_load_cores")),
        verdict(row),
    ]


def _cores(others: float | None) -> str:
    return "-" if others is None else f"{others:.1f} cores"


def growth_rows(profile: Profile) -> list[list[str]]:
    """One line a model and batch size: exponents and slopes with intervals."""
    rows = []
    for batch in profile.batch_sizes():
        for model in profile.models():
            found = growth(profile, model, batch)
            if found:
                keys = ("state_bytes_per_token", "decode_memory_slope")
                rows.append(
                    [
                        model,
                        str(batch),
                        _fit_text(found["prefill_exponent"]),
                        _step_text(found["prefill_last_step"]),
                        _fit_text(found["memory_exponent"]),
                        *(_fit_text(found[key]) for key in keys),
                    ]
                )
    return rows


def crossover_rows(profile: Profile) -> list[list[str]]:
    """One line a pair, batch size and quantity."""
    return [
        [f"{pair[0]} / {pair[1]}", str(batch), quantity, _tokens(found), found.note]
        for batch in profile.batch_sizes()
        for pair in profile.pairs()
        for quantity in CROSSING
        for found in [profile.crossover(pair, batch, quantity)]
    ]


def _tokens(found: Crossover) -> str:
    if found.length is None:
        return "-"
    return "at most " * found.at_most + f"{found.length:.0f} tokens"


def _step_text(step: Mapping[str, Any] | None) -> str:
    return "-" if step is None else f"x{step['factor']:.3g}, {step['start']} to {step['end']}"


def _fit_text(fit: Mapping[str, Any] | None) -> str:
    if fit is None:
        return "-"
    interval = "" if fit["low"] is None else f" [{fit['low']:.4g} to {fit['high']:.4g}]"
    return f"{fit['value']:.4g}{interval}"


def tables(profile: Profile) -> list[tuple[str, Sequence[str], list[list[str]]]]:
    """(title, headers, rows) of everything a profile has to say."""
    found: list[tuple[str, Sequence[str], list[list[str]]]] = []
    if profile.rows:
        found = [
            ("points", POINT_HEADERS, point_rows(profile)),
            ("growth with sequence length", GROWTH_HEADERS, growth_rows(profile)),
            ("crossovers", CROSSOVER_HEADERS, crossover_rows(profile)),
        ]
    if profile.whole:
        title = "whole models: one question with one image, encoder included, batch 1"
        found.append((title, whole.HEADERS, whole.table_rows(profile.whole)))
    return found
