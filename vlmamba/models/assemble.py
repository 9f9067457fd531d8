"""A model put together for training: random connector, published encoder and language model."""

from __future__ import annotations

from typing import Any

import torch

from vlmamba.config import VLMambaConfig
from vlmamba.models.connector import build_connector
from vlmamba.models.language import language_model_class
from vlmamba.models.vision import build_vision_encoder
from vlmamba.models.vlm import VLMambaForConditionalGeneration
from vlmamba.published import fetching
from vlmamba.weight_files import check_finite


def assemble(
    config: VLMambaConfig, pretrained: bool = True, **load_options: Any
) -> VLMambaForConditionalGeneration:
    """A model for training: random connector, pretrained encoder, and LLM weights if it has any.

    What of the published language model's settings changes results but no shape becomes the
    model's, in `config` too.  load_options go to from_pretrained (revision, cache_dir,
    local_files_only).
    """
    published = config.language_model_id if pretrained else None
    if published is not None:
        language_model_class(config.text_config).take_published_settings(
            config.text_config, published, **load_options
        )
        model = hollow(config)
    else:
        model = VLMambaForConditionalGeneration(config)
    if not model.vision_encoder.weights_in_checkpoint or pretrained:
        load_encoder(model, **load_options)
    if published is not None:
        with fetching("language model", published):
            model.language_model.load_published(published, **load_options)
        model.tie_weights()
    return model


def load_encoder(model: VLMambaForConditionalGeneration, **load_options: Any) -> None:
    """Give a model the published weights of its configuration's encoder (options: `assemble`)."""
    name = model.config.vision_model_id
    with fetching("vision encoder", name):
        model.vision_encoder.load_pretrained(**load_options)
    check_finite(str(name), model.vision_encoder)


def hollow(config: VLMambaConfig) -> VLMambaForConditionalGeneration:
    """A model whose language model and encoder have no memory yet (meta device), to be filled.

    The connector is there, with random weights; so is an encoder whose weights a package brings.
    """
    with torch.device("meta"):
        model = VLMambaForConditionalGeneration(config)
    model.connector = build_connector(config)
    model.connector.apply(model._init_weights)
    if not model.vision_encoder.weights_in_checkpoint:
        model.vision_encoder = build_vision_encoder(config)
    return model
