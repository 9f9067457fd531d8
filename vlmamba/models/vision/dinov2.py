"""DINOv2 (2304.07193), with register tokens or without."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from vlmamba import registry
from vlmamba.models.vision.base import IMAGENET_MEAN, IMAGENET_STD
from vlmamba.models.vision.tower import TransformersEncoder


@registry.vision_encoders.add("dinov2", "dinov2_with_registers")
class Dinov2Encoder(TransformersEncoder):
    """DINOv2: a class token in front, and registers where it has them.

    Its position embeddings are for 518 pixels; at another resolution transformers interpolates
    them.  Hence the patches are those of `config.resolution`, which is ours, not the checkpoint's.
    """

    def __init__(self, vision: PretrainedConfig, layer: int, model_id: str | None):
        super().__init__(vision, layer, model_id)
        self.skipped = 1 + getattr(vision, "num_register_tokens", 0)

    @staticmethod
    def grid(vision: PretrainedConfig) -> tuple[int, int]:
        """At the resolution that pictures are brought to."""
        side = _resolution(vision) // vision.patch_size
        return side, side

    @staticmethod
    def pixels(vision: PretrainedConfig) -> tuple[int, ...]:
        """At the resolution that pictures are brought to."""
        return 3, _resolution(vision), _resolution(vision)

    @staticmethod
    def working_bytes(vision: PretrainedConfig) -> int:
        """All hidden states and one wide layer."""
        token = (vision.num_hidden_layers + 1 + 4 + 2 * vision.mlp_ratio) * vision.hidden_size
        return 4 * token * (_resolution(vision) // vision.patch_size) ** 2

    @staticmethod
    def transform(vision: PretrainedConfig) -> Any:
        """Shortest side to the resolution, then the center; ImageNet's mean and deviation."""
        from transformers import CLIPImageProcessor

        side = _resolution(vision)
        return CLIPImageProcessor(
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            image_mean=list(IMAGENET_MEAN),
            image_std=list(IMAGENET_STD),
        )


def _resolution(vision: PretrainedConfig) -> int:
    return getattr(vision, "resolution", None) or vision.image_size
