"""Checkpoints in Prismatic's layout: config.json, and latest-checkpoint.pt with one part a key.

    RUN/config.json                         {"model": {"arch_specifier": ..., ...}, ...}
    RUN/checkpoints/latest-checkpoint.pt    {"model": {"projector": {...}, "llm_backbone": {...}}}

The encoders are not in it: they are timm's.  Pictures are stretched to 384 x 384 (`resize-naive`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPImageProcessor, SiglipImageProcessor

from vlmamba.models.vision.base import IMAGENET_MEAN, IMAGENET_STD
from vlmamba.models.vision.fused import FusedImageProcessor
from vlmamba.weight_files import plain_objects, read_object
from vlmamba_core.errors import UserError

WEIGHTS = "latest-checkpoint.pt"
VISION = "dinosiglip-vit-so-384px"

# Zephyr's turns, without a system sentence; the picture stands before all of the text
ZEPHYR_TEMPLATE = (
    "{% set seen = namespace(images=0) %}{% for message in messages %}"
    "{% if message['content'] is string %}"
    "{% set seen.images = seen.images + message['content'].split('<image>')|length - 1 %}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{% set seen.images = seen.images + 1 %}"
    "{% elif part['type'] == 'text' %}"
    "{% set seen.images = seen.images + part['text'].split('<image>')|length - 1 %}"
    "{% endif %}{% endfor %}{% endif %}{% endfor %}"
    "{{ '<image>' * seen.images }}"
    "{% for message in messages %}{% set turn = namespace(text='') %}"
    "{% if message['content'] is string %}{% set turn.text = message['content'] %}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'text' %}"
    "{% set turn.text = turn.text + part['text'] %}{% endif %}{% endfor %}{% endif %}"
    "{% set turn.text = turn.text.replace('<image>', '').strip() %}"
    "{% if message['role'] == 'user' %}"
    "{{ ('' if loop.first else '\n') + USER_TURN }}"
    "{% elif message['role'] == 'assistant' %}{{ (turn.text or ' ') + eos_token }}{% endif %}"
    "{% endfor %}"
)
TEMPLATES = {
    "zephyr": ZEPHYR_TEMPLATE.replace(
        "USER_TURN", "'<|user|>\n' + turn.text + eos_token + '\n<|assistant|>\n'"
    ),
    "in_out": ZEPHYR_TEMPLATE.replace("USER_TURN", "'In: ' + turn.text + '\nOut: '"),
}


def weights_file(source: Path) -> Path:
    """The one `latest-checkpoint.pt` at or below a path. Raises UserError."""
    if source.is_file():
        return source
    found = sorted(source.rglob(WEIGHTS))
    if len(found) != 1:
        raise UserError(
            f"{source}: {len(found)} files {WEIGHTS} below it; expected the folder of one model, "
            "or the file itself"
        )
    return found[0]


def settings(file: Path) -> dict[str, Any]:
    """What config.json beside the weights, or a folder above, says of the model; {} without one."""
    for folder in (file.parent, file.parent.parent):
        if (folder / "config.json").is_file():
            found = read_object(folder / "config.json").get("model")
            if not isinstance(found, dict):
                raise UserError(f'{folder / "config.json"} has no object "model"')
            return found
    return {}


def check_settings(found: dict[str, Any], file: Path, wanted: Mapping[str, Sequence[str]]) -> None:
    """Raise UserError where a setting is none of those that can be converted."""
    for name, values in wanted.items():
        if name in found and found[name] not in values:
            raise UserError(
                f"{file}: {name} is {found[name]!r} in its config.json; expected "
                f"{' or '.join(values)}"
            )


def read(file: Path, parts: Sequence[str]) -> dict[str, Tensor]:
    """All tensors as PART.KEY. Raises UserError unless the file has exactly these parts."""
    found = plain_objects(file)
    model = found.get("model") if isinstance(found, dict) else None
    if not isinstance(model, dict):
        raise UserError(f'{file}: no entry "model"; expected a checkpoint in Prismatic\'s layout')
    for what, names in (
        ("lacks", [name for name in parts if name not in model]),
        ("has unexpected", [str(name) for name in model if name not in parts]),
    ):
        if names:
            raise UserError(f"{file}: the checkpoint {what} parts: {', '.join(names)}")
    tensors: dict[str, Tensor] = {}
    for part in parts:
        if not isinstance(model[part], dict) or not all(map(torch.is_tensor, model[part].values())):
            raise UserError(f"{file}: {part} holds something else than named tensors")
        tensors |= {f"{part}.{key}": tensor for key, tensor in model[part].items()}
    return tensors


def image_processor(side: int) -> FusedImageProcessor:
    """Each encoder's pixels of the picture stretched to side x side, bicubic."""
    size = {"height": side, "width": side}
    dino = CLIPImageProcessor(
        size=size,
        do_center_crop=False,
        image_mean=list(IMAGENET_MEAN),
        image_std=list(IMAGENET_STD),
    )
    return FusedImageProcessor([dino, SiglipImageProcessor(size=size, resample=dino.resample)])
