"""Typed fields that are flags too: what each one says, may be, and may become on resume.

    @dataclass(frozen=True)
    class Arguments:
        lr: float = flag(above=0, help="the peak learning rate")
        save_every: int = flag(500, at_least=1, on_resume=OnResume.FREE)

    add_flags(parser, Arguments)          # --lr FLOAT (required), --save-every INT
    check(Arguments(lr=0.0))              # UserError: lr is 0.0; expected a positive number

A new flag is one field: the parser, the saved settings and the checks are made of them.  A field
made by `group` holds another dataclass of such fields; saved and compared, they stand in its place.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Container, Iterator
from dataclasses import MISSING, Field
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from vlmamba_core.errors import UserError

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
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Any:
    """A dataclass field that `add_flags` makes a flag of; without a default it is required.

    above, at_least, at_most: what `check` expects of a value that is not None.
    """
    metadata = {"on_resume": on_resume, "help": help, "metavar": metavar}
    bounds = {"above": above, "at_least": at_least, "at_most": at_most}
    return dataclasses.field(default=default, metadata=metadata | bounds)


def group() -> Any:
    """A field (default None) that holds a dataclass whose flags stand beside the others."""
    return dataclasses.field(default=None, metadata={"group": True})


def fields(owner: Any, *policies: OnResume) -> Iterator[Field[Any]]:
    """The fields of a dataclass or an instance that have one of the policies (none named: all).

    Groups and what they hold are left out: see `values`.
    """
    for field in dataclasses.fields(owner):
        if not field.metadata.get("group") and (not policies or on_resume(field) in policies):
            yield field


def values(instance: Any, *policies: OnResume) -> Iterator[tuple[Field[Any], Any]]:
    """(field, its value) of an instance and of its groups, for the policies (none named: all)."""
    for field in fields(instance, *policies):
        yield field, getattr(instance, field.name)
    for field in dataclasses.fields(instance):
        if field.metadata.get("group"):
            yield from values(getattr(instance, field.name), *policies)


def on_resume(field: Field[Any]) -> OnResume:
    """A field's policy; one that says nothing decides the result."""
    return field.metadata.get("on_resume", OnResume.SAME)


def add_flags(
    parser: argparse._ActionsContainer,
    owner: type[Any],
    overriding: bool = False,
    only: Container[str] | None = None,
) -> None:
    """A flag for each field of the dataclass `owner` (or those that `only` names), of its type.

    overriding: the flags are laid over a value from elsewhere, so one that is left out gives None,
    nothing is required, and a switch can be turned off (--no-NAME).
    """
    hints = get_type_hints(owner)
    for field in fields(owner):
        if only is not None and field.name not in only:
            continue
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
    found = {field.name: getattr(parsed, field.name) for field in fields(owner)}
    return {name: tuple(v) if isinstance(v, list) else v for name, v in found.items()}


def check(instance: Any) -> None:
    """Raise UserError unless each field's value is of its type, finite and within its bounds.

    Types: those of one value (bool, int, float, str, Path, None) and their unions; a whole number
    will do for a float.
    """
    hints = get_type_hints(type(instance))
    for field in fields(instance):
        value = getattr(instance, field.name)
        _check_kind(field.name, value, get_args(hints[field.name]) or (hints[field.name],))
        expected = _out_of_bounds(value, field.metadata) if value is not None else None
        if expected:
            raise UserError(f"{field.name} is {value!r}; expected {expected}")


def _check_kind(name: str, value: Any, kinds: tuple[type, ...]) -> None:
    of_a_number = isinstance(value, int) and not isinstance(value, bool) and float in kinds
    fits = any(type(value) is k or (k is Path and isinstance(value, k)) for k in kinds)
    if not (fits or of_a_number) or (isinstance(value, float) and not math.isfinite(value)):
        wanted = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
        raise UserError(f"{name} is {value!r}; expected {wanted}")


def _out_of_bounds(value: Any, bounds: Any) -> str | None:
    """What was expected, where a value is not within the bounds of `flag`."""
    above, least, most = (bounds.get(name) for name in ("above", "at_least", "at_most"))
    if above is not None and not value > above:
        return "a positive number" if above == 0 else f"more than {above}"
    if least is not None and value < least:
        return "0 or more" if least == 0 else f"at least {least}"
    return f"at most {most}" if most is not None and value > most else None


def settings(instance: Any) -> dict[str, Any]:
    """The fields that are saved with a run, groups' among them, as JSON holds them."""
    kept = values(instance, OnResume.SAME, OnResume.LENGTH, OnResume.FREE)
    return {field.name: json_value(value) for field, value in kept}


def json_value(value: Any) -> Any:
    """A field's value as JSON holds it: paths as text, tuples as lists."""
    if isinstance(value, tuple):
        return [json_value(one) for one in value]
    return str(value) if isinstance(value, Path) else value
