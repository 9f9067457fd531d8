"""Benchmark files of the demo world, in the column schema of the published data sets.

    python -m vlmamba.demo --out DIR --benchmarks all --split seen

One parquet file a task with embedded pictures; `datasets.load_dataset("parquet", ...)` yields them
as PIL images.  Splits: "seen" (the training styles, other scenes), "heldout" (a style that training
never shows) and "validation" (for tuning).  Equal arguments give equal rows.
"""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from vlmamba.demo.benchmarks.easy_vqa import easy_vqa
from vlmamba.demo.benchmarks.hub_schemas import features
from vlmamba.demo.benchmarks.mme import mme
from vlmamba.demo.benchmarks.multiple_choice import mmbench, scienceqa
from vlmamba.demo.benchmarks.pope import pope
from vlmamba.demo.benchmarks.retrieval import retrieval
from vlmamba.demo.benchmarks.sentences import coco_cap, mmvet
from vlmamba.demo.benchmarks.short_answers import gqa, textvqa, vqav2
from vlmamba.demo.benchmarks.source import Source
from vlmamba.demo.render import render
from vlmamba.demo.world import SPLITS, Scene, split_styles
from vlmamba_core.errors import UserError, unknown
from vlmamba_core.names import choose
from vlmamba_core.paths import cache_dir, file_sha256

# Task -> its rows, with hub columns; a picture is a `Scene` (drawn here), PNG bytes, or None, and a
# list of pictures where the column holds several.
ROWS: dict[str, Callable[[Source], list[dict]]] = {
    "pope": pope,
    "mme": mme,
    "vqav2": vqav2,
    "gqa": gqa,
    "scienceqa": scienceqa,
    "textvqa": textvqa,
    "mmbench": mmbench,
    "coco_cap": coco_cap,
    "mmvet": mmvet,
    "easy_vqa": easy_vqa,
    "retrieval": retrieval,
}
BENCHMARKS = tuple(ROWS)
REVISION = 1  # part of the cache's file names: raise it when rows or pictures change


def build_benchmark(
    task: str,
    out: Path,
    split: str = "seen",
    seed: int = 0,
    styles: Sequence[str] | None = None,
) -> Path:
    """Write `out`/TASK.parquet and return the folder `out`.

    `styles` replaces the split's emoji styles (to tune generalisation without the held-out one).
    Raises UserError for an unknown task or split, or a split that is for training.
    """
    if task not in ROWS:
        raise unknown("benchmark", task, ROWS)
    split = benchmark_split(split)
    source = Source(task, split, seed, tuple(styles or split_styles(split)))
    rows = [row | {"image": _embedded(row["image"])} for row in ROWS[task](source)]
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    _write(rows, task, out / f"{task}.parquet")
    return out


def benchmark_split(name: str) -> str:
    """A split that is not for training, as it is spelled. Raises UserError for others."""
    split = choose("split", name, SPLITS)
    if split == "train":
        raise UserError("benchmarks have no split 'train'; take validation, seen or heldout")
    return split


def demo_benchmark(task: str, split: str = "seen", seed: int = 0) -> Path:
    """The folder with the benchmark's file, written to the cache at the first call.

    A file that no longer has the digest beside it is written anew.
    """
    folder = cache_dir() / f"demo-v{REVISION}" / f"{split}-{seed}"
    file, digest = folder / f"{task}.parquet", folder / f"{task}.sha256"
    if not (file.exists() and digest.exists() and digest.read_text() == file_sha256(file)):
        build_benchmark(task, folder, split, seed)
        digest.write_text(file_sha256(file))
    return folder


def _write(rows: list[dict], task: str, path: Path) -> None:
    """Write a parquet file in one step: readers see it whole or not at all.

    The dictionary may grow large, so that a picture which many rows share is stored once.
    """
    table = pa.Table.from_pylist(rows, schema=features(task).arrow_schema)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        pq.write_table(table, part, dictionary_pagesize_limit=2**27)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _embedded(picture: Scene | bytes | list | None) -> dict | list | None:
    """An image column's value: the encoded picture, or a list of them."""
    if picture is None:
        return None
    if isinstance(picture, list):
        return [_embedded(one) for one in picture]
    if isinstance(picture, bytes):
        return {"bytes": picture, "path": None}
    return {"bytes": _jpeg(picture), "path": None}


@functools.lru_cache(maxsize=512)
def _jpeg(scene: Scene) -> bytes:
    file = io.BytesIO()
    render(scene).save(file, format="JPEG", quality=90)
    return file.getvalue()
