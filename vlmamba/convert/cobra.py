"""Cobra (Zhao et al., 2403.14520; h-zhao1997/cobra): DINOv2 + SigLIP, three-layer MLP, Mamba.

    [picture] <|user|> QUESTION <|endoftext|> <|assistant|> ANSWER <|endoftext|>

Its weights, `projector` and `llm_backbone` in Prismatic's layout, are at han1997/cobra.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from vlmamba.config import VLMambaConfig
from vlmamba.convert import encoders, languages, prismatic
from vlmamba.convert.rules import Rule
from vlmamba.convert.system import Parts, System

LANGUAGE = "llm_backbone.llm."
SETTINGS = {
    "arch_specifier": ("fused-gelu-mlp", "no-align+fused-gelu-mlp", "full-align+fused-gelu-mlp"),
    "vision_backbone_id": (prismatic.VISION,),
    "image_resize_strategy": ("resize-naive",),
}
PROJECTOR = [Rule(r"connector\.mlp\.(\d)\.(.+)", r"projector.projector.\1.\2")]


def read(path: Path, timm: Mapping[str, Tensor]) -> Parts:
    """Configuration and tensors of one of Cobra's models. Raises UserError."""
    file = prismatic.weights_file(path)
    settings = prismatic.settings(file)
    prismatic.check_settings(settings, file, SETTINGS)
    found = prismatic.read(file, ("projector", "llm_backbone")) | dict(timm)
    found = languages.check_tied(found, LANGUAGE, str(file))
    side, patch = encoders.resolution(found, str(file))
    config = VLMambaConfig(
        **languages.mamba_fields(found, LANGUAGE, str(file)),
        connector="mlp3",
        vision_config=encoders.fused(found, str(file), side),
    )
    chat = str(settings.get("llm_backbone_id", "zephyr")).endswith("zephyr")
    return Parts(
        config,
        found,
        [*PROJECTOR, *languages.mamba_rules(LANGUAGE), *encoders.fused_rules(side, patch)],
        encoders.FUSED_ASIDE,
        prismatic.TEMPLATES["zephyr" if chat else "in_out"],
        prismatic.image_processor(side),
    )


SYSTEM = System(
    name="cobra",
    about="Cobra 3B (han1997/cobra); encoders from timm",
    tokenizer="xiuyul/mamba-2.8b-zephyr",
    read=read,
    encoders=encoders.TIMM_IDS,
)
