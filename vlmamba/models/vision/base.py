"""What the model asks of a vision encoder: width, grid, image transform, features."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PretrainedConfig

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class VisionEncoder(nn.Module):
    """What the model asks of an encoder, besides forward: (n, *pixels(vision)) -> (n, P, Dv)."""

    weights_in_checkpoint: bool  # or do they come from elsewhere at every load?

    def __init__(self, vision: PretrainedConfig, layer: int, model_id: str | None):
        """vision: its configuration.  layer: the hidden state to read.  model_id: its weights."""
        super().__init__()

    @staticmethod
    def width(vision: PretrainedConfig) -> int:
        """Dv."""
        return vision.hidden_size

    @staticmethod
    def grid(vision: PretrainedConfig) -> tuple[int, int]:
        """Patch rows and columns of one image."""
        side = vision.image_size // vision.patch_size
        return side, side

    @staticmethod
    def transform(vision: PretrainedConfig) -> Any:
        """The published image transform: a transformers image processor."""
        raise NotImplementedError

    @staticmethod
    def pixels(vision: PretrainedConfig) -> tuple[int, ...]:
        """The shape, here (C, H, W), of what the transform makes of one picture."""
        return 3, vision.image_size, vision.image_size

    @staticmethod
    def working_bytes(vision: PretrainedConfig) -> int:
        """An upper bound of what the forward pass of one image holds, in float32."""
        raise NotImplementedError

    def load_pretrained(self, **kwargs: Any) -> None:
        """Take over the published weights."""
        raise NotImplementedError
