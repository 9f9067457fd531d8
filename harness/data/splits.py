"""Which files of a folder hold the wanted split: the names that the hub and people give them.

    test-00000-of-00004.parquet, test-00000-of-00004-1f2e3d4c5b6a7980.parquet   the hub's shards
    test.parquet, test.jsonl                                                    a split in one file
    default/test/0000.parquet                                  the hub's own conversion to parquet

A name that says neither split nor shard could be anything: beside other files it is refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tasks.common import Hub
from vlmamba_core.errors import UserError

SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d{5,})-of-(?P<count>\d{5,})(-[0-9a-f]{8,64})?")
CONVERTED = re.compile(r"\d{4}")
SPLITS = {"train", "val", "validation", "dev", "test", "testdev"}
CACHE = re.compile(r"datasets--[^/]+--(?P<name>[^/]+)")  # the hub's cache: one data set's folder
NAMES_SHOWN = 8


class Name(NamedTuple):
    """What a file's name tells: its split, and which of how many shards it is (None: not told)."""

    split: str
    number: int | None = None
    of: int | None = None


def read_name(file: Path, wanted: str) -> Name | None:
    """What the name tells; None where it is not understood. `wanted` may be a split's own word."""
    if found := SHARD.fullmatch(file.stem):
        return Name(found["split"], int(found["number"]), int(found["count"]))
    if CONVERTED.fullmatch(file.stem) and file.parent.name in {wanted, *SPLITS}:
        return Name(file.parent.name, int(file.stem))
    return Name(file.stem) if file.stem in {wanted, *SPLITS} else None


def of_split(
    files: Sequence[Path], root: Path, hub: Hub, chosen: bool = False, known: str = ""
) -> list[Path]:
    """The files of the hub's config and split, all shards of them.

    One file alone may have any name that is no other split's, unless the split was `chosen` by
    hand. Raises UserError for a name that is not understood, files of other splits only, two
    files in one place and missing shards; each says what was found. `known` names further forms.
    """
    within = [file for file in files if hub.name in file.relative_to(root).parts] or list(files)
    names = {file: read_name(file, hub.split) for file in within}
    unknown = [file for file, name in names.items() if name is None]
    if len(within) == 1 and unknown and not chosen:
        return within
    if unknown:
        raise UserError(
            f"{root}: {listing(unknown, root)} does not say which split it holds; expected names "
            f"such as {hub.split}.parquet or {hub.split}-00000-of-00001.parquet{known}; found "
            f"{listing(within, root)}"
        )
    told = {file: name for file, name in names.items() if name is not None}
    kept = [file for file, name in told.items() if name.split == hub.split]
    if not kept:
        others = ", ".join(sorted({name.split for name in told.values()}))
        raise UserError(
            f"{root} has files of split {others}, not of {hub.split} (found "
            f"{listing(within, root)}); name the split to use with --split"
        )
    folders = {file.parent for file in kept}
    if len(folders) > 1:
        raise UserError(
            f"{root} has split {hub.split} in several folders (found {listing(kept, root)}); "
            "give the folder to use, or keep one"
        )
    return whole(kept)


def whole(files: Sequence[Path]) -> list[Path]:
    """The files by number; raises UserError where they are not each shard of one table, once."""
    named = [(read_name(file, file.stem) or Name(file.stem), file) for file in files]
    parts = sorted(named, key=lambda part: (part[0].number or 0, part[1]))
    numbers = [name.number for name, _ in parts if name.number is not None]
    counts = {name.of for name, _ in parts}
    folder, split = files[0].parent, parts[0][0].split
    if len(counts) > 1 or (len(numbers) or 1) != len(files) or len(set(numbers)) < len(numbers):
        raise UserError(
            f"{folder}: split {split} is there more than once (found {listing(files, folder)}); "
            "keep one copy of it"
        )
    count = counts.pop()
    needed = max(numbers) + 1 if numbers and count is None else count
    if numbers and numbers != list(range(needed or 0)):
        raise UserError(
            f"{folder / split}: {len(files)} of {needed} parquet shards are there (found "
            f"{listing(files, folder)}); get all"
        )
    return [file for _, file in parts]


def listing(files: Sequence[Path], root: Path) -> str:
    """Names for a message: the first few, and how many more there are."""
    names = [str(file.relative_to(root)) for file in sorted(files)]
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


def under(folder: Path, suffix: str) -> list[Path]:
    """Every file with the suffix below a folder, hidden ones apart; links are followed once."""
    return sorted(file for file in _walk(folder, set()) if file.suffix == suffix)


def _walk(folder: Path, seen: set[str]) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in seen:  # a link that leads back
        return
    seen.add(real)
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _walk(path, seen)
        elif path.is_file():
            yield path


def names_of(folder: Path) -> set[str]:
    """The data sets' names, in lower case, that a folder may go by: its own, or a link's target's.

    A folder of the hub's cache, or a snapshot in it, goes by the data set's.
    """
    lexical = Path(os.path.abspath(folder))
    places = (lexical.name, lexical.parent.parent.name)
    cached = {found["name"] for place in places if (found := CACHE.fullmatch(place))}
    return {name.lower() for name in cached | {lexical.name, folder.resolve().name}}


def snapshot(folder: Path) -> Path:
    """The folder itself; of a data set in the hub's cache the main snapshot, or the only one."""
    if not CACHE.fullmatch(Path(os.path.abspath(folder)).name):
        return folder
    try:
        main = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        main = ""
    snapshots = sorted(path for path in folder.glob("snapshots/*") if path.is_dir())
    named = [path for path in snapshots if path.name == main] or snapshots
    if len(named) > 1:
        raise UserError(
            f"{folder} has several snapshots ({listing(named, folder)}); give the one to use"
        )
    return named[0] if named else folder
