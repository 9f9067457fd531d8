"""What a preset's parts stand for: language models and vision encoders by their short names.

Plain data, which `VLMambaConfig.preset` reads; a new size or encoder is an entry here.  Published
VLMs, which name all parts at once, are in vlmamba.configs.vlms.
Sizes: `state-spaces/mamba-*` and `mamba2-*`; encoders as the hub's files have them.
"""

from __future__ import annotations

from typing import Any

# Mamba-2's are those of its published models (their vocabulary is padded to a multiple of 16)
MAMBA2: dict[str, Any] = {"mixer": "mamba2", "d_state": 128, "vocab_size": 50288}

NANO: dict[str, Any] = {
    "d_model": 256,
    "n_layer": 6,
    "vocab_size": 4096,
    "language_model_id": None,
}
EIGHT_MAMBA_THEN_ATTENTION = ",".join(["mamba"] * 8 + ["attention"])

# d_model, n_layer, vocab_size, hub id of the pretrained weights (None: trained here)
LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "nano": NANO,
    # families of as many parameters (2 % apart) as nano, for a comparison from scratch
    "nano-mamba2": {**NANO, "mixer": "mamba2", "d_state": 64},
    "nano-transformer": {**NANO, "n_layer": 8, "mixer": "attention,mlp", "d_intermediate": 512},
    "nano-hybrid": {
        **NANO,
        "n_layer": 7,
        "mixer": "mamba,mamba,mamba,attention,mlp,mamba,mamba",
        "d_intermediate": 228,
    },
    # nano with two attention layers more, which start with zero output
    "nano-plus-attention": {**NANO, "n_layer": 8, "mixer": "mamba,mamba,mamba,attention"},
    # nano with an inner adaptor behind every second layer
    "nano-iaa": {**NANO, "adaptors": [1, 3, 5], "adaptor_ends": True},
    # nano with three layers of four experts more, which start with zero output
    "nano-plus-experts": {
        **NANO,
        "n_layer": 9,
        "mixer": "mamba,mamba,experts",
        "d_intermediate": 256,
        "n_experts": 4,
    },
    # BlackMamba's layout, half of the layers experts, and by its totals the size of its largest
    "mamba-experts-2.8b": {
        "d_model": 1472,
        "n_layer": 36,
        "mixer": "mamba,experts",
        "d_intermediate": 3872,
        "vocab_size": 50304,
        "language_model_id": None,
    },
    "130m": {"d_model": 768, "n_layer": 24, "language_model_id": "state-spaces/mamba-130m"},
    "790m": {"d_model": 1536, "n_layer": 48, "language_model_id": "state-spaces/mamba-790m"},
    "1.4b": {"d_model": 2048, "n_layer": 48, "language_model_id": "state-spaces/mamba-1.4b"},
    "2.8b": {"d_model": 2560, "n_layer": 64, "language_model_id": "state-spaces/mamba-2.8b"},
    "2.8b-slimpj": {
        "d_model": 2560,
        "n_layer": 64,
        "language_model_id": "state-spaces/mamba-2.8b-slimpj",
    },
    "2.8b-iaa": {  # at IAA-14's places, of a model twice as deep
        "d_model": 2560,
        "n_layer": 64,
        "adaptors": [1, 3, 11, 13, 21, 23, 31, 33, 41, 43, 51, 53, 61, 63],
        "adaptor_ends": True,
        "language_model_id": "state-spaces/mamba-2.8b",
    },
    "2.8b-plus-attention": {  # eight attention layers more
        "d_model": 2560,
        "n_layer": 72,
        "mixer": EIGHT_MAMBA_THEN_ATTENTION,
        "language_model_id": "state-spaces/mamba-2.8b",
    },
    **{
        f"mamba2-{size}": {
            "d_model": d_model,
            "n_layer": n_layer,
            "language_model_id": f"state-spaces/mamba2-{size}",
            **MAMBA2,
        }
        for size, d_model, n_layer in (
            ("130m", 768, 24),
            ("370m", 1024, 48),
            ("780m", 1536, 48),
            ("1.3b", 2048, 48),
            ("2.7b", 2560, 64),
        )
    },
}

# model_type picks the class in models/vision/
VISION_ENCODERS: dict[str, dict[str, Any]] = {
    "efficientnet-lite0": {
        "model_type": "efficientnet_lite0",
        "hidden_size": 1280,
        "image_size": 224,
        "patch_size": 32,
    },
    "efficientnet-lite0-160": {  # the same weights on smaller and larger pictures, for ablations
        "model_type": "efficientnet_lite0",
        "hidden_size": 1280,
        "image_size": 160,
        "patch_size": 32,
    },
    "efficientnet-lite0-320": {
        "model_type": "efficientnet_lite0",
        "hidden_size": 1280,
        "image_size": 320,
        "patch_size": 32,
    },
    # Color, small things and letters are in its early stages alone: the last features say what kind
    # of thing a patch shows.  Several stages for one patch: Dense Connector (2405.13800)
    "efficientnet-lite0-levels": {
        "model_type": "efficientnet_lite0",
        "hidden_size": 1280 + 4 * 4 * 40 + 2 * 2 * 112,
        "image_size": 224,
        "patch_size": 32,
        "levels": [2, 4],
    },
    "efficientnet-lite0-cells": {  # 16 patches: a cell of the demo's scenes with signs is one
        "model_type": "efficientnet_lite0",
        "hidden_size": 1280 + 4 * 4 * 112,
        "image_size": 256,
        "patch_size": 64,
        "levels": [4],
    },
    "clip-l-336": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
    },
    "siglip-so400m-384": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
        "vision_use_head": False,
    },
}
VISION_ENCODERS["dinov2-l-384"] = {
    "model_type": "dinov2",
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 518,  # of its position embeddings, interpolated to
    "resolution": 384,
    "patch_size": 14,
    "layer_norm_eps": 1e-6,
}
# With four register tokens: what Prismatic, Cobra and ML-Mamba fuse with SigLIP
VISION_ENCODERS["dinov2-reg-l-384"] = VISION_ENCODERS["dinov2-l-384"] | {
    "model_type": "dinov2_with_registers",
    "num_register_tokens": 4,
}
VISION_ENCODERS["eva02-l-336"] = {  # EVA-02-CLIP, of "Shaking up VLMs" (2409.05395)
    "model_type": "eva02",
    "hidden_size": 1024,
    "intermediate_size": 2730,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
VISION_MODEL_IDS = {
    "eva02-l-336": "timm/eva02_large_patch14_clip_336.merged2b",
    "dinov2-l-384": "facebook/dinov2-large",
    "dinov2-reg-l-384": "facebook/dinov2-with-registers-large",
    "clip-l-336": "openai/clip-vit-large-patch14-336",
    "siglip-so400m-384": "google/siglip-so400m-patch14-384",
}
TOKENIZER_ID = "EleutherAI/gpt-neox-20b"  # of all published Mamba and Mamba-2 language models
DEFAULT_ENCODER = {n: "efficientnet-lite0" for n in LANGUAGE_MODELS if n.startswith("nano")}
