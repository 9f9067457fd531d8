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


def human(value: str) -> dict[str, str]:
    return {"from": "human", "value": value}


def gpt(value: str) -> dict[str, str]:
    return {"from": "gpt", "value": value}


# conversation -> its turns as the model reads them, <image> once for each picture
PLACES = {
    "a picture in the second round": (
        [human("Hello?"), gpt("Hi."), human("<image>\nWhat is it?"), gpt("A cat.")],
        f"USER: Hello? ASSISTANT: Hi.{EOS}USER: <image>\nWhat is it? ASSISTANT: A cat.{EOS}",
    ),
    "a picture each round": (
        [human("<image>\nWhat?"), gpt("A cat."), human("And this? <image>"), gpt("A dog.")],
        f"USER: <image>\nWhat? ASSISTANT: A cat.{EOS}USER: <image>\nAnd this? ASSISTANT: A dog."
        f"{EOS}",
    ),
    "pictures inside a question": (
        [human("First <image>, then <image>: which?"), gpt("The first.")],
        f"USER: <image>\n<image>\nFirst , then : which? ASSISTANT: The first.{EOS}",
    ),
    "a picture alone": (
        [human("<image>"), gpt("A cat.")],
        f"USER: <image>\n ASSISTANT: A cat.{EOS}",
    ),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_picture_belongs_to_its_round(name, processor):
    """In training, in the chat template (tags or image parts) and in a prompt of one question."""
    turns, expected = PLACES[name]
    ids, labels = processor.training_example(turns)
    text = processor.tokenizer.decode(ids).replace("<image>" * 4, "<image>")
    assert text == f"{SYSTEM} {expected}"
    assert supervised(processor, ids, labels) == "".join(
        f" {turn['value']}{EOS}" for turn in turns[1::2]
    )
    roles = {"human": "user", "gpt": "assistant"}
    messages = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in turns]
    assert processor.apply_chat_template(messages) == f"{SYSTEM} {expected}"
    for message in messages:
        words = message["content"].replace("<image>", "").strip()
        parts = [{"type": "text", "text": words}]
        parts += [{"type": "image"}] * message["content"].count("<image>")
        message["content"] = parts
    assert processor.apply_chat_template(messages) == f"{SYSTEM} {expected}"
    question = turns[-2]["value"]
    prompt = processor.conversation_prompt(question, images=question.count("<image>"))
    assert expected.endswith(f"{prompt.removeprefix(SYSTEM + ' ')} {turns[-1]['value']}{EOS}")


def test_a_picture_in_an_answer_is_refused(processor):
    turns = [human("Show me."), gpt("Here: <image>")]
    with pytest.raises(UserError, match="in an answer"):
        processor.training_example(turns)
    messages = [
        {"role": "user", "content": "Show me."},
        {"role": "assistant", "content": "Here: <image>"},
    ]
    with pytest.raises(Exception, match="a picture in an answer"):
        processor.apply_chat_template(messages)


def test_tags_and_pictures_agree(processor):
    with pytest.raises(UserError, match="1 <image> tags for 0 images"):
        processor.training_example(TURNS, images=0)
    with pytest.raises(UserError, match="2 <image> tags for 1 images"):
        processor.conversation_prompt("<image> <image> which?")


def test_plain_template_shows_every_picture(processor):
    turns = [human("<image>\n<image>\nCompare."), gpt("They differ.")]
    ids, labels = processor.training_example(turns, images=2, template="plain")
    assert ids[:8] == [processor.image_token_id] * 8
    assert supervised(processor, ids, labels) == "They differ.\n"


@pytest.mark.parametrize(
    "turns", [[human("Write."), gpt("A.")], [*TURNS], [human("<image>")]], ids=str
)
def test_plain_template_has_no_place_for_more(turns, processor):
    with pytest.raises(UserError, match="learns captions"):
        processor.training_example(turns, template="plain")


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
