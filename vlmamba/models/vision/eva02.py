"""EVA-02-CLIP (2303.11331) as timm builds it, of "Shaking up VLMs" (2409.05395)."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.image_utils import PILImageResampling

from vlmamba import registry
from vlmamba.models.vision.base import VisionEncoder
from vlmamba.models.vision.timm_library import import_timm
from vlmamba.models.vision.tower import TransformersEncoder
from vlmamba.published import timm_tensors
from vlmamba.weight_files import in_dtype
from vlmamba_core.errors import UserError


@registry.vision_encoders.add("eva02")
class Eva02Encoder(VisionEncoder):
    """timm's EVA-02-CLIP: one class token in front; its last hidden state is the normed one.

    "Shaking up VLMs" (2409.05395) reads that one: vision_feature_layer is -1 in its presets.
    """

    weights_in_checkpoint = True

    def __init__(self, vision: PretrainedConfig, layer: int, model_id: str | None):
        super().__init__(vision, layer, model_id)
        import_timm()
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
