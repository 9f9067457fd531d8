"""The next pictures are made ready while a model on an accelerator computes; answers stay."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest
from PIL import Image

from harness.data.images import UnreadableImage
from harness.models import resumable
from harness.models.base import EvalModel, Limits, Picture, Request
from harness.models.prefetch import in_turn
from harness.models.resumable import Resumable
from harness.models.vlmamba import VLMambaModel

LIMITS = Limits(4)
NAP_S = 0.05
Span = tuple[float, float]


def requests_of(pictures: list[Picture], questions: int = 1) -> list[Request]:
    return [
        Request("pope", number, f"Is there a {number}?", (picture,), LIMITS)
        for number, picture in enumerate(p for p in pictures for _ in range(questions))
    ]


class Sleeping(EvalModel):
    """A model that leaves its processor alone while it answers, as one on a GPU does."""

    name, batch_size = "sleeping", 1

    def __init__(self, device: str) -> None:
        self.device = SimpleNamespace(type=device)
        self.asked: list[int] = []
        self.spans: list[Span] = []  # when it was answering
        self.prepared: list[tuple[int, str]] = []  # row, and in which thread

    def provenance(self):
        return {}

    def prepare(self, requests):
        self.prepared += [(r.row, threading.current_thread().name) for r in requests]

    def answer(self, requests, limits, batch_size, on_done):
        began = time.perf_counter()
        time.sleep(NAP_S)
        self.spans.append((began, time.perf_counter()))
        for index, request in enumerate(requests):
            self.asked.append(request.row)
            on_done(index, str(request.row))


def slow_picture(number: int, threads: list[str]) -> Picture:
    def read() -> Image.Image:
        threads.append(threading.current_thread().name)
        time.sleep(NAP_S)
        return Image.new("RGB", (4, 4))

    return Picture(str(number), read)


def timed_reads(pictures: list[Picture]) -> list[Span]:
    """When each picture is read, filled in as that happens."""
    spans: list[Span] = []

    def timed(read):
        def call() -> Image.Image:
            began = time.perf_counter()
            image = read()
            spans.append((began, time.perf_counter()))
            return image

        return call

    for picture in pictures:
        picture.read = timed(picture.read)
    return spans


@pytest.fixture(autouse=True)
def one_batch_at_a_time(monkeypatch):
    monkeypatch.setattr(resumable, "BATCHES_AHEAD", 1)


def at_once(reads: list[Span], answers: list[Span]) -> int:
    """How many pictures were being read while an answer was being made."""
    return sum(any(a < end and start < b for a, b in answers) for start, end in reads)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_pictures_are_decoded_while_a_model_on_an_accelerator_answers(device):
    """A model that sleeps; on a CPU, whose cores the model holds, nothing goes on beside it."""
    threads: list[str] = []
    model = Sleeping(device)
    pictures = [slow_picture(n, threads) for n in range(10)]
    reads = timed_reads(pictures)
    assert Resumable(model).answer(requests_of(pictures)) == [str(n) for n in range(10)]
    assert model.asked == list(range(10)) and len(threads) == 10
    if device == "cpu":
        assert at_once(reads, model.spans) == 0
        assert set(threads) == {"MainThread"} and model.prepared == []
    else:  # all but the first, were the machine idle
        assert at_once(reads, model.spans) >= 3
        assert all(name.startswith("prefetch") for name in threads)
        assert [row for row, _ in model.prepared] == list(range(10))


def test_the_second_picture_is_read_before_the_first_answer_is_there():
    """No clock: each waits for the other."""
    answering, read = threading.Event(), threading.Event()

    class Waiting(Sleeping):
        def answer(self, requests, limits, batch_size, on_done):
            answering.set()
            assert read.wait(20), "nothing was read meanwhile"
            on_done(0, "yes")

    def second() -> Image.Image:
        assert answering.wait(20)
        read.set()
        return Image.new("RGB", (4, 4))

    pictures = [Picture("a", lambda: Image.new("RGB", (4, 4))), Picture("b", second)]
    assert Resumable(Waiting("cuda")).answer(requests_of(pictures)) == ["yes", "yes"]


def test_a_broken_picture_is_counted_in_its_turn_and_other_errors_are_raised():
    def broken() -> Image.Image:
        raise UnreadableImage("torn")

    threads: list[str] = []
    pictures = [slow_picture(0, threads), Picture("x", broken), slow_picture(2, threads)]
    around = Resumable(Sleeping("cuda"))
    assert around.answer(requests_of(pictures)) == ["0", None, "2"]
    assert around.events == ["pope: row 2: torn"]
    assert [row for row, _ in around.model.prepared] == [0, 2]

    def bug() -> Image.Image:
        raise ZeroDivisionError

    pictures[1] = Picture("x", bug)
    with pytest.raises(ZeroDivisionError):
        Resumable(Sleeping("cuda")).answer(requests_of(pictures))


def test_turns_are_in_order_and_one_ahead():
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        return item * item

    assert list(in_turn(work, range(6), ahead=True)) == [(n, n * n) for n in range(6)]
    assert list(in_turn(work, [], ahead=True)) == []
    begun.clear()
    turns = in_turn(work, range(100), ahead=True)
    assert next(turns) == (0, 0)
    turns.close()
    assert len(begun) <= 2  # the one given, and the one ahead
    begun.clear()
    alone = in_turn(work, range(3), ahead=False)
    assert next(alone) == (0, 0) and begun == [0]


@pytest.mark.parametrize("blind", [False, True])
def test_answers_and_likelihoods_are_those_without_prefetching(blind, monkeypatch):
    """The bundled model: tokens and pixels made ready in the thread, pictures of several sizes."""
    colors = ["red", "green", "blue", "white"]
    pictures = [
        Picture(color, lambda c=color, n=n: Image.new("RGB", (40 + 9 * n, 64), c))
        for n, color in enumerate(colors)
    ]
    found, inside = [], []
    for ahead in (False, True):
        model = VLMambaModel("nano", device="cpu", dtype="float32", batch_size=2, blind=blind)
        monkeypatch.setattr(VLMambaModel, "prefetches", ahead)
        tiled = model.processor.tiled

        def seen(images, tiled=tiled):
            inside.append(threading.current_thread().name)
            return tiled(images)

        monkeypatch.setattr(model.processor, "tiled", seen)
        found.append(Resumable(model).answer(requests_of(pictures, questions=2)))
        assert model._ready == {}  # all that was prepared was asked
        if not blind:
            assert all(("prefetch" in name) == ahead for name in inside) and inside
            assert len(inside) == 4 or not ahead  # a picture once, not once a question
        inside.clear()
    assert found[0] == found[1] and None not in found[0]
