"""The model and processor that a stage starts from: preset, earlier stage, published parts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from vlmamba import checkpoints
from vlmamba.config import VLMambaConfig
from vlmamba.configs.encoders import VISION_RESULT_ONLY
from vlmamba.configs.language import MambaConfig
from vlmamba.data.text import plain_texts
from vlmamba.data.tokenizer import train_tokenizer
from vlmamba.models.assemble import assemble, hollow, load_encoder
from vlmamba.models.language import language_model_class
from vlmamba.models.language.wrapped import shrunk
from vlmamba.models.vlm import VLMambaForConditionalGeneration
from vlmamba.processing import VLMambaProcessor, follow_tokenizer
from vlmamba.published import tokenizer_for
from vlmamba.training.stages import Stage
from vlmamba.weight_files import take_buffers
from vlmamba_core.errors import UserError

# What changes a connector's result and perhaps no shape
SAME_CONNECTOR = (
    *("connector", "scan", "scan_merge", "scan_shared", "vision_feature_layer"),
    "connector_layer",
)
# By the kind of layer, what changes a language model's result and perhaps no shape
NO_SHAPE = {
    "attention": ("head_dim",),
    "mamba2": ("head_dim", "n_groups", "d_state"),
    "experts": ("experts_per_token",),
}


def initial_model(
    config: VLMambaConfig, stage: Stage, init: str | None, data: list[Path], seed: int
) -> tuple[VLMambaForConditionalGeneration, VLMambaProcessor]:
    """Model (float32, CPU) and processor at the start of `stage`.

    init: result of an earlier stage (folder, hub id) whose parts `stage.init_from` are taken
    over; without it language model, encoder and tokenizer are the published ones.  Where there are
    none (the demo's, a tiny configuration), they are initialized from `seed`, and a tokenizer is
    trained on `data`.  The encoder is the earlier stage's as well, unless the connector begins anew
    and the preset names another one.  Raises UserError when parts do not fit.
    """
    torch.manual_seed(seed)
    if init is None:
        model = assemble(config, pretrained=config.language_model_id is not None)
        if config.tokenizer_id is not None:
            tokenizer = tokenizer_for(config)
        else:
            tokenizer = train_tokenizer(plain_texts(data), config.vocab_size)
        return model, _processor(model, tokenizer)
    donor, donor_processor = checkpoints.load(init, dtype=torch.float32)
    take_settings_of(donor.config, config)
    model = hollow(config)
    if "connector" not in stage.init_from and another_encoder(model, donor):
        load_encoder(model)
    else:
        adopt(model, donor, "vision_encoder", init)
    for part in stage.init_from:
        adopt(model, donor, part, init)
    model.tie_weights()
    return model, _processor(model, donor_processor.tokenizer)


def _processor(model: VLMambaForConditionalGeneration, tokenizer: Any) -> VLMambaProcessor:
    """The processor; the model's answers end as its tokenizer says."""
    processor = VLMambaProcessor.from_config(model.config, tokenizer)
    follow_tokenizer(model, tokenizer)
    return processor


def check_init(config: VLMambaConfig, stage: Stage, init: str | None) -> None:
    """Raise UserError where a stage would start from parts that nothing has trained."""
    if init is not None or stage.name == "text":
        return
    if stage.name in ("finetune", "adaptors"):
        raise UserError(
            f"--stage {stage.name} needs --init: the `final` folder of --stage pretrain"
        )
    if config.language_model_id is None:
        raise UserError(
            f"--stage {stage.name} of a preset without published language model needs --init: "
            "the `final` folder of --stage text"
        )


def tiny(config: VLMambaConfig) -> VLMambaConfig:
    """The same architecture with every dimension shrunk and nothing published: for dry runs.

    The demo's encoder stays as it is: it is small and its weights are in a package.
    """
    fields = config.to_dict() | dict.fromkeys(("language_model_id", "vision_model_id"))
    fields |= {"tokenizer_id": None, "connector_layer": None}  # as the language model's then
    if isinstance(config.text_config, MambaConfig):
        layers = max(2, len(config.mixer.split(",")))
        fields |= {"d_model": 32, "n_layer": layers, "dt_rank": 2, "vocab_size": 512, "head_dim": 8}
        fields |= {"d_intermediate": 48, "adaptors": [1] if config.adaptors else []}
    else:
        fields["text_config"] = shrunk(config.text_config)
    vision = fields["vision_config"]
    for part in vision.get("encoders", [vision]):
        if "num_hidden_layers" in part:
            part |= {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
            part |= {"num_attention_heads": 2, "image_size": 4 * part["patch_size"]}
            part |= {"resolution": part["image_size"]} if "resolution" in part else {}
            for backbone in ("stage_names", "out_features", "out_indices"):  # made by depth
                part.pop(backbone, None)
    return VLMambaConfig(**fields)


def take_settings_of(donor: VLMambaConfig, config: VLMambaConfig) -> None:
    """Make `config` the donor's where no shape changes: what it took over from published models.

    An encoder that is loaded in place of the donor's takes its own published ones.  Raises
    UserError where `config` itself wants another.
    """
    language_model_class(config.text_config).take_settings_of(config.text_config, donor.text_config)
    both = [getattr(c.vision_config, "encoders", [c.vision_config]) for c in (config, donor)]
    for own, other in zip(*both, strict=False):
        for name in VISION_RESULT_ONLY:
            if own.model_type == other.model_type and hasattr(other, name):
                setattr(own, name, getattr(other, name))


def another_encoder(
    model: VLMambaForConditionalGeneration, donor: VLMambaForConditionalGeneration
) -> bool:
    """Whether the model's encoder can be had published, and is not the donor's."""
    named, encoder = model.config.vision_model_id, model.vision_encoder
    if named is None and encoder.weights_in_checkpoint:
        return False
    other = named != donor.config.vision_model_id
    return other or bool(misfits(encoder.state_dict(), donor.vision_encoder.state_dict()))


def other_results(own: PretrainedConfig, its: PretrainedConfig) -> list[str]:
    """Settings of a donor's language model that change what its weights compute, but no shape."""
    if not isinstance(own, MambaConfig) or not isinstance(its, MambaConfig):
        return []
    names = [name for kind, names in NO_SHAPE.items() if kind in its.layer_kinds for name in names]
    names += ["adaptors"] if its.adaptors else []
    return [
        f"{name}={getattr(its, name)}" for name in names if getattr(own, name) != getattr(its, name)
    ]


def misfits(own: Mapping[str, Tensor], donated: Mapping[str, Tensor]) -> list[str]:
    """Names of weights that only one of both has, or in another shape."""
    wrong = [k for k in own if k not in donated or donated[k].shape != own[k].shape]
    return wrong + [k for k in donated if k not in own]


def adopt(
    model: VLMambaForConditionalGeneration,
    donor: VLMambaForConditionalGeneration,
    part: str,
    source: str,
) -> None:
    """Take over the donor's weights of one submodule; UserError naming what does not fit.

    A language model with layers among the donor's computes what the donor does, until it learns.
    """
    donated, own = donor.get_submodule(part).state_dict(), model.get_submodule(part).state_dict()
    if part == "language_model":
        donated = model.language_model.weights_from(donor.language_model)
    wrong = misfits(own, donated)
    if part == "language_model":
        wrong += other_results(model.config.text_config, donor.config.text_config)
    if part == "connector":
        for name in SAME_CONNECTOR:
            if getattr(model.config, name) != getattr(donor.config, name):
                wrong.append(f"{name}={getattr(donor.config, name)}")
    if wrong:
        raise UserError(
            f"the {part} of {source} does not fit this preset: {', '.join(sorted(wrong)[:5])} "
            "differ; use the preset it was trained with"
        )
    hollow = any(weight.is_meta for weight in own.values())
    model.get_submodule(part).load_state_dict(donated, assign=hollow)  # the same memory
    take_buffers(model.get_submodule(part), donor.get_submodule(part))
