"""Any model under evaluation: journal, broken pictures and smaller batches come from outside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from PIL import Image

from harness.data.images import UnreadableImage
from harness.models.base import EvalModel, Limits, Picture, Request
from harness.models.registry import ModelOptions, eval_models
from harness.models.resumable import Resumable, is_out_of_memory
from vlmamba_core.errors import UserError
from vlmamba_core.folder import AnswerJournal


class Counting(EvalModel):
    """Says how many pictures it saw; remembers what it was asked, in which batches."""

    name, batch_size = "counting", 4

    def __init__(self, fits: int = 99, version: int = 1) -> None:
        self.fits, self.version = fits, version
        self.asked: list[str] = []
        self.batches: list[int] = []

    def provenance(self) -> dict:
        return {"version": self.version}

    def answer(self, requests: Sequence[Request], limits: Limits, batch_size: int, on_done) -> None:
        self.batches.append(batch_size)
        for index, request in enumerate(requests):
            if batch_size > self.fits:
                raise MemoryError
            assert all(picture.image.size == (2, 2) for picture in request.pictures)
            self.asked.append(request.prompt)
            on_done(index, f" {request.prompt} {len(request.pictures)}\n\nand more")


def broken() -> Image.Image:
    raise UnreadableImage("half a file")


def requests(n: int = 6) -> list[Request]:
    good = [Picture(f"k{i % 2}", lambda: Image.new("RGB", (2, 2))) for i in range(n)]
    found = [Request("t", i, f"q{i}", (good[i],) * (i % 3), Limits(5, ("\n\n",))) for i in range(n)]
    return [*found, Request("t", n, "bad", (Picture("b", broken),), Limits(5))]


def test_answers_come_in_order_and_are_cut():
    model = Counting()
    answers = Resumable(model).answer(requests())
    assert answers == [*(f"q{i} {i % 3}" for i in range(6)), None]
    assert sorted(model.asked) == [f"q{i}" for i in range(6)]


def test_a_broken_picture_is_noted_by_its_row():
    around = Resumable(Counting())
    around.answer(requests())
    assert around.events == ["t: row 7: half a file"]


def test_what_was_answered_is_not_asked_again(tmp_path):
    first = Resumable(Counting(), AnswerJournal(tmp_path))
    answers = first.answer(requests()[:4])
    second = Resumable(Counting(), AnswerJournal(tmp_path))
    assert second.answer(requests())[:4] == answers
    assert sorted(second.model.asked) == ["q4", "q5"]
    assert second.timing["resumed_answers"] == 4
    other = Resumable(Counting(version=2), AnswerJournal(tmp_path))
    other.answer(requests()[:4])
    assert len(other.model.asked) == 4  # another model's answers


def test_a_batch_that_does_not_fit_is_halved_and_nothing_is_asked_twice():
    model = Counting(fits=1)
    around = Resumable(model)
    assert around.answer(requests())[:6] == [f"q{i} {i % 3}" for i in range(6)]
    assert len(model.asked) == 6
    assert model.batches[:3] == [4, 2, 1]
    assert around.events[:2] == [f"out of memory: batch size halved to {n}" for n in (2, 1)]
    with pytest.raises(UserError, match="out of memory at batch size 1"):
        Resumable(Counting(fits=0)).answer(requests())


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (torch.AcceleratorError("CUDA error: out of memory"), True),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), False),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("shapes do not fit"), False),
    ],
)
def test_what_a_smaller_batch_may_help(error, memory):
    assert is_out_of_memory(error) == memory


@pytest.mark.parametrize("depends", [True, False])
def test_another_batch_size_asks_again_only_where_answers_depend_on_it(depends, tmp_path):
    for size, asked in ((4, 4), (2, 4 if depends else 0)):
        model = Counting()
        model.batch_size, model.depends_on_batch = size, depends
        Resumable(model, AnswerJournal(tmp_path)).answer(requests()[:4])
        assert len(model.asked) == asked


def test_a_model_that_leaves_requests_out_is_an_error():
    class Lazy(Counting):
        def answer(self, requests, limits, batch_size, on_done) -> None:
            on_done(0, "only this")

    with pytest.raises(UserError, match="model counting left . requests unanswered"):
        Resumable(Lazy()).answer(requests())


class Choosy(Counting):
    """Refuses every question but those in `takes`."""

    def __init__(self, takes: Sequence[str]) -> None:
        super().__init__()
        self.takes = takes

    def answer(self, requests: Sequence[Request], limits: Limits, batch_size: int, on_done) -> None:
        for index, request in enumerate(requests):
            self.asked.append(request.prompt)
            if request.prompt in self.takes:
                on_done(index, "fine")
            else:
                on_done(index, None, "too\nlong")


def test_a_refused_question_is_counted_and_asked_again_by_the_next_run(tmp_path):
    model = Choosy(["q0", "q2"])
    around = Resumable(model, AnswerJournal(tmp_path))
    assert around.answer(requests(4)[:4]) == ["fine", None, "fine", None]
    assert sorted(around.events) == [f"t: row {n}: not answered: too long" for n in (2, 4)]
    again = Choosy(["q1"])
    assert Resumable(again, AnswerJournal(tmp_path)).answer(requests(4)[:4])[1] == "fine"
    assert sorted(again.asked) == ["q1", "q3"]


def test_many_refused_questions_do_not_end_a_continued_run(tmp_path):
    """Those that have their answer are not asked again: nothing is answered anew."""
    for _ in range(2):
        around = Resumable(Choosy(["q0"]), AnswerJournal(tmp_path))
        assert around.answer(requests(12)[:12]) == ["fine"] + [None] * 11


def test_one_question_s_many_votes_are_one_refusal():
    asked = [replace(requests(1)[0], vote=vote) for vote in range(12)]
    assert Resumable(Choosy([])).answer(asked) == [None] * 12


def test_a_model_that_refuses_everything_is_an_error():
    with pytest.raises(UserError, match="answered none of the first 10 questions: too long"):
        Resumable(Choosy([])).answer(requests(12)[:12])


def test_quantized_weights_are_recorded_and_other_kinds_refuse_them():
    plain, rounded = (
        eval_models.load("nano", ModelOptions(quantize=kind, dtype="float32"))
        for kind in (None, "int8")
    )
    assert rounded.provenance()["quantize"] == "int8"
    assert "quantize" not in plain.provenance()
    assert rounded.provenance()["model_sha256"] != plain.provenance()["model_sha256"]
    assert rounded.parameters == plain.parameters
    with pytest.raises(UserError, match="--quantize has no meaning for api"):
        eval_models.load("api:http://localhost,model=x", ModelOptions(quantize="int8"))
