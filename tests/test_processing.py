"""Tokens and labels of prompts and training samples."""

from __future__ import annotations

import pytest
from PIL import Image

from vlmamba.errors import UserError
from vlmamba.processing import EOS, IGNORED, SYSTEM

TURNS = [
    {"from": "human", "value": "What is it?\n<image>"},
    {"from": "gpt", "value": "cat"},
    {"from": "human", "value": "And the colour?"},
    {"from": "gpt", "value": "red"},
]


def supervised(processor, ids, labels) -> str:
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    return processor.tokenizer.decode([label for label in labels if label != IGNORED])


def test_labels_are_the_answers_only(processor):
    ids, labels = processor.training_example(TURNS, images=1)
    assert supervised(processor, ids, labels) == f" cat{EOS} red{EOS}"
    text = processor.tokenizer.decode(ids).replace("<image>" * 4, "<image>")
    assert text == (
        f"{SYSTEM} USER: <image>\nWhat is it? ASSISTANT: cat{EOS}"
        f"USER: And the colour? ASSISTANT: red{EOS}"
    )


def test_plain_template_supervises_the_caption(processor):
    turns = [
        {"from": "human", "value": "Describe it.\n<image>"},
        {"from": "gpt", "value": "a cat\n"},
    ]
    ids, labels = processor.training_example(turns, images=1, template="plain")
    assert ids[:4] == [processor.image_token_id] * 4
    assert supervised(processor, ids, labels) == "a cat\n"


def test_a_training_prompt_has_the_tokens_of_inference(processor):
    ids, labels = processor.training_example(TURNS[:2], images=1)
    prompt = processor.encode(processor.conversation_prompt("What is it?"))
    assert ids[: len(prompt)] == prompt
    assert all(label == IGNORED for label in labels[: len(prompt)])
    inputs = processor(
        text=processor.conversation_prompt("What is it?"), images=Image.new("RGB", (9, 9))
    )
    assert inputs["input_ids"][0] == prompt


def test_split_prompt_shares_the_image_prefix(processor):
    questions = ["What?", "Where is it?\nAnswer."]
    prompts = [processor.conversation_prompt(q) for q in questions]
    (first, a), (second, b) = map(processor.split_prompt, prompts)
    assert first == second and first[-1] == processor.image_token_id
    assert [first + a, second + b] == [processor.encode(p) for p in prompts]
    assert processor.split_prompt("no image")[0] == []


def test_padding_to_a_square_centres_the_image(processor):
    square = processor.pad_to_square(Image.new("RGB", (6, 2), "white"))
    assert square.size == (6, 6)
    assert square.getpixel((3, 3)) == (255, 255, 255) != square.getpixel((3, 0))


def test_unknown_template(processor):
    with pytest.raises(UserError, match="unknown template 'vicuna'; .*: vicuna_v1"):
        processor.training_example(TURNS, 1, template="vicuna")
