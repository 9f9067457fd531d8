"""The worked examples of CONTRIBUTING.md are run: a benchmark's files and test, and the parts."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from test_ablate import training_world

import tasks

ROOT = Path(__file__).resolve().parents[1]
PART = re.compile(
    r"^```python\n# part: (?P<name>[^\n]+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
# Words of a training command, and of two evaluations, on all the parts
COMMANDS = """
import sys
from harness import run
from vlmamba import train
start = ["--cpu", "--dtype", "fp32", "--batch-size", "2", "--micro-batch", "2", "--steps", "2"]
start += ["--preset", "nano+pool", "--objective", "z_loss", "--image-layout", "halves"]
start += ["--set", 'vision_config={"model_type": "colors"}', 'text_config={"model_type": "decay"}']
start += ["--data", f"{sys.argv[1]}/finetune.json"]
shown = [*start, "--images", sys.argv[1], "--max-length", "512"]
code = train.main([*start, "--stage", "text", "--max-length", "32", "--out", "text"])
code += train.main([*shown, "--stage", "pretrain", "--init", "text/final", "--out", "aligned"])
code += train.main([*shown, "--stage", "finetune", "--init", "aligned/final", "--out", "done"])
for number, model in enumerate(("done/final", "constant:yes")):
    evaluation = ["--tasks", "pope", "--limit", "3", "--out", f"run{number}"]
    code += run.main([*evaluation, "--model", model])
sys.exit(code)
"""
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


def test_the_parts_train_and_are_evaluated_as_they_stand(tmp_path):
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    parts = {match["name"]: match["text"] for match in PART.finditer(text)}
    assert set(parts) == {
        *("imports", "language model", "vision encoder", "connector", "objective", "image layout"),
        "model under evaluation",
    }
    world = training_world(tmp_path)
    (tmp_path / "parts.py").write_text("\n".join([*parts.values(), COMMANDS]))
    done = subprocess.run(
        [sys.executable, "parts.py", str(world)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (tmp_path / "run0" / "record.json").is_file()
    assert (tmp_path / "run1" / "record.json").is_file()


def test_a_module_of_the_users_own_is_known_to_every_command(tmp_path):
    """VLMAMBA_PLUGINS: a kind of model and a connector, without a script around the commands."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    parts = {match["name"]: match["text"] for match in PART.finditer(text)}
    (tmp_path / "mine.py").write_text("".join(parts.values()), encoding="utf-8")
    places = os.pathsep.join([str(tmp_path), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": places, "VLMAMBA_PLUGINS": "mine"}

    def command(*arguments: str, **more: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=tmp_path,
            env=environment | more,
            capture_output=True,
            text=True,
        )

    asked = ("harness.run", "--tasks", "pope", "--limit", "2", "--model", "constant:yes")
    done = command(*asked, "--out", "run")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "record.json").is_file()
    shown = command("vlmamba.train", "--preset", "nano+pool", "--stage", "text", "--estimate")
    assert shown.returncode == 0, shown.stderr
    lost = command(*asked, "--out", "other", VLMAMBA_PLUGINS="nosuch")
    assert lost.returncode == 2
    assert lost.stderr.startswith("error: VLMAMBA_PLUGINS names nosuch, which cannot be imported")
