"""`harness.run --from-record FILE`: what differs between the record's terms and those at hand.

    for line in rerun.differences(before, {"model": {"sha256": ...}, "terms": {...}}): ...

A rerun with other weights, rows, packages or code may give other answers.  It is made all the same;
every difference is one line of warning, known before the first question where that is possible.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

COMPARED = {"model": ("sha256",), "data": None, "terms": None}  # None: all of it
TWICE = ("terms.torch", "terms.transformers")  # among the packages too
SHOWN = 60  # characters of a value


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """ "NAME was VALUE, here it is VALUE" for what `now` has and an older record has otherwise."""
    lines = []
    for part, names in COMPARED.items():
        if part in now:
            old, new = (dict(_leaves(part, record.get(part), names)) for record in (before, now))
            lines += [
                f"{name} was {_text(old.get(name))}, here it is {_text(new.get(name))}"
                for name in dict.fromkeys([*old, *new])
                if old.get(name) != new.get(name) and name not in TWICE
            ]
    return lines


def read(file: Path | None) -> dict[str, Any] | None:
    """The record in `file`, which `harness.run` has checked; None where the run is no rerun."""
    return json.loads(file.read_text(encoding="utf-8")) if file else None


def warn(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> None:
    """Print each difference from the record of before, if there is one."""
    for line in differences(before, now) if before else ():
        print(f"warning: not as in the record: {line}", file=sys.stderr)


def _leaves(
    name: str, value: Any, only: tuple[str, ...] | None = None
) -> Iterator[tuple[str, object]]:
    """Every value inside nested tables, by its dotted name."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if only is None or key in only:
                yield from _leaves(f"{name}.{key}", inner)
    else:
        yield name, value


def _text(value: object) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
