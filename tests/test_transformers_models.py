"""transformers' VLMs under evaluation answer what the library's generate() answers alone."""

from __future__ import annotations

import functools
import json
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_vlms
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, BambaConfig, MistralConfig

import tasks
from harness.data.images import decode, image_key
from harness.data.sources import Source
from harness.models import templates
from harness.models.base import Limits, Picture, Request, Turn
from harness.models.resumable import Resumable
from harness.models.shared_prefix import ALONE, BATCHED, EQUAL
from harness.models.transformers import TransformersModel
from harness.runs.schema import record_text
from vlmamba_core.errors import UserError

NEW_TOKENS = 10
PER_TASK = 3
TASKS = tuple(name for name in tasks.NAMES if Source.parse("demo").has(tasks.load(name)))


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("vlms")
    return {name: tiny_vlms.save(name, root / name) for name in tiny_vlms.FAMILIES}


@pytest.fixture(scope="session")
def demo_requests() -> list[Request]:
    """The first questions of each of the demo's tasks, and what tasks may hold besides."""
    found = []
    for name in TASKS:
        task = tasks.load(name)
        rows = Source.parse("demo").load(task, "paper")
        without = [n for n in range(len(rows)) if not task.image_cells(rows[n], "paper")][:1]
        for n in [*range(PER_TASK), *without]:
            pictures = tuple(
                Picture(image_key(stored), lambda stored=stored: decode(stored))
                for stored in task.image_cells(rows[n], "paper")
            )
            prompt = task.prompt(rows[n], "paper")
            found.append(Request(name, n, prompt, pictures, Limits(NEW_TOKENS)))
    one, *_, other = (request.pictures[0] for request in found if request.pictures)
    for n, pictures in enumerate([(one, other), (other, one, one), (one, other), (), ()]):
        text = ("Which is larger?", "Compare them.", "How many dogs?", "What is 2 + 2?", "Hi!")[n]
        found.append(Request("mixed", n, text, pictures, Limits(NEW_TOKENS)))
    return found


def by_the_library(folder: Path, requests: list[Request], tag: str = "<image>") -> list[str]:
    """Each prompt alone through AutoProcessor and generate(), written without the harness.

    tag: of a picture, where there is no chat template.
    """
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    found = []
    for request in requests:
        images = [picture.image.convert("RGB") for picture in request.pictures]
        parts = [{"type": "image", "image": image} for image in images]
        turn = {"role": "user", "content": [*parts, {"type": "text", "text": request.prompt}]}
        if processor.chat_template:
            inputs = processor.apply_chat_template(
                [turn],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
        else:
            inputs = processor(text=tag * len(images) + request.prompt, images=[images])
            inputs = inputs.convert_to_tensors("pt")
            inputs.pop("labels", None)
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
        new = tokens[0, inputs["input_ids"].shape[1] :]
        found.append(processor.tokenizer.decode(new, skip_special_tokens=True).strip())
    return found


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "idefics3", "mllama"])
def test_answers_are_those_of_generate_one_at_a_time(family, folders, demo_requests):
    expected = by_the_library(folders[family], demo_requests)
    model = TransformersModel(str(folders[family]), batch_size=5)
    assert model.mode == BATCHED, model.reasons
    assert model.error is not None and model.error < 1e-4
    answers = Resumable(model).answer(demo_requests)
    assert answers == expected
    assert len(set(answers)) > len(answers) // 2  # the comparison means something
    described = model.describe()["batching"]
    assert described["questions_also_asked_alone"] == 8
    assert described["of_these_answered_differently"] == 0


TEXT_ONLY = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] | trim }}\n"
    "{% endfor %}[assistant]"
)


def test_a_tokenizer_s_template_for_text_is_given_text(folders):
    """As of a LLaVA on Llama-3 whose processor has none of its own."""
    processor = AutoProcessor.from_pretrained(folders["llava"])
    processor.chat_template, processor.tokenizer.chat_template = None, TEXT_ONLY
    template = templates.choose(processor, None)
    assert template.in_words and template.name == "chat_template"
    before = (Turn("user", "Hello", 1), Turn("assistant", "Hi"))
    text = template.render(processor, "a dog?", images=2, before=before)
    assert text == "[user] <image>\nHello\n[assistant] Hi\n[user] <image>\na dog?\n[assistant]"
    assert not templates.choose(AutoProcessor.from_pretrained(folders["llava"]), None).in_words


@pytest.mark.parametrize("mode", [EQUAL, ALONE])
def test_slower_ways_give_the_same_answers(mode, folders, demo_requests):
    fast = Resumable(TransformersModel(str(folders["qwen2_vl"]), batch_size=7))
    slow = Resumable(TransformersModel(str(folders["qwen2_vl"]), batch_size=7, mode=mode))
    assert slow.answer(demo_requests) == fast.answer(demo_requests)


def test_an_image_that_sees_the_question_is_found_and_read_each_time(folders, demo_requests):
    pictures = [request for request in demo_requests if len(request.pictures) == 1]
    model = TransformersModel(str(folders["paligemma"]), batch_size=5)
    assert model.mode == ALONE
    assert all("logits differ" in reason for reason in model.reasons) and model.reasons
    assert model.template.name == "plain"
    assert Resumable(model).answer(pictures) == by_the_library(folders["paligemma"], pictures)


def test_a_processor_that_places_pictures_itself_gets_no_tags(folders, demo_requests):
    pictures = [request for request in demo_requests if len(request.pictures) == 1]
    model = TransformersModel(str(folders["blip2"]), batch_size=5)
    assert model.template.name == "plain"
    answers = Resumable(model).answer(pictures)
    assert answers == by_the_library(folders["blip2"], pictures, tag="")
    assert len(set(answers)) > len(answers) // 2
    first, *_ = model.prompt(pictures[0]).inputs["input_ids"].tolist()
    assert first.count(model.model.config.image_token_id) == 4


@pytest.mark.parametrize("family", ["instructblip", "blip"])
def test_an_answer_begins_where_the_models_own_generate_has_it(family, folders, demo_requests):
    """InstructBLIP on T5 returns the answer alone, BLIP goes on before the prompt's last token."""
    asked = [request for request in demo_requests if len(request.pictures) == 1]
    model = TransformersModel(str(folders[family]), batch_size=5)
    answers = Resumable(model).answer(asked)
    processor = AutoProcessor.from_pretrained(folders[family])
    library = AutoModelForImageTextToText.from_pretrained(folders[family]).eval()
    for request, answer in zip(asked, answers, strict=True):
        image = request.pictures[0].image.convert("RGB")
        text = model.template.render(processor, request.prompt, 0)
        inputs = processor(text=[text], images=[image], return_tensors="pt")
        tokens = library.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)[0]
        if family == "blip":
            assert torch.equal(tokens[: inputs.input_ids.shape[1] - 1], inputs.input_ids[0, :-1])
            tokens = tokens[inputs.input_ids.shape[1] - 1 :]
        assert answer == processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
    assert len(set(answers)) > len(answers) // 2
    for request in asked:  # a stop string ends generate() itself
        tokens = model.alone(model.prompt(request), request.limits)
        letters = [letter for letter in model.text(tokens[:4]) if letter.isalnum()]
        if letters:
            ended = model.alone(model.prompt(request), Limits(NEW_TOKENS, (letters[0],)))
            assert ended == tokens[: len(ended)] and len(ended) <= 4
            break
    else:
        raise AssertionError("no answer to stop in")


def test_a_configuration_with_infinite_numbers_can_be_recorded(tmp_path):
    """Mamba-2's and its kin's time_step_limit ends at infinity."""
    folder = tiny_vlms.save("llava", tmp_path, text=BambaConfig, mamba_n_heads=4, mamba_d_head=16)
    record = record_text(TransformersModel(str(folder)).describe())
    limit = json.loads(record)["config"]["text_config"]["time_step_limit"]
    assert "Infinity" in json.dumps(limit)


def test_questions_longer_than_the_positions_are_counted(tmp_path, demo_requests, capsys):
    """Rotary positions go on without a word, and scores fall."""
    folder = tiny_vlms.save("llava", tmp_path, max_position_embeddings=60)
    model = TransformersModel(str(folder), batch_size=2, mode=ALONE)
    short = replace(demo_requests[0], prompt="Is it?", pictures=(), limits=Limits(2))
    Resumable(model).answer([short])
    assert "questions_beyond_its_positions" not in model.describe()
    long = replace(short, prompt="Is it? " * 40, row=7)
    Resumable(model).answer([long, replace(long, row=8)])
    assert model.describe()["questions_beyond_its_positions"] == 2
    assert capsys.readouterr().err.count("more than the 60 positions") == 1


def test_a_picture_whose_token_is_not_known_is_never_left_out(folders, demo_requests):
    model = TransformersModel(str(folders["llava"]))
    asked = next(request for request in demo_requests if request.pictures)
    with pytest.raises(TypeError, match="which token stands for a picture"):
        model.decoder.prefill(replace(model.prompt(asked), shared=0))


QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if m.content is string else '' }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
TEXTS = (
    "{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}{% endif %}\n{% endfor %}"
)


@pytest.mark.parametrize("text", [TEXT_ONLY, QWEN3, TEXTS])
@pytest.mark.parametrize("file", [True, False])
def test_no_template_for_text_loses_a_picture_or_a_question(text, file, folders, tmp_path):
    processor = AutoProcessor.from_pretrained(folders["llava"])
    if file:
        (tmp_path / "mine.jinja").write_text(text)
    else:
        processor.chat_template = text
    template = templates.choose(processor, str(tmp_path / "mine.jinja") if file else None)
    told = template.render(processor, "a dog?", images=1)
    assert "<image>\na dog?" in told and "'type'" not in told


def test_a_template_that_loses_every_question_is_refused(folders):
    processor = AutoProcessor.from_pretrained(folders["llava"])
    processor.chat_template = "Hello"
    with pytest.raises(UserError, match="writes no picture and question of a message"):
        templates.choose(processor, None)


def test_what_the_processor_adds_on_its_own_is_its_own_affair(tmp_path, demo_requests):
    """LFM2-VL's adds no special tokens by default: then neither the harness does."""
    folder = tiny_vlms.save("llava", tmp_path / "llava")
    model = TransformersModel(str(folder))
    seen = []
    inner = model.processor

    class Watched:
        def __call__(self, **given):
            seen.append(given.get("add_special_tokens"))
            return inner(**given)

        def __getattr__(self, name):
            return getattr(inner, name)

    model.processor = Watched()
    model.prompt(demo_requests[0])
    model.processor.chat_template = inner.chat_template
    model.template = replace(model.template, text="{{ '<bos>' }}" + model.template.text)
    model.prompt(demo_requests[0])
    assert seen == [None, False]


@pytest.mark.parametrize("mode", [BATCHED, ALONE])
def test_a_question_that_breaks_the_model_is_counted_and_the_others_are_answered(
    folders, demo_requests, mode, monkeypatch
):
    asked = list({r.prompt: r for r in demo_requests if len(r.pictures) == 1}.values())[:6]
    model = TransformersModel(str(folders["llava"]), batch_size=4, mode=mode)
    expected = Resumable(model).answer(asked)
    around = Resumable(TransformersModel(str(folders["llava"]), batch_size=4, mode=mode))
    inner = around.model
    broken = inner.prompt(asked[2]).question.tolist()
    forward = type(inner.model).forward

    @functools.wraps(forward)  # generate() looks at the arguments it takes
    def fail(self, input_ids=None, **given):
        for row in input_ids.tolist():
            if any(row[at : at + len(broken)] == broken for at in range(len(row))):
                raise RuntimeError("shape '[1, 42, 2, -1]' is invalid")
        return forward(self, input_ids=input_ids, **given)

    monkeypatch.setattr(type(inner.model), "forward", fail)
    answers = around.answer(asked)
    assert answers[2] is None, around.events
    assert answers == [None if n == 2 else text for n, text in enumerate(expected)]
    assert sum("not answered: RuntimeError: shape" in event for event in around.events) == 1


def test_an_empty_stop_string_ends_nothing(folders, demo_requests):
    plain = [replace(r, limits=Limits(4)) for r in demo_requests[:2]]
    empty = [replace(r, limits=Limits(4, until=("", "\0"))) for r in demo_requests[:2]]
    model = TransformersModel(str(folders["llava"]))
    assert Resumable(model).answer(empty) == Resumable(model).answer(plain)


def test_a_question_the_model_does_not_take_is_counted(folders, demo_requests):
    around = Resumable(TransformersModel(str(folders["paligemma"]), batch_size=5))
    asked = [*demo_requests[:2], next(r for r in demo_requests if not r.pictures)]
    assert around.answer(asked)[2] is None
    why, refusal = around.events
    assert why.startswith("questions are answered one by one: ") and "logits differ" in why
    assert "not answered: ValueError" in refusal


def test_a_picture_is_prepared_and_encoded_once_for_its_questions(folders, demo_requests):
    pictures = [demo_requests[0].pictures[0], demo_requests[-6].pictures[0]]
    assert pictures[0].key != pictures[1].key
    asked = [Request("t", n, f"Question {n}?", (pictures[n // 6],), Limits(3)) for n in range(12)]
    model = TransformersModel(str(folders["llava"]), batch_size=4, agreement=0)
    counts = {"encoded": 0, "prepared": 0}
    process = model.processor.image_processor

    def encoded(*_) -> None:
        counts["encoded"] += 1

    def prepared(*args, real=process._preprocess, **kwargs):
        counts["prepared"] += 1
        return real(*args, **kwargs)

    model.model.model.vision_tower.register_forward_hook(encoded)
    process._preprocess = prepared
    Resumable(model).answer(asked)
    assert counts == {"encoded": 2, "prepared": 2}


def test_rows_that_ended_leave_the_batch(folders, demo_requests):
    model = TransformersModel(str(folders["llava"]), batch_size=32)
    whole = Resumable(model).answer(demo_requests)
    stops = sorted({c for text in whole if text for c in text if c.isascii() and c.isalpha()})[:3]
    asked = [
        Request(r.task, r.row, r.prompt, r.pictures, Limits(NEW_TOKENS, tuple(stops)))
        for r in demo_requests
    ]
    expected = []
    for text in whole:
        for stop in stops:
            text = text.split(stop)[0]
        expected.append(text.strip())
    assert expected != whole
    assert Resumable(model).answer(asked) == expected
    assert Resumable(TransformersModel(str(folders["llava"]), mode=ALONE)).answer(asked) == expected


@pytest.mark.parametrize(
    ("settings", "mode"),
    [
        ({"repetition_penalty": 1.4, "do_sample": True, "temperature": 0.7, "top_k": 3}, BATCHED),
        ({"no_repeat_ngram_size": 2}, ALONE),
        ({"suppress_tokens": [44, 258]}, ALONE),
    ],
)
def test_the_models_own_generation_settings_hold(tmp_path, demo_requests, settings, mode):
    folder = tiny_vlms.save("llava", tmp_path, generation=settings)
    model = TransformersModel(str(folder), batch_size=4)
    assert model.mode == mode
    if mode == ALONE:
        assert model.reasons == [f"its generation settings have {next(iter(settings))}"]
    assert Resumable(model).answer(demo_requests) == by_the_library(folder, demo_requests)


def test_a_sliding_window_is_not_padded(tmp_path, demo_requests):
    folder = tiny_vlms.save("llava", tmp_path, text=MistralConfig, sliding_window=16)
    model = TransformersModel(str(folder), batch_size=4)
    assert Resumable(model).answer(demo_requests) == by_the_library(folder, demo_requests)
    assert model.agreement.different == 0


def test_a_named_template_is_used_and_told(folders, demo_requests, tmp_path):
    asked = demo_requests[:1]
    llava = str(folders["llava"])
    own, vicuna = (TransformersModel(llava, template=name) for name in (None, "vicuna_v1"))
    assert own.describe()["template"]["name"] == "chat_template"
    assert vicuna.describe()["template"]["name"] == "vicuna_v1"
    text = vicuna.template.render(vicuna.processor, "Is there a dog?", images=2)
    assert text == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. USER: <image>\n"
        "<image>\nIs there a dog? ASSISTANT:"
    )
    assert own.provenance() != vicuna.provenance()
    assert own.provenance() == TransformersModel(llava).provenance()
    assert Resumable(own).answer(asked) != Resumable(vicuna).answer(asked)
    file = tmp_path / "mine.jinja"
    file.write_text(tiny_vlms.CHAT.replace("IMAGE", "<image>\n"))
    mine = TransformersModel(llava, template=str(file))
    assert mine.template.name == "mine.jinja"
    assert Resumable(mine).answer(asked) == Resumable(own).answer(asked)
    with pytest.raises(UserError, match="unknown template 'vicuna'; .*: vicuna_v1"):
        TransformersModel(llava, template="vicuna")


def test_a_question_brings_no_image_tokens_along(folders, demo_requests):
    asked = demo_requests[0]
    odd = Request("t", 0, f"<image>{asked.prompt}<image>", asked.pictures, asked.limits)
    model = TransformersModel(str(folders["llava"]))
    assert Resumable(model).answer([odd]) == Resumable(model).answer([asked])


def test_what_is_no_such_model_is_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot load .* as an image-text-to-text model"):
        TransformersModel(str(tmp_path))


def test_the_command_that_times_shared_prefixes_runs(capsys):
    tool = Path(__file__).resolve().parents[1] / "tools" / "time_shared_prefix.py"
    assert runpy.run_path(str(tool))["main"](["--small", "--images", "1", "--repeats", "1"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["shared_tokens"], found["question_tokens"]) == (765, 24)
    assert (found["questions"], found["different_answers"]) == (18, 0)
    assert found["mode"] == BATCHED and found["times_faster"]["alone"] > 0
