"""Grouped decoding: one prefill an image, any batch size and order, the answers of generate()."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from test_vlm import picture
from tiny import TINY_MIXERS, tiny_config

from vlmamba.config import VLMambaConfig
from vlmamba.generation import GroupedGenerator, Request, Sampler, greedy, prepared
from vlmamba.models import linear
from vlmamba.processing import split_text


@pytest.fixture(params=TINY_MIXERS)
def config(request) -> VLMambaConfig:
    return tiny_config(**TINY_MIXERS[request.param])


@pytest.fixture
def requests(processor):
    questions = ["a cat?", "what is the color of the dog in the picture?", "2 + 2", "x" * 90, "?"]
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


def test_a_token_of_generate_is_a_step_in_every_product(model, processor, monkeypatch):
    """A sequence of one token would be filled up with rows of zeros, the head's product too."""
    inputs = processor(text=processor.conversation_prompt("2 + 2", 0), return_tensors="pt")
    sequences = []
    whole = linear.product
    monkeypatch.setattr(linear, "product", lambda *a: sequences.append(a[0].shape) or whole(*a))
    with torch.inference_mode():
        state = model(**inputs).cache_params
        assert sequences
        sequences.clear()
        model(input_ids=torch.tensor([[5]]), cache_params=state)
    assert sequences == []


@pytest.mark.parametrize("batch_size", [1, 3, 8, 32])
def test_batch_size_and_order_change_nothing(model, processor, requests, batch_size):
    generator = GroupedGenerator(model, processor)
    expected = generator.generate(requests, 8, 1)
    assert len(set(expected)) > 5  # answers that would show a mix-up
    order = random.Random(batch_size).sample(range(len(requests)), len(requests))
    answers = generator.generate([requests[n] for n in order], 8, batch_size)
    assert answers == [expected[n] for n in order]


def test_more_rows_than_the_kernels_take_change_nothing(model, processor, monkeypatch):
    """Above that number, products of other libraries would sum in another order."""
    asked = [Request(processor.conversation_prompt(f"{n} + 2", images=0)) for n in range(9)]
    alone = [GroupedGenerator(model, processor).generate([one], 8)[0] for one in asked]
    widths = []
    step = model.language_model.step
    monkeypatch.setattr("vlmamba.generation.MOST_ROWS", 4)
    monkeypatch.setattr(
        model.language_model, "step", lambda x, cache: widths.append(len(x)) or step(x, cache)
    )
    assert GroupedGenerator(model, processor).generate(asked, 8, batch_size=9) == alone
    assert max(widths) == 4


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


@pytest.mark.parametrize("continued", [True, False])
def test_pictures_without_a_key_are_shared_with_nobody(model, processor, continued, monkeypatch):
    """Prepared or not, and where each prompt is read as a whole; an empty key is one as well."""
    monkeypatch.setattr(type(model.language_model), "shares_prefix", continued)
    prompt = processor.conversation_prompt("what is the color of the dog in the picture?")
    keyed = [Request(prompt, f"image{n}", picture(n)) for n in range(4)]
    generator = GroupedGenerator(model, processor)
    expected = generator.generate(keyed, 8)
    assert len(set(expected)) > 1
    bare = [replace(request, image_key=None) for request in keyed]
    assert generator.generate(bare, 8) == expected
    assert generator.generate([replace(keyed[0], image_key=""), *keyed[1:]], 8) == expected
    tiles: dict = {}
    assert generator.generate([prepared(one, processor, tiles) for one in bare], 8) == expected
    scored = generator.loglikelihood(keyed, ["yes"] * 4)
    assert generator.loglikelihood(bare, ["yes"] * 4) == scored


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


def voted(requests, votes, seed=0):
    return [
        replace(request, seed=f"{seed}/{place}/{vote}")
        for place, request in enumerate(requests)
        for vote in range(votes)
    ]


def test_votes_share_one_prefill(model, processor, requests):
    """As many tokens are read for four sampled answers a question as for one."""
    greedy_run = GroupedGenerator(model, processor)
    greedy_run.generate(requests, 6, 3)
    sampled = GroupedGenerator(model, processor, temperature=1.0)
    answers = sampled.generate(voted(requests, 4), 6, 3)
    prompts = {(r.image_key, r.prompt) for r in requests}
    assert len(prompts) == len(requests)
    prefixes = {(r.image_key, split_text(r.prompt)[0]): len(r.pictures) for r in requests}
    read = sum(
        len(processor.encode(prefix, [1] * pictures)) if prefix else 0
        for (_, prefix), pictures in prefixes.items()
    )
    read += sum(len(processor.encode(split_text(r.prompt)[1])) for r in requests)
    assert greedy_run.tokens["prefill"] == sampled.tokens["prefill"] == read
    assert sampled.tokens["decode"] > 2 * greedy_run.tokens["decode"]
    assert len({*answers[:4]}) > 1  # one question's votes differ


def test_a_sampled_answer_depends_on_its_seed_and_not_on_its_batch(model, processor, requests):
    asked = voted(requests[::3], 3)
    alone = GroupedGenerator(model, processor, temperature=1.0).generate(asked, 6, 1)
    order = random.Random(1).sample(range(len(asked)), len(asked))
    for batch_size in (2, 5, 32):
        again = GroupedGenerator(model, processor, temperature=1.0)
        mixed = again.generate([asked[n] for n in order], 6, batch_size)
        assert mixed == [alone[n] for n in order]
    fewer = GroupedGenerator(model, processor, temperature=1.0).generate(asked[::3], 6, 32)
    assert fewer == alone[::3]  # a question's first vote is the same without the others
    other = GroupedGenerator(model, processor, temperature=1.0)
    assert other.generate(voted(requests[::3], 3, seed=1), 6, 32) != alone


def test_the_sampler_draws_as_often_as_the_softmax_says():
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0]])
    draw = Sampler(2.0, ["seed"])
    drawn = torch.cat([draw(logits, [0]) for _ in range(20000)])
    counts = torch.bincount(drawn, minlength=4) / len(drawn)
    expected = torch.tensor([math.exp(x / 2) for x in (0, 1, -1, 2)])
    torch.testing.assert_close(counts, expected / expected.sum(), atol=0.01, rtol=0)
    impossible = torch.tensor([[-torch.inf, 0.0, -torch.inf, -torch.inf]])
    assert {int(draw(impossible, [0])) for _ in range(50)} == {1}


def test_low_temperature_is_greedy(model, processor, requests):
    sampled = GroupedGenerator(model, processor, temperature=1e-9).generate(requests, 6, 8)
    assert sampled == GroupedGenerator(model, processor).generate(requests, 6, 8)
