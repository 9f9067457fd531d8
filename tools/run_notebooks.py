"""Run the notebooks as they stand and keep their outputs in them: `make notebooks`.

    python tools/run_notebooks.py             # needs the extra `notebooks`; half a minute
    python tools/run_notebooks.py 02_scan_ablation

Progress bars and notes (standard error) are left out, and times of execution: a notebook changes
where its results do.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from vlmamba_core.cli import cli
from vlmamba_core.names import choose

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
MOST_BYTES = 300_000  # of one notebook with its pictures
LONGEST_S = 600  # of a cell


def executed(file: Path, folder: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of a new kernel in `folder`. Raises where a cell does."""
    notebook = nbformat.read(file, as_version=4)
    place = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=LONGEST_S, kernel_name="python3", resources=place).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
            for output in cell.outputs:
                if "image/jpeg" in output.get("data", {}):  # Pillow gives both, a PNG the larger
                    output.data.pop("image/png", None)
    notebook.metadata.language_info = {"name": "python"}
    return notebook


@cli
def main() -> int:
    """Write the notebooks; 1 where one grew too large."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="default: all")
    known = sorted(file.stem for file in FOLDER.glob("*.ipynb"))
    names = [choose("notebook", name, known) for name in parser.parse_args().names] or known
    for name in names:
        file = FOLDER / f"{name}.ipynb"
        with tempfile.TemporaryDirectory() as folder:
            text = nbformat.writes(executed(file, Path(folder))) + "\n"
        if len(text) > MOST_BYTES:
            print(f"{file} would have {len(text)} bytes; at most {MOST_BYTES}", file=sys.stderr)
            return 1
        file.write_text(text, encoding="utf-8")
        print(f"{file}: {len(text)} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
