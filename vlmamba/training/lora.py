"""LoRA on the language model (Hu et al., arXiv:2106.09685): small additions learn, nothing else.

    python -m vlmamba.train --stage finetune --lora 64 ...

Each chosen projection W becomes W + alpha / rank * B A.  A checkpoint's model.safetensors holds the
untouched W, and its `adapter/` A and B in peft's format, which from_pretrained adds; `final/` holds
the sum, and `adapter/` beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vlmamba.models.adapter import FILE, PREFIX, additions
from vlmamba.models.language import LanguageModel
from vlmamba.training.recipe import Hyperparameters
from vlmamba.weight_files import tensors
from vlmamba_core.errors import UserError

if TYPE_CHECKING:  # loads only where it is used
    from peft import LoraConfig

Tensors = dict[str, Tensor]


def attach(model: nn.Module, hyper: Hyperparameters) -> None:
    """Add LoRA to the language model's projections; of that model, only these additions learn.

    Raises UserError where the language model does not learn, or a target is no projection.
    """
    from peft import inject_adapter_in_model

    language_model = model.get_submodule("language_model")
    if not any(p.requires_grad for p in language_model.parameters()):
        raise UserError("--lora is for stages in which the language model learns (finetune)")
    others = [p for p in model.get_submodule("connector").parameters() if p.requires_grad]
    _check_targets(hyper, language_model)
    try:
        inject_adapter_in_model(_peft_config(hyper), model)  # freezes everything but the adapter
    except (ValueError, TypeError, RuntimeError, ImportError) as error:  # peft has no common type
        where = f"--lora {hyper.lora} --lora-targets {hyper.lora_targets}"
        raise UserError(f"{where}: {' '.join(str(error).split())[:300]}") from error
    for parameter in others:
        parameter.requires_grad_(True)


def _check_targets(hyper: Hyperparameters, language_model: nn.Module) -> None:
    """Raise UserError for a target that the language model does not have."""
    known = cast(LanguageModel, language_model).lora_targets
    for target in hyper.lora_targets.split(","):
        if target not in known:
            raise UserError(f"unknown LoRA target {target!r}; known: {', '.join(known)}")


def _peft_config(hyper: Hyperparameters) -> LoraConfig:
    from peft import LoraConfig

    targets = hyper.lora_targets.split(",")
    return LoraConfig(
        r=hyper.lora or 0,
        lora_alpha=_alpha(hyper),  # type: ignore[arg-type]  # peft takes any number
        lora_dropout=hyper.lora_dropout,
        target_modules=rf"language_model\..*\.({'|'.join(targets)})",
    )


def _alpha(hyper: Hyperparameters) -> float:
    return 2 * (hyper.lora or 0) if hyper.lora_alpha is None else hyper.lora_alpha


def split(weights: Tensors) -> tuple[Tensors, Tensors]:
    """State dictionary with LoRA -> (the untouched model's, the adapter's in peft's names)."""
    base = {k.replace(".base_layer.", "."): v for k, v in weights.items() if "lora_" not in k}
    adapter = {PREFIX + k.replace(".default.", "."): v for k, v in weights.items() if "lora_" in k}
    return base, adapter


def merged(base: Tensors, adapter: Tensors, hyper: Hyperparameters) -> Tensors:
    """The untouched model's weights with the adapter added, in float32."""
    found = dict(base)
    for name, addition in additions(adapter, _alpha(hyper) / (hyper.lora or 1)):
        found[name] = (base[name].float() + addition).to(base[name].dtype)
    return found


def save(folder: Path, adapter: Tensors, hyper: Hyperparameters) -> None:
    """Write `folder`/adapter as peft reads it."""
    target = Path(folder) / "adapter"
    target.mkdir()
    _peft_config(hyper).save_pretrained(str(target))
    save_file({k: v.contiguous() for k, v in adapter.items()}, target / FILE)


@torch.no_grad()
def restore(folder: Path, model: nn.Module) -> None:
    """Read `folder`/adapter into a model that `attach` has prepared."""
    path = Path(folder) / "adapter" / FILE
    saved = dict(tensors([path]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            value = saved.get(PREFIX + name.replace(".default.", "."))
            if value is None or value.shape != parameter.shape:
                found = "no such tensor" if value is None else f"shape {tuple(value.shape)}"
                raise UserError(f"{path}: {name} of {tuple(parameter.shape)}: {found}")
            parameter.copy_(value)
