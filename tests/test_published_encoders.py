"""Published vision encoders: whole models and towers, heads or not, in every layout of the hub."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TINY_CLIP, tiny_config
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionModel,
)

from vlmamba.models.assemble import assemble
from vlmamba.processing import VLMambaProcessor
from vlmamba.training.init_model import initial_model
from vlmamba.training.stages import STAGES
from vlmamba_core.errors import UserError

SIZES = {name: value for name, value in TINY_CLIP.items() if name not in ("model_type",)}
SIZES |= {"num_hidden_layers": 3}
TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 50}
TEXT |= {"num_attention_heads": 2}
KINDS = {"siglip": (SiglipModel, SiglipConfig), "clip": (CLIPModel, CLIPConfig)}
TOWERS = {"siglip": SiglipVisionModel, "clip": CLIPVisionModel}
# Act 1e-2 apart, eps a visible one: what only config.json says
FIELDS = {"hidden_act": "gelu", "layer_norm_eps": 1e-2}


def whole(kind: str, folder: Path, **vision):
    """A whole model with random weights, written as published: text tower and (SigLIP) head."""
    made, config = KINDS[kind]
    torch.manual_seed(1)
    model = made(config(text_config=dict(TEXT), vision_config=SIZES | vision)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model.vision_model


def as_tower(kind: str, folder: Path, prefix: str, form: str = "safetensors", head: bool = True):
    """Rewrite `folder` as a vision tower alone, its tensors under `prefix`."""
    config = json.loads((folder / "config.json").read_text())
    vision = config["vision_config"] | {"model_type": f"{kind}_vision_model"}
    (folder / "config.json").write_text(json.dumps(vision))
    held = load_file(folder / "model.safetensors")
    start = "vision_model."
    held = {
        prefix + k.removeprefix(start): t
        for k, t in held.items()
        if k.startswith(start) and (head or not k.startswith(f"{start}head."))
    }
    (folder / "model.safetensors").unlink()
    if form == "bin":  # as CLIP's files of 2022: with indices that are no weights
        held[f"{prefix}embeddings.position_ids"] = torch.arange(5).unsqueeze(0)
        torch.save(held, folder / "pytorch_model.bin")
    else:
        save_file(held, folder / "model.safetensors", {"format": "pt"})


def ours(kind: str, folder: Path, **vision):
    fields = SIZES | {"model_type": f"{kind}_vision_model"} | vision
    if kind == "siglip":
        fields["vision_use_head"] = False  # as the presets have it
    config = tiny_config(vision_config=fields, vision_model_id=str(folder))
    return assemble(config).eval()


LAYOUTS = {
    "whole model": lambda kind, folder: None,
    "tower": lambda kind, folder: as_tower(kind, folder, ""),
    "tower with prefix": lambda kind, folder: as_tower(kind, folder, "vision_model."),
    "tower without head": lambda kind, folder: as_tower(kind, folder, "vision_model.", head=False),
    "tower as .bin": lambda kind, folder: as_tower(kind, folder, "vision_model.", "bin"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_every_published_layout_gives_the_published_features(kind, layout, tmp_path, capfd):
    theirs = whole(kind, tmp_path, **FIELDS)
    LAYOUTS[layout](kind, tmp_path)
    model = ours(kind, tmp_path)
    pixels = torch.randn(2, 3, 28, 28)
    expected = theirs(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
    expected = expected[:, 1:] if kind == "clip" else expected
    torch.testing.assert_close(model.vision_encoder(pixels), expected)
    assert model.config.vision_config.hidden_act == "gelu"  # and a saved folder computes the same
    assert "UNEXPECTED" not in "".join(capfd.readouterr())
    model.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(again.vision_encoder(pixels), expected)


@torch.no_grad()
def test_a_new_connector_stands_behind_the_encoder_that_is_named_though_all_shapes_agree(
    tmp_path, tokenizer
):
    """`--stage pretrain --init`: the language model is the earlier stage's, the encoder is not."""
    whole("clip", tmp_path / "first")
    whole("clip", tmp_path / "second")
    file = tmp_path / "second/model.safetensors"
    save_file({k: 0.9 * v for k, v in load_file(file).items()}, file, {"format": "pt"})
    donor = ours("clip", tmp_path / "first")
    donor.save_pretrained(tmp_path / "donor")
    VLMambaProcessor.from_config(donor.config, tokenizer).save_pretrained(tmp_path / "donor")
    wanted = ours("clip", tmp_path / "second")
    made, _ = initial_model(wanted.config, STAGES["pretrain"], str(tmp_path / "donor"), [], 0)
    pixels = torch.randn(2, 3, 28, 28)
    assert torch.equal(made.vision_encoder(pixels), wanted.vision_encoder(pixels))
    assert not torch.equal(made.vision_encoder(pixels), donor.vision_encoder(pixels))
    weights = donor.language_model.state_dict()
    for name, weight in made.language_model.state_dict().items():
        assert torch.equal(weight, weights[name])


def rewrite(folder: Path, change) -> None:
    held = load_file(folder / "model.safetensors")
    change(held)
    save_file(held, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_what_lies_behind_the_layer_that_is_read_may_be_missing(kind, tmp_path):
    theirs = whole(kind, tmp_path)
    behind = ("encoder.layers.2.", "post_layernorm.", "head.")

    def cut(held):
        for key in [k for k in held if k.removeprefix("vision_model.").startswith(behind)]:
            del held[key]

    rewrite(tmp_path, cut)
    pixels = torch.randn(1, 3, 28, 28)
    expected = theirs(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
    expected = expected[:, 1:] if kind == "clip" else expected
    torch.testing.assert_close(ours(kind, tmp_path).vision_encoder(pixels), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_layer_needs_may_not_be_missing(kind, tmp_path):
    whole(kind, tmp_path)
    rewrite(tmp_path, lambda held: held.pop("vision_model.encoder.layers.1.mlp.fc1.weight"))
    message = "lacks 1 tensors of the encoder: encoder.layers.1.mlp.fc1.weight"
    with pytest.raises(UserError, match=message):
        ours(kind, tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"intermediate_size": 48}, "intermediate_size is 32, the preset's 48"),
        ({"num_attention_heads": 4}, "num_attention_heads is 2, the preset's 4"),
        ({"image_size": 56}, "image_size is 28, the preset's 56"),
    ],
)
def test_an_encoder_of_another_size_is_named(fields, message, tmp_path):
    whole("siglip", tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        ours("siglip", tmp_path, **fields)
    assert "\n" not in str(caught.value)


def test_an_encoder_of_another_kind_is_named(tmp_path):
    whole("clip", tmp_path)
    with pytest.raises(UserError, match="model_type is 'clip_vision_model', the preset's 'siglip"):
        ours("siglip", tmp_path)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    whole("clip", tmp_path)
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    rewrite(tmp_path, lambda held: held[name].view(-1)[3:4].fill_(torch.nan))
    with pytest.raises(UserError, match="holds NaN or infinite values"):
        ours("clip", tmp_path)
