"""What hf: models are asked besides greedy answers: likelihoods, samples, beams, earlier turns.

Each beside the library's own model and generate(), called here.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import datasets
import pytest
import tiny_vlms
import torch
from PIL import Image
from test_lmms_requests import ROWS, generate, instance, shown
from transformers import AutoModelForImageTextToText, AutoProcessor

from harness import run
from harness.models.base import Limits, Picture, Request, Sampling, Turn, likelihood
from harness.models.lmms import UNREADABLE, VLMamba, VLMambaChat
from harness.models.resumable import Resumable
from harness.models.transformers import TransformersModel

FAMILIES = ("llava", "qwen2_vl", "idefics3", "paligemma")
COLORS = ((200, 30, 30), (30, 30, 200))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("vlms")
    return {name: str(tiny_vlms.save(name, root / name)) for name in FAMILIES}


def request(text: str = "Is there a dog?", **changes) -> Request:
    pictures = (Picture("red", lambda: Image.new("RGB", (50, 40), COLORS[0])),)
    return replace(Request("t", 0, text, pictures, Limits(6)), **changes)


class Library:
    """The model by transformers alone."""

    def __init__(self, folder: str) -> None:
        load = AutoModelForImageTextToText.from_pretrained
        self.model = load(folder, dtype=torch.float32).eval()
        self.processor = AutoProcessor.from_pretrained(folder)

    def inputs(self, text: str, images: int = 1) -> dict:
        pictures = [Image.new("RGB", (50, 40), color) for color in COLORS[:images]]
        if self.processor.chat_template:
            parts = [{"type": "image"}] * images + [{"type": "text", "text": text}]
            turn = [{"role": "user", "content": parts}]
            text = self.processor.apply_chat_template(turn, add_generation_prompt=True)
        else:
            text = "<image>" * images + text
        found = self.processor(text=[text], images=[pictures], return_tensors="pt")
        found.pop("labels", None)
        return found

    def answer(self, inputs: dict, **settings) -> str:
        settings = {"max_new_tokens": 6, "do_sample": False, **settings}
        tokens = self.model.generate(**inputs, **settings)
        new = tokens[0, inputs["input_ids"].shape[1] :]
        return self.processor.tokenizer.decode(new, skip_special_tokens=True).strip()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_likelihood_is_that_of_the_whole_text_read_at_once(family, folders):
    library, model = Library(folders[family]), TransformersModel(folders[family])
    for text in (" yes", " a long walk", ""):
        (found,) = Resumable(model).answer([request(continuation=text)])
        chance, count, greedy = likelihood(found)
        inputs = library.inputs("Is there a dog?")
        more = library.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert count == len(more)
        if not more:
            assert (chance, greedy) == (0.0, True)
            continue
        output = library.model.generate(
            **inputs,
            max_new_tokens=len(more),
            do_sample=False,
            prefix_allowed_tokens_fn=lambda _, ids, n=inputs["input_ids"].shape[1], more=more: [
                more[len(ids) - n]
            ],
            output_logits=True,
            return_dict_in_generate=True,
        )
        logits = torch.cat(output.logits).double().log_softmax(-1)
        assert chance == pytest.approx(float(sum(logits[k, t] for k, t in enumerate(more))))
        assert greedy == all(int(logits[k].argmax()) == t for k, t in enumerate(more))
        if family == "llava":  # one forward over all of it, without a cache
            ids = torch.cat([inputs["input_ids"], torch.tensor([more])], dim=1)
            whole = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            with torch.no_grad():
                read = library.model(**whole).logits[0, -len(more) - 1 : -1].double()
            read = read.log_softmax(-1)
            assert chance == pytest.approx(
                float(sum(read[k, t] for k, t in enumerate(more))), abs=1e-4
            )


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_and_beams_are_generates_own(family, folders):
    library, model = Library(folders[family]), TransformersModel(folders[family])
    drawn = Sampling(do_sample=True, temperature=1.5, top_p=0.9, seed=3)
    asked = [
        request(limits=Limits(6, sampling=drawn), vote=1),
        request(limits=Limits(6, sampling=Sampling(num_beams=3))),
    ]
    inputs = library.inputs("Is there a dog?")
    torch.manual_seed(asked[0].seed(3))
    expected = [library.answer(inputs, do_sample=True, temperature=1.5, top_p=0.9)]
    expected.append(library.answer(inputs, num_beams=3))
    before = torch.get_rng_state()
    assert Resumable(model).answer(asked) == expected
    assert torch.equal(torch.get_rng_state(), before)


def test_earlier_turns_stand_in_the_chat_template(folders):
    library = Library(folders["llava"])
    turns = (Turn("user", "Look at <image> this.", 1), Turn("assistant", "I see."))
    pictures = tuple(
        Picture(str(color), lambda color=color: Image.new("RGB", (50, 40), color))
        for color in COLORS
    )
    asked = request("And that?", before=turns, pictures=pictures)
    found = Resumable(TransformersModel(folders["llava"])).answer([asked])
    text = "USER: <image>Look at  this.USER: I see.USER: <image>And that? ASSISTANT:"
    images = [Image.new("RGB", (50, 40), color) for color in COLORS]
    token = library.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}]}]
    ).removeprefix("USER: ")
    inputs = library.processor(
        text=[text.replace("<image>", token)], images=[images], return_tensors="pt"
    )
    assert found == [library.answer(inputs)]
    plain = Resumable(TransformersModel(folders["llava"], template="plain"))
    assert plain.answer([asked]) == [None]
    assert "earlier turns" in plain.events[-1]


@pytest.mark.parametrize("family", ["llava", "paligemma"])  # in batches, and one by one
def test_votes_are_drawn_from_the_models_own_distribution(family, folders):
    library, votes, heat = Library(folders[family]), 400, 0.5
    model = TransformersModel(folders[family], temperature=heat, batch_size=50)
    asked = [request(limits=Limits(1), vote=vote) for vote in range(votes)]
    found = Counter(Resumable(model).answer(asked))
    with torch.no_grad():
        logits = library.model(**library.inputs("Is there a dog?")).logits[0, -1]
    chances = (logits.double() / heat).softmax(-1)
    tokenizer, expected = library.processor.tokenizer, Counter()
    for token, chance in enumerate(chances.tolist()):
        expected[tokenizer.decode([token], skip_special_tokens=True).strip()] += chance
    likely = [text for text, chance in expected.items() if votes * chance >= 5]
    assert len(likely) > 2
    for text in likely:  # each within five standard deviations
        chance = expected[text]
        assert abs(found[text] - votes * chance) < 5 * (votes * chance * (1 - chance)) ** 0.5 + 1
    again = TransformersModel(folders[family], temperature=heat, batch_size=7)
    assert Resumable(again).answer(asked[::-1]) == Resumable(model).answer(asked)[::-1]


def test_a_run_with_votes(folders, tmp_path):
    command = ["--tasks", "pope", "--limit", "6", "--model", f"hf:{folders['llava']}"]
    command += ["--votes", "3", "--temperature", "1", "--out", str(tmp_path)]
    assert run.main(command) == 0
    record = json.loads((tmp_path / "record.json").read_text())
    assert len(record["votes"]["pope"]["accuracy"]) == 3
    assert record["settings"]["temperature"] == 1
    lines = (tmp_path / "votes_pope.jsonl").read_text().splitlines()
    votes = [json.loads(line)["votes"] for line in lines]
    assert len(votes) == 6 and all(len(set(three)) > 1 for three in votes)


@pytest.mark.parametrize("kind", [VLMamba, VLMambaChat])
def test_lmms_evals_model_asks_it_samples_and_rounds(kind, folders):
    made = kind(f"hf:{folders['llava']}", batch_size=3, device="cpu")
    rows = [{**row, "images": [{"bytes": b, "path": None} for b in row["images"]]} for row in ROWS]
    kinds = {"question": datasets.Value("string"), "images": datasets.List(datasets.Image())}
    table = datasets.Dataset.from_list(rows, features=datasets.Features(kinds))
    made.task_dict = {"t": {"test": table}}
    if kind is VLMambaChat:

        def messages(doc, round_idx=None, previous_output=None, previous_round_info=None):
            parts = [{"type": "image", "url": image} for image in shown(doc)]
            text = f"{doc['question']} {previous_output or ''}"
            turn = {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
            return ([turn], round_idx == 2, previous_output, None) if round_idx else [turn]

        asked = [
            instance("generate_until_multi_round", n, "", messages, {"max_new_tokens": 4})
            for n in range(4)
        ]
        found = made.generate_until_multi_round(asked)
        assert [len(rounds) for rounds in found] == [2, 2, 2, 1]
        assert found[3] == [UNREADABLE]
        return

    def ask(doc, previous_output, round_idx, previous_round_info):
        return [], f"Round {round_idx}?", round_idx == 3, previous_output, None

    asked = [
        instance("generate_until_multi_round", n, "First?", {"max_new_tokens": 4}, shown, ask)
        for n in range(4)
    ]
    found = made.generate_until_multi_round(asked)
    assert [len(rounds) for rounds in found] == [3, 3, 3, 1]
    drawn = made.generate_until([generate(0, do_sample=True, temperature=2.0)] * 4)
    assert UNREADABLE not in drawn and len(set(drawn)) > 1
