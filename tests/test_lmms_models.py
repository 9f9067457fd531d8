"""lmms-eval's model classes under evaluation, by its own llava_hf on a tiny LLaVA."""

from __future__ import annotations

import sys
import types
from dataclasses import replace

import pytest
import tiny_vlms
import torch
from loguru import logger
from PIL import Image

from harness.models.base import Limits, Picture, Request
from harness.models.lmms_models import LmmsModel, _instance
from harness.models.resumable import Resumable
from harness.models.transformers import TransformersModel
from vlmamba_core.errors import UserError

COLORS = ((40, 0, 20), (200, 200, 100), (250, 100, 200))  # the first is dark

# what tiny_vlms.CHAT makes of a picture and a question, for a template that gets one text
TEMPLATE = "{% for turn in messages %}USER: {{ turn.content }} ASSISTANT:{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(tiny_vlms.save("llava", tmp_path_factory.mktemp("llava")))


@pytest.fixture
def llava(folder, monkeypatch) -> LmmsModel:
    """lmms-eval's class; what it reads videos with is not needed."""
    unused = types.SimpleNamespace(VideoReader=None, cpu=None)
    monkeypatch.setitem(sys.modules, "decord", unused)
    text = f"llava_hf,pretrained={folder},dtype=float32,device_map=cpu,chat_template={TEMPLATE}"
    return LmmsModel.from_spec(text, batch_size=4, device=torch.device("cpu"))


def requests(n: int = 7) -> list[Request]:
    pictures = [
        Picture(f"k{i}", lambda i=i: Image.new("RGB", (40 + i, 30), COLORS[i])) for i in range(3)
    ]
    return [
        Request("t", i, f"Question {i}?", (pictures[i % 3],), Limits(8, ("a",))) for i in range(n)
    ]


def test_answers_are_those_of_the_same_model_read_by_transformers(llava, folder):
    expected = Resumable(TransformersModel(folder)).answer(requests())
    assert len(set(expected)) > 3
    assert Resumable(llava).answer(requests()) == expected
    assert llava.parameters == TransformersModel(folder).parameters
    assert llava.provenance()["model_sha256"] == TransformersModel(folder).sha256
    assert llava.describe()["template"] == {"name": "lmms-eval's llava_hf"}


def test_what_its_class_only_logs_is_counted(llava):
    whole = Resumable(llava).answer(requests())
    generate = llava.inner.model.generate

    def fails_on_dark_pictures(pixel_values: torch.Tensor, **inputs):
        if float(pixel_values.mean()) < 0:  # the first of the three
            raise ValueError("a picture too dark")
        return generate(pixel_values=pixel_values, **inputs)

    llava.inner.model.generate = fails_on_dark_pictures
    around = Resumable(llava)
    assert around.answer(requests()) == [None if n % 3 == 0 else whole[n] for n in range(7)]
    assert len(around.events) == 3
    assert all("not answered" in e and "a picture too dark" in e for e in around.events)


def test_a_class_that_raises_costs_only_its_questions(llava):
    real = llava.inner.generate_until

    def raises(instances):
        if any(instance.args[0] == "Question 2?" for instance in instances):
            raise KeyError("what")
        return real(instances)

    expected = Resumable(llava).answer(requests())
    llava.inner.generate_until = raises
    answers = Resumable(llava).answer(requests())
    assert answers == [*expected[:2], None, *expected[3:]]


def test_what_cannot_be_made_is_one_line(folder, monkeypatch):
    with pytest.raises(UserError, match="unknown model class .* nearest first: llava_hf"):
        LmmsModel.from_spec("llava_hff")
    with pytest.raises(UserError, match="holds no settings"):
        LmmsModel.from_spec("llava_hf,pretrained")
    monkeypatch.setitem(sys.modules, "decord", None)
    monkeypatch.delitem(sys.modules, "lmms_eval.models.simple.llava_hf", raising=False)
    with pytest.raises(UserError, match="llava_hf needs a package that is not installed: .*decord"):
        LmmsModel.from_spec(f"llava_hf,pretrained={folder}")


def test_the_log_is_left_as_it_was(llava):
    told: list[str] = []
    sink = logger.add(told.append, level="ERROR")
    try:
        Resumable(llava).answer(requests(2))
        logger.error("mine")
    finally:
        logger.remove(sink)
    assert len(told) == 1


def test_a_length_that_no_task_sets_is_the_classs_own():
    """Qwen2.5-VL's takes 32768 then, for tasks that ask for reasoning."""
    picture = Picture("red", lambda: Image.new("RGB", (9, 9)))
    asked = Request("t", 0, "why?", (picture,), Limits(1024, unset=True))
    assert "max_new_tokens" not in _instance(asked, 0, asked.limits).args[1]
    asked = replace(asked, limits=Limits(16))
    assert _instance(asked, 0, asked.limits).args[1]["max_new_tokens"] == 16
