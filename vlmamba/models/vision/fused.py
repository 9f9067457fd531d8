"""Several encoders of one picture side by side: DINOv2 + SigLIP of Prismatic, Cobra, ML-Mamba."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor, BatchFeature, PretrainedConfig
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.auto.image_processing_auto import get_image_processor_class_from_name

from vlmamba import registry
from vlmamba.configs.encoders import FusedVisionConfig
from vlmamba.models.vision.base import VisionEncoder
from vlmamba_core.errors import UserError

TENSORS = {"return_tensors": "pt"}


@registry.vision_encoders.add("fused_vision_model")
class FusedEncoder(VisionEncoder):
    """Several encoders of one picture, their patches concatenated: Dv is the sum of theirs.

    Each sees the picture through its own transform and at its own resolution.  Raises UserError
    where their grids differ.
    """

    def __init__(self, vision: PretrainedConfig, layer: int, model_id: str | None):
        super().__init__(vision, layer, model_id)
        parts = vision.encoders
        ids = model_id.split(",") if model_id else [None] * len(parts)
        if len(ids) != len(parts):
            raise UserError(
                f"vision_model_id names {len(ids)} encoders, the configuration {len(parts)}; "
                "expected as many, with commas between them"
            )
        self.grid(vision)  # refuses parts that do not fit
        self.parts = nn.ModuleList(
            _class(part)(part, layer, one) for part, one in zip(parts, ids, strict=True)
        )
        self.shapes = [_class(part).pixels(part) for part in parts]
        self.weights_in_checkpoint = all(part.weights_in_checkpoint for part in self.parts)
        if not self.weights_in_checkpoint and any(p.weights_in_checkpoint for p in self.parts):
            raise UserError("encoders with and without weights in the checkpoint cannot be fused")

    @staticmethod
    def width(vision: PretrainedConfig) -> int:
        """The sum of the parts' widths."""
        return sum(_class(part).width(part) for part in vision.encoders)

    @staticmethod
    def grid(vision: PretrainedConfig) -> tuple[int, int]:
        """The grid of every part."""
        if not vision.encoders:
            raise UserError("fused_vision_model has no encoders; expected two or more")
        grids = [_class(part).grid(part) for part in vision.encoders]
        if len(set(grids)) != 1:
            kinds = [part.model_type for part in vision.encoders]
            shown = ", ".join(f"{k} {g[0]} x {g[1]}" for k, g in zip(kinds, grids, strict=True))
            raise UserError(f"encoders of different grids cannot be fused: {shown} patches")
        return grids[0]

    @staticmethod
    def transform(vision: PretrainedConfig) -> Any:
        """Each part's own."""
        return FusedImageProcessor([_class(part).transform(part) for part in vision.encoders])

    @staticmethod
    def pixels(vision: PretrainedConfig) -> tuple[int, ...]:
        """(K,): the pixels of all parts, one after the other."""
        return (sum(math.prod(_class(part).pixels(part)) for part in vision.encoders),)

    @staticmethod
    def working_bytes(vision: PretrainedConfig) -> int:
        """One part works at a time; the outputs of all are held."""
        return max(_class(part).working_bytes(part) for part in vision.encoders)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(n, K), the parts' pixels in turn -> (n, P, Dv)."""
        pixels = pixel_values.split([math.prod(shape) for shape in self.shapes], dim=1)
        of_each = zip(self.parts, pixels, self.shapes, strict=True)
        return torch.cat([part(x.unflatten(1, shape)) for part, x, shape in of_each], dim=-1)

    def load_pretrained(self, **kwargs: Any) -> None:
        """Take over the published weights of each part."""
        for part in self.parts:
            cast(VisionEncoder, part).load_pretrained(**kwargs)


class FusedImageProcessor(BaseImageProcessor):
    """Several image processors' pixels of one picture, flattened one after the other.

    parts: the processors, or what `to_dict` made of them.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012

    def __init__(self, parts: Sequence[Any] = (), **kwargs: Any):
        super().__init__(**kwargs)
        self.parts = [_image_processor(p) if isinstance(p, dict) else p for p in parts]

    def __call__(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:  # type: ignore[override]
        """`pixel_values` (n, K); a picture that each part sees differently: see `joined`."""
        return self.joined([part(images, **kwargs | TENSORS) for part in self.parts])

    @staticmethod
    def joined(of_each: Sequence[BatchFeature]) -> BatchFeature:
        """What the parts made of the same pictures, as tensors -> `pixel_values` (n, K)."""
        pixels = [features["pixel_values"].flatten(1) for features in of_each]
        return BatchFeature({"pixel_values": torch.cat(pixels, dim=1)})

    def to_dict(self) -> dict[str, Any]:
        """What preprocessor_config.json holds."""
        parts = [part.to_dict() for part in self.parts]
        return {"image_processor_type": type(self).__name__, "parts": parts}


def _image_processor(fields: dict[str, Any]) -> Any:
    """The image processor of transformers, or one registered with it, that `fields` describe."""
    name = str(fields.get("image_processor_type"))
    found = get_image_processor_class_from_name(name)
    if found is None:
        raise UserError(f"unknown image processor {name!r} in a fused one; import its module first")
    return found(**{key: value for key, value in fields.items() if key != "image_processor_type"})


def _class(vision: PretrainedConfig) -> type[VisionEncoder]:
    return registry.vision_encoders[vision.model_type]


AutoImageProcessor.register(
    FusedVisionConfig, slow_image_processor_class=FusedImageProcessor, exist_ok=True
)
