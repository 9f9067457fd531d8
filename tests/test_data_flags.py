"""Every flag that says what is trained on changes what a real run reads; held-out samples stay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_data_filters import LINE
from test_llava_data import conversation, write
from test_train_cli import PRESET, flags

from vlmamba import train
from vlmamba.data.examples import Example
from vlmamba.training import loop

FLAGS = {
    "drop_repetitive": ["--drop-repetitive"],
    "jpeg_augmentation": ["--jpeg-augmentation"],
    "image_aspect_ratio": ["--image-aspect-ratio", "resize"],
    "image_layout": ["--image-layout", "dynamic_4"],
    "image_place": ["--image-place", "last"],
    "max_length": ["--max-length", "80"],
    "features_cache": ["--features-cache", "cache"],
    "images": ["--images", "others"],
}
ALTER_TRAINING_ALONE = ("drop_repetitive", "jpeg_augmentation")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """data.json and held_out.json, of three samples each; images/ and others/ of the same names."""
    folder = tmp_path_factory.mktemp("world")
    for seed, name in enumerate(("images", "others")):
        (folder / name).mkdir()
        pixels = np.random.default_rng(seed).integers(0, 255, (30, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name / "a.png")
    answers = ("a box", f"{LINE}\n" * 9, "a cup")
    records = [{"image": "a.png", "conversations": conversation(answer=text)} for text in answers]
    write(folder, records)
    write(folder, records, "held_out.json")
    return folder


@pytest.fixture
def read(world, tmp_path, monkeypatch) -> Callable[..., tuple[list[Example], list[Example]]]:
    """A run up to its first update, by its command: what it would train on, and hold out."""
    seen: list[loop.Run] = []

    def stop_here(run: loop.Run, *_: object) -> Path:
        seen.append(run)
        return run.out / "final"

    def examples(name: str, *more: str) -> tuple[list[Example], list[Example]]:
        monkeypatch.chdir(world)
        words = [*flags(world, tmp_path / name), "--eval-data", str(world / "held_out.json")]
        assert train.main(["--preset", PRESET, *words, *more]) == 0
        run = seen.pop()
        assert run.evaluation is not None and run.evaluation.examples is not None
        held_out = run.evaluation.examples
        return tuple([one[i] for i in range(len(one.lengths))] for one in (run.examples, held_out))

    monkeypatch.setattr(loop, "train", stop_here)
    return examples


def equal(ours: list[Example], others: list[Example]) -> bool:
    """Whether two lists of examples hold the same tokens, labels and pictures."""
    return len(ours) == len(others) and all(
        torch.equal(getattr(a, name), getattr(b, name))
        for a, b in zip(ours, others, strict=True)
        for name in ("input_ids", "labels", "images")
    )


def test_every_data_flag_changes_what_a_run_reads(read):
    plain, held_out = read("plain")
    assert len(plain) == 3 and equal(plain, held_out) and equal(plain, read("again")[0])
    for name, more in FLAGS.items():
        changed, then_held_out = read(name, *more)
        assert not equal(plain, changed), name
        assert equal(held_out, then_held_out) == (name in ALTER_TRAINING_ALONE), name


def test_a_run_trains_without_answers_that_repeat_themselves(read, capsys):
    trained, held_out = read("dropped", "--drop-repetitive")
    assert "2 of 3 samples usable (1 an answer with duplicate lines" in capsys.readouterr().out
    assert (len(trained), len(held_out)) == (2, 3)
