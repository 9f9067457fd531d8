"""Typed fields that are flags too: what each one says, and whether a resumed run may change it.

    @dataclass(frozen=True)
    class Arguments:
        lr: float = flag(help="the peak learning rate")
        save_every: int = flag(500, on_resume=OnResume.FREE)

    add_flags(parser, Arguments)          # --lr FLOAT (required), --save-every INT

A new flag is one field: the parser, the saved settings and the check on resume are made of them.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from dataclasses import MISSING, Field
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

NOT_ONE_VALUE = (type(None), Ellipsis)


class OnResume(Enum):
    """What a field means to a run that goes on from a checkpoint."""

    SAME = "it decides the result: saved, and a resumed run must have the same"
    LENGTH = "how long the run is: saved, and --resume longer may change it"
    FREE = "saved, and a resumed run may change it: it says how, not what"
    COMMAND = "of this command alone: not saved"


def flag(
    default: Any = MISSING,
    *,
    on_resume: OnResume = OnResume.SAME,
    help: str | None = None,
    metavar: str | None = None,
) -> Any:
    """A dataclass field that `add_flags` makes a flag of; without a default it is required."""
    metadata = {"on_resume": on_resume, "help": help, "metavar": metavar}
    return dataclasses.field(default=default, metadata=metadata)


def fields(owner: Any, *policies: OnResume) -> Iterator[Field[Any]]:
    """The fields of a dataclass or an instance that have one of the policies (none named: all)."""
    for field in dataclasses.fields(owner):
        if not policies or on_resume(field) in policies:
            yield field


def on_resume(field: Field[Any]) -> OnResume:
    """A field's policy; one that says nothing decides the result."""
    return field.metadata.get("on_resume", OnResume.SAME)


def add_flags(
    parser: argparse._ActionsContainer, owner: type[Any], overriding: bool = False
) -> None:
    """A flag for each field of the dataclass `owner`, of the field's type.

    overriding: the flags are laid over a value from elsewhere, so one that is left out gives None,
    nothing is required, and a switch can be turned off (--no-NAME).
    """
    hints = get_type_hints(owner)
    for field in dataclasses.fields(owner):
        options: dict[str, Any] = {"help": field.metadata.get("help")}
        options |= _options_of(hints[field.name])
        if field.metadata.get("metavar"):
            options["metavar"] = field.metadata["metavar"]
        if overriding:
            if options.get("action"):
                options["action"] = argparse.BooleanOptionalAction
            options["default"] = None
        elif field.default is MISSING:
            options["required"] = True
        else:
            options["default"] = field.default
        parser.add_argument(f"--{field.name.replace('_', '-')}", **options)


def _options_of(hint: Any) -> dict[str, Any]:
    """How argparse reads a value of a type: bool, int, float, str, Path, Literal, a tuple, None."""
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    options = {"nargs": "+"} if get_origin(hint) is tuple else {}
    members = [kind for kind in get_args(hint) if kind not in NOT_ONE_VALUE] or [hint]
    if get_origin(members[0]) is tuple:  # tuple[...] | None
        return _options_of(members[0])
    return {"action": "store_true"} if members == [bool] else options | {"type": members[0]}


def given(owner: type[Any], parsed: argparse.Namespace) -> dict[str, Any]:
    """What was parsed for each field of `owner`, lists as tuples."""
    found = {field.name: getattr(parsed, field.name) for field in dataclasses.fields(owner)}
    return {name: tuple(v) if isinstance(v, list) else v for name, v in found.items()}


def settings(instance: Any) -> dict[str, Any]:
    """The fields that are saved with a run, as JSON holds them."""
    kept = fields(instance, OnResume.SAME, OnResume.LENGTH, OnResume.FREE)
    return {field.name: json_value(getattr(instance, field.name)) for field in kept}


def json_value(value: Any) -> Any:
    """A field's value as JSON holds it: paths as text, tuples as lists."""
    if isinstance(value, tuple):
        return [json_value(one) for one in value]
    return str(value) if isinstance(value, Path) else value
