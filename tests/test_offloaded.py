"""Weights that accelerate keeps on the CPU or the disk until they are needed: the same answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from tiny import TINY_CLIP
from transformers import AutoConfig

from vlmamba.config import VLMambaConfig
from vlmamba.models.vlm import VLMambaForConditionalGeneration

KINDS = {
    "mamba": {},
    "mamba2": {"mixer": "mamba2", "d_state": 16, "head_dim": 16},
    "hybrid": {"mixer": "mamba,attention,mlp", "head_dim": 16},
    "experts": {"mixer": "mamba,experts", "n_experts": 2},
    "layer norm": {"norm": "layer"},
    "msc": {"connector": "msc", "mixer": "mamba2", "d_state": 16, "head_dim": 16},
    "mlp": {"connector": "mlp"},
    "adaptors": {"adaptors": [0, 2], "adaptor_ends": True},
}


def saved(folder: Path, **changes) -> VLMambaForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "n_layer": 3, "vocab_size": 96} if "text_config" not in changes else {}
    config = VLMambaConfig(vision_config=dict(TINY_CLIP), **sizes | changes)
    model = VLMambaForConditionalGeneration(config).eval()
    model.save_pretrained(folder)
    return model


def offloaded(where: str, folder: Path, store: Path) -> VLMambaForConditionalGeneration:
    if where == "cpu":
        model = VLMambaForConditionalGeneration.from_pretrained(folder)
        return cpu_offload(model, execution_device=torch.device("cpu")).eval()
    return VLMambaForConditionalGeneration.from_pretrained(
        folder, device_map={"": "disk"}, offload_folder=store
    ).eval()


@torch.no_grad()
def answers(model: VLMambaForConditionalGeneration) -> list[torch.Tensor]:
    """Logits of a batch with pictures, its greedy answers, and a text's through transformers."""
    tokens = model.config.num_image_tokens
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(3, 90, (2, tokens + 6), generator=generator)
    rows[:, 1 : 1 + tokens] = model.config.image_token_id
    pictures = torch.randn(2, 3, 28, 28, generator=generator)
    given = {"input_ids": rows, "pixel_values": pictures}
    return [
        model(**given).logits,
        model.generate(**given, max_new_tokens=6, do_sample=False, eos_token_id=None),
        model.generate(rows[:, -4:], max_new_tokens=6, do_sample=False, eos_token_id=None),
    ]


def elsewhere(model: torch.nn.Module) -> list[str]:
    parameters = model.named_parameters(remove_duplicate=False)
    return [name for name, parameter in parameters if parameter.is_meta]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_offloaded_model_answers_as_the_whole_one(kind, where, tmp_path):
    expected = answers(saved(tmp_path / "model", **KINDS[kind]))
    model = offloaded(where, tmp_path / "model", tmp_path / "store")
    away = elsewhere(model)
    assert away
    for _ in range(2):
        for got, want in zip(answers(model), expected, strict=True):
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert elsewhere(model) == away


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_so_does_a_wrapped_language_model(where, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 96, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    text = AutoConfig.for_model("llama", **sizes)
    expected = answers(saved(tmp_path / "model", text_config=text))
    model = offloaded(where, tmp_path / "model", tmp_path / "store")
    for got, want in zip(answers(model), expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
