"""The notebooks: their outputs are there, every cell runs, and running them again changes nothing.

Every code cell is executed in order in one namespace, in this process, at small size.  What would
start processes of its own (training cells, points of a profile) runs here instead: loading torch a
dozen times would take minutes.  As they stand, on committed results, they run in a kernel of
their own; the quickstart, which asks 1,296 questions, with `pytest -m soak`.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from accelerate.state import AcceleratorState
from test_ablate import in_this_process

from harness.ablation import jobs
from harness.runs.points import Row
from harness.speed.sweep import lengths, measure, worker
from harness.speed.sweep.points import Point, row_of

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
SMALL = {  # the first code cell as it stands, and the one that makes the notebook small
    "01_quickstart": ("SMALL = False", "SMALL = True"),
    "02_scan_ablation": ('RUN = "committed"', 'RUN = "small"'),
    "03_latency": ('RUN = "committed"', 'RUN = "small"'),
}
MOST_BYTES = 400_000  # of all notebooks together
KINDS = {"text/plain", "text/markdown", "image/png", "image/jpeg", "image/svg+xml"}
TIMES = re.compile("^.*questions/s;.*$", re.MULTILINE)


def read(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))


def code(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def sources(name: str) -> list[str]:
    """The source of every code cell."""
    return ["".join(cell["source"]) for cell in code(read(name))]


def said(cells: list[dict[str, Any]]) -> list[list[tuple[str, str]]]:
    """What each cell shows: text as it stands, but for times; of pictures that there is one."""
    found = []
    for cell in cells:
        shown = []
        for output in cell["outputs"]:
            if output["output_type"] == "stream":
                shown.append(("text", TIMES.sub("", "".join(output["text"]))))
            for kind, data in sorted(output.get("data", {}).items()):
                text = "" if kind.startswith("image/") else "".join(data)
                shown.append((kind, text))
        found.append(shown)
    return found


@pytest.mark.parametrize("name", SMALL)
def test_the_outputs_are_there(name):
    notebook = read(name)
    assert (notebook["nbformat"], notebook["metadata"]["language_info"]["name"]) == (4, "python")
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    assert {cell["cell_type"] for cell in notebook["cells"]} == {"code", "markdown"}
    made = code(notebook)
    assert [cell["execution_count"] for cell in made] == list(range(1, len(made) + 1))
    outputs = [output for cell in made for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data"}
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert {kind for output in outputs for kind in output.get("data", {})} <= KINDS
    assert any(kind.startswith("image/") for o in outputs for kind in o.get("data", {}))
    assert sum(bool(cell["outputs"]) for cell in made) >= 2


def test_they_are_small_and_none_is_left_out():
    files = sorted(FOLDER.glob("*.ipynb"))
    assert [path.stem for path in files] == sorted(SMALL)
    assert sum(path.stat().st_size for path in files) < MOST_BYTES


@pytest.mark.parametrize("name", SMALL)
def test_what_the_cells_import_and_call_exists(name):
    """Names of modules, and what is taken from them; names of the notebook's own: ruff's F821."""
    modules: dict[str, types.ModuleType] = {}
    trees = [ast.parse(source) for source in sources(name)]
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                module = importlib.import_module(alias.name)
                modules[alias.asname or alias.name] = module
        elif isinstance(node, ast.ImportFrom):
            parent = importlib.import_module(node.module)
            for alias in node.names:
                try:
                    found = getattr(parent, alias.name)
                except AttributeError:
                    found = importlib.import_module(f"{node.module}.{alias.name}")
                if isinstance(found, types.ModuleType):
                    modules[alias.asname or alias.name] = found
    used = [
        (node.value.id, node.attr)
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    ]
    absent = [f"{n}.{a}" for n, a in used if n in modules and not hasattr(modules[n], a)]
    assert absent == []


@pytest.fixture
def shown(monkeypatch) -> list:
    """What a notebook displays, which is looked at in no kernel here."""
    objects: list = []
    ipython = types.ModuleType("IPython.display")
    ipython.display, ipython.SVG, ipython.Markdown = objects.append, str, str
    monkeypatch.setitem(sys.modules, "IPython.display", ipython)
    return objects


def launch(point: Point) -> Row:
    """A point in this process."""
    found = worker.outcome(point)
    return row_of(point, found["status"], found["detail"], found["result"])


@pytest.mark.parametrize("name", SMALL)
def test_every_cell_runs_at_small_size(name, tmp_path, monkeypatch, shown, capsys):
    matplotlib.use("agg")
    AcceleratorState._reset_state(reset_partial_state=True)  # one state a process, else
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    monkeypatch.setattr(jobs, "execute", in_this_process)
    monkeypatch.setattr(lengths, "launch", launch)
    monkeypatch.setattr(lengths, "measure_machine", measure.measure_machine)
    namespace: dict = {"__name__": "__main__"}
    first, *others = sources(name)
    assert first == SMALL[name][0]
    for number, source in enumerate([SMALL[name][1], *others], 1):
        exec(compile(source, f"{name} cell {number}", "exec"), namespace)
        assert "error:" not in capsys.readouterr().err
    made = {"01_quickstart": "quickstart.html", "02_scan_ablation": "ablation/scan/record.json"}
    assert (Path("runs") / made.get(name, "profile/record.json")).exists()
    assert len(shown) == {"01_quickstart": 1, "02_scan_ablation": 2, "03_latency": 3}[name]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("01_quickstart", marks=pytest.mark.soak),
        "02_scan_ablation",
        "03_latency",
    ],
)
def test_running_it_again_shows_the_same(name, tmp_path):
    from tools.run_notebooks import executed

    again = executed(FOLDER / f"{name}.ipynb", tmp_path)
    assert said(code(again)) == said(code(read(name)))
