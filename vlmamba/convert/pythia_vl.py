"""Pythia-VL (see `shaking_up`): the language model is transformers' GPT-NeoX."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from transformers import GPTNeoXConfig

from vlmamba.convert import languages, shaking_up
from vlmamba.convert.rules import need
from vlmamba.convert.system import Parts, System
from vlmamba_core.errors import UserError, shortened


def read(path: Path, timm: Mapping[str, Tensor]) -> Parts:
    """Configuration and tensors of one of the models. Raises UserError."""
    found = shaking_up.folder_tensors(path)
    fields = shaking_up.settings(path)
    if fields.get("model_type") != "gpt_neox":
        raise UserError(
            f"{path}: model_type is {fields.get('model_type')!r} in its config.json; "
            "expected 'gpt_neox'"
        )
    ours = set(GPTNeoXConfig().to_dict()) | {"rotary_pct", "rotary_emb_base", "rope_scaling"}
    fields = {name: value for name, value in fields.items() if name in ours}
    fields["vocab_size"] = need(found, "gpt_neox.embed_in.weight", str(path)).shape[0]
    try:
        text = GPTNeoXConfig(**fields | {"dtype": None})
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: config.json: {shortened(error)}") from error
    return shaking_up.parts(
        path, found, {"text_config": text}, languages.NEOX_RULES, languages.NEOX_ASIDE
    )


SYSTEM = System(
    name="pythia-vl",
    about="Pythia-VL 1B, 1.4B, 2.8B (gpantaz/finetuned_pythiavl_2.8b, ...)",
    tokenizer="EleutherAI/pythia-1b",
    read=read,
)
