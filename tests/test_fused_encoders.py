"""DINOv2 from published folders, and encoders side by side: each part sees what it would alone."""

from __future__ import annotations

import pytest
import timm
import torch
from PIL import Image
from tiny import TINY_CLIP, tiny_config
from transformers import (
    AutoProcessor,
    CLIPImageProcessor,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from vlmamba import checkpoints
from vlmamba.config import VLMambaConfig
from vlmamba.data import feature_cache
from vlmamba.data.images import PixelImages
from vlmamba.data.tokenizer import train_tokenizer
from vlmamba.generation import GroupedGenerator, Request
from vlmamba.models.assemble import assemble
from vlmamba.processing import VLMambaProcessor
from vlmamba.training.estimate import estimate
from vlmamba.training.recipe import Hyperparameters
from vlmamba.training.stages import STAGES
from vlmamba_core.errors import UserError

SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 14}
DINO = SIZES | {"model_type": "dinov2", "image_size": 56, "resolution": 28}
REGISTERS = DINO | {"model_type": "dinov2_with_registers", "num_register_tokens": 4}
# the same grid of 2 x 2 at another resolution
SIGLIP = SIZES | {"model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 32}
SIGLIP |= {"patch_size": 16, "image_size": 32, "vision_use_head": False}
MEANS = {"dinov2": [0.485, 0.456, 0.406], "siglip": [0.5, 0.5, 0.5]}


def random_weights(model):
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def write_dino(folder, registers: bool = False):
    made, config = (Dinov2Model, Dinov2Config)
    if registers:
        made, config = (Dinov2WithRegistersModel, Dinov2WithRegistersConfig)
    model = random_weights(made(config(**SIZES, image_size=56)))
    model.save_pretrained(folder)
    return model


def write_siglip(folder):
    fields = {name: value for name, value in SIGLIP.items() if name != "model_type"}
    model = random_weights(SiglipVisionModel(SiglipVisionConfig(**fields)))
    model.save_pretrained(folder)
    return model


def fused(*parts) -> dict:
    return {"model_type": "fused_vision_model", "encoders": [dict(part) for part in parts]}


@pytest.fixture
def pair(tmp_path):
    """(DINOv2 and SigLIP of transformers, our model of both from their folders, its processor)."""
    theirs = write_dino(tmp_path / "dino"), write_siglip(tmp_path / "siglip")
    ids = f"{tmp_path / 'dino'},{tmp_path / 'siglip'}"
    config = tiny_config(vision_config=fused(DINO, SIGLIP), vision_model_id=ids)
    tokenizer = train_tokenizer(["what is it? a red box"] * 30, 300)
    processor = VLMambaProcessor.from_config(config, tokenizer)
    return theirs, assemble(config).eval(), processor


@pytest.mark.parametrize("registers", [False, True])
@torch.no_grad()
def test_dinov2_gives_the_published_features(registers, tmp_path):
    theirs = write_dino(tmp_path, registers)
    vision = REGISTERS if registers else DINO
    model = assemble(tiny_config(vision_config=dict(vision), vision_model_id=str(tmp_path))).eval()
    pixels = torch.randn(2, 3, 28, 28)
    expected = theirs(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
    ours = model.vision_encoder(pixels)
    torch.testing.assert_close(ours, expected[:, 5 if registers else 1 :])
    assert ours.shape == (2, model.config.num_patches, model.config.vision_width) == (2, 4, 24)


@torch.no_grad()
def test_dinov2_with_registers_is_timms_at_another_resolution(tmp_path):
    """timm's model is what Prismatic and Cobra load; it scales the positions to 28 pixels."""
    shape = {"patch_size": 14, "embed_dim": 24, "depth": 3, "num_heads": 2, "init_values": 1e-5}
    shape |= {"reg_tokens": 4, "no_embed_class": True, "num_classes": 0}
    large = random_weights(timm.models.VisionTransformer(img_size=56, **shape))
    small = timm.models.VisionTransformer(img_size=28, **shape).eval()
    convert = timm.models.vision_transformer.checkpoint_filter_fn
    small.load_state_dict(convert(large.state_dict(), small))
    theirs = write_dino(tmp_path, registers=True)
    theirs.load_state_dict(as_transformers(large.state_dict()), strict=False)
    theirs.save_pretrained(tmp_path)
    vision = dict(REGISTERS)
    model = assemble(tiny_config(vision_config=vision, vision_model_id=str(tmp_path))).eval()
    pixels = torch.randn(2, 3, 28, 28)
    [expected] = small.get_intermediate_layers(pixels, n={1})  # the second to last of three
    torch.testing.assert_close(model.vision_encoder(pixels), expected, rtol=1e-4, atol=1e-4)


def as_transformers(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """timm's names of a DINOv2 with registers in transformers' layout.

    timm has added the class token's position to the token itself.
    """
    found = {
        "embeddings.cls_token": weights["cls_token"],
        "embeddings.register_tokens": weights["reg_token"],
        "embeddings.patch_embeddings.projection.weight": weights["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.projection.bias": weights["patch_embed.proj.bias"],
    }
    own = torch.zeros_like(weights["cls_token"])
    found["embeddings.position_embeddings"] = torch.cat([own, weights["pos_embed"]], dim=1)
    names = {"norm1": "norm1", "norm2": "norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    names["attn.proj"] = "attention.o_proj"
    for layer in range(3):
        old, new = f"blocks.{layer}.", f"encoder.layer.{layer}."
        for leaf in ("weight", "bias"):
            for before, after in names.items():
                found[f"{new}{after}.{leaf}"] = weights[f"{old}{before}.{leaf}"]
            of_each = weights[f"{old}attn.qkv.{leaf}"].chunk(3)
            for name, part in zip(("q_proj", "k_proj", "v_proj"), of_each, strict=True):
                found[f"{new}attention.{name}.{leaf}"] = part
        for scale in (1, 2):
            found[f"{new}layer_scale{scale}.lambda1"] = weights[f"{old}ls{scale}.gamma"]
    return found


@torch.no_grad()
def test_each_encoder_sees_the_picture_as_it_would_alone(pair):
    """Own mean at the border, own resampling and size, own normalization; then side by side."""
    (dino, siglip), model, processor = pair
    picture = Image.effect_noise((90, 40), 80).convert("RGB")
    expected = []
    for name, theirs, transform in (
        ("dinov2", dino, CLIPImageProcessor),
        ("siglip", siglip, SiglipImageProcessor),
    ):
        square = Image.new("RGB", (90, 90), tuple(int(255 * x) for x in MEANS[name]))
        square.paste(picture, (0, 25))
        side = 28 if name == "dinov2" else 32
        size = {"height": side, "width": side}
        options = {"size": size}
        if name == "dinov2":
            options = {"size": {"shortest_edge": side}, "crop_size": size}
            options |= {"image_mean": MEANS[name], "image_std": [0.229, 0.224, 0.225]}
        pixels = transform(**options)(square, return_tensors="pt")["pixel_values"]
        hidden = theirs(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
        expected.append(hidden[:, 1:] if name == "dinov2" else hidden)
    together = torch.cat(expected, dim=-1)
    pixels = processor.pixel_values([picture])
    torch.testing.assert_close(model.encode_images(pixels), together)
    asked = {"text": processor.conversation_prompt("What?"), "images": [picture]}
    assert torch.equal(processor(**asked, return_tensors="pt")["pixel_values"], pixels)
    assert torch.equal(torch.as_tensor(processor(**asked)["pixel_values"]), pixels)


@torch.no_grad()
def test_a_fused_model_is_saved_loaded_cached_answered_and_estimated(pair, tmp_path):
    _, model, processor = pair
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    again, read = checkpoints.load(str(tmp_path / "saved"))
    pictures = [Image.new("RGB", (40, 30 + n), color) for n, color in enumerate(("red", "blue"))]
    pixels = read.pixel_values(pictures)
    assert torch.equal(pixels, processor.pixel_values(pictures))
    assert torch.equal(
        AutoProcessor.from_pretrained(tmp_path / "saved").pixel_values(pictures), pixels
    )
    torch.testing.assert_close(again.encode_images(pixels), model.encode_images(pixels))

    for name, picture in enumerate(pictures):
        picture.save(tmp_path / f"{name}.png")
    cache = feature_cache.open_cache(tmp_path / "cache", tmp_path, again, read)
    assert feature_cache.fill_cache(cache, ["0.png", "1.png"], again, read) == 0
    live = PixelImages(tmp_path, read).load(("1.png", "0.png"))
    expected = [again.encode_images(one) for one in live]
    torch.testing.assert_close(cache.load(("1.png", "0.png")), expected, rtol=1e-2, atol=1e-2)

    requests = [
        Request(read.conversation_prompt(question), str(n), picture)
        for n, picture in enumerate(pictures)
        for question in ("What?", "Is it a box?")
    ]
    alone = GroupedGenerator(again, read).generate(requests, 6, 1)
    assert GroupedGenerator(again, read).generate(requests, 6, 4) == alone

    hyper = Hyperparameters(lr=1e-3, batch_size=2, micro_batch=1, max_length=64, dtype="fp32")
    found = estimate(again.config, STAGES["pretrain"], hyper)
    weights = sum(p.numel() for p in again.vision_encoder.parameters())
    assert found.parameters["vision_encoder"] == weights


def test_encoders_of_different_grids_are_refused_in_one_line():
    with pytest.raises(UserError) as caught:
        tiny_config(vision_config=fused(DINO, SIGLIP | {"image_size": 48}))
    message = "encoders of different grids cannot be fused: dinov2 2 x 2, siglip_vision_model 3 x 3"
    assert str(caught.value) == f"{message} patches"


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        (fused(), "fused_vision_model has no encoders; expected two or more"),
        ({"model_type": "ijepa"}, "unknown vision encoder 'ijepa'; .*clip_vision_model"),
        (fused(DINO, {"model_type": "ijepa"}), "unknown vision encoder 'ijepa'"),
        (fused(DINO, SIGLIP | {"hidden_size": 0}), "vision_config.hidden_size is 0"),
    ],
)
def test_what_is_no_encoder_is_named(vision, message):
    with pytest.raises(UserError, match=message):
        tiny_config(vision_config=vision)


def test_as_many_sources_as_encoders():
    config = tiny_config(vision_config=fused(DINO, SIGLIP), vision_model_id="only/one")
    with pytest.raises(UserError, match="names 1 encoders, the configuration 2"):
        assemble(config)


def test_a_pair_inside_a_pair_is_three_encoders():
    inner = fused(DINO, SIGLIP)
    config = tiny_config(vision_config=fused(inner, TINY_CLIP))
    assert [e.model_type for e in config.vision_config.encoders] == [
        *("dinov2", "siglip_vision_model", "clip_vision_model")
    ]
    assert config.vision_width == 24 + 16 + 24


def test_presets_name_the_pair_of_cobra_and_ml_mamba():
    config = VLMambaConfig.preset("2.8b+dinov2-reg-l-384+siglip-so400m-384+mlp")
    assert (config.grid, config.vision_width) == ((27, 27), 1024 + 1152)
    assert config.vision_model_id == (
        "facebook/dinov2-with-registers-large,google/siglip-so400m-patch14-384"
    )
    plain = VLMambaConfig.preset("2.8b+dinov2-l-384+siglip-so400m-384+mlp")
    assert plain.vision_config.encoders[0].model_type == "dinov2"
    again = VLMambaConfig(**config.to_dict())
    assert again.to_dict() == config.to_dict()
