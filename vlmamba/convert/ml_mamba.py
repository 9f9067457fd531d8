"""ML-Mamba (Huang et al., 2407.19832; WenjunHuang94/ML-Mamba): Cobra's layout with its connector.

Parts of its file (huangwenjun1994/ML-Mamba): `llm_backbone`, a Mamba-2 in state-spaces' layout,
and of the connector `mlp`, `bidirectional_mamba` and `projector`.  Prompt as Cobra's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from vlmamba.config import VLMambaConfig
from vlmamba.convert import encoders, languages, prismatic
from vlmamba.convert.rules import Rule
from vlmamba.convert.system import Parts, System

LANGUAGE = "llm_backbone."
PARTS = ("llm_backbone", "mlp", "bidirectional_mamba", "projector")
SETTINGS = {
    "arch_specifier": ("fused-gelu-mlp", "no-align+fused-gelu-mlp", "full-align+fused-gelu-mlp"),
    "vision_backbone_id": (prismatic.VISION,),
    "image_resize_strategy": ("resize-naive",),
}
CONNECTOR = [
    Rule(r"connector\.linear_in\.(.+)", r"mlp.0.\1"),
    Rule(r"connector\.blocks\.(\d)\.(.+)", r"bidirectional_mamba.layers.\1.\2"),
    Rule(r"connector\.norm\.(.+)", r"bidirectional_mamba.norm_f.\1"),
    Rule(r"connector\.mlp\.(\d)\.(.+)", r"projector.projector.\1.\2"),
]


def read(path: Path, timm: Mapping[str, Tensor]) -> Parts:
    """Configuration and tensors of the model. Raises UserError."""
    file = prismatic.weights_file(path)
    prismatic.check_settings(prismatic.settings(file), file, SETTINGS)
    found = prismatic.read(file, PARTS) | dict(timm)
    found = languages.check_tied(found, LANGUAGE, str(file))
    side, patch = encoders.resolution(found, str(file))
    config = VLMambaConfig(
        **languages.mamba_fields(found, LANGUAGE, str(file)),
        connector="msc",
        vision_config=encoders.fused(found, str(file), side),
    )
    return Parts(
        config,
        found,
        [*CONNECTOR, *languages.mamba_rules(LANGUAGE), *encoders.fused_rules(side, patch)],
        encoders.FUSED_ASIDE,
        prismatic.TEMPLATES["zephyr"],
        prismatic.image_processor(side),
    )


SYSTEM = System(
    name="ml-mamba",
    about="ML-Mamba 3B (huangwenjun1994/ML-Mamba); encoders from timm",
    tokenizer="EleutherAI/gpt-neox-20b",
    read=read,
    encoders=encoders.TIMM_IDS,
)
