"""What one published system is, and the conversion itself."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from vlmamba.config import VLMambaConfig
from vlmamba.convert.rules import Absent, Rule, translate
from vlmamba.image_layouts import WHOLE
from vlmamba.models.vlm import VLMambaForConditionalGeneration
from vlmamba.processing import VLMambaProcessor, follow_tokenizer
from vlmamba.published import published_folder, timm_tensors, tokenizer_for
from vlmamba.weight_files import in_dtype
from vlmamba_core.errors import UserError, unknown


@dataclass(frozen=True)
class Parts:
    """What a system's reader makes of its files.

    found: all tensors by their names.  rules, aside: see `translate`.
    image_processor: where it is another than the encoder's own.
    """

    config: VLMambaConfig
    found: Mapping[str, Tensor]
    rules: Sequence[Rule | Absent]
    aside: Sequence[str]
    chat_template: str
    image_processor: Any = None
    image_layout: str = WHOLE


@dataclass(frozen=True)
class System:
    """A family of published checkpoints.

    about: what it is and where its files are.  tokenizer: hub id.  encoders: name -> timm's hub id
    of those whose weights are not in the checkpoint.  read: path, and tensors of the encoders as
    NAME.KEY -> its parts; raises UserError.
    """

    name: str
    about: str
    tokenizer: str
    read: Callable[[Path, Mapping[str, Tensor]], Parts]
    encoders: Mapping[str, str] = field(default_factory=dict)


def convert(
    system: System,
    source: str,
    out: Path,
    encoders: Mapping[str, str] | None = None,
    tokenizer: str | None = None,
    dtype: torch.dtype | None = None,
) -> VLMambaConfig:
    """Write the checkpoint at `source` to the new folder `out` as one of ours; its configuration.

    source: folder, file or hub id.  encoders, tokenizer: folders or hub ids in place of the
    system's own.  dtype: of the written weights; None: of their language model's.
    Raises UserError, one line, where anything is missing, unexpected or unreadable; `out` is then
    as it was.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already; give --out a new folder")
    for name in encoders or {}:
        if name not in system.encoders:
            raise unknown(f"encoder of {system.name}", name, system.encoders)
    places = {**system.encoders, **(encoders or {})}
    path = Path(source) if Path(source).exists() else published_folder(source, what=system.name)
    of_encoders = {
        f"{name}.{key}": tensor
        for name, place in places.items()
        for key, tensor in timm_tensors(place).items()
    }
    parts = system.read(path, of_encoders)
    parts.config.tokenizer_id = tokenizer or system.tokenizer
    processor = _processor(parts)
    model, weights = _weights(parts, source, dtype)
    follow_tokenizer(model, processor.tokenizer)
    _write(model, weights, processor, out)
    return parts.config


def _processor(parts: Parts) -> VLMambaProcessor:
    """The system's own prompt, and pictures stretched to the encoders' resolution."""
    processor = VLMambaProcessor.from_config(parts.config, tokenizer_for(parts.config))
    processor.chat_template = parts.chat_template
    processor.image_processor = parts.image_processor or processor.image_processor
    processor.image_aspect_ratio = "resize"
    processor.image_layout = parts.image_layout
    return processor


def _weights(
    parts: Parts, source: str, dtype: torch.dtype | None
) -> tuple[VLMambaForConditionalGeneration, dict[str, Tensor]]:
    """A model without memory, and its weights in one dtype."""
    with torch.device("meta"):
        model = VLMambaForConditionalGeneration(parts.config)
    tied = set(model.all_tied_weights_keys)
    shapes = {name: t.shape for name, t in model.state_dict().items() if name not in tied}
    weights = translate(shapes, parts.found, parts.rules, parts.aside, source)
    if dtype is None:
        dtype = next(t.dtype for name, t in weights.items() if name.startswith("language_model."))
    cast(torch.nn.Module, model).to(dtype)
    return model, {name: in_dtype(t, dtype) for name, t in weights.items()}


def _write(
    model: VLMambaForConditionalGeneration,
    weights: Mapping[str, Tensor],
    processor: VLMambaProcessor,
    out: Path,
) -> None:
    """Under another name first, so that an interrupted conversion leaves no half folder."""
    unfinished = out.with_name(f"{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        model.save_pretrained(unfinished, state_dict=dict(weights))
        processor.save_pretrained(unfinished)
        if out.exists():
            out.rmdir()
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
