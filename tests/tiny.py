"""A model configuration small enough for tests: a two-layer CLIP and a two-layer Mamba."""

from __future__ import annotations

from vlmamba.config import VLMambaConfig

TINY_CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "projection_dim": 16,
}

# The layers of the language model, small
TINY_MIXERS = {
    "mamba": {},
    "mamba2": {"mixer": "mamba2", "d_state": 16, "head_dim": 8},
    "hybrid": {"mixer": "mamba,attention,mlp", "n_layer": 3, "head_dim": 8, "d_intermediate": 40},
}
TINY_TRANSFORMER = {"mixer": "attention,mlp", "n_layer": 4, "head_dim": 8}


def tiny_config(**overrides) -> VLMambaConfig:
    fields = {"d_model": 32, "n_layer": 2, "vocab_size": 320, "vision_config": dict(TINY_CLIP)}
    return VLMambaConfig(**{**fields, **overrides})
