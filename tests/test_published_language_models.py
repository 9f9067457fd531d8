"""A published language model's config.json is read: followed, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TINY_CLIP, tiny_config
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from vlmamba import checkpoints
from vlmamba.config import VLMambaConfig
from vlmamba.models.assemble import assemble
from vlmamba.models.language.mamba_config import published_fields
from vlmamba.models.vlm import VLMambaForConditionalGeneration
from vlmamba.processing import VLMambaProcessor
from vlmamba.training.init_model import initial_model
from vlmamba.training.stages import STAGES
from vlmamba_core.errors import UserError

SIZES = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2}
KINDS = {
    "mamba": (MambaForCausalLM, MambaConfig, {"time_step_rank": 2}),
    "mamba2": (
        Mamba2ForCausalLM,
        Mamba2Config,
        {"state_size": 16, "head_dim": 8, "num_heads": 8, "n_groups": 1, "chunk_size": 16},
    ),
    "falcon_mamba": (FalconMambaForCausalLM, FalconMambaConfig, {"time_step_rank": 2}),
}
OURS = {"mamba": {}, "mamba2": {"mixer": "mamba2", "d_state": 16, "head_dim": 8}}


def published(kind: str, folder: Path, **fields):
    """A folder as transformers writes it, and its model."""
    made, config, own = KINDS[kind]
    model = made(config(**SIZES | own | {"tie_word_embeddings": True} | fields)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("proj.weight", "embeddings.weight", "conv1d.weight")):
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return model


def ours(kind: str, folder: Path) -> VLMambaForConditionalGeneration:
    """By the way that training takes."""
    fields = {"language_model_id": str(folder), "vision_config": None}  # its encoder is a package's
    return assemble(tiny_config(**OURS[kind] | fields)).eval()


def change(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("fields", [{}, {"layer_norm_epsilon": 0.1}, {"residual_in_fp32": False}])
@torch.no_grad()
def test_what_config_json_says_is_computed(kind, fields, tmp_path):
    theirs = published(kind, tmp_path, **fields)
    model = ours(kind, tmp_path)
    ids = torch.randint(2, 320, (2, 21))
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
    assert model.config.rms_eps == fields.get("layer_norm_epsilon", 1e-5)  # saved with it


@pytest.mark.parametrize("fields", [{"layer_norm_epsilon": 0.1}, {"residual_in_fp32": False}])
@torch.no_grad()
def test_a_later_stage_computes_what_the_first_one_did(fields, tmp_path, tokenizer):
    """What the first stage took over from published parts is in no preset."""
    published("mamba", tmp_path / "theirs", **fields)
    config = tiny_config(language_model_id=str(tmp_path / "theirs"), vision_config=None)
    first = assemble(config).eval()
    first.save_pretrained(tmp_path / "first")
    VLMambaProcessor.from_config(first.config, tokenizer).save_pretrained(tmp_path / "first")
    preset = tiny_config(language_model_id=str(tmp_path / "theirs"), vision_config=None)
    later, _ = initial_model(preset, STAGES["finetune"], str(tmp_path / "first"), [], 0)
    ids = torch.randint(2, 320, (2, 21))
    assert torch.equal(later.eval()(ids).logits, first(ids).logits)
    later.save_pretrained(tmp_path / "first")
    again = checkpoints.load(str(tmp_path / "first"))[0]
    assert torch.equal(again(ids).logits, first(ids).logits)
    if "layer_norm_epsilon" in fields:
        other = tiny_config(rms_eps=1e-3, vision_config=None)
        with pytest.raises(UserError, match="rms_eps is 0.001 here, and 0.1 in the earlier stage"):
            initial_model(other, STAGES["finetune"], str(tmp_path / "first"), [], 0)


def test_a_later_stage_s_encoder_computes_what_the_first_one_s_did(tmp_path, tokenizer):
    config = tiny_config(vision_config=TINY_CLIP | {"hidden_act": "gelu"})
    first = VLMambaForConditionalGeneration(config)
    first.eval().save_pretrained(tmp_path)
    VLMambaProcessor.from_config(first.config, tokenizer).save_pretrained(tmp_path)
    later, _ = initial_model(tiny_config(), STAGES["finetune"], str(tmp_path), [], 0)
    pixels = torch.rand(1, 3, 28, 28)
    assert torch.equal(later.eval().vision_encoder(pixels), first.vision_encoder(pixels))


@pytest.mark.parametrize("kind", OURS)
@torch.no_grad()
def test_other_files_of_a_training_run_are_left_alone(kind, tmp_path):
    """What Trainer and accelerate leave beside pytorch_model.bin."""
    theirs = published(kind, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    torch.save(SimpleNamespace(lr=1), tmp_path / "training_args.bin")
    save_file({"lora": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    ids = torch.randint(2, 320, (2, 21))
    logits = ours(kind, tmp_path)(ids).logits
    torch.testing.assert_close(logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", OURS)
@torch.no_grad()
def test_a_config_with_both_layouts_names_is_transformers(kind, tmp_path):
    """As state-spaces' own -hf folders of 2024 have it."""
    theirs = published(kind, tmp_path, layer_norm_epsilon=0.1)
    change(tmp_path, d_model=32, n_layer=2, ssm_cfg={}, rms_norm=True, pad_vocab_size_multiple=8)
    ids = torch.randint(2, 320, (2, 21))
    logits = ours(kind, tmp_path)(ids).logits
    torch.testing.assert_close(logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("mamba", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported here is 'silu'"),
        ("mamba2", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported here is 'silu'"),
        ("mamba", {"use_conv_bias": False}, "use_conv_bias is False"),
        ("mamba", {"use_bias": True}, "use_bias is True"),
        ("mamba2", {"time_step_limit": [0.0, 0.5]}, r"time_step_limit is \[0.0, 0.5\]"),
        ("mamba2", {"time_step_limit": [0.01, float("inf")]}, "time_step_limit"),
        ("falcon_mamba", {}, "unknown language model in .*: model_type 'falcon_mamba'; known"),
    ],
)
def test_what_our_layers_lack_is_refused_by_name(kind, fields, message, tmp_path):
    published(kind, tmp_path, **fields)
    with pytest.raises(UserError, match=message) as caught:
        ours(kind if kind in OURS else "mamba", tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", OURS)
def test_an_untied_head_is_refused(kind, tmp_path):
    published(kind, tmp_path, tie_word_embeddings=False)
    with pytest.raises(UserError, match=r"output head differs .*tie_word_embeddings is False"):
        ours(kind, tmp_path)


@pytest.mark.parametrize("kind", OURS)
def test_a_head_of_its_own_that_is_not_there_is_refused(kind, tmp_path):
    published(kind, tmp_path)
    change(tmp_path, tie_word_embeddings=False)
    with pytest.raises(UserError, match="lacks lm_head.weight"):
        ours(kind, tmp_path)


@pytest.mark.parametrize("form", [float("inf"), {"__float__": "Infinity"}])
def test_no_limit_has_two_spellings(form, tmp_path):
    published("mamba2", tmp_path)
    change(tmp_path, time_step_limit=[0.0, form])
    assert published_fields(tmp_path)["n_groups"] == 1


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("mamba", {"num_hidden_layers": 3}, "n_layer is 3 in its config.json, and 2 here"),
        ("mamba", {"state_size": 8}, "d_state is 8 in its config.json, and 16 here"),
        ("mamba2", {"head_dim": 16, "num_heads": 4}, "head_dim is 16"),
        ("mamba", {"vocab_size": 328}, "vocab_size is 328"),
    ],
)
def test_another_models_size_is_named(kind, fields, message, tmp_path):
    published(kind, tmp_path, **fields)
    with pytest.raises(UserError, match=message):
        ours(kind, tmp_path)


def test_a_mamba2_folder_is_not_taken_for_mamba(tmp_path):
    published("mamba2", tmp_path)
    with pytest.raises(UserError, match="mixer is 'mamba2' in its config.json, and 'mamba' here"):
        ours("mamba", tmp_path)


def test_weights_are_not_put_into_a_model_of_another_epsilon(tmp_path):
    published("mamba", tmp_path, layer_norm_epsilon=0.1)
    model = VLMambaForConditionalGeneration(tiny_config())
    with pytest.raises(UserError, match="rms_eps is 0.1 in its config.json, and 1e-05 here"):
        model.language_model.load_published(tmp_path)


def test_a_smaller_vocabulary_fills_the_first_rows(tmp_path):
    theirs = published("mamba", tmp_path, vocab_size=300)
    table = ours("mamba", tmp_path).language_model.embedding.weight
    assert table.shape[0] == 320
    assert torch.equal(table[:300], theirs.backbone.embeddings.weight)


ORIGINAL = {"d_model": 32, "n_layer": 2, "vocab_size": 317, "ssm_cfg": {}}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rms_norm": False}, "rms_norm is False"),
        ({"d_intermediate": 64}, "d_intermediate is 64"),
        ({"attn_layer_idx": [1]}, r"attn_layer_idx is \[1\]"),
        ({"ssm_cfg": {"dt_limit": [0.0, 0.5]}}, "ssm_cfg has dt_limit"),
        ({"ssm_cfg": {"bias": True}}, "ssm_cfg has bias=True"),
        ({"ssm_cfg": {"d_state": 8}}, "d_state is 8 in its config.json, and 16 here"),
    ],
)
def test_the_original_layouts_settings_are_read_too(fields, message, tmp_path):
    published("mamba", tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    held = {key.replace("embeddings.", "embedding."): t for key, t in held.items()}
    save_file(held, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(ORIGINAL))
    ours("mamba", tmp_path)
    change(tmp_path, ssm_cfg={"dt_min": 0.01, "bias": False, "use_fast_path": False})
    ours("mamba", tmp_path)
    change(tmp_path, **fields)
    with pytest.raises(UserError, match=message):
        ours("mamba", tmp_path)


@pytest.mark.parametrize(
    ("preset", "config"),
    [
        ("2.8b-slimpj", {"d_model": 2560, "n_layer": 64, "vocab_size": 50277, "ssm_cfg": {}}),
        (
            "mamba2-2.7b",
            {
                "d_model": 2560,
                "d_intermediate": 0,
                "n_layer": 64,
                "vocab_size": 50277,
                "ssm_cfg": {"layer": "Mamba2"},
                "attn_layer_idx": [],
                "rms_norm": True,
                "residual_in_fp32": True,
                "pad_vocab_size_multiple": 16,
                "tie_embeddings": True,
            },
        ),
    ],
)
def test_presets_agree_with_the_published_configurations(preset, config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = VLMambaConfig.preset(preset)
    found = published_fields(tmp_path)
    assert {name: getattr(ours, name) for name in found} == found
