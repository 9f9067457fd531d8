"""The benchmarks, by name. Each folder is one benchmark; it loads when first asked for."""

from __future__ import annotations

import importlib

from tasks.common import Benchmark
from tasks.errors import unknown

NAMES = (
    "pope",
    "mme",
    "vqav2",
    "gqa",
    "scienceqa",
    "textvqa",
    "mmbench",
    "coco_cap",
    "mmvet",
    "easy_vqa",
)


def load(name: str) -> Benchmark:
    """The benchmark called `name`. Raises UserError that lists the known ones, nearest first."""
    if name not in NAMES:
        raise unknown("task", name, NAMES)
    return importlib.import_module(f"tasks.{name}").task
