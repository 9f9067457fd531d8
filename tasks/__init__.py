"""The benchmarks, by name. Each folder is one benchmark; it loads when first asked for."""

from __future__ import annotations

import importlib
from pathlib import Path

from tasks.common import PROMPT_OPTIONS, Benchmark
from vlmamba_core.names import choose

__all__ = ["NAMES", "PROMPT_OPTIONS", "load"]

NAMES = tuple(sorted(file.parent.name for file in Path(__file__).parent.glob("*/__init__.py")))


def load(name: str) -> Benchmark:
    """The benchmark called `name`. Raises UserError that lists the known ones, nearest first."""
    name = choose("task", name, NAMES)
    return importlib.import_module(f"tasks.{name}").task
