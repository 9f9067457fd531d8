"""InternVL 2.5's filter by rules and its JPEG augmentation."""

from __future__ import annotations

import io
import json
import os
import random

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_config

from vlmamba import train
from vlmamba.data import llava
from vlmamba.data.feature_cache import image_key
from vlmamba.data.images import PixelImages, through_jpeg
from vlmamba.data.repetition import repetition

LINE = "the cat sat on the mat"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("A red box on a table.", None),
        ("", None),
        ("yes", None),
        ("\n".join([LINE] * 4), None),
        ("\n".join([LINE] * 5), "duplicate lines"),
        ("1 | 2 | 3\n" * 40, "repeats a phrase"),  # short lines may stand as often as they like
        ("0\n" * 7, None),
        ("the number 1" + "0" * 40, "run of one character"),
        ("-" * 31 + " | " + "-" * 31, None),
        (f"{LINE} " * 20, "repeats a phrase"),
        (" ".join(f"{LINE} {n}" for n in range(8)), None),
        (" ".join(str(n) for n in range(500)), None),
    ],
)
def test_what_repeats_itself_has_a_reason(answer, reason):
    found = repetition(answer)
    assert (found is None) if reason is None else (found is not None and reason in found)


def picture(seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_jpeg_is_pillows_own_at_the_seeds_quality():
    for seed in ("0/a.png", "1/a.png", "0/b.png"):
        held = io.BytesIO()
        picture().save(held, "JPEG", quality=random.Random(seed).randint(75, 100))
        assert through_jpeg(picture(), seed).tobytes() == Image.open(held).tobytes()
    assert through_jpeg(picture(), "0/a.png").tobytes() != picture().tobytes()


def test_pictures_are_augmented_only_when_asked(processor, tmp_path):
    picture().save(tmp_path / "a.png")
    plain, again = (PixelImages(tmp_path, processor).load(("a.png",))[0] for _ in range(2))
    one, two = (PixelImages(tmp_path, processor, jpeg_seed=3).load(("a.png",))[0] for _ in range(2))
    assert torch.equal(plain, again) and torch.equal(one, two) and not torch.equal(plain, one)


@pytest.fixture
def config():
    return tiny_config()


def test_both_are_flags_of_training(tmp_path, capsys):
    picture().save(tmp_path / "a.png")
    answers = ["a box", f"{LINE}\n" * 9, "a cup"]
    rows = [
        {
            "id": str(n),
            "image": "a.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat?"},
                {"from": "gpt", "value": answer},
            ],
        }
        for n, answer in enumerate(answers)
    ]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    file = llava.LlavaFile(tmp_path / "data.json")
    kept = llava.index_samples(file, tmp_path, 4, drop_repetitive=True)
    assert kept.usable.tolist() == [0, 2] and "duplicate lines" in kept.describe()
    assert len(llava.index_samples(file, tmp_path, 4).usable) == 3
    words = ["--preset", "nano", "--stage", "pretrain", "--tiny", "--cpu", "--dry-run"]
    words += ["--data", str(tmp_path / "data.json"), "--images", str(tmp_path)]
    words += ["--jpeg-augmentation", "--features-cache", str(tmp_path / "cache")]
    assert train.main(words) == 2
    assert "give one of the two" in capsys.readouterr().err


def test_a_file_whose_name_is_no_text_has_a_key_and_a_quality(tmp_path):
    """Latin-1 on a disk: Python reads and writes such names with surrogates."""
    name = os.fsdecode(b"caf\xe9.jpg")
    picture().save(tmp_path / "a.jpg")
    os.rename(os.fsencode(tmp_path / "a.jpg"), os.fsencode(tmp_path) + b"/caf\xe9.jpg")
    assert image_key(str(tmp_path), name) == image_key(str(tmp_path), name)
    assert through_jpeg(picture(), f"0/{name}").size == picture().size
