"""Odd and broken images in a run, in training and in a report: read alike, left out alike."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from harness_world import write_parquet
from pictures import BROKEN, ODD

from harness import run
from harness.data.images import UnreadableImage, decode
from harness.reporting.pictures import Pictures
from vlmamba.data.images import open_image
from vlmamba.data.llava import SampleError
from vlmamba.generation import GroupedGenerator

NAMES = [*ODD, *BROKEN]


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    """Name -> content."""
    return {name: make() for name, make in ODD.items()} | {
        name: make() for name, (make, _) in BROKEN.items()
    }


@pytest.fixture(scope="module")
def evaluated(files, whole_checkpoint, tmp_path_factory) -> dict[str, dict]:
    """Name -> the sample of one run with a question about each."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = [
        {
            "question_id": str(number),
            "question": "Is there a dog in the image?",
            "answer": "yes",
            "category": "random",
            "image": {"bytes": content, "path": "picture.png"},  # whatever it is
        }
        for number, content in enumerate(files.values())
    ]
    (folder / "data").mkdir()
    write_parquet(rows, folder / "data" / "pope.parquet")
    generate = GroupedGenerator.generate
    with pytest.MonkeyPatch.context() as patched:
        short = lambda self, requests, n, *rest: generate(self, requests, 2, *rest)  # noqa: E731
        patched.setattr(GroupedGenerator, "generate", short)
        arguments = ["--tasks", "pope", "--data", str(folder / "data"), "--backend", "torch"]
        arguments += ["--model", str(whole_checkpoint), "--batch-size", "4"]
        assert run.main([*arguments, "--out", str(folder / "out")]) == 0
    record = json.loads((folder / "out" / "record.json").read_text())
    assert record["tasks"]["pope"]["excluded"] == {"unreadable image": len(BROKEN)}
    assert record["tasks"]["pope"]["n"] == len(ODD)
    assert record["lmms_eval_check"] == {"pope": "equal"}
    assert len(record["events"]) == len(BROKEN)
    lines = (folder / "out" / "samples_pope.jsonl").read_text().splitlines()
    return dict(zip(NAMES, map(json.loads, lines), strict=True))


@pytest.mark.parametrize("name", ODD)
def test_an_odd_picture_is_shown_to_the_model(name, files, evaluated, tmp_path):
    assert isinstance(evaluated[name]["prediction"], str)
    assert evaluated[name]["score"] in (0, 1)
    image = decode({"bytes": files[name], "path": None}).convert("RGB")
    (tmp_path / "picture").write_bytes(files[name])
    assert list(open_image(tmp_path / "picture").getdata())[:99] == list(image.getdata())[:99]
    pictures = Pictures()
    pictures.add(name, {"bytes": files[name], "path": None})
    assert pictures.shown()[name].small.startswith("data:image/jpeg;base64,")


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_picture_is_counted(name, files, evaluated, tmp_path):
    assert evaluated[name]["excluded"] == "unreadable image"
    assert evaluated[name]["prediction"] is None
    assert evaluated[name]["score"] is None
    with pytest.raises(UnreadableImage) as caught:
        decode({"bytes": files[name], "path": None})
    assert re.search(BROKEN[name][1], str(caught.value))
    (tmp_path / "picture").write_bytes(files[name])
    with pytest.raises(SampleError, match="broken image file"):
        open_image(tmp_path / "picture")


def test_sixteen_bits_are_not_clipped(files):
    for name in ("16-bit gray PNG", "16-bit gray TIFF"):
        image = decode({"bytes": files[name], "path": None}).convert("RGB")
        assert image.getpixel((0, 0)) == (40_000 // 257,) * 3


def test_an_animation_is_its_first_frame(files):
    for name in ("animated GIF", "animated PNG", "animated WebP", "TIFF of three pages"):
        red, green, blue = (
            decode({"bytes": files[name], "path": None}).convert("RGB").getpixel((9, 9))
        )
        assert red > 240
        assert max(green, blue) < 12


@pytest.mark.parametrize("size", [(20_000, 10), (10, 20_000)])
def test_a_strips_square_is_no_bomb(size, whole_checkpoint):
    from PIL import Image

    from vlmamba.processing import VLMambaProcessor

    processor = VLMambaProcessor.from_pretrained(whole_checkpoint)
    square = processor.pad_to_square(Image.new("RGB", size, "red"))
    assert square.size[0] == square.size[1]
    assert square.size[0] ** 2 <= Image.MAX_IMAGE_PIXELS
    assert square.getpixel((square.size[0] // 2, square.size[1] // 2)) == (255, 0, 0)


def test_missing_files_are_counted_too(tmp_path):
    for value in (None, "/no/such.png", "a\0b", "x" * 5000, str(tmp_path)):
        with pytest.raises(UnreadableImage):
            decode({"bytes": None, "path": value})
    with pytest.raises(SampleError, match="missing image file"):
        open_image(Path(tmp_path / "none.png"))
