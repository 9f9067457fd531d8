"""What the wheel holds and declares, and that its commands work without the source tree."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from vlmamba_core import __version__

ROOT = Path(__file__).parent.parent
PACKAGES = ("vlmamba_core", "vlmamba", "harness", "tasks")
# used where they are there, and never asked for: counters of an NVIDIA GPU
IF_THERE = {"pynvml", "triton"}  # triton comes with torch where it has GPUs
NO_SOURCE = ("__pycache__", ".venv", ".git", "build", "*.egg-info", ".*_cache")


def not_source(folder: str, names: list[str]) -> set[str]:
    """What of a folder is no source, for shutil.copytree."""
    results_of_commands = {"runs"} if Path(folder) == ROOT else set()
    return shutil.ignore_patterns(*NO_SOURCE)(folder, names) | results_of_commands


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def declared() -> list[str]:
    """Every requirement, with those of the extras."""
    extras = project()["optional-dependencies"].values()
    return [*project()["dependencies"], *(line for extra in extras for line in extra)]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imported() -> dict[str, str]:
    """Top-level module -> a file that imports it, of all but Python's own and ours."""
    found = {}
    for file in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            found |= {name.split(".")[0]: str(file.relative_to(ROOT)) for name in names}
    ours = {*PACKAGES, *sys.stdlib_module_names}
    return {name: file for name, file in found.items() if name not in ours}


def test_every_import_is_declared():
    names = {canonical(re.split(r"[^\w.-]", line)[0]) for line in declared()}
    owners = importlib.metadata.packages_distributions()
    missing = {
        module: file
        for module, file in imported().items()
        if module not in IF_THERE
        and not {canonical(owner) for owner in owners.get(module, [module])} & names
    }
    assert missing == {}


def test_errors_name_our_own_distribution():
    """`pip install X` in a message: X is declared, or is this project."""
    known = " ".join(declared())
    asked = set()
    for file in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        asked |= set(re.findall(r"pip install '?([\w.-]+)", file.read_text()))
    assert project()["name"] in asked
    assert {name for name in asked if name not in known} == {project()["name"]}


def test_transformers_is_new_enough_for_what_is_called():
    (line,) = (x for x in project()["dependencies"] if x.startswith("transformers"))
    assert line == "transformers>=5.23,<6"  # activation_checkpointing_enable came with 5.23


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: nothing is written into the source tree."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=not_source, symlinks=True)
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    shutil.rmtree(source)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_every_file_of_the_packages(wheel):
    tracked = [
        str(file.relative_to(ROOT))
        for package in PACKAGES
        for file in (ROOT / package).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    ]
    held = set(zipfile.ZipFile(wheel).namelist())
    assert sorted(set(tracked) - held) == []
    assert "harness/reporting/paper.csv" in held
    assert not [name for name in held if name.startswith("tests/")]


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """An interpreter that has the wheel, and sees the dependencies that are installed here.

    Files .pth of those folders are not read there, so an editable install of this tree is unseen.
    """
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    install = ["install", "--no-deps", "--no-index", "--quiet", str(wheel)]
    command = [sys.executable, "-m", "pip", "--python", str(python), *install]
    subprocess.run(command, check=True, capture_output=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    seen = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "dependencies.pth").write_text("\n".join(seen) + "\n")
    return python


def call(python: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """A command in `folder`, which knows nothing of this source tree."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    command = [str(python), *arguments]
    return subprocess.run(command, cwd=folder, env=kept, capture_output=True, text=True)


@pytest.mark.wheel
def test_the_commands_of_the_wheel_work_in_an_empty_folder(python, tmp_path):
    def works(*arguments: str) -> str:
        done = call(python, tmp_path, *arguments)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    where = works("-c", "import harness, vlmamba, tasks; print(harness.__file__, vlmamba.__file__)")
    assert str(ROOT) not in where
    works("-m", "harness.run", "--tasks", "pope", "--limit", "4", "--out", "runs/a")
    record = json.loads((tmp_path / "runs" / "a" / "record.json").read_text())
    assert record["tasks"]["pope"]["n"] == 4
    assert record["settings"]["commit"] is None
    assert record["settings"]["packages"][project()["name"]] == __version__
    works("-m", "harness.score", "pope", "runs/a/samples_pope.jsonl", "--out", "runs/b")
    works("-m", "harness.compare", "runs/a", "runs/b")
    works("-m", "harness.plots", "--from", "runs", "--out", "plots")
    works("-m", "harness.report", "runs/a", "runs/b", "--out", "report.html")
    works("-m", "harness.tables", "--from", "runs", "--out", "tables")
    table = (tmp_path / "tables" / "paper_main.csv").read_text()
    assert "VL-Mamba" in table
    assert "VL-Mamba" in (tmp_path / "report.html").read_text()
    little = ["--images=6", "--captions=6", "--dialogues=6", "--workers=1", "--no-easy-vqa"]
    works("-m", "vlmamba.demo", "--out", "data", *little)
    start = ["-m", "vlmamba.train", "--init", "nano", "--stage", "finetune", "--images", "data"]
    start += ["--data", "data/finetune.json", "--steps=1", "--batch-size=2", "--micro-batch=2"]
    works(*start, "--cpu", "--out", "runs/t")
    picture = str(next((tmp_path / "data").rglob("*.jpg")).relative_to(tmp_path))
    asked = ["-m", "vlmamba.ask", picture, "Is there a dog?", "--model", "runs/t/final"]
    assert works(*asked, "--max-new-tokens", "2").strip()
    tiny = ["--tiny", "--models=vl-mamba-130m", "--seq-lens=16", "--image-tokens=4", "--decode=1"]
    works("-m", "harness.profile", *tiny, "--seconds=0.1", "--out", "runs/p")
    works("-m", "harness.ablate", "--axis", "scan", "--quick", "--dry-run")
    works("-m", "harness.study", "--scale", "quick", "--plan")


@pytest.mark.wheel
@pytest.mark.parametrize("name", project()["scripts"])
def test_every_script_of_the_wheel_starts(name, python, tmp_path):
    for flag, said in (("--version", __version__), ("--help", "usage: ")):
        script = [str(python.with_name(name)), flag]
        done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        assert said in done.stdout


@pytest.mark.parametrize("name", ["tasks", "vlmamba"])
@pytest.mark.parametrize("command", ["harness.run", "harness.score", "harness.tables"])
def test_a_file_of_the_users_that_hides_a_package_is_one_line(name, command, tmp_path):
    (tmp_path / f"{name}.py").write_text("print('mine')\n")
    kept = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", command, "--help"],
        cwd=tmp_path,
        env=kept,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert f"{name}.py hides the package '{name}' of vlmamba-harness" in done.stderr
