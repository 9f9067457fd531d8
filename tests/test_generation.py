"""Grouped decoding: one prefill an image, any batch size and order, the answers of generate()."""

from __future__ import annotations

import random

import pytest
import torch
from test_vlm import picture
from tiny import TINY_MIXERS, tiny_config

from vlmamba.config import VLMambaConfig
from vlmamba.generation import GroupedGenerator, Request, greedy


@pytest.fixture(params=TINY_MIXERS)
def config(request) -> VLMambaConfig:
    return tiny_config(**TINY_MIXERS[request.param])


@pytest.fixture
def requests(processor):
    questions = ["a cat?", "what is the colour of the dog in the picture?", "2 + 2", "x" * 90, "?"]
    asked = [
        Request(processor.conversation_prompt(f"{q} {n}"), f"image{n}", picture(n))
        for n in range(4)
        for q in questions
    ]
    text_only = [Request(processor.conversation_prompt(q, images=0)) for q in questions]
    several = [
        Request(processor.conversation_prompt(q, count), f"{count} from 3", pictures[:count])
        for count in (2, 3)
        for pictures in [tuple(picture(n) for n in (3, 1, 2))]
        for q in questions
    ]
    return asked + text_only + several


def test_the_answers_are_those_of_generate(model, processor, requests):
    grouped = GroupedGenerator(model, processor).generate(requests, 8, batch_size=4)
    for request, answer in zip(requests, grouped, strict=True):
        images = list(request.pictures) or None
        inputs = processor(text=request.prompt, images=images, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :]
        assert processor.tokenizer.decode(new, skip_special_tokens=True).strip() == answer


@pytest.mark.parametrize("batch_size", [1, 3, 8, 32])
def test_batch_size_and_order_change_nothing(model, processor, requests, batch_size):
    generator = GroupedGenerator(model, processor)
    expected = generator.generate(requests, 8, 1)
    assert len(set(expected)) > 5  # answers that would show a mix-up
    order = random.Random(batch_size).sample(range(len(requests)), len(requests))
    answers = generator.generate([requests[n] for n in order], 8, batch_size)
    assert answers == [expected[n] for n in order]


def test_one_encoder_pass_per_distinct_image(model, processor, requests, monkeypatch):
    seen = []
    encode = model.encode_images

    def encode_images(pixels):
        seen.append(len(pixels))
        return encode(pixels)

    monkeypatch.setattr(model, "encode_images", encode_images)
    done = {}
    generator = GroupedGenerator(model, processor)
    answers = generator.generate(requests, 4, 2, on_done=done.__setitem__)
    assert sum(seen) == 4 + 2 + 3  # four single ones, a pair and a triple
    assert [done[n] for n in range(len(requests))] == answers


def test_an_image_may_be_loaded_when_needed(model, processor, requests):
    lazy = [
        Request(r.prompt, r.image_key, [lambda p=p: p for p in r.pictures])
        for r in requests
        if r.image
    ]
    plain = [r for r in requests if r.image]
    generator = GroupedGenerator(model, processor)
    assert generator.generate(lazy, 4, 8) == generator.generate(plain, 4, 8)


@torch.inference_mode()
def test_rows_leave_the_batch_as_they_end(model):
    """A head that maps the state's row to a fixed answer: tokens count down to the end token."""
    model.config.eos_token_id = 0
    model.get_input_embeddings().weight.zero_()
    starts = torch.tensor([3, 1, 0, 5])
    remaining = starts.clone().tolist()
    sizes = []

    class CountDown(torch.nn.Module):
        def forward(self, hidden):
            sizes.append(len(hidden))
            logits = torch.zeros(len(hidden), 8)
            alive = [row for row, left in enumerate(remaining) if left >= 0]
            for line, row in enumerate(alive):
                logits[line, remaining[row]] = 1
                remaining[row] -= 1
            return logits

    model.language_model.lm_head = CountDown()
    hidden = torch.zeros(4, model.config.d_model)
    outputs = greedy(model, hidden, model.init_state(4), max_new_tokens=10)
    assert outputs == [[3, 2, 1], [1], [], [5, 4, 3, 2, 1]]
    assert sizes == [4, 3, 2, 2, 1, 1]
