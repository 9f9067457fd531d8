"""CLIP (2103.00020), which LLaVA looks through."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from vlmamba import registry
from vlmamba.models.vision.tower import TransformersEncoder


@registry.vision_encoders.add("clip_vision_model")
class CLIPEncoder(TransformersEncoder):
    """CLIP's vision tower: one class token in front."""

    skipped = 1

    @staticmethod
    def transform(vision: PretrainedConfig) -> Any:
        """Shortest side to the resolution, then the center."""
        from transformers import CLIPImageProcessor

        side = vision.image_size
        square = {"height": side, "width": side}
        return CLIPImageProcessor(size={"shortest_edge": side}, crop_size=square)
