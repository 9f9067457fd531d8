"""The digest of the code that answers: it changes with whatever decides one, and only with that."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from harness.models import code

ROOT = Path(code.__file__).resolve().parents[2]
FIND_IMPORTED = """
import sys
from pathlib import Path
import PIL.Image
from harness.models.base import Limits, Picture, Request
from harness.models.vlmamba import VLMambaModel
image = PIL.Image.new("RGB", (40, 30), "red")
limits = Limits(2)
request = Request("task", 0, "What?", (Picture("red", lambda: image),), limits)
VLMambaModel(device="cpu", quantize="int8").answer([request], limits, 1, lambda *done: None)
for name, module in sys.modules.items():
    if name.partition(".")[0] == "vlmamba" and getattr(module, "__file__", None):
        print(Path(module.__file__).resolve())
"""


def sha256(root: Path, monkeypatch) -> str:
    monkeypatch.setattr(code, "ROOT", root)
    return code.code_sha256.__wrapped__()


@pytest.fixture
def tree(tmp_path) -> Path:
    wanted = shutil.ignore_patterns("assets", "__pycache__")
    for package in ("vlmamba", "vlmamba_core", "harness"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=wanted)
    return tmp_path


@pytest.mark.parametrize(
    ("file", "counts"),
    [
        ("vlmamba/data/decode.py", True),
        ("vlmamba/generation.py", True),
        ("vlmamba/processing.py", True),
        ("vlmamba/models/quantized.py", True),
        ("vlmamba/models/csrc/scan.cpp", True),
        ("vlmamba/a_new_part.py", True),
        ("vlmamba_core/tokens.py", True),
        ("vlmamba/training/loop.py", False),
        ("vlmamba/data/llava.py", False),
        ("vlmamba/demo/render.py", False),
        ("vlmamba/convert/cobra.py", False),
        ("vlmamba/serving/engine.py", False),
        ("vlmamba/train.py", False),
        ("vlmamba_core/cli.py", False),
        ("harness/compare.py", False),
    ],
)
def test_what_decides_an_answer_changes_the_digest(file, counts, tree, monkeypatch):
    before = sha256(tree, monkeypatch)
    with open(tree / file, "a", encoding="utf-8") as source:
        source.write("\n")
    assert (sha256(tree, monkeypatch) != before) == counts


def test_nothing_that_answers_is_left_out():
    """Every module of the package that an answer has loaded is in the digest."""
    run = subprocess.run(
        [sys.executable, "-c", FIND_IMPORTED], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    loaded = {Path(line) for line in run.stdout.splitlines() if line.startswith("/")}
    assert ROOT / "vlmamba" / "generation.py" in loaded
    empty = {path for path in loaded if len(path.read_text(encoding="utf-8").splitlines()) < 2}
    assert loaded - empty <= set(code._sources())
