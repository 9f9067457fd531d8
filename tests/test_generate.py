"""generate() of transformers: rows keep their own pictures; every input of forward; errors."""

from __future__ import annotations

import pytest
import torch
from test_vlm import picture
from tiny import TINY_MIXERS, tiny_config
from transformers.generation.utils import DeferredStopCheck

from vlmamba.config import VLMambaConfig
from vlmamba.generation import GroupedGenerator, Request

NEW = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
QUESTIONS = ("What?", "Which of them is larger, and where?", "2 + 2?")
PICTURES = ([0], [1, 2], [])  # of each question's row


@pytest.fixture(params=TINY_MIXERS)
def config(request) -> VLMambaConfig:
    return tiny_config(**TINY_MIXERS[request.param])


def ask(processor, rows=(0, 1, 2), side="left") -> dict[str, torch.Tensor]:
    """Inputs of some of the questions, with one, two and no pictures."""
    processor.tokenizer.padding_side = side
    prompts = [processor.conversation_prompt(QUESTIONS[n], images=len(PICTURES[n])) for n in rows]
    images = [[picture(seed) for seed in PICTURES[n]] for n in rows]
    return dict(processor(text=prompts, images=images, return_tensors="pt", padding=True))


def with_features(model, inputs):
    features = model.encode_images(inputs["pixel_values"]) if "pixel_values" in inputs else None
    rest = {name: value for name, value in inputs.items() if name != "pixel_values"}
    return rest if features is None else rest | {"image_features": features}


def with_embeds(model, inputs):
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    return rest | {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}


def with_both(model, inputs):
    return inputs | with_embeds(model, inputs)


def in_place(model, inputs):
    """Embeddings that hold the pictures already."""
    pixels = inputs.get("pixel_values")
    embeds, _ = model.embed(inputs["input_ids"], pixels)
    return {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}


FORMS = {
    "pixel_values": lambda model, inputs: inputs,
    "image_features": with_features,
    "inputs_embeds and pixel_values": with_embeds,
    "input_ids, inputs_embeds and pixel_values": with_both,
    "inputs_embeds with the pictures in place": in_place,
}
WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "several beams of each": {"num_beams": 4, "num_return_sequences": 3},
    "several samples": {"do_sample": True, "top_k": 1, "num_return_sequences": 3},
}


@torch.no_grad()
def answers(model, inputs: dict, **options) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The new tokens, and the beams' scores."""
    options = NEW | options
    output = model.generate(**inputs, **options, return_dict_in_generate=True, output_scores=True)
    new = output.sequences[:, -NEW["max_new_tokens"] :]
    return new, output.get("sequences_scores")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("form", "way"),
    [
        *(("pixel_values", way) for way in WAYS),
        *((form, "several beams of each") for form in FORMS),
    ],
)
def test_a_row_sees_its_own_pictures_only(model, processor, form, way, side):
    """Answers and scores of a batch are those of its rows alone, greedily, by beams or sampled."""
    together, scores = answers(model, FORMS[form](model, ask(processor, side=side)), **WAYS[way])
    each = WAYS[way].get("num_return_sequences", 1)
    for row in range(3):
        alone, score = answers(model, ask(processor, rows=[row]), **WAYS[way])
        part = slice(row * each, (row + 1) * each)
        assert torch.equal(together[part], alone)
        if scores is not None:
            assert torch.allclose(scores[part], score, atol=1e-4)
    assert len(torch.unique(together, dim=0)) > 1


@pytest.mark.parametrize("options", [{"use_cache": False}, {"use_cache": False, "num_beams": 2}])
@pytest.mark.parametrize("form", FORMS)
def test_without_a_state_the_answers_are_the_same(model, processor, form, options):
    inputs = FORMS[form](model, ask(processor))
    without, _ = answers(model, inputs, **options)
    assert torch.equal(without, answers(model, inputs, num_beams=options.get("num_beams", 1))[0])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("size", [1, 7, 500])
@pytest.mark.parametrize("form", FORMS)
def test_a_prompt_in_pieces_has_the_same_answer(model, processor, form, size, side):
    inputs = FORMS[form](model, ask(processor, side=side))
    for way in ({}, {"num_beams": 3}, {"use_cache": False}):
        whole, scores = answers(model, inputs, **way)
        pieces, again = answers(model, inputs, prefill_chunk_size=size, **way)
        assert torch.equal(pieces, whole)
        assert scores is None or torch.allclose(scores, again, atol=1e-4)


@torch.no_grad()
def test_pieces_are_passed_one_by_one(model, processor):
    inputs, lengths = ask(processor), []
    model.language_model.register_forward_pre_hook(lambda _, args: lengths.append(len(args[0][0])))
    model.generate(**inputs, **NEW, prefill_chunk_size=16)
    assert max(lengths) == 16 and sum(lengths) >= inputs["input_ids"].shape[1]


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"prefill_chunk_size": 2}])
@torch.no_grad()
def test_a_state_is_continued_row_by_row(model, processor, options):
    """A first round with pictures, then a second question from the state that it left."""
    first = ask(processor, rows=[0, 1])
    more = torch.randint(2, 300, (2, 4))
    ids = torch.cat([first["input_ids"], more], dim=1)
    mask = torch.cat([first["attention_mask"], torch.ones_like(more)], dim=1)
    whole, scores = answers(model, first | {"input_ids": ids, "attention_mask": mask}, **options)
    state = model(**first).cache_params
    going_on = {"input_ids": ids, "attention_mask": mask, "cache_params": state}
    continued, again = answers(model, going_on, **options)
    assert torch.equal(continued, whole)
    assert scores is None or torch.allclose(scores, again, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"prefill_chunk_size": 2}])
@pytest.mark.parametrize("seen", [2, 5, 9])
@torch.no_grad()
def test_new_tokens_alone_are_all_read(model, options, seen):
    """However many they are: a mask that is longer than the ids says that they are the new ones."""
    ids = torch.randint(2, 300, (2, 12))
    whole, scores = answers(model, {"input_ids": ids}, **options)
    state = model(ids[:, :seen]).cache_params
    new = {"input_ids": ids[:, seen:], "attention_mask": torch.ones_like(ids)}
    continued, again = answers(model, new | {"cache_params": state}, **options)
    assert torch.equal(continued, whole)
    assert scores is None or torch.allclose(scores, again, atol=1e-4)


@torch.no_grad()
def test_pictures_among_new_tokens_are_counted_there(model, processor):
    inputs, seen = ask(processor, rows=[0, 1]), 3
    first = torch.full((2, seen), 7)
    mask = torch.cat([torch.ones_like(first), inputs["attention_mask"]], dim=1)
    together = inputs | {"input_ids": torch.cat([first, inputs["input_ids"]], 1)}
    whole, _ = answers(model, together | {"attention_mask": mask}, num_beams=2)
    state = model(first).cache_params
    going_on = inputs | {"attention_mask": mask, "cache_params": state}
    assert torch.equal(answers(model, going_on, num_beams=2)[0], whole)


def test_an_apple_gpu_may_ask_whether_a_state_goes_back(model):
    state = model(torch.full((1, 3), 7)).cache_params
    asked = torch.device("mps"), state
    assert not DeferredStopCheck.is_supported(*asked, cache_is_returned=True, is_assistant=False)
    assert DeferredStopCheck.is_supported(*asked, cache_is_returned=False, is_assistant=False)


def shift_a_picture(inputs) -> None:
    """Six tokens in each of two rows, for pictures of four."""
    inputs["input_ids"].fill_(5)
    inputs["input_ids"][:2, :6] = 1


WRONG = {
    "a tag without a picture": (
        lambda inputs: inputs.pop("pixel_values"),
        "image tokens but no images",
    ),
    "a picture without a tag": (
        lambda inputs: inputs.update(input_ids=inputs["input_ids"].clamp(min=5)),
        "holds 0 image tokens but 3 images of 4 tokens",
    ),
    "a picture too many": (
        lambda inputs: inputs.update(pixel_values=inputs["pixel_values"].repeat(2, 1, 1, 1)),
        "holds 12 image tokens but 6 images",
    ),
    "a picture between two rows": (shift_a_picture, "holds 12 image tokens but 3 images"),
    "pixels and features": (
        lambda inputs: inputs.update(image_features=torch.zeros(3, 4, 24)),
        "pixel_values or image_features, not both",
    ),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("embedded", [False, True])
def test_tags_and_pictures_agree_or_it_is_an_error(model, processor, name, embedded):
    damage, said = WRONG[name]
    inputs = ask(processor)
    damage(inputs)
    inputs = with_embeds(model, inputs) if embedded else inputs
    with pytest.raises(ValueError, match=said):
        model(**inputs)
    for options in ({}, {"num_beams": 2}, {"prefill_chunk_size": 3}):
        with pytest.raises(ValueError, match=said):
            model.generate(**inputs, **NEW, **options)


def test_a_continued_piece_wants_its_pictures_too(model, processor):
    state = model(torch.full((1, 3), 7)).cache_params
    with pytest.raises(ValueError, match="holds 4 image tokens but no images"):
        model(torch.full((1, 4), processor.image_token_id), cache_params=state)
    sampled = torch.full((1, 1), processor.image_token_id)  # any token may be sampled
    assert model(sampled, cache_params=state).logits.shape[1] == 1


def test_an_empty_prompt_is_an_error(model, processor):
    with pytest.raises(ValueError, match="holds no token"):
        model.generate(torch.zeros((1, 0), dtype=torch.long), **NEW)
    ids, mask = torch.full((2, 3), 7), torch.tensor([[1, 1, 1], [0, 0, 0]])
    with pytest.raises(ValueError, match="row 1 of the prompts is all padding"):
        model.generate(ids, attention_mask=mask, **NEW)
    assert model.generate(**NEW).shape[1] == 1 + NEW["max_new_tokens"]  # from the first token


def test_grouped_requests_are_checked_before_any_is_answered(model, processor):
    generator = GroupedGenerator(model, processor)
    good = Request(processor.conversation_prompt("What?"), "a", picture(0))
    tagged = processor.conversation_prompt("What?")
    for wrong, said in (
        (Request(tagged), "request 2: 1 <image> tags for 0 images"),
        (Request("What?", "a", picture(0)), "request 2: 0 <image> tags for 1 images"),
        (Request("<image><image> What?", "a", picture(0)), "request 2: 2 <image> tags"),
        (Request(""), "request 2: the prompt is empty"),
        (Request("What? <image>", "a", picture(0)), "request 2: .* ends with an image"),
    ):
        seen = []
        with pytest.raises(Exception, match=said) as caught:
            generator.generate([good, wrong], 3, on_done=lambda *done: seen.append(done))  # noqa: B023
        assert type(caught.value).__name__ == "UserError" and not seen
