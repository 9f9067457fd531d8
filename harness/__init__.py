"""The harness: benchmarks run through lmms-eval, scored, given intervals and written as records.

Start at `harness.run` (`python -m harness.run --help`).
"""

import sys
from importlib.util import find_spec
from pathlib import Path

from vlmamba_core import __version__

__all__ = ["__version__"]
PARTS = {"tasks": "common.py", "vlmamba": "config.py"}  # what tells the package from a namesake


def _refuse_shadows() -> None:
    """End in one line where a file of the user's has the name of a package that comes with ours.

    `python -m` looks into the current folder first, so a tasks.py there hides the benchmarks.
    """
    for name, part in PARTS.items():
        spec = find_spec(name)
        found = Path(spec.origin).resolve() if spec and spec.origin else None
        if found is not None and not (found.parent / part).is_file():
            line = (
                f"{found} hides the package {name!r} of vlmamba-harness; rename it, or work in "
                "another folder"
            )
            if sys.argv[:1] != ["-m"]:  # imported, not run as `python -m harness.run`
                raise ImportError(line)
            print(f"error: {line}", file=sys.stderr)
            raise SystemExit(2)


_refuse_shadows()
