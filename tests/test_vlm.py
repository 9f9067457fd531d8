"""The whole model: padding, splicing, loss, generate(), Auto classes, save and load."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import TINY_MIXERS, tiny_config
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

import vlmamba
from vlmamba.checkpoints import load
from vlmamba.config import VLMambaConfig
from vlmamba.models.selective_scan import use_backend
from vlmamba.models.vlm import VLMambaForConditionalGeneration
from vlmamba.processing import SYSTEM, VLMambaProcessor
from vlmamba_core.errors import UserError


@pytest.fixture(params=TINY_MIXERS)
def config(request) -> VLMambaConfig:
    return tiny_config(**TINY_MIXERS[request.param])


def picture(seed: int, size=(40, 30)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def batch(processor, questions):
    prompts = [processor.conversation_prompt(q) for q in questions]
    images = [[picture(n)] for n in range(len(questions))]
    return processor(text=prompts, images=images, return_tensors="pt", padding=True)


@pytest.fixture
def saved(tmp_path, model, processor):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    return tmp_path


@torch.no_grad()
def test_chosen_hidden_states(model):
    ids = torch.randint(2, 300, (2, 7))
    whole = model(ids, output_hidden_states=True).hidden_states
    some = model(ids, output_hidden_states=[0, -1]).hidden_states
    assert len(some) == len(whole) == model.config.n_layer + 1
    assert torch.equal(some[0], whole[0]) and torch.equal(some[-1], whole[-1])
    assert some[1:-1] == (None,) * (len(whole) - 2)


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_the_encoders_attention_can_be_chosen(saved, kind):
    model = VLMambaForConditionalGeneration.from_pretrained(saved, attn_implementation=kind)
    assert model.vision_encoder.model.config._attn_implementation == kind


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_on_either_side_changes_nothing(model, processor, side):
    processor.tokenizer.padding_side = side
    inputs = batch(processor, ["What?", "What is in the image, and where is it?"])
    together = model(**inputs)
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        alone = model(
            input_ids=inputs["input_ids"][row : row + 1, mask],
            pixel_values=inputs["pixel_values"][row : row + 1],
        )
        assert torch.allclose(together.logits[row, mask], alone.logits[0], atol=1e-5)
        assert torch.allclose(
            together.cache_params.ssm[:, row], alone.cache_params.ssm[:, 0], atol=1e-5
        )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "do_sample": True}])
def test_generate_is_exact_in_a_padded_batch(model, processor, side, options):
    processor.tokenizer.padding_side = side
    inputs = batch(processor, ["What?", "What is in the image, and where is it?"])
    start = inputs["input_ids"].shape[1]
    limits = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **options}
    if limits["do_sample"]:  # only that it runs: its draws depend on the batch
        assert model.generate(**inputs, **limits).shape == (2, start + 6)
        return
    together = model.generate(**inputs, **limits)[:, start:]
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        ids = inputs["input_ids"][row : row + 1, mask]
        pixels = inputs["pixel_values"][row : row + 1]
        alone = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, **limits
        )
        assert torch.equal(together[row], alone[0, ids.shape[1] :])


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
@pytest.mark.parametrize("start", ["fresh", "continued"])
@torch.no_grad()
def test_a_piece_that_is_all_padding_leaves_a_row_as_it_is(model, backend, start):
    """A batch fed piece by piece, whose rows end in different pieces: the rows alone."""
    ids = torch.randint(2, 300, (3, 12))
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0  # nothing in the second piece, nor in the third
    mask[1, :8] = 0  # nothing before the third piece
    with use_backend(backend):
        state = None
        if start == "continued":
            before = torch.randint(2, 300, (3, 5))
            state = model(before).cache_params
        began = model.init_state(3) if state is None else state.clone()
        for piece in (slice(0, 4), slice(4, 8), slice(8, 12)):
            state = model(ids[:, piece], attention_mask=mask[:, piece], cache_params=state)
            state = state.cache_params
            if piece.start == 4:
                assert torch.equal(state.conv[:, 1], began.conv[:, 1])
                assert torch.equal(state.ssm[:, 1], began.ssm[:, 1])
        after = model(torch.full((3, 1), 7), cache_params=state).logits
        for row in range(3):
            real = torch.cat([ids[row, mask[row] != 0], torch.tensor([7])])[None]
            alone = model(real, cache_params=began.select(torch.tensor([row]))).logits[:, -1]
            assert torch.allclose(after[row], alone, atol=1e-5)


@torch.no_grad()
def test_a_loss_does_not_depend_on_where_padding_is(model):
    """Each label is predicted from the real token before it, wherever that stands."""
    ids = torch.randint(2, 300, (1, 6))
    alone = model(ids, labels=ids).loss
    for real in (
        [1, 1, 1, 1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 1, 1, 1, 1, 1],
        [0, 1, 1, 0, 1, 1, 0, 1, 1],
    ):
        mask = torch.tensor([real])
        padded, labels = torch.full((1, 9), 3), torch.full((1, 9), -100)
        padded[mask != 0], labels[mask != 0] = ids[0], ids[0]
        loss = model(padded, attention_mask=mask, labels=labels).loss
        torch.testing.assert_close(loss, alone, atol=1e-5, rtol=1e-5)


def test_images_and_their_tokens_must_agree(model, processor):
    inputs = batch(processor, ["What?"])
    with pytest.raises(ValueError, match="4 image tokens but 2 images of 4 tokens"):
        model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"].repeat(2, 1, 1, 1))


def test_image_features_replace_pixels(model, processor):
    inputs = batch(processor, ["What?"])
    features = model.encode_images(inputs.pop("pixel_values"))
    with_features = model(**inputs, image_features=features).logits
    with_pixels = model(**batch(processor, ["What?"])).logits
    assert torch.equal(with_features, with_pixels)


def test_loss_covers_the_labeled_tokens_only(model):
    ids = torch.randint(2, 300, (2, 12))
    labels = ids.clone()
    labels[:, :7] = -100
    logits = model(ids).logits
    expected = torch.nn.functional.cross_entropy(
        logits[:, 6:-1].reshape(-1, logits.shape[-1]), ids[:, 7:].reshape(-1)
    )
    assert torch.allclose(model(ids, labels=labels).loss, expected)
    training = model.train()(ids, labels=labels)
    assert training.logits is None and torch.allclose(training.loss, expected)


def test_gradient_checkpointing_changes_no_gradient(model):
    ids = torch.randint(2, 300, (2, 12))
    gradients = []
    for checkpointing in (False, True):
        model.train().zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        gradients.append(model.language_model.layers[0].mixer.in_proj.weight.grad.clone())
    assert torch.allclose(*gradients)


@torch.no_grad()
def test_save_and_load_through_the_auto_classes(saved, model, processor):
    loaded = AutoModelForImageTextToText.from_pretrained(saved)
    again = AutoProcessor.from_pretrained(saved)
    assert isinstance(loaded, VLMambaForConditionalGeneration)
    inputs = batch(processor, ["What?"])
    assert torch.equal(batch(again, ["What?"])["input_ids"], inputs["input_ids"])
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_pipeline(saved):
    pipe = pipeline("image-text-to-text", model=str(saved))
    content = [{"type": "image", "image": picture(0)}, {"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": content}]
    outputs = pipe(text=messages, max_new_tokens=3, return_full_text=False)
    assert isinstance(outputs[0]["generated_text"], str)


def test_the_demo_encoder_is_left_out_of_checkpoints(tmp_path, processor):
    config = tiny_config(vision_config=None)
    model = VLMambaForConditionalGeneration(config)
    model.vision_encoder.load_pretrained()
    model.eval().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, _ = load(str(tmp_path))
    pixels = torch.randn(1, 3, 224, 224)
    assert torch.equal(loaded.encode_images(pixels), model.encode_images(pixels))
    assert (tmp_path / "model.safetensors").stat().st_size < 3e6


def test_the_demo_encoder_ignores_its_batch_even_in_training():
    model = VLMambaForConditionalGeneration(tiny_config(vision_config=None))  # never put in eval
    model.vision_encoder.load_pretrained()
    pixels = torch.randn(3, 3, 224, 224)
    with torch.no_grad():
        together, alone = model.encode_images(pixels), model.encode_images(pixels[:1])
        assert torch.allclose(together[:1], alone, atol=1e-4)
        assert torch.equal(model.train().encode_images(pixels), together)


def test_the_demo_encoders_features_are_standardised():
    """The channel moments are derived from batch-norm parameters; photographs must agree."""
    model = VLMambaForConditionalGeneration(tiny_config(vision_config=None))
    model.vision_encoder.load_pretrained()
    folder = Path(vlmamba.__file__).parent / "assets" / "backgrounds"
    photos = [Image.open(path).convert("RGB").resize((224, 224)) for path in folder.glob("*.jpg")]
    transform = model.config.vision_encoder.transform(model.config.vision_config)
    pixels = transform(photos, return_tensors="pt")
    with torch.no_grad():
        features = model.encode_images(pixels["pixel_values"])
    assert abs(features.mean()) < 0.3 and 0.5 < features.std() < 2


def test_the_chat_template_is_vicuna_v1(processor):
    content = [{"type": "image"}, {"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": content}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert prompt == processor.conversation_prompt("What?")
    assert prompt == f"{SYSTEM} USER: <image>\nWhat? ASSISTANT:"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "config.json").unlink(), "no config.json"),
        (lambda d: (d / "model.safetensors").unlink(), r"no \*.safetensors"),
        (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), "pickled"),
        (lambda d: (d / "model.safetensors").write_bytes(b"x" * 50), "cannot load model"),
        (
            lambda d: (d / "config.json").write_text(
                (d / "config.json").read_text().replace('"d_model": 32', '"d_model": 40')
            ),
            "wrong shapes|cannot load model",
        ),
        (
            lambda d: (d / "config.json").write_text(
                re.sub(r'"n_layer": \d', '"n_layer": 9', (d / "config.json").read_text())
            ),
            "lacks",
        ),
        (lambda d: (d / "config.json").write_text("{"), "cannot load model"),
    ],
)
def test_a_broken_checkpoint_is_refused_in_one_line(saved, damage, message):
    damage(saved)
    with pytest.raises(UserError, match=message) as caught:
        load(str(saved))
    assert "\n" not in str(caught.value)


def test_an_encoder_is_missing_only_where_its_package_brings_it(saved, processor, tmp_path):
    file = saved / "model.safetensors"
    tensors = load_file(file)
    left_out = {name for name in tensors if "layers.0" in name and name.startswith("vision_")}
    kept = {name: tensor for name, tensor in tensors.items() if name not in left_out}
    save_file(kept, file, {"format": "pt"})
    with pytest.raises(UserError, match=rf"lacks {len(left_out)} tensors: vision_encoder\."):
        load(str(saved))
    packaged = VLMambaForConditionalGeneration(tiny_config(vision_config=None))
    packaged.save_pretrained(tmp_path / "packaged")
    VLMambaProcessor.from_config(packaged.config, processor.tokenizer).save_pretrained(
        tmp_path / "packaged"
    )
    file = tmp_path / "packaged" / "model.safetensors"
    assert not any(name.startswith("vision_encoder.") for name in load_file(file))
    load(str(tmp_path / "packaged"))


def test_unknown_names_list_the_nearest_first():
    with pytest.raises(UserError, match="unknown model 'nanoo'; known, nearest first: nano"):
        load("nanoo")
    with pytest.raises(UserError, match="unknown scan 'bms'; known, nearest first: bsm"):
        VLMambaConfig(scan="bms")
    with pytest.raises(UserError, match="unknown connector 'vss-l2'; .*: vss_l2"):
        VLMambaConfig(connector="vss-l2")
    with pytest.raises(UserError, match="unknown preset part"):
        VLMambaConfig.preset("nano+vsl2")
