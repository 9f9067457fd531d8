"""Inner adaptors: their path by hand, text that never changes, the stage in which they learn."""

from __future__ import annotations

import json
from queue import Queue

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from test_generation import picture
from test_hybrid import built
from test_mamba import theirs, write_checkpoint  # noqa: F401
from tiny import tiny_config

from harness.speed import models
from vlmamba import train
from vlmamba.configs.language import MambaConfig
from vlmamba.configs.presets import LANGUAGE_MODELS
from vlmamba.generation import GroupedGenerator, Request
from vlmamba.models.quantized import QuantizedLinear, quantize
from vlmamba.models.vlm import VLMambaForConditionalGeneration
from vlmamba.serving.engine import Engine, Ticket
from vlmamba.serving.requests import Job
from vlmamba.training.init_model import adopt
from vlmamba.training.lora import attach
from vlmamba.training.recipe import Hyperparameters
from vlmamba.training.stages import STAGES, freeze
from vlmamba_core.errors import UserError

ADAPTED = {"n_layer": 3, "adaptors": [0, 2], "adaptor_ends": True}


@pytest.fixture
def config():
    return tiny_config(**ADAPTED)


def stirred(model: VLMambaForConditionalGeneration) -> VLMambaForConditionalGeneration:
    """With adaptors that have learned something."""
    with torch.no_grad():
        for block in model.language_model.adaptors:
            block.mixer.out_proj.weight.normal_(std=0.3)
        ends = model.language_model.adaptors.ends
        for weight in () if ends is None else ends.parameters():
            weight.add_(torch.randn_like(weight) * 0.3 * weight.std().nan_to_num(1))
    return model


def without(model: VLMambaForConditionalGeneration) -> VLMambaForConditionalGeneration:
    """The frozen model alone."""
    plain = built(n_layer=3)
    own = {k: v for k, v in model.state_dict().items() if "adaptors" not in k}
    plain.load_state_dict(own)
    return plain


def test_they_start_as_copies_that_add_nothing():
    donor, model = built(n_layer=3), built(**ADAPTED)
    ids = torch.tensor([[1, 1, 1, 1, 5, 6]])
    pixels = torch.rand(1, 3, 28, 28)
    for _ in range(2):  # fresh, then with the donor's weights
        plain = without(model)
        with torch.no_grad():
            shown = [m(ids, pixel_values=pixels).logits for m in (model, plain)]
        torch.testing.assert_close(*shown, atol=0, rtol=0)
        adopt(model, donor, "language_model", "donor")
    for block, layer in zip(model.language_model.adaptors, (0, 2), strict=True):
        its, copied = block.state_dict(), donor.language_model.layers[layer].state_dict()
        assert (
            not its.pop("mixer.out_proj.weight").any() and copied.pop("mixer.out_proj.weight").any()
        )
        assert all(torch.equal(its[name], copied[name]) for name in copied)
    ends = model.language_model.adaptors.ends
    assert torch.equal(ends.embedding.weight, donor.language_model.embedding.weight)
    assert torch.equal(ends.lm_head.weight, donor.language_model.embedding.weight)
    memories = {p.data_ptr() for p in model.language_model.parameters()}
    assert len(memories) == len(list(model.language_model.parameters()))  # each learns apart
    again = built(**ADAPTED)
    adopt(again, stirred(model), "language_model", "model")  # a trained one's come along
    trained = model.language_model.adaptors.state_dict()
    assert all(
        torch.equal(w, trained[k]) for k, w in again.language_model.adaptors.state_dict().items()
    )


def test_a_checkpoint_without_ends_is_the_frozen_models(tmp_path):
    older = stirred(built(**ADAPTED | {"adaptor_ends": False}))
    older.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    del saved["text_config"]["adaptor_ends"]  # as it was written before there was the field
    (tmp_path / "config.json").write_text(json.dumps(saved))
    found = VLMambaForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert found.language_model.adaptors.ends is None
    ids, pixels = torch.tensor([[1, 1, 1, 1, 5, 6]]), torch.rand(1, 3, 28, 28)
    own = built(**ADAPTED)
    adopt(own, found, "language_model", "older")  # goes on learning, with ends
    own.connector.load_state_dict(found.connector.state_dict())
    own.vision_encoder.load_state_dict(found.vision_encoder.state_dict())
    with torch.no_grad():
        logits = [m(ids, pixel_values=pixels).logits for m in (older, found, own)]
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


def test_saved_loaded_packed_and_resized(tmp_path):
    model = stirred(built(**ADAPTED))
    model.save_pretrained(tmp_path)
    again = VLMambaForConditionalGeneration.from_pretrained(tmp_path).eval()
    its = again.state_dict()
    assert all(torch.equal(its[name], weight) for name, weight in model.state_dict().items())
    language, ends = again.language_model, again.language_model.adaptors.ends
    assert language.lm_head.weight is language.embedding.weight is not ends.embedding.weight
    before = ends.embedding.weight.detach().clone()
    again.resize_token_embeddings(len(before) + 3)
    assert torch.equal(ends.embedding.weight[:-3], before)
    assert torch.equal(ends.embedding.weight[-3:], language.embedding.weight[-3:])
    assert ends.lm_head.weight.shape == language.lm_head.weight.shape
    ids, pixels = torch.tensor([[1, 1, 1, 1, 5, 6], [9, 8, 7, 6, 5, 4]]), torch.rand(1, 3, 28, 28)
    with torch.no_grad():
        plain = without(model)
        for m in (model, plain):
            quantize(m.language_model, "int8")
        assert isinstance(model.language_model.adaptors.ends.lm_head, QuantizedLinear)
        packed, frozen = (m(ids, pixel_values=pixels).logits for m in (model, plain))
    assert torch.equal(packed[1], frozen[1]) and not torch.allclose(packed[0], frozen[0], atol=0.1)


@torch.no_grad()
def test_a_pictures_row_goes_through_them_and_a_rows_text_does_not():
    model = stirred(built(**ADAPTED))
    language, plain = model.language_model, without(model)
    ids = torch.tensor([[1, 1, 1, 1, 5, 6, 7], [9, 8, 7, 6, 5, 4, 3]])
    pixels = torch.rand(1, 3, 28, 28)
    together = model(ids, pixel_values=pixels)
    own = {k: v.double() for k, v in language.adaptors.ends.state_dict().items()}
    x = own["embedding.weight"][ids[:1]].float()
    x[:, :4] = plain.connector(plain.encode_images(pixels))
    for number, layer in enumerate(language.layers):
        x = layer(x)[0]
        if number in (0, 2):
            x = language.adaptors[number // 2](x)[0]
    x = x.double()
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * own["norm_f.weight"]
    expected = (normed @ own["lm_head.weight"].T).float()
    torch.testing.assert_close(together.logits[:1], expected, atol=1e-5, rtol=0)
    text = plain(ids, pixel_values=pixels)  # the same batch, so that products have the same shapes
    assert torch.equal(together.logits[1], text.logits[1])
    assert torch.equal(model(ids[1:]).logits, plain(ids[1:]).logits)
    assert not together.cache_params.ssm[3:, 1].any()  # the adaptors' states: no trace of text
    one = torch.tensor([5, 5])
    state = together.cache_params
    stepped = language.step(language.embed(one, state.pictured), state)
    same = plain.language_model.step(plain.language_model.embed(one), text.cache_params)
    assert torch.equal(language.head(stepped)[1], plain.language_model.head(same)[1])
    assert not torch.allclose(language.bare(stepped)[0], same[0], atol=1e-2)
    longer = torch.cat([ids, one[:, None]], dim=1)
    whole = model(longer, pixel_values=pixels).logits[:, -1]
    torch.testing.assert_close(language.head(stepped), whole, atol=1e-5, rtol=0)


def test_answers_in_any_batch_are_generates_and_text_is_the_frozen_models(model, processor):
    stirred(model.eval())
    questions = [f"{'what ' * n}is it?" for n in (1, 4, 2)]
    seen = [
        Request(processor.conversation_prompt(q), f"image{n}", picture(n))
        for n in range(2)
        for q in questions
    ]
    text = [Request(processor.conversation_prompt(q, images=0)) for q in questions]
    alone = GroupedGenerator(model, processor).generate(seen + text, 6, batch_size=1)
    assert GroupedGenerator(model, processor).generate(seen + text, 6, batch_size=9) == alone
    plain = GroupedGenerator(without(model), processor)
    assert plain.generate(text, 6, batch_size=2) == alone[len(seen) :]
    assert plain.generate(seen, 6, batch_size=2) != alone[: len(seen)]
    for request, answer in zip(seen[:2], alone, strict=False):
        inputs = processor(text=request.prompt, images=[request.image], return_tensors="pt")
        for options in ({}, {"prefill_chunk_size": 5}, {"use_cache": False}):
            tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False, **options)
            new = tokens[0, inputs["input_ids"].shape[1] :]
            assert processor.tokenizer.decode(new, skip_special_tokens=True).strip() == answer


def test_the_endpoint_hands_on_the_words_of_the_same_answers(model, processor):
    stirred(model.eval())
    prompt = processor.conversation_prompt("what is it?")
    asked = [Request(prompt, "image", picture(0)), Request(prompt.replace("<image>\n", ""))]
    expected = GroupedGenerator(model, processor).generate(asked, 6)
    engine, answers = Engine(model, processor), Queue()
    try:
        for request in asked:  # with `on_text` each is answered by itself, a token at a time
            job = Job(request, 6)
            engine.put(Ticket(job, answers.put, on_text=lambda text: None))
            assert answers.get(timeout=60).text == expected[asked.index(request)]
    finally:
        engine.close()


@pytest.mark.parametrize("rows", [[0], [1], [0, 1]])
def test_whatever_a_batch_holds_every_part_that_learns_gets_a_gradient(rows):
    model = stirred(built(**ADAPTED))
    freeze(model, STAGES["adaptors"])
    ids = torch.tensor([[1, 1, 1, 1, 5, 6, 7], [9, 8, 7, 6, 5, 4, 3]])[rows]
    shown = {"pixel_values": torch.rand(1, 3, 28, 28)} if 0 in rows else {}
    labels = ids.masked_fill(ids == 1, -100)
    model(ids, labels=labels, **shown).loss.backward()
    learns = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in learns.values())
    moved = {name for name, p in learns.items() if p.grad.any()}
    assert len(moved) > 0.9 * len(learns) if 0 in rows else not moved  # text teaches them nothing


@pytest.mark.parametrize("kind", ["int8", "int4"])
@torch.no_grad()
def test_on_a_packed_model_they_start_silent_too(kind):
    """In int4 a byte of zero is twice -8."""
    donor, model = built(n_layer=3), built(**ADAPTED)
    for one in (donor, model):
        quantize(one.language_model, kind)
    ids, pixels = torch.tensor([[1, 1, 1, 1, 5, 6]]), torch.rand(1, 3, 28, 28)
    model.vision_encoder.load_state_dict(donor.vision_encoder.state_dict())
    model.connector.load_state_dict(donor.connector.state_dict())
    adopt(model, donor, "language_model", "donor")
    shown = [one(ids, pixel_values=pixels).logits for one in (model, donor)]
    assert torch.equal(*shown)


def test_lora_is_not_for_a_stage_in_which_adaptors_alone_learn():
    model = built(**ADAPTED)
    freeze(model, STAGES["adaptors"])
    sizes = {"lr": 1e-3, "batch_size": 2, "micro_batch": 2, "dtype": "fp32"}
    with pytest.raises(UserError, match="in which the language model learns"):
        attach(model, Hyperparameters(**sizes, lora=4))


def test_the_stage_trains_connector_and_adaptors_alone(tmp_path):
    Image.new("RGB", (30, 30), "red").save(tmp_path / "a.png")
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a box"}]
    words = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "a word"}]
    rows = [{"id": str(n), "image": "a.png", "conversations": talk} for n in range(3)]
    rows += [{"id": "text", "conversations": words}]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    shared = ["--data", str(tmp_path / "data.json"), "--images", str(tmp_path), "--cpu", "--tiny"]
    shared += ["--preset", "nano-iaa", "--batch-size", "2", "--micro-batch", "2", "--steps", "2"]
    out = tmp_path / "o"
    assert train.main(["--stage", "pretrain", *shared, "--out", str(out / "p")]) == 0
    first = VLMambaForConditionalGeneration.from_pretrained(out / "p" / "final")
    begun = ["--init", str(out / "p" / "final"), "--out", str(out / "a")]
    assert train.main(["--stage", "adaptors", *shared, *begun]) == 0
    last = VLMambaForConditionalGeneration.from_pretrained(out / "a" / "final").state_dict()
    ends = {k for k in last if "adaptors.ends" in k}
    changed = {name for name, w in first.state_dict().items() if not torch.equal(w, last[name])}
    assert ends and ends <= changed
    assert any("adaptors.0" in name for name in changed)
    assert all("adaptors" in name or "connector" in name for name in changed)


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match=r"adaptors is \[5\]; expected numbers of Mamba layers"):
        MambaConfig(n_layer=3, adaptors=[5])
    with pytest.raises(UserError, match="adaptor_ends is true; expected adaptors"):
        MambaConfig(n_layer=3, adaptor_ends=True)
    with pytest.raises(UserError, match="in order"):
        MambaConfig(n_layer=3, adaptors=[2, 1])
    with pytest.raises(UserError, match="expected numbers of Mamba layers"):
        MambaConfig(n_layer=2, mixer="mamba,mlp", adaptors=[1])
    with pytest.raises(UserError, match="the model has no adaptors; choose a preset that has"):
        freeze(built(n_layer=2), STAGES["adaptors"])


def test_the_published_size_and_what_is_profiled():
    config = MambaConfig(**{k: v for k, v in LANGUAGE_MODELS["2.8b-iaa"].items() if "_id" not in k})
    assert len(config.adaptors) == 14 and config.adaptor_ends  # IAA-14
    model = models.build("vl-mamba-2.8b-iaa", tiny=True, image_tokens=4)
    embeds = models.embed(model, torch.tensor([[5, 6]]), torch.rand(1, 4, 24))
    stirred(model)
    shown, cache = models.prefill(model, embeds)
    assert cache.pictured.all() and shown.isfinite().all()


@pytest.mark.parametrize("kind", [None, "int8"])
def test_a_token_of_a_row_with_a_picture_reads_its_own_head(kind):
    language = built(**ADAPTED).language_model
    held = sum(p.nbytes for p in language.parameters())
    table = language.embedding.weight.nbytes
    assert models.weight_bytes(language) == held - 2 * table  # two of three: one head is left
    if kind is not None:
        before = {n: p.nbytes for n, p in language.named_parameters() if ".mixer." in n}
        quantize(language, kind)
        after = {n: p.nbytes for n, p in language.named_parameters() if ".mixer." in n}
        spared = sum(before.values()) - sum(after.values())
        numbers = spared // 4 + table // 4
        rows = 4 * sum(m.out_features for m in language.modules() if isinstance(m, QuantizedLinear))
        rows -= 4 * language.lm_head.out_features
        assert models.weight_bytes(language) == held - 3 * table - spared + numbers + rows


def test_a_published_model_gets_them_as_copies(tmp_path, theirs):  # noqa: F811
    write_checkpoint(tmp_path, theirs, "original", "safetensors")
    model = VLMambaForConditionalGeneration(
        tiny_config(n_layer=2, adaptors=[1], adaptor_ends=True)
    ).eval()
    model.language_model.load_published(tmp_path)
    model.tie_weights()
    language, ends = model.language_model, model.language_model.adaptors.ends
    assert language.lm_head.weight is language.embedding.weight
    for weight in (ends.embedding.weight, ends.lm_head.weight):
        assert torch.equal(weight, language.embedding.weight)
        assert weight.data_ptr() != language.embedding.weight.data_ptr()
    ids = torch.randint(2, 320, (3, 9))
    marked = language.mark_pictured(language.embed(ids), torch.tensor([True, False, True]))
    with torch.no_grad():
        logits = language.head(language(marked)[0])
        expected = theirs(ids).logits
    torch.testing.assert_close(logits, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


@pytest.fixture(autouse=True)
def a_process_of_its_own():
    """Accelerate keeps its settings for a process; other files train with others."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
