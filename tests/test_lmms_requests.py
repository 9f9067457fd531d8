"""What lmms-eval may ask of the registered model, each beside a computation of the test's own."""

from __future__ import annotations

import io

import datasets
import pytest
import torch
from harness_world import png
from lmms_eval.api.instance import Instance, unwrap_generation_output
from PIL import Image
from test_lmms_tasks import ODD_PICTURES, READABLE

from harness.models.base import Limits, Request, Turn
from harness.models.lmms import UNLIKELY, UNREADABLE, VLMamba, VLMambaChat
from harness.models.resumable import Resumable
from harness.models.vlmamba import VLMambaModel

ROWS = [
    {"question": "What is it?", "images": [png((9, 200, 90))]},
    {"question": "Are they alike?", "images": [png((90, 20, 90)), png((9, 9, 220))]},
    {"question": "Two and two?", "images": []},
    {"question": "Broken?", "images": [b"no picture"]},
]


@pytest.fixture
def saved(tmp_path, model, processor) -> str:
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def make(saved):
    def build(kind=VLMamba):
        made = kind(saved, batch_size=3, device="cpu", backend="torch")
        rows = [
            {**row, "images": [{"bytes": b, "path": None} for b in row["images"]]} for row in ROWS
        ]
        kinds = datasets.Features(
            {"question": datasets.Value("string"), "images": datasets.List(datasets.Image())}
        )
        made.task_dict = {"t": {"test": datasets.Dataset.from_list(rows, features=kinds)}}
        return made

    return build


def shown(doc):
    return [image.convert("RGB") for image in doc["images"]]


def instance(kind: str, row: int, *arguments) -> Instance:
    return Instance(
        kind, (*arguments, row, "t", "test"), 0, metadata={"task": "t", "doc_id": row, "repeats": 1}
    )


def generate(row: int, **settings) -> Instance:
    settings = {"max_new_tokens": 6, **settings}
    return instance("generate_until", row, ROWS[row]["question"], settings, shown)


def inputs_of(vlm, row: int):
    """The prompt of a row by the processor alone."""
    images = [Image.open(io.BytesIO(b)) for b in ROWS[row]["images"]]
    processor = vlm.answers.model.processor
    prompt = processor.conversation_prompt(ROWS[row]["question"], len(images))
    return processor(text=[prompt], images=[images] if images else None, return_tensors="pt")


def answer_of(vlm, row: int, **settings) -> str:
    inputs = inputs_of(vlm, row)
    model = vlm.answers.model
    tokens = model.model.generate(**inputs, max_new_tokens=6, **settings)
    new = tokens[0, inputs["input_ids"].shape[1] :]
    return model.processor.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_every_kind_of_row_is_answered_and_a_broken_one_is_counted(make):
    vlm = make()
    found = vlm.generate_until([generate(row) for row in range(4)])
    assert found == [*(answer_of(vlm, row, do_sample=False) for row in range(3)), UNREADABLE]
    assert any("row 4" in event for event in vlm.answers.events)


def test_a_row_whose_task_code_fails_is_counted(make):
    vlm = make()
    odd = instance("generate_until", 0, "?", {}, lambda doc: ["film.mp4"])
    worse = instance("generate_until", 1, "?", {}, lambda doc: doc["absent"])
    assert vlm.generate_until([odd, worse, generate(2)])[:2] == [UNREADABLE] * 2


def test_beams_are_generates_own(make):
    vlm = make()
    found = vlm.generate_until([generate(row, num_beams=3) for row in range(3)])
    assert found == [answer_of(vlm, row, num_beams=3, do_sample=False) for row in range(3)]


def test_samples_depend_on_the_seed_alone(make):
    asked = generate(1, do_sample=True, temperature=1.5, top_p=0.9)
    alone = make().generate_until([asked])
    again = make().generate_until([generate(0, temperature=0.7), asked, asked])
    assert again[1] == alone[0]
    assert again[2] != again[1]  # several answers to one question are several draws
    cold = make().generate_until([generate(1, do_sample=True, temperature=0)])
    assert cold == make().generate_until([generate(1)])


def test_likelihoods_are_the_loss_over_the_continuations_tokens(make):
    vlm = make()
    model, tokenizer = vlm.answers.model.model, vlm.answers.model.processor.tokenizer
    texts = [" yes", " a long walk", " 4"]
    asked = [(row, text) for row in range(3) for text in texts]
    found = vlm.loglikelihood(
        [instance("loglikelihood", r, ROWS[r]["question"], t, shown) for r, t in asked]
        + [instance("loglikelihood", 3, "?", " x", shown)]
    )
    found = [unwrap_generation_output(one)[0] for one in found]  # as lmms-eval does
    assert found.pop() == UNLIKELY
    for (row, text), (loss, greedy) in zip(asked, found, strict=True):
        inputs = inputs_of(vlm, row)
        more = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], more], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.no_grad():
            logits = model(**inputs).logits[0, -more.shape[1] - 1 : -1].double()
        picked = logits.log_softmax(-1)[torch.arange(more.shape[1]), more[0]]
        assert loss == pytest.approx(-float(picked.mean()), abs=1e-4)
        assert greedy == bool((logits.argmax(-1) == more[0]).all())


def test_rounds_follow_the_task(make):
    vlm, heard = make(), []

    def ask(doc, previous_output, round_idx, previous_round_info):
        heard.append((round_idx, list(previous_output), previous_round_info))
        ends = round_idx == len(doc["images"]) + 1
        return shown(doc), f"Round {round_idx}?", ends, previous_output, round_idx

    asked = [
        instance("generate_until_multi_round", r, "First?", {"max_new_tokens": 4}, shown, ask)
        for r in range(4)
    ]
    found = vlm.generate_until_multi_round(asked)
    assert [len(rounds) for rounds in found] == [2, 3, 1, 1]
    assert found[3] == [UNREADABLE]
    assert (2, found[1][:2], 1) in heard


def test_chat_messages_are_asked_with_their_turns(make):
    vlm = make(VLMambaChat)

    def messages(doc):
        content = [{"type": "image", "url": image} for image in shown(doc)]
        first = {"role": "user", "content": [*content, {"type": "text", "text": "Look."}]}
        said = {"role": "assistant", "content": [{"type": "text", "text": "I see."}]}
        return [first, said, {"role": "user", "content": [{"type": "text", "text": "And?"}]}]

    asked = [instance("generate_until", r, "", messages, {"max_new_tokens": 6}) for r in range(4)]
    found = vlm.generate_until(asked)
    assert found[3] == UNREADABLE
    processor, model = vlm.answers.model.processor, vlm.answers.model.model
    system = processor.conversation_prompt("", 0).partition(" USER:")[0]
    for row in range(3):
        images = [Image.open(io.BytesIO(b)) for b in ROWS[row]["images"]]
        end = processor.tokenizer.eos_token
        tags = "<image>\n" * len(images)
        prompt = f"{system} USER: {tags}Look. ASSISTANT: I see.{end}USER: And? ASSISTANT:"
        inputs = processor(text=[prompt], images=[images] if images else None, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        new = tokens[0, inputs["input_ids"].shape[1] :]
        assert found[row] == processor.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_earlier_turns_are_in_the_chosen_chat_template_or_refused(saved, tmp_path):
    jinja = tmp_path / "short.jinja"
    jinja.write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content[-1].text }}. {% endfor %}answer:"
    )
    asked = Request("t", 0, "And?", (), Limits(6), before=(Turn("user", "Look"),))

    def build(template):
        return VLMambaModel(saved, device="cpu", backend="torch", template=template)

    short = build(str(jinja))
    inputs = short.processor(text=["user: Look. user: And?. answer:"], return_tensors="pt")
    tokens = short.model.generate(**inputs, max_new_tokens=6, do_sample=False)
    new = tokens[0, inputs["input_ids"].shape[1] :]
    said = short.processor.tokenizer.decode(new, skip_special_tokens=True).strip()
    assert Resumable(short).answer([asked]) == [said]
    plain = Resumable(build("plain"))
    assert plain.answer([asked]) == [None]
    assert "earlier turns" in plain.events[0]


@pytest.mark.parametrize("kind", [VLMamba, VLMambaChat])
def test_odd_pictures_and_texts_are_asked_or_counted(kind, make):
    """Every mode and size that can be a picture; what cannot, and what is no text, is counted."""
    made = make(kind)
    pictures = [*ODD_PICTURES.values(), None]
    rows = [{"question": "What is it?", "images": [picture]} for picture in pictures]
    rows += [{"question": text, "images": []} for text in ("", None, "<image>")]
    rows += [{"question": "Several?", "images": [ODD_PICTURES["palette"], ODD_PICTURES["cut"]]}]
    rows += [{"question": "A list?", "images": None}]
    kinds = {"question": datasets.Value("string"), "images": datasets.List(datasets.Image())}
    table = datasets.Dataset.from_list(rows, features=datasets.Features(kinds))
    made.task_dict = {"t": {"test": table}}

    def as_they_are(doc):  # no task's convert("RGB") between them and the model
        return doc["images"]

    def messages(doc):
        parts = [{"type": "image", "url": image} for image in doc["images"]]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": doc["question"]}]}]

    def ask(number: int) -> Instance:
        if kind is VLMambaChat:
            return instance("generate_until", number, "", messages, {"max_new_tokens": 3})
        given = (rows[number]["question"], {"max_new_tokens": 3}, as_they_are)
        return instance("generate_until", number, *given)

    found = made.generate_until([ask(number) for number in range(len(rows))])
    odd = {number for number, text in enumerate(found) if text == UNREADABLE}
    first = len(pictures)
    without_text, cut = first + 1, first + 3
    expected = {*range(READABLE, first), without_text, cut}
    if kind is VLMambaChat:  # its messages are made of the list that is absent
        expected.add(first + 4)
    assert odd == expected
    told = made.answers.events
    assert len(told) == len(odd)
    assert f"t: row {cut + 1}: OSError: Truncated File Read" in told
    assert sum("no picture, or one whose header is damaged" in line for line in told) == 2
