"""SigLIP (2303.15343), the encoder of VL-Mamba's final model."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from vlmamba import registry
from vlmamba.models.vision.tower import TransformersEncoder


@registry.vision_encoders.add("siglip_vision_model")
class SiglipEncoder(TransformersEncoder):
    """SigLIP's vision tower: patches only."""

    @staticmethod
    def transform(vision: PretrainedConfig) -> Any:
        """Stretched to the resolution."""
        from transformers import SiglipImageProcessor

        return SiglipImageProcessor(size={"height": vision.image_size, "width": vision.image_size})
