"""kill -9 at random moments: the same command finishes, repeats no finished work, changes nothing.

Two moments a command here; `pytest -m kill tests/test_kills.py` takes twenty (about half an hour).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from harness_world import mme_rows, pope_rows, write_parquet
from kills import Workplace, kill_and_finish
from test_ablate import training_world
from test_train_cli import PRESET, flags
from test_train_cli import world as training_data  # noqa: F401

from harness import ablate, profile, run
from harness.ablation import cells
from harness.ablation.variants import FINAL
from harness.runs.schema import without_timing
from vlmamba import train
from vlmamba_core.folder import RunFolder

MANY = [pytest.param(range(n, n + 10), marks=pytest.mark.kill) for n in (0, 10)]
MOMENTS = pytest.mark.parametrize("moments", [range(2), *MANY], ids=("two", "ten", "ten more"))


def record(path: Path) -> dict:
    return without_timing(json.loads(path.read_text()))


def lines(path: Path) -> list[bytes]:
    """Whole lines; none of a file that is not there."""
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def log(path: Path) -> list[dict]:
    return [without_timing(json.loads(line)) for line in lines(path)]


@pytest.fixture
def evaluation(tmp_path, model, processor) -> list[str]:
    """Arguments of a run of 20 questions in batches of 4; answers differ in text and length."""
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            torch.nn.init.constant_(parameter, -6)  # a long memory
    with torch.no_grad():
        model.get_input_embeddings().weight[processor.tokenizer.eos_token_id] *= 4
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    write_parquet(pope_rows(images=2), tmp_path / "data" / "pope.parquet")
    write_parquet(mme_rows(), tmp_path / "data" / "mme.parquet")
    places = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "data"), "--out", "out"]
    return ["--tasks", "pope,mme", "--batch-size", "4", "--backend", "torch", *places]


@MOMENTS
def test_an_evaluation(moments, evaluation, tmp_path):
    def answers(out: Path) -> dict[str, int]:
        found = lines(out / "answers.rank0.jsonl")
        assert len(set(found)) == len(found)  # no question was asked twice
        return {line.decode(): 1 for line in found}

    def check(killed: Workplace, whole: Workplace) -> None:
        for name in ("samples_pope.jsonl", "samples_mme.jsonl", "table.md"):
            assert (killed.out / name).read_bytes() == (whole.out / name).read_bytes()
        assert record(killed.out / "record.json") == record(whole.out / "record.json")
        assert {p.name for p in killed.out.iterdir()} == {p.name for p in whole.out.iterdir()}

    kill_and_finish(tmp_path / "runs", "harness.run", evaluation, moments, check, answers)


@MOMENTS
def test_a_training(moments, training_data, tmp_path):  # noqa: F811
    arguments = ["--preset", PRESET, "--resume", "auto"]
    arguments += flags(training_data, Path("out"), steps=12, save_every=1)

    def steps(out: Path) -> dict[str, int]:
        """Steps in checkpoints; the log may be one step ahead."""
        saved = [int(p.name[-8:]) for p in (out / "checkpoints").glob("step-*")]
        if not (out / "final").exists():
            assert len(lines(out / "train.jsonl")) - max(saved, default=0) <= 1
        return {str(step): 1 for step in range(max(saved, default=0))}

    def check(killed: Workplace, whole: Workplace) -> None:
        assert log(killed.out / "train.jsonl") == log(whole.out / "train.jsonl")
        assert record(killed.out / "summary.json") == record(whole.out / "summary.json")
        for path in whole.out.rglob("*"):
            other = killed.out / path.relative_to(whole.out)
            if path.is_file() and path.name not in ("train.jsonl", "summary.json", "state.json"):
                assert other.read_bytes() == path.read_bytes(), path
        assert len(list(killed.out.rglob("*"))) == len(list(whole.out.rglob("*")))

    kill_and_finish(tmp_path / "runs", "vlmamba.train", arguments, moments, check, steps)


@MOMENTS
def test_a_profile(moments, tmp_path):
    arguments = ["--tiny", "--models", "vl-mamba-130m", "--seq-lens", "16,32", "--threads", "1"]
    arguments += ["--image-tokens", "4", "--decode", "2", "--seconds", "0.1", "--out", "out"]

    def points(out: Path) -> dict[str, int]:
        found = lines(out / "points.jsonl")
        assert len({json.loads(line)["key"] for line in found}) == len(found)
        return {line.decode(): 1 for line in found}

    def check(killed: Workplace, whole: Workplace) -> None:
        assert record(killed.out / "record.json") == record(whole.out / "record.json")

    kill_and_finish(tmp_path / "runs", "harness.profile", arguments, moments, check, points)


@MOMENTS
def test_an_ablation(moments, tmp_path):
    world = training_world(tmp_path)
    small = ["--tiny", "--cpu", "--dtype=fp32", "--batch-size=2", "--micro-batch=2"]
    text = ["--preset", "nano", "--stage", "text", "--data", str(world / "finetune.json")]
    text += ["--out", "out", "--steps=1", "--max-length=32", *small]
    language_model = Workplace(tmp_path / "lm", "vlmamba.train", text)
    language_model.run()
    language_model.out.rename(language_model.folder / (FINAL["demo"].lm or ""))
    write_parquet(pope_rows(2, 1), world / "pope.parquet")
    arguments = ["--axis", "connector", "--variants", "vss_l2", "--seeds", "1", "--tasks", "pope"]
    arguments += ["--data", str(world), "--lm", str(language_model.folder), "--limit", "4"]
    arguments += ["--pretrain-steps", "2", "--steps", "2", "--eval-data", str(world)]
    arguments += ["--train-args", " ".join([*small, "--save-every=1"]), "--out", "out"]

    def pieces(out: Path) -> dict[str, int]:
        """Stages that are done, with the time of their last file."""
        done = [f for s in cells.STAGES for f in out.glob(f"cells/*/seed-0/{s}/summary.json")]
        done += out.glob("cells/*/seed-0/evaluation/record.json")
        return {str(file.relative_to(out)): file.stat().st_mtime_ns for file in done}

    def check(killed: Workplace, whole: Workplace) -> None:
        for name in ("record.json", "table.md"):
            mine, other = (place.out / "connector" / name for place in (killed, whole))
            if name == "record.json":
                assert record(mine) == record(other)
            else:
                assert mine.read_bytes() == other.read_bytes()
        weights = "cells/*/seed-0/finetune/final/model.safetensors"
        [mine], [other] = (list(place.out.glob(weights)) for place in (killed, whole))
        assert mine.read_bytes() == other.read_bytes()

    kill_and_finish(tmp_path / "runs", "harness.ablate", arguments, moments, check, pieces)


@pytest.mark.parametrize("command", ["run", "profile", "ablate", "train"])
def test_the_second_writer_is_refused(command, evaluation, training_data, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "taken"
    ablation = ["--axis", "connector", "--data", str(tmp_path / "d"), "--lm", str(tmp_path / "d")]
    for name in ("pretrain.json", "finetune.json", "talk/final/config.json"):
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).write_text("[]")
    main, arguments = {
        "run": (run.main, evaluation[:-2]),
        "profile": (profile.main, ["--tiny", "--models", "vl-mamba-130m"]),
        "ablate": (ablate.main, ablation),
        "train": (train.main, ["--preset", PRESET, *flags(training_data, out)]),
    }[command]
    with RunFolder(out):  # all four commands keep the same lock
        assert main([*arguments, "--out", str(out)]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert "taken is in use by process" in printed.err
    assert list(out.iterdir()) == []  # the lock goes with its owner
