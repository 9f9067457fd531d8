"""Shapes of vision encoders: those that transformers does not know, and what all must have.

The encoders themselves are in vlmamba.models.vision.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from vlmamba import registry
from vlmamba.configs.checks import LARGEST, LARGEST_SIZE, check_size, sub_config
from vlmamba_core.errors import UserError, unknown

VISION_SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_channels", "image_size", "patch_size"),
)
VISION_RESULT_ONLY = ("hidden_act", "layer_norm_eps")  # they change no shape
MAY_BE_ZERO = ("num_hidden_layers", "image_size")  # to measure a model without its encoder


class EfficientNetLite0Config(PretrainedConfig):
    """The demo's encoder: ImageNet EfficientNet-Lite0 without its classifier.

    patch_size: 32, or a multiple over which the last features are averaged.  levels: stages, 0 to
    6, whose outputs stand beside them, those of all places that a patch covers; hidden_size: the
    width of all together.
    """

    model_type = "efficientnet_lite0"

    def __init__(
        self,
        hidden_size: int = 1280,
        image_size: int = 224,
        patch_size: int = 32,
        levels: Sequence[int] = (),
        **kwargs: Any,
    ):
        self.hidden_size, self.image_size, self.patch_size = hidden_size, image_size, patch_size
        self.levels = list(levels)
        super().__init__(**kwargs)


AutoConfig.register("efficientnet_lite0", EfficientNetLite0Config, exist_ok=True)


class Eva02Config(PretrainedConfig):
    """timm's EVA-02-CLIP vision tower: rotary positions, SwiGLU, norms inside attention and MLP.

    reference_grid: patches along a side at which its rotary positions have their unit step.
    """

    model_type = "eva02"

    def __init__(
        self,
        hidden_size: int = 1024,
        intermediate_size: int = 2730,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 16,
        image_size: int = 336,
        patch_size: int = 14,
        reference_grid: int = 16,
        **kwargs: Any,
    ):
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.image_size, self.patch_size = image_size, patch_size
        self.reference_grid = reference_grid
        super().__init__(**kwargs)


AutoConfig.register("eva02", Eva02Config, exist_ok=True)


class FusedVisionConfig(PretrainedConfig):
    """Several encoders of one picture side by side: `encoders` holds their configurations."""

    model_type = "fused_vision_model"

    def __init__(self, encoders: Sequence[Any] = (), **kwargs: Any):
        given = [e if isinstance(e, PretrainedConfig) else encoder_config(e) for e in encoders]
        self.encoders = [part for one in given for part in getattr(one, "encoders", [one])]
        super().__init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """As transformers writes it, the parts as objects."""
        return super().to_dict() | {"encoders": [encoder.to_dict() for encoder in self.encoders]}


AutoConfig.register("fused_vision_model", FusedVisionConfig, exist_ok=True)


def encoder_config(fields: Any) -> PretrainedConfig:
    """An encoder's configuration from its dictionary. Raises UserError."""
    if not isinstance(fields, dict):
        raise UserError(f"config: vision_config is {fields!r}; expected a JSON object")
    kind = str(fields.get("model_type"))
    if kind not in registry.vision_encoders:
        raise unknown("vision encoder", kind, registry.vision_encoders)
    return sub_config("vision_config", fields)


def check_encoder(vision: PretrainedConfig, layer: int) -> None:
    """Refuse sizes that no encoder has; layer: the hidden state to read. Raises UserError."""
    for name in (*VISION_SIZES, "resolution"):
        if hasattr(vision, name):
            value = getattr(vision, name)
            if value != 0 or name not in MAY_BE_ZERO:
                check_size(f"vision_config.{name}", value, LARGEST.get(name, LARGEST_SIZE))
    layers = getattr(vision, "num_hidden_layers", 0)
    if layers and not -layers - 1 <= layer <= layers:
        raise UserError(f"config: vision_feature_layer is {layer}; the encoder has {layers} layers")
