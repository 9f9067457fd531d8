"""Mamba-VL (see `shaking_up`): a Mamba language model in state-spaces' layout.

Their code builds its blocks with LayerNorm, which has a bias, and keeps the residual in the
precision of the weights; a file without such biases is read as the RMSNorm that it then has.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from vlmamba.convert import languages, shaking_up
from vlmamba.convert.system import Parts, System


def read(path: Path, timm: Mapping[str, Tensor]) -> Parts:
    """Configuration and tensors of one of the models. Raises UserError."""
    found = languages.check_tied(shaking_up.folder_tensors(path), "", str(path))
    shaking_up.settings(path)
    fields = languages.mamba_fields(found, "", str(path)) | {"residual_in_fp32": False}
    return shaking_up.parts(path, found, fields, languages.mamba_rules(""))


SYSTEM = System(
    name="mamba-vl",
    about="Mamba-VL 790M, 1.4B, 2.8B (gpantaz/finetuned_mambavl_2.8b, ...)",
    tokenizer="EleutherAI/gpt-neox-20b",
    read=read,
)
