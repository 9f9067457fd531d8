"""timm's vision transformers by the names of the encoders here.

DINOv2 with registers and SigLIP, which Prismatic, Cobra and ML-Mamba read from timm beside their
checkpoints, become transformers' modules; EVA-02 is timm's own module here too.  Widths of heads
are those of the published models (a file does not tell).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from vlmamba.convert.rules import Absent, Rule, layers, need
from vlmamba_core.errors import UserError

SIDE = 384  # to which Prismatic's `dinosiglip-vit-so-384px` brings pictures
TIMM_IDS = {
    "dinov2": "timm/vit_large_patch14_reg4_dinov2.lvd142m",
    "siglip": "timm/vit_so400m_patch14_siglip_384.webli",
}
HEAD_WIDTHS = {"dinov2_with_registers": 64, "siglip_vision_model": 72, "eva02": 64}


def _fields(kind: str, found: Mapping[str, Tensor], prefix: str, source: str) -> dict[str, Any]:
    """What every kind has."""
    width, _, patch, _ = need(found, f"{prefix}patch_embed.proj.weight", source).shape
    if width % HEAD_WIDTHS[kind]:
        raise UserError(
            f"{source}: {prefix}patch_embed.proj.weight has {width} channels; expected a multiple "
            f"of {HEAD_WIDTHS[kind]}, the width of a head"
        )
    return {
        "model_type": kind,
        "hidden_size": width,
        "num_hidden_layers": layers(found, f"{prefix}blocks."),
        "num_attention_heads": width // HEAD_WIDTHS[kind],
        "patch_size": patch,
    }


def dino_fields(found: Mapping[str, Tensor], source: str, side: int) -> dict[str, Any]:
    """The configuration of `dinov2.*`: positions are resampled to `side` once, as timm does."""
    registers = need(found, "dinov2.reg_token", source).shape[1]
    fields = _fields("dinov2_with_registers", found, "dinov2.", source)
    return fields | {
        "num_register_tokens": registers,
        "image_size": side,
        "layer_norm_eps": 1e-6,
    }


def siglip_fields(found: Mapping[str, Tensor], source: str, side: int) -> dict[str, Any]:
    """The configuration of `siglip.*`; timm computes it with the exact GELU."""
    hidden = need(found, "siglip.blocks.0.mlp.fc1.weight", source).shape[0]
    return _fields("siglip_vision_model", found, "siglip.", source) | {
        "intermediate_size": hidden,
        "image_size": side,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "vision_use_head": False,
    }


def fused(found: Mapping[str, Tensor], source: str, side: int) -> dict[str, Any]:
    """DINOv2 and SigLIP side by side, each at `side` pixels."""
    parts = [dino_fields(found, source, side), siglip_fields(found, source, side)]
    return {"model_type": "fused_vision_model", "encoders": parts}


def resolution(found: Mapping[str, Tensor], source: str) -> tuple[int, int]:
    """Pixels a side of a picture and of a patch: SigLIP's positions are those of its pictures."""
    patch = need(found, "siglip.patch_embed.proj.weight", source).shape[-1]
    grid = math.isqrt(need(found, "siglip.pos_embed", source).shape[1])
    return (SIDE if SIDE // patch == grid else grid * patch), patch


def eva02_fields(found: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """The configuration of `vision_encoder.*`, whose positions tell the resolution."""
    prefix = "vision_encoder."
    fields = _fields("eva02", found, prefix, source)
    hidden = need(found, f"{prefix}blocks.0.mlp.fc1_g.weight", source).shape[0]
    patches = need(found, f"{prefix}pos_embed", source).shape[1] - 1
    side = math.isqrt(patches) * fields["patch_size"]
    return fields | {"intermediate_size": hidden, "image_size": side}


def fused_rules(side: int, patch: int) -> list[Rule | Absent]:
    """Of `fused`: DINOv2 is part 0, SigLIP part 1."""
    grid = side // patch
    dino, siglip = r"vision_encoder\.parts\.0\.model\.", r"vision_encoder\.parts\.1\.model\."
    layer = r"encoder\.layers?\.(\d+)\."
    end = r"\.(weight|bias)"
    rules: list[Rule | Absent] = [
        Rule(dino + r"embeddings\.cls_token", "dinov2.cls_token"),
        Rule(dino + r"embeddings\.register_tokens", "dinov2.reg_token"),
        Rule(dino + r"embeddings\.position_embeddings", "dinov2.pos_embed", _positions(grid)),
        Absent(dino + r"embeddings\.mask_token"),  # of pretraining alone
        Rule(
            dino + r"embeddings\.patch_embeddings\.projection" + end, r"dinov2.patch_embed.proj.\1"
        ),
        Rule(dino + layer + r"attention\.q_proj" + end, _QKV.format("dinov2"), _third(0)),
        Rule(dino + layer + r"attention\.k_proj" + end, _QKV.format("dinov2"), _third(1)),
        Rule(dino + layer + r"attention\.v_proj" + end, _QKV.format("dinov2"), _third(2)),
        Rule(dino + layer + r"attention\.o_proj" + end, r"dinov2.blocks.\1.attn.proj.\2"),
        Rule(dino + layer + r"layer_scale(\d)\.lambda1", r"dinov2.blocks.\1.ls\2.gamma"),
        Rule(dino + layer + r"(norm\d|mlp\.fc\d)" + end, r"dinov2.blocks.\1.\2.\3"),
        Rule(dino + r"layernorm" + end, r"dinov2.norm.\1"),
        Rule(siglip + r"embeddings\.patch_embedding" + end, r"siglip.patch_embed.proj.\1"),
        Rule(siglip + r"embeddings\.position_embedding\.weight", "siglip.pos_embed", _rows(grid)),
        Rule(siglip + layer + r"self_attn\.q_proj" + end, _QKV.format("siglip"), _third(0)),
        Rule(siglip + layer + r"self_attn\.k_proj" + end, _QKV.format("siglip"), _third(1)),
        Rule(siglip + layer + r"self_attn\.v_proj" + end, _QKV.format("siglip"), _third(2)),
        Rule(siglip + layer + r"self_attn\.out_proj" + end, r"siglip.blocks.\1.attn.proj.\2"),
        Rule(siglip + layer + r"layer_norm(\d)" + end, r"siglip.blocks.\1.norm\2.\3"),
        Rule(siglip + layer + r"(mlp\.fc\d)" + end, r"siglip.blocks.\1.\2.\3"),
        Rule(siglip + r"post_layernorm" + end, r"siglip.norm.\1"),
    ]
    return rules


_QKV = r"{}.blocks.\1.attn.qkv.\2"
FUSED_ASIDE = (r"siglip\.attn_pool\..+",)  # SigLIP's pooling head, behind what is read
EVA02_RULES = [Rule(r"vision_encoder\.model\.(.+)", r"vision_encoder.\1")]


def _third(number: int) -> Callable[[Tensor], Tensor]:
    """Query, key or value of a fused projection."""
    return lambda tensor: tensor.chunk(3)[number].contiguous()


def _resampled(tensor: Tensor, grid: int) -> Tensor:
    """Position embeddings (1, P, D) at grid x grid, by timm's own function where P is another."""
    from timm.layers import resample_abs_pos_embed

    return resample_abs_pos_embed(tensor, [grid, grid], num_prefix_tokens=0)


def _positions(grid: int) -> Callable[[Tensor], Tensor]:
    """timm's (1, P, D), without the class token's, which is in the class token -> (1, 1 + P, D)."""

    def take(tensor: Tensor) -> Tensor:
        from torch.nn.functional import pad

        return pad(_resampled(tensor, grid), (0, 0, 1, 0))

    return take


def _rows(grid: int) -> Callable[[Tensor], Tensor]:
    """(1, P, D) -> (P, D)."""
    return lambda tensor: _resampled(tensor, grid)[0].contiguous()
