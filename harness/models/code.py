"""Which code makes the answers of this project's own models.

Old answers stand for new ones only where it is the same.  Of `vlmamba` everything counts but what
trains, converts, draws or serves: a new file counts until it is named here.  What is left out is
never imported by what answers (`tests/test_code_digest.py`).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUFFIXES = (".py", ".cpp", ".h")
COMMANDS = ("__main__.py", "ask.py", "experts.py", "quantize.py", "serve.py", "train.py")
LEFT_OUT = ("convert", "data", "demo", "serving", "training", *COMMANDS)  # of vlmamba
COUNTED = (  # all the same
    "vlmamba/data/decode.py",  # the pixels that a model is shown
    "vlmamba_core/tokens.py",
)


@functools.cache
def code_sha256() -> str:
    """A digest of the sources that answers depend on: the model's code, not the harness's."""
    total = hashlib.sha256()
    for path in sorted(_sources()):
        total.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return total.hexdigest()


def _sources() -> Iterator[Path]:
    package = ROOT / "vlmamba"
    for path in package.rglob("*"):
        if path.suffix in SUFFIXES and path.relative_to(package).parts[0] not in LEFT_OUT:
            yield path
    for name in COUNTED:
        yield ROOT / name
