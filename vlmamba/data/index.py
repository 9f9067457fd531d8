"""What one look at a data file found, written once: where its records lie, and which can be used.

    OUT/samples.npz     offsets of the records, `llava.SampleIndex`, and what they depend on

The main process parses every record, counts its tokens and looks for every picture (558,000 files
on a network disk); the others, and a run that is resumed, read the result.  So all of them, and a
run before and after a kill, agree on the samples, whatever happened to the folder of pictures
meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from vlmamba.data.llava import LlavaFile, SampleIndex

ARRAYS = ("starts", "ends", "usable", "lengths")


def file_digest(path: Path) -> str:
    """BLAKE2b of a file's bytes, 32 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def write(path: Path, file: LlavaFile, found: SampleIndex, settings: dict[str, Any]) -> None:
    """Write the index; `settings` say what it holds for, as JSON. A killed writer leaves none."""
    partial = path.with_name(f".{path.name}.partial")
    notes = {"settings": settings, "skipped": dict(found.skipped), "first": found.first}
    held = (file.starts, file.ends, found.usable, found.lengths)
    arrays: dict[str, Any] = dict(zip(ARRAYS, held, strict=True))
    arrays["notes"] = np.frombuffer(json.dumps(notes).encode(), dtype=np.uint8)
    with open(partial, "wb") as out:
        np.savez(out, **arrays)
        out.flush()
        os.fsync(out.fileno())
    partial.replace(path)


def read(path: Path, data: Path, settings: dict[str, Any]) -> tuple[LlavaFile, SampleIndex] | None:
    """The data file and what was found in it; None if no index of these settings is there."""
    try:
        with np.load(path) as saved:
            notes = json.loads(saved["notes"].tobytes())
            starts, ends, usable, lengths = (saved[name] for name in ARRAYS)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    if notes.get("settings") != json.loads(json.dumps(settings)):
        return None
    found = SampleIndex(usable, lengths, Counter(notes["skipped"]), notes["first"])
    return LlavaFile(data, (starts, ends)), found
