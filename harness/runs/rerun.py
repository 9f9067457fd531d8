"""`harness.run --from-record FILE`: what differs between the record's settings and those at hand.

    for line in rerun.differences(before, {"model": {"sha256": ...}, "settings": {...}}): ...

A rerun with other weights, rows, packages or code may give other answers.  It is made all the same;
every difference is one line of warning, known before the first question where that is possible.
What another run has finished in a folder is not replaced without being asked (`refuse_another`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from harness.runs import older
from vlmamba_core.errors import UserError

COMPARED = {"model": ("sha256",), "data": None, "settings": None}  # None: all of it
TWICE = ("settings.torch", "settings.transformers")  # among the packages too
SHOWN = 60  # characters of a value
# arguments that say how answers are made or graded, not which; a run may go on under others
HOW = frozenset(("batch_size", "device", "backend", "judge", "judge_model", "judge_key_env"))


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
    return older.record(json.loads(file.read_text(encoding="utf-8"))) if file else None


def finished(folder: Path) -> dict[str, Any] | None:
    """The record of the run that was finished in `folder`; None where there is none.

    Raises UserError for a record.json that nobody can read: it is not ours to replace.
    """
    file = folder / "record.json"
    try:
        record = older.record(json.loads(file.read_text(encoding="utf-8")))
        return {"kind": record["kind"], **record}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{file} is there and is not a run's record ({error!r}); give another --out"
        ) from error


def refuse_another(
    folder: Path,
    before: Mapping[str, Any] | None,
    kind: str,
    names: Iterable[str] = (),
    arguments: Mapping[str, Any] | None = None,
) -> None:
    """Raise UserError unless a run of this kind, tasks and arguments is what `folder` holds.

    before: the record there; None, where no run was finished, lets every run go on.
    """
    if before is None:
        return
    kept, ran = before.get("arguments"), before.get("tasks")
    kept, ran = (value if isinstance(value, Mapping) else {} for value in (kept, ran))
    differs = [f"it is of kind {before['kind']}"] if before["kind"] != kind else []
    if not differs and names and set(names) != set(ran):
        differs.append(f"its tasks are {', '.join(ran)}")
    differs += [
        f"its {name} is {_text(kept[name])}"
        for name, value in ({} if differs else arguments or {}).items()
        if name not in HOW and name != "tasks" and kept.get(name, value) != value
    ]
    if differs:
        answers = sum(entry.get("n", 0) for entry in ran.values() if isinstance(entry, Mapping))
        scored = f" ({answers} answers scored)" if answers else ""
        replace = "" if arguments is None else ", or --overwrite to replace it"
        raise UserError(
            f"{folder} holds another finished run{scored}: {'; '.join(differs)}; give another "
            f"--out{replace}"
        )


def refuse_other_weights(
    folder: Path, before: Mapping[str, Any] | None, sha256: str | None
) -> None:
    """Raise UserError where the run in `folder` was made by a model of the same name, not this."""
    model = before.get("model") if before else None
    found = model.get("sha256") if isinstance(model, Mapping) else None
    if sha256 is not None and found not in (None, sha256):
        raise UserError(
            f"{folder} holds a finished run of other weights of this name (sha256 "
            f"{_text(found)}); give another --out, or --overwrite to replace it"
        )


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
