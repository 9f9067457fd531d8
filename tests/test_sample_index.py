"""What is found in a data file is written once, and read by all processes and resumed runs."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_llava_data import conversation, write
from test_train_cli import PRESET, flags, train_in_two_processes

from vlmamba import train
from vlmamba.data import index, llava
from vlmamba.training import trainer_state

SETTINGS = {"data": "1", "images": "there", "patches": 4, "template": "vicuna_v1"}


@pytest.fixture
def file(tmp_path) -> llava.LlavaFile:
    good = {"conversations": conversation("<image> what?"), "image": "a.png"}
    (tmp_path / "a.png").write_bytes(b"")
    return llava.LlavaFile(write(tmp_path, [good, {"conversations": []}, good, good]))


@pytest.fixture
def world(tmp_path) -> Path:
    """data.json with 12 samples and images/ with three of their four pictures."""
    (tmp_path / "images").mkdir()
    for number, color in enumerate(("red", "green", "blue")):
        Image.new("RGB", (28, 28), color).save(tmp_path / "images" / f"{number}.png")
    records = [{"image": f"{i % 4}.png", "conversations": conversation()} for i in range(12)]
    write(tmp_path, records)
    return tmp_path


def test_an_index_gives_back_what_was_found(file, tmp_path):
    found = llava.index_samples(file, tmp_path, 4, progress=False)
    index.write(tmp_path / "i.npz", file, found, SETTINGS)
    again, known = index.read(tmp_path / "i.npz", file.path, SETTINGS)
    assert [again[i] for i in (0, 2, 3)] == [file[i] for i in (0, 2, 3)]
    assert known.describe() == found.describe()
    assert "first: record 1" in known.describe()
    for name in ("usable", "lengths"):
        assert np.array_equal(getattr(known, name), getattr(found, name))


@pytest.mark.parametrize("change", SETTINGS)
def test_an_index_of_other_terms_is_none(change, file, tmp_path):
    index.write(
        tmp_path / "i.npz", file, llava.index_samples(file, tmp_path, 4, progress=False), SETTINGS
    )
    assert index.read(tmp_path / "i.npz", file.path, SETTINGS | {change: "another"}) is None


@pytest.mark.parametrize("damage", [b"", b"PK", b"not an index"])
def test_a_damaged_index_is_none(damage, file, tmp_path):
    path = tmp_path / "i.npz"
    assert index.read(path, file.path, SETTINGS) is None
    index.write(path, file, llava.index_samples(file, tmp_path, 4, progress=False), SETTINGS)
    path.write_bytes(damage or path.read_bytes()[:-30])
    assert index.read(path, file.path, SETTINGS) is None


SPY = """
import os, sys
from vlmamba import train
from vlmamba.data import llava
looked = llava.check_images
def count(sample, folder):
    with open(os.environ["LOOKS"], "a") as file:
        print(os.environ["RANK"], file=file)
    return looked(sample, folder)
llava.check_images = count
raise SystemExit(train.main())
"""


def test_one_process_alone_looks_for_the_images(world, monkeypatch):
    """Once each, and a resumed run not at all."""
    spy, looks = world / "spy.py", world / "looks"
    spy.write_text(SPY)
    monkeypatch.setenv("LOOKS", str(looks))
    arguments = ["--preset", PRESET, *flags(world, world / "o", steps=2)]
    train_in_two_processes("ddp", *arguments, script=spy)
    assert looks.read_text().split() == ["0"] * 12
    (world / "o" / "summary.json").unlink()
    train_in_two_processes("ddp", *arguments, "--resume", "auto", script=spy)
    assert len(looks.read_text().split()) == 12


@pytest.mark.parametrize("cached", [False, True])
def test_a_resumed_run_keeps_its_samples(cached, world, capsys):
    """An image that came or went meanwhile changes no order; one that went is counted."""
    images = world / "images"
    more = ["--features-cache", str(world / "cache")] if cached else []

    def run(steps: int, resume: str) -> str:
        arguments = ["--preset", PRESET, *flags(world, world / "o", steps=steps), *more]
        assert train.main([*arguments, "--resume", resume]) == 0
        return capsys.readouterr().out

    found = "9 of 12 samples usable (3 missing image file, first: record 3)"
    assert found in run(2, "never")
    (images / "3.png").write_bytes((images / "2.png").read_bytes())
    assert found in run(3, "longer")
    (images / "0.png").unlink()
    assert found in run(6, "longer")
    summary = json.loads((world / "o" / "summary.json").read_text())
    assert summary["skipped"]["missing image file"] == 3
    assert trainer_state.checkpoints(world / "o")[-1].name == "step-00000006"


def test_two_processes_count_what_is_cut_and_left_out_as_one_does(world):
    """Broken pictures, which the index does not see, and answers longer than --max-length."""
    for number in (2, 3):
        (world / "images" / f"{number}.png").write_bytes(b"no picture")
    records = json.loads((world / "data.json").read_text())
    for record in records[4:]:
        record["conversations"][1]["value"] = "a cat " * 60
    write(world, records)
    changes = {"steps": 3, "micro_batch": 1, "max_length": 150}
    one, two = (["--preset", PRESET, *flags(world, world / out, **changes)] for out in "ab")
    assert train.main(one) == 0
    train_in_two_processes("ddp", *two)
    a, b = (json.loads((world / out / "summary.json").read_text()) for out in "ab")
    assert a["skipped"] == {"broken image file": 6} and a["truncated"] == 4
    del a["seconds"], b["seconds"]
    assert a == b


def test_a_data_file_prints_nothing_at_exit(tmp_path):
    """However late it goes: here after the modules that it needs."""
    path = write(tmp_path, [{"conversations": conversation("hi")}])
    code = (
        "import builtins, sys\n"
        "from vlmamba.data import llava\n"
        "builtins.kept = llava.LlavaFile(sys.argv[1])\n"
        "builtins.kept[0]\n"
        "llava.os = None\n"
    )
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_data_file_is_closed_with_its_last_user(tmp_path):
    file = llava.LlavaFile(write(tmp_path, [{"conversations": conversation("hi")}]))
    file[0]
    link = f"/proc/self/fd/{file._descriptor}"
    assert os.readlink(link) == str(file.path.resolve())
    path = str(file.path.resolve())
    del file
    gc.collect()
    assert not os.path.exists(link) or os.readlink(link) != path


@pytest.fixture(autouse=True)
def _fresh_accelerate_state():
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)
