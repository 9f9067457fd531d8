"""Random weights in the layouts in which the real models are published, to try a machine with them.

    python tools/random_published.py OUT --preset 2.8b-slimpj+siglip-so400m-384

OUT/lm is a language model in state-spaces' layout (config.json and pytorch_model.bin, a vocabulary
padded to a multiple of 8, 16 for Mamba-2), OUT/vision an encoder in transformers' (SigLIP with its
pooling head), OUT/tokenizer a byte-level one, OUT/pairs four captioned pictures; all in bfloat16.
Nothing is downloaded, and no weight means anything: what loading and a step cost is what they tell.

    python -m vlmamba.train --preset PRESET --stage pretrain --dry-run --data OUT/pairs/data.json \\
        --images OUT/pairs --set language_model_id=OUT/lm vision_model_id=OUT/vision \\
        tokenizer_id=OUT/tokenizer
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModel, PretrainedConfig

from vlmamba.config import VLMambaConfig
from vlmamba.data.tokenizer import train_tokenizer
from vlmamba.models.vlm import VLMambaForConditionalGeneration

WORDS = "a photo of one red green blue white field under the sky with no cloud in it"


def main() -> None:
    """Write the folders."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--preset", default="2.8b-slimpj+siglip-so400m-384")
    args = parser.parse_args()
    torch.manual_seed(0)
    config = VLMambaConfig.preset(args.preset)
    args.out.mkdir(parents=True)
    write_encoder(config.vision_config, args.out / "vision")
    write_language_model(config, args.out / "lm")
    train_tokenizer([WORDS] * 40, 300).save_pretrained(args.out / "tokenizer")
    write_pairs(args.out / "pairs")


def write_encoder(config: PretrainedConfig, folder: Path) -> None:
    """As `save_pretrained` of transformers leaves it, head included."""
    if hasattr(config, "vision_use_head"):
        config.vision_use_head = True
    AutoModel.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def write_language_model(config: VLMambaConfig, folder: Path) -> None:
    """As state-spaces/mamba's `save_pretrained` leaves it."""
    with torch.device("meta"):
        model = VLMambaForConditionalGeneration(config)
    layer = {"layer": "Mamba2"} if config.mixer == "mamba2" else {}
    sizes = {"d_model": config.d_model, "n_layer": config.n_layer, "vocab_size": 50277}
    fixed = {"rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True}
    padding = {"pad_vocab_size_multiple": 16 if layer else 8}
    folder.mkdir()
    published = {**sizes, "ssm_cfg": layer, **fixed, **padding}
    (folder / "config.json").write_text(json.dumps(published, indent=2))
    held = {
        f"backbone.{name}": _random(name, parameter)
        for name, parameter in model.language_model.named_parameters()
    }
    held["lm_head.weight"] = held["backbone.embedding.weight"]
    torch.save(held, folder / "pytorch_model.bin")


def _random(name: str, parameter: torch.Tensor) -> torch.Tensor:
    """Of a size at which nothing overflows: A = -1..-N, norms and skips 1, steps of about 0.01."""
    values = torch.empty(parameter.shape, dtype=torch.bfloat16)
    if name.endswith("A_log"):
        states = torch.arange(1, parameter.shape[-1] + 1).log()
        return values.copy_(states.expand(parameter.shape))
    if name.endswith((".D", "norm.weight", "norm_f.weight")):
        return values.fill_(1)
    if name.endswith(("dt_proj.bias", "dt_bias")):
        return values.fill_(-4.6)
    return values.normal_(std=0.02)


def write_pairs(folder: Path) -> None:
    """Four pictures of one color each, with captions, as LLaVA's file has them."""
    folder.mkdir()
    records = []
    for color in ("red", "green", "blue", "white"):
        Image.new("RGB", (384, 384), color).save(folder / f"{color}.png")
        turns = [("human", "<image>\nWhat is it?"), ("gpt", f"a photo of one {color} field")]
        talk = [{"from": who, "value": text} for who, text in turns]
        records.append({"id": color, "image": f"{color}.png", "conversations": talk})
    (folder / "data.json").write_text(json.dumps(records))


if __name__ == "__main__":
    main()
