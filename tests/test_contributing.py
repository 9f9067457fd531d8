"""The worked example of CONTRIBUTING.md: its files are written out and its test is run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import tasks

ROOT = Path(__file__).resolve().parents[1]
FILE = re.compile(r"^### `(?P<path>[^`]+)`\n\n```\w+\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


def test_worked_example_is_complete_and_passes_its_test(tmp_path):
    shutil.copytree(ROOT / "tasks", tmp_path / "tasks")
    shutil.copytree(ROOT / "harness", tmp_path / "harness")
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    files = {match["path"]: match["text"] for match in FILE.finditer(text)}
    for path, content in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(content, encoding="utf-8")
    assert {Path(path).suffix for path in files} == {".py", ".yaml", ".md"}
    assert "counting" not in tasks.NAMES
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10 passed" in done.stdout
