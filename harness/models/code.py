"""Which code makes the answers of this project's own models."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "vlmamba"


@functools.cache
def code_sha256() -> str:
    """A digest of the sources that answers depend on: the model's code, not the harness's."""
    total = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*")):
        if path.suffix in (".py", ".cpp", ".h") and "data" not in path.relative_to(PACKAGE).parts:
            total.update(str(path.relative_to(PACKAGE)).encode() + b"\0" + path.read_bytes())
    return total.hexdigest()
