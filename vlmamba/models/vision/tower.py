"""What CLIP, SigLIP and DINOv2 share: a tower of transformers, read at one hidden state."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import AutoConfig, AutoModel, PretrainedConfig
from transformers.utils import logging

from vlmamba.config import split_revision
from vlmamba.configs.encoders import VISION_RESULT_ONLY, VISION_SIZES
from vlmamba.models.vision.base import VisionEncoder
from vlmamba.weight_files import in_dtype
from vlmamba_core.errors import UserError


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
        for name in VISION_RESULT_ONLY:
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


def _quietly(load: Callable[[], Any]) -> Any:
    """`load()` without transformers' list of tensors that it leaves aside: text model, head."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return load()
    finally:
        logging.set_verbosity(before)
