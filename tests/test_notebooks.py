"""The notebooks: valid, without outputs, and every cell runs at small size.

Their code cells are executed in order in one namespace, in this process, with SMALL = True. What
would start processes of its own (training cells, points of a profile) runs here instead: loading
torch a dozen times would take minutes.
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import matplotlib
import pytest
from accelerate.state import AcceleratorState
from test_ablate import in_this_process

from harness.ablation import cells
from harness.runs.points import Row
from harness.speed.sweep import lengths, measure, worker
from harness.speed.sweep.points import Point, row_of

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NAMES = ("01_quickstart", "02_scan_ablation", "03_latency")


def code_cells(name: str) -> list[str]:
    """The source of every code cell; the notebook's form is checked on the way."""
    notebook = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["metadata"]["language_info"]["name"]) == (4, "python")
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in notebook["cells"]:
        assert cell["cell_type"] in ("code", "markdown")
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
    return ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]


@pytest.fixture
def shown(monkeypatch) -> list:
    """What a notebook displays; IPython is not needed."""
    objects: list = []
    ipython = types.ModuleType("IPython.display")
    ipython.display, ipython.SVG = objects.append, lambda data: data
    monkeypatch.setitem(sys.modules, "IPython.display", ipython)
    return objects


def launch(point: Point) -> Row:
    """A point in this process."""
    found = worker.outcome(point)
    return row_of(point, found["status"], found["detail"], found["result"])


@pytest.mark.parametrize("name", NAMES)
def test_every_cell_runs_at_small_size(name, tmp_path, monkeypatch, shown, capsys):
    matplotlib.use("agg")
    AcceleratorState._reset_state(reset_partial_state=True)  # one state a process, else
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    monkeypatch.setattr(cells, "execute", in_this_process)
    monkeypatch.setattr(lengths, "launch", launch)
    monkeypatch.setattr(lengths, "measure_machine", measure.measure_machine)
    namespace: dict = {"__name__": "__main__"}
    sources = code_cells(name)
    assert sources[0] == "SMALL = False"
    for number, source in enumerate(["SMALL = True", *sources[1:]], 1):
        exec(compile(source, f"{name} cell {number}", "exec"), namespace)
        assert "error:" not in capsys.readouterr().err
    made = {"01_quickstart": "quickstart.html", "02_scan_ablation": "ablation/scan/record.json"}
    assert (Path("runs") / made.get(name, "profile/record.json")).exists()
    assert len(shown) == (3 if name == "03_latency" else 0)


def test_no_notebook_is_left_out():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(NAMES)
