"""What a teacher says of each sample, kept on disk: a second epoch or run does not ask it again.

    cache = open_cache(Path("runs/teacher"), teacher, {"temperature": 1.0, ...})
    keys = row_keys(teacher, batch.inputs)       # a key a row, None where nothing is supervised
    cache.put(keys[0], {"hidden": hidden})
    cache.get(keys[0])                           # the same tensors, or None

A folder per teacher (named by a hash of its weights, its configuration and what is asked of it)
holds one safetensors file a sample, KEY[:2]/KEY.safetensors, with a checksum (CRC-32) in its
header.  A file is written under parts/ and moved, so that a killed run leaves whole files alone
and several processes may write at once: of one key all write the same.  A damaged file counts as
absent and is written anew.

The cache of features (vlmamba/data/feature_cache.py) does not serve here: its rows are of one size,
known before training by the picture's name, and have one writer at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import zlib
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vlmamba.data.feature_cache import weights_fingerprint
from vlmamba_core.errors import UserError
from vlmamba_core.folder import write_atomically
from vlmamba_core.tokens import IGNORE

IMAGES = ("pixel_values", "image_features")
ABANDONED_S = 3600  # a part of this age belongs to a killed process
Tensors = dict[str, Tensor]


class TeacherCache:
    """Named tensors by key, one file each."""

    def __init__(self, folder: Path) -> None:
        """Open or create the cache in `folder`. Raises UserError where that cannot be written."""
        self.folder, self.parts = folder, folder / "parts"
        try:
            self.parts.mkdir(parents=True, exist_ok=True)
            for part in self.parts.iterdir():
                if time.time() - part.stat().st_mtime > ABANDONED_S:
                    part.unlink(missing_ok=True)
        except FileNotFoundError:
            pass  # another process has moved or removed a part meanwhile
        except OSError as error:
            raise _unwritable(folder, error) from error

    def path(self, key: str) -> Path:
        """Where the tensors of `key` are kept."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def get(self, key: str) -> Tensors | None:
        """The tensors kept under `key`, on the CPU; None if there are none or they are damaged."""
        try:
            with safe_open(self.path(key), framework="pt") as file:
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                sound = (file.metadata() or {}).get("crc32") == _checksum(found)
        except (OSError, SafetensorError):
            return None
        return found if sound else None

    def put(self, key: str, tensors: Tensors) -> None:
        """Keep `tensors` under `key`. Raises UserError when the disk refuses."""
        target, part = self.path(key), self.parts / f"{key}.{os.getpid()}"
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        try:
            target.parent.mkdir(exist_ok=True)
            part.write_bytes(save(tensors, {"crc32": _checksum(tensors)}))
            part.replace(target)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise _unwritable(self.folder, error) from error


def open_cache(root: Path, teacher: Any, asked: dict[str, Any]) -> TeacherCache:
    """The cache under `root` of what `asked` says of this teacher.

    Raises UserError where `root` cannot be written.
    """
    description = {"asked": asked, "config": teacher.config.to_dict()}
    for how_saved in ("dtype", "transformers_version", "_name_or_path"):
        description["config"].pop(how_saved, None)  # says nothing of what it answers
    cache = TeacherCache(root / weights_fingerprint(teacher, description))
    text = json.dumps(description, indent=2, default=str) + "\n"
    write_atomically(cache.folder / "meta.json", text)
    return cache


def row_keys(teacher: Any, inputs: Tensors) -> list[str | None]:
    """A key for each row of a batch on the CPU: its tokens, what is supervised, its pictures.

    Tokens behind the last supervised one, padding among them, do not count, for a causal model
    has not read them.  None: a row in which nothing is supervised.
    """
    keys: list[str | None] = []
    pictures = images_of_rows(teacher, inputs)
    for ids, labels, shown in zip(inputs["input_ids"], inputs["labels"], pictures, strict=True):
        supervised = (labels[1:] != IGNORE).nonzero().flatten() + 1
        if not len(supervised):
            keys.append(None)
            continue
        digest = hashlib.blake2b(digest_size=16)
        for tensor in (ids[: int(supervised[-1]) + 1], supervised, *shown.values()):
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(_bytes(tensor))
        keys.append(digest.hexdigest())
    return keys


def images_of_rows(teacher: Any, inputs: Tensors) -> list[Tensors]:
    """The pictures of each row under the name of their argument; none: an empty dictionary."""
    name = next((name for name in IMAGES if name in inputs), None)
    if name is None:
        return [{} for _ in inputs["input_ids"]]
    counts = teacher.images_per_row(inputs["input_ids"], None, len(inputs[name]))
    bounds = pairwise(accumulate(counts, initial=0))
    return [{name: inputs[name][start:end]} if end > start else {} for start, end in bounds]


def some_rows(teacher: Any, inputs: Tensors, rows: list[int]) -> Tensors:
    """The batch of these rows alone, without labels, with their own pictures."""
    of_all = images_of_rows(teacher, inputs)
    pictures = [of_all[row] for row in rows]
    names = {name for shown in pictures for name in shown}
    images = {name: torch.cat([s[name] for s in pictures if s]) for name in names}
    return {"input_ids": inputs["input_ids"][rows], **images}


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _checksum(tensors: Tensors) -> str:
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(_bytes(tensors[name]), zlib.crc32(name.encode(), total))
    return str(total)


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(f"cannot write {folder}: {error.strerror}; give another --teacher-cache")
