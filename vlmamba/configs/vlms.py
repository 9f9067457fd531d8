"""Published Mamba VLMs at their own sizes: preset name -> fields of `VLMambaConfig`.

    python -m vlmamba.train --preset cobra-3b --stage finetune --estimate
    python -m vlmamba.convert cobra FOLDER --out cobra       # the weights themselves

Cobra (2403.14520), ML-Mamba (2407.19832), and Mamba-VL and Pythia-VL of "Shaking up VLMs"
(2409.05395), which differ in the language model alone.  Plain data; `VLMambaConfig.preset` reads
it.  The language models have no published id where the VLM's own language model is another than
the published one: such a preset is trained from a converted checkpoint (`--init`).
"""

from __future__ import annotations

from typing import Any

from vlmamba.configs.presets import TOKENIZER_ID, VISION_ENCODERS, VISION_MODEL_IDS

# As the hub's files have them: positions interpolated from 518 pixels, SigLIP with tanh GELU
HUB_DINO_SIGLIP = [VISION_ENCODERS["dinov2-reg-l-384"], VISION_ENCODERS["siglip-so400m-384"]]
# As timm builds them at 384 pixels: positions resampled once, SigLIP with the exact GELU
DINO_SIGLIP: dict[str, Any] = {
    "model_type": "fused_vision_model",
    "encoders": [
        {k: v for k, v in HUB_DINO_SIGLIP[0].items() if k != "resolution"} | {"image_size": 384},
        HUB_DINO_SIGLIP[1] | {"hidden_act": "gelu", "layer_norm_eps": 1e-6},
    ],
}
EVA02: dict[str, Any] = {"model_type": "eva02", "image_size": 336}

COBRA: dict[str, Any] = {
    "d_model": 2560,
    "n_layer": 64,
    "vocab_size": 50280,
    "connector": "mlp3",
    "vision_config": DINO_SIGLIP,
    "tokenizer_id": "xiuyul/mamba-2.8b-zephyr",
}
ML_MAMBA: dict[str, Any] = {
    "mixer": "mamba2",
    "d_model": 2560,
    "n_layer": 64,
    "d_state": 128,
    "vocab_size": 50288,
    "connector": "msc",
    "vision_config": DINO_SIGLIP,
    "tokenizer_id": TOKENIZER_ID,
}

# The same from published parts, to be trained: encoders from the hub, Mamba-2 of state-spaces
ML_MAMBA_TO_TRAIN = ML_MAMBA | {
    "language_model_id": "state-spaces/mamba2-2.7b",
    "vision_config": {"model_type": "fused_vision_model", "encoders": HUB_DINO_SIGLIP},
    "vision_model_id": ",".join(
        VISION_MODEL_IDS[name] for name in ("dinov2-reg-l-384", "siglip-so400m-384")
    ),
}


def _mamba_vl(d_model: int, n_layer: int) -> dict[str, Any]:
    # their code builds the blocks with LayerNorm and the residual in the weights' precision
    return {
        "d_model": d_model,
        "n_layer": n_layer,
        "vocab_size": 50280,
        "norm": "layer",
        "residual_in_fp32": False,
        "connector": "mlp",
        "vision_config": EVA02,
        "vision_feature_layer": -1,
        "tokenizer_id": TOKENIZER_ID,
    }


def _pythia_vl(hidden_size: int, layers: int, heads: int) -> dict[str, Any]:
    text = {
        "model_type": "gpt_neox",
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden_size,
        "vocab_size": 50304,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }
    return {
        "text_config": text,
        "connector": "mlp",
        "vision_config": EVA02,
        "vision_feature_layer": -1,
        "tokenizer_id": "EleutherAI/pythia-1b",
    }


VLM_PRESETS: dict[str, dict[str, Any]] = {
    "cobra-3b": COBRA,
    "ml-mamba-3b": ML_MAMBA,
    "ml-mamba-2.7b": ML_MAMBA_TO_TRAIN,
    "ml-mamba-2.7b-basic": ML_MAMBA_TO_TRAIN | {"connector": "msc_basic"},
    "mamba-vl-790m": _mamba_vl(1536, 48),
    "mamba-vl-1.4b": _mamba_vl(2048, 48),
    "mamba-vl-2.8b": _mamba_vl(2560, 64),
    "pythia-vl-1b": _pythia_vl(2048, 16, 8),
    "pythia-vl-1.4b": _pythia_vl(2048, 24, 16),
    "pythia-vl-2.8b": _pythia_vl(2560, 32, 32),
}
