"""Processor time of an evaluation outside the model: a question, and an image.

    python tools/time_around.py                          # 9,000 questions, 500 pictures: a minute
    python tools/time_around.py --images 20 --profile 30     # and where it goes

`harness.run` with the bundled model on POPE-shaped rows about noisy pictures of COCO's size, in one
thread of this process.  The model's own calls give zeros at once, and answers of a word or so;
what they take is left out.  The rest counts: the command from start to end, rows, pictures, tokens,
journal, scoring, intervals, files (loading of libraries and of the model is told apart).
Processor time, unlike the clock's, is little disturbed by other load.  Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import cProfile
import functools
import io
import json
import pstats
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image

from harness import run
from harness.data import questions
from harness.runs import evaluation, schema
from vlmamba import checkpoints
from vlmamba.config import VLMambaConfig
from vlmamba.configs.presets import VISION_ENCODERS
from vlmamba.models.language import mamba
from vlmamba.models.vlm import VLMambaForConditionalGeneration
from vlmamba.processing import VLMambaProcessor
from vlmamba_core.cli import cli
from vlmamba_core.errors import UserError
from vlmamba_core.folder import AnswerJournal

SIZE, QUALITY = (640, 480), 90
QUESTIONS = 18  # a picture, as POPE has them: six in each category
THINGS = ("dog", "cat", "car", "chair", "cup", "book", "person", "bottle", "bird", "boat")
CATEGORIES = ("random", "popular", "adversarial")
WORDS = ("yes", "no")


class Meter:
    """Seconds of processor time by name; what runs inside another is taken from that one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner: list[float] = []  # seconds inside each of the calls that are going on

    def around(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, timed."""
        self.seconds.setdefault(name, 0.0)

        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            began = time.process_time()
            try:
                return call(*args, **kwargs)
            finally:
                spent = time.process_time() - began
                self.seconds[name] += spent - self._inner.pop()
                if self._inner:
                    self._inner[-1] += spent

        return timed


def picture(number: int) -> bytes:
    """A JPEG of COCO's usual size and weight (about 150 kB): shades with noise upon them."""
    generator = np.random.default_rng(number)
    small = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    shades = np.asarray(small.resize(SIZE, Image.Resampling.BICUBIC), dtype=np.int16)
    noise = generator.integers(-16, 17, shades.shape, dtype=np.int16)
    file = io.BytesIO()
    Image.fromarray((shades + noise).clip(0, 255).astype(np.uint8)).save(
        file, "JPEG", quality=QUALITY
    )
    return file.getvalue()


def write_rows(folder: Path, images: int) -> None:
    """POPE's rows as the hub stores them: category by category, the picture in every row."""
    pictures = [{"bytes": picture(n), "path": f"COCO_{n:012d}.jpg"} for n in range(images)]
    rows = [
        {
            "id": str(n),
            "question_id": str(n),
            "question": f"Is there a {THINGS[(image + n) % len(THINGS)]} in the image?",
            "answer": ("yes", "no")[n % 2],
            "image_source": f"COCO_{image:012d}",
            "image": pictures[image],
            "category": category,
        }
        for category in CATEGORIES
        for image in range(images)
        for n in range(QUESTIONS // len(CATEGORIES))
    ]
    table = datasets.Dataset.from_dict({key: [row[key] for row in rows] for key in rows[0]})
    folder.mkdir(parents=True)
    table.cast_column("image", datasets.Image()).to_parquet(folder / "test.parquet")


@contextlib.contextmanager
def replaced(calls: Sequence[tuple[Any, str, Callable[..., Any]]]) -> Iterator[None]:
    """Attributes replaced inside the `with` block."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in calls]
    for owner, name, call in calls:
        setattr(owner, name, call)
    try:
        yield
    finally:
        for owner, name, call in before:
            setattr(owner, name, call)


class NoState:
    """In place of a cache: how many rows there are."""

    pictured = None  # no adaptors

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def select(self, rows: torch.Tensor) -> NoState:
        """The state of these rows."""
        return NoState(len(rows))

    def write_rows(self, rows: torch.Tensor, other: NoState) -> None:
        """Nothing to write."""


def model_calls(meter: Meter, words: Sequence[int]) -> list[tuple[Any, str, Callable[..., Any]]]:
    """What a run calls of the model, giving zeros of the right shapes and one of these tokens."""
    drawn = np.random.default_rng(0)

    def encode(self: Any, pixels: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(pixels), self.config.num_patches, self.config.vision_width)

    def embed(self: Any, ids: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        return torch.zeros(*ids.shape, 1), None

    def read(self: Any, embeds: torch.Tensor, cache: Any = None, *_: Any) -> tuple[Any, Any]:
        return embeds, cache or NoState(len(embeds))

    def head(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        tokens = torch.as_tensor(drawn.choice(words, len(hidden)))
        return torch.nn.functional.one_hot(tokens, self.config.vocab_size)

    def step(self: Any, embeds: torch.Tensor, cache: Any) -> torch.Tensor:
        return embeds

    def new_cache(self: Any, batch: int) -> NoState:
        return NoState(batch)

    vlm, language = VLMambaForConditionalGeneration, mamba.MambaLM
    calls = [(vlm, "encode_images", encode), (vlm, "embed", embed), (language, "forward", read)]
    calls += [
        (language, "head", head),
        (language, "step", step),
        (language, "new_cache", new_cache),
    ]
    return [(owner, name, meter.around("model", call)) for owner, name, call in calls]


def other_calls(meter: Meter) -> list[tuple[Any, str, Callable[..., Any]]]:
    """Parts of a run that are told apart."""
    parts = {
        "rows": (run.questions, "read"),
        "decode_pictures": (questions, "decode"),
        "resize": (VLMambaProcessor, "tiled"),
        "journal": (AnswerJournal, "add"),
        "intervals": (schema, "intervals"),
        "scoring": (evaluation, "score"),
        "files": (evaluation, "write"),
        "lmms_eval_check": (evaluation, "check"),
    }
    return [
        (owner, name, meter.around(part, getattr(owner, name)))
        for part, (owner, name) in parts.items()
    ]


def measure(folder: Path, images: int) -> dict[str, Any]:
    """Seconds of processor time of a whole run, by part, behind a short one that loads all."""
    _, processor = checkpoints.load("nano")
    answers = [
        processor.tokenizer(word, add_special_tokens=False)["input_ids"][-1] for word in WORDS
    ]
    words = [*answers, processor.tokenizer.eos_token_id]
    command = ["--model", "nano", "--tasks", "pope"]
    command += ["--device", "cpu", "--dtype", "float32", "--verbose"]
    found: dict[str, Any] = {}
    for name, size in (("loading", 1), ("run", images)):
        write_rows(folder / f"{name}-data" / "pope", size)
        data = ["--data", str(folder / f"{name}-data"), "--out", str(folder / name)]
        meter = Meter()
        with (
            replaced([*model_calls(meter, words), *other_calls(meter)]),
            contextlib.redirect_stdout(io.StringIO()) as said,
        ):
            began = time.process_time()
            code = run.main([*command, *data])
            spent = time.process_time() - began
        if code:
            raise SystemExit(f"harness.run failed: {said.getvalue()}")
        found[name] = {"total": spent, **meter.seconds}
    return found


def encoder_ms(images: int) -> dict[str, float]:
    """Milliseconds of processor time in which an image becomes pixels of each encoder."""
    _, processor = checkpoints.load("nano")
    pictures = [Image.open(io.BytesIO(picture(n))).convert("RGB") for n in range(images)]
    found = {}
    for name, settings in VISION_ENCODERS.items():
        config = VLMambaConfig(vision_config=dict(settings))
        shown = copy.copy(processor)
        shown.image_processor = config.vision_encoder.transform(config.vision_config)
        shown.tiled(pictures[:1])
        began = time.process_time()
        for one in pictures:
            shown.tiled([one])
        found[name] = round(1000 * (time.process_time() - began) / images, 3)
    return found


def summary(found: dict[str, Any], images: int) -> dict[str, Any]:
    """Milliseconds a question, and of each picture."""
    asked = images * QUESTIONS
    spent = found["run"]
    outside = spent["total"] - spent["model"]
    pictures = spent["decode_pictures"] + spent["resize"]
    parts = {part: spent[part] for part in spent if part not in ("total", "model")}
    parts["rest"] = outside - sum(parts.values())
    return {
        "questions": asked,
        "images": images,
        "outside_ms_per_question": 1000 * outside / asked,
        "ms_per_question": {part: round(1000 * s / asked, 4) for part, s in parts.items()},
        "decode_ms_per_image": 1000 * spent["decode_pictures"] / images,
        "resize_ms_per_image": 1000 * spent["resize"] / images,
        "pictures_ms_per_image": 1000 * pictures / images,
        "loading_s": found["loading"]["total"],
    }


@cli
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--profile", type=int, default=0, help="show so many lines of a profile")
    args = parser.parse_args(argv)
    if args.images < 1:
        raise UserError("--images must be at least 1")
    torch.set_num_threads(1)
    profiler = cProfile.Profile()
    with tempfile.TemporaryDirectory() as folder:
        if args.profile:
            found = profiler.runcall(measure, Path(folder), args.images)
            pstats.Stats(profiler).sort_stats("tottime").print_stats(args.profile)
            pstats.Stats(profiler).sort_stats("cumulative").print_stats(args.profile)
        else:
            found = measure(Path(folder), args.images)
    by_encoder = encoder_ms(min(args.images, 50))
    print(json.dumps(summary(found, args.images) | {"resize_ms_by_encoder": by_encoder}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
