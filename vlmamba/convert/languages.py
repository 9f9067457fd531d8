"""Language models inside published VLMs: their sizes, read from the tensors, and their names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vlmamba.convert.rules import Rule, layers, need
from vlmamba_core.errors import UserError


def mamba_fields(found: Mapping[str, Tensor], prefix: str, source: str) -> dict[str, Any]:
    """Fields of `MambaConfig` of a language model in state-spaces' layout, Mamba or Mamba-2.

    prefix: what its keys begin with.  Mamba-2 has one group, as all published ones have.
    """
    home = f"{prefix}backbone."
    vocabulary, width = need(found, f"{home}embedding.weight", source).shape
    mixer = f"{home}layers.0.mixer."
    states = need(found, f"{mixer}A_log", source)
    conv = need(found, f"{mixer}conv1d.weight", source)
    d_inner = need(found, f"{mixer}out_proj.weight", source).shape[1]
    fields: dict[str, Any] = {
        "d_model": width,
        "vocab_size": vocabulary,
        "n_layer": layers(found, f"{home}layers."),
        "d_conv": conv.shape[-1],
        "expand": d_inner // width,
        "norm": "layer" if f"{home}norm_f.bias" in found else "rms",
    }
    if states.ndim == 2:
        rank = need(found, f"{mixer}dt_proj.weight", source).shape[1]
        return fields | {"mixer": "mamba", "d_state": states.shape[1], "dt_rank": rank}
    sizes = {"d_state": (conv.shape[0] - d_inner) // 2, "head_dim": d_inner // len(states)}
    return fields | {"mixer": "mamba2"} | sizes


def mamba_rules(prefix: str) -> list[Rule]:
    """Our layers have state-spaces' names."""
    home = f"{prefix}backbone."
    return [Rule(r"language_model\.((?:embedding|layers|norm_f)\..+)", home + r"\1")]


def check_tied(found: Mapping[str, Tensor], prefix: str, source: str) -> dict[str, Tensor]:
    """The tensors with the embedding under its own name and without the output head, which it is.

    A file may hold either of the two or both.  Raises UserError where they differ.
    """
    embedding, head = f"{prefix}backbone.embedding.weight", f"{prefix}lm_head.weight"
    if embedding in found and head in found and not torch.equal(found[embedding], found[head]):
        raise UserError(f"{source}: {head} differs from {embedding}; the two are one in this model")
    kept = {key: tensor for key, tensor in found.items() if key != head}
    if head in found:
        kept.setdefault(embedding, found[head])
    return kept


NEOX_RULES = [
    Rule(r"language_model\.model\.(gpt_neox\..+)", r"\1"),
    Rule(r"language_model\.model\.(?:lm_head|embed_out)\.weight", "embed_out.weight"),
]
# masks and rotary frequencies, which older transformers saved with the weights
NEOX_ASIDE = (r"gpt_neox\.layers\.\d+\.attention\.(?:bias|masked_bias|rotary_emb\.inv_freq)",)
