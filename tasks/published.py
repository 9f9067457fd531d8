"""Benchmarks' own published files: which they are, where they lie, and their rows in hub columns.

A benchmark's `layout` finds its files in a folder (`--data DIR`) and reads them, or reads files
that are given by name (`--truth FILE`).  A row's image is the end of its path: the name alone where
that names one picture (COCO_val2014_000000000042.jpg), with folders where names repeat (test/2/
image.png); `image_files` finds it wherever the images were put.
"""

from __future__ import annotations

import filecmp
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import Any

from vlmamba_core.errors import UserError

Row = dict[str, Any]
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True)
class Layout:
    """One benchmark's published files.

    description: the files, for messages.  find(folder, split): those of a split, anywhere in the
    folder; empty if they are not there.  read(files, split): their rows; None where the files are
    something else.
    """

    description: str
    find: Callable[[Path, str], list[Path]]
    read: Callable[[Sequence[Path], str], list[Row] | None]


def read_json(path: Path) -> Any:
    """The value of a JSON file, or the list of values of a JSON lines file (any suffix).

    Blank lines are skipped. Raises UserError for an empty file and for the first bad line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} as UTF-8 text: {error}") from error
    if not text.strip():
        raise UserError(f"{path} is empty")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        lines = enumerate(text.split("\n"), 1)  # not splitlines: U+2028 may stand in a string
    return [_parse_line(path, number, line) for number, line in lines if line.strip()]


def _parse_line(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} line {number} is not JSON: {error}") from error


def find_files(folder: Path, *patterns: str) -> list[Path]:
    """The files in `folder` that match the first pattern with any, highest folder first."""
    files = walk(folder, lambda name: any(fnmatchcase(name, pattern) for pattern in patterns))
    for pattern in patterns:
        if found := [path for path in files if fnmatchcase(path.name, pattern)]:
            return found
    return []


def only(files: Sequence[Path]) -> list[Path]:
    """The highest of several copies of one file; raises UserError where they differ."""
    for other in files[1:]:
        if other.name == files[0].name and not filecmp.cmp(files[0], other, shallow=False):
            raise UserError(f"{files[0]} and {other} differ; give the folder of the one to use")
    return list(files[:1])


def one_of_each(folder: Path, *patterns: str) -> list[Path]:
    """The highest file for every pattern; empty where the first one has none.

    Raises UserError where there are several that differ.
    """
    found = [only(find_files(folder, pattern)) for pattern in patterns]
    return [path for paths in found for path in paths] if found[0] else []


def is_of(content: Any, *keys: str) -> bool:
    """Whether a JSON value is an object with all these keys."""
    return isinstance(content, Mapping) and all(key in content for key in keys)


def entries(content: Any, *keys: str) -> list[Row] | None:
    """The rows of a JSON lines file if all have these keys, else None; one line is one row."""
    rows: Any = [content] if isinstance(content, Mapping) else content
    return list(rows) if records_of(rows, *keys) else None


def records_of(content: Any, *keys: str) -> bool:
    """Whether a JSON value is an object or list of objects that have all these keys."""
    rows = content.values() if isinstance(content, Mapping) else content
    if not isinstance(rows, Iterable) or isinstance(rows, str):
        return False
    rows = list(rows)
    return bool(rows) and all(is_of(row, *keys) for row in rows)


def image_files(folder: Path, near: Path) -> Callable[[str], Path | None]:
    """A look-up of images anywhere in `folder` (links followed) by the end of their path.

    Of several that fit, the one nearest to the file `near` is taken. Raises UserError where two are
    as near and differ: either could be meant.
    """
    by_name: dict[str, list[Path]] = {}
    for path in walk(folder, _may_be_picture):
        by_name.setdefault(path.name, []).append(path)

    def find(name: str) -> Path | None:
        wanted = PurePath(name).parts
        named = by_name.get(wanted[-1], []) if wanted else []
        fitting = [path for path in named if path.parts[-len(wanted) :] == wanted]
        if len(fitting) < 2:
            return next(iter(fitting), None)
        shared = [len(os.path.commonpath((path, near))) for path in fitting]
        nearest = [p for p, length in zip(fitting, shared, strict=True) if length == max(shared)]
        return only(nearest)[0]

    return find


def _may_be_picture(name: str) -> bool:
    return name.lower().endswith(PICTURES) or "." not in name  # SEED-Bench's have no suffix


def walk(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> list[Path]:
    """The files of wanted names in `folder`, links to folders followed, highest first."""
    found: list[Path] = []
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link back to a folder above
            folders.clear()
            continue
        seen.add(real)
        found += [Path(place) / name for name in names if wanted(name)]
    return sorted(found, key=lambda path: (len(path.parts), path))
