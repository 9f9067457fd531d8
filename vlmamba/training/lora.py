"""LoRA on the language model (Hu et al., arXiv:2106.09685): small additions learn, nothing else.

    python -m vlmamba.train --stage finetune --lora 64 ...

Each chosen projection W becomes W + alpha / rank * B A.  A checkpoint's model.safetensors holds the
untouched W, and its `adapter/` A and B in peft's format, which from_pretrained adds; `final/` holds
the sum, and `adapter/` beside it.

Of a model whose weights are packed (vlmamba.quantize) W stays as it is, and A and B are part of the
model, on the way and at the end (vlmamba.models.low_rank).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from safetensors.torch import save_file
from torch import Tensor, nn

from vlmamba.models import low_rank
from vlmamba.models.adapter import FILE, PREFIX, additions
from vlmamba.models.language import LanguageModel
from vlmamba.models.low_rank import LowRankSettings
from vlmamba.training.recipe import Hyperparameters
from vlmamba.weight_files import tensors
from vlmamba_core.errors import UserError, shortened

if TYPE_CHECKING:  # loads only where it is used
    from peft import LoraConfig

Tensors = dict[str, Tensor]


def attach(model: nn.Module, hyper: Hyperparameters) -> None:
    """Add LoRA to the language model's projections; of that model, only these additions learn.

    A packed model that has additions goes on with them.  Raises UserError where the language model
    does not learn, a target is no projection, or a packed model has other additions.
    """
    language_model = model.get_submodule("language_model")
    own = (p for n, p in language_model.named_parameters() if not n.startswith("adaptors."))
    if not any(p.requires_grad for p in own):
        raise UserError("--lora is for stages in which the language model learns (finetune)")
    others = [p for p in model.get_submodule("connector").parameters() if p.requires_grad]
    targets = _targets(hyper, cast(LanguageModel, language_model))
    if packed(model):
        _attach_packed(model, hyper, targets)
    else:
        _inject(model, hyper, targets)
    for parameter in others:
        parameter.requires_grad_(True)


def _inject(model: nn.Module, hyper: Hyperparameters, targets: tuple[str, ...]) -> None:
    """peft's layers around the projections; all else is frozen."""
    from peft import inject_adapter_in_model

    try:
        inject_adapter_in_model(
            _peft_config(hyper, targets), model
        )  # freezes everything but the adapter
    except (ValueError, TypeError, RuntimeError, ImportError) as error:  # peft has no common type
        where = f"--lora {hyper.lora} --lora-targets {','.join(targets)}"
        raise UserError(f"{where}: {' '.join(str(error).split())[:300]}") from error


def packed(model: nn.Module) -> bool:
    """Whether the language model's weights are whole numbers, which nothing can be added to."""
    return bool(cast(Any, model).config.quantized)


def check_packed(model: nn.Module, hyper: Hyperparameters) -> None:
    """Raise UserError where whole numbers would have to learn."""
    learns = any(p.requires_grad for p in model.get_submodule("language_model").parameters())
    if packed(model) and learns and not hyper.lora:
        raise UserError(
            f"the language model's weights are packed ({cast(Any, model).config.quantized}) and "
            "cannot learn; give --lora RANK, or train first and quantize then"
        )


def _attach_packed(model: nn.Module, hyper: Hyperparameters, targets: tuple[str, ...]) -> None:
    """Additions beside the whole numbers, new unless the model has them; all else is frozen."""
    config: Any = cast(Any, model).config
    if not targets:
        raise UserError("--lora: the language model has no packed projection to add to")
    asked = LowRankSettings(hyper.lora or 0, float(_alpha(hyper)), tuple(sorted(targets)))
    if config.low_rank is None:
        low_rank.add(cast(LanguageModel, model.get_submodule("language_model")), asked)
        config.low_rank = asked.fields()
    has = LowRankSettings.read(config.low_rank)
    if has != asked:
        raise UserError(
            f"the model has learned additions of rank {has.rank}, alpha {has.alpha:g} to "
            f"{','.join(has.targets)}; go on with --lora {has.rank} --lora-alpha {has.alpha:g} "
            f"--lora-targets {','.join(has.targets)}"
        )
    model.requires_grad_(False)
    for addition in low_rank.additions(model):
        addition.dropout = hyper.lora_dropout
        addition.requires_grad_(True)


def _targets(hyper: Hyperparameters, language_model: LanguageModel) -> tuple[str, ...]:
    """The projections asked for, or all that the family names. Raises UserError for others."""
    known = language_model.lora_targets
    if hyper.lora_targets is None:
        return known
    targets = tuple(hyper.lora_targets.split(","))
    for target in targets:
        if target not in known:
            raise UserError(f"unknown LoRA target {target!r}; known: {', '.join(known)}")
    return targets


def _peft_config(hyper: Hyperparameters, targets: tuple[str, ...]) -> LoraConfig:
    from peft import LoraConfig

    return LoraConfig(
        r=hyper.lora or 0,
        lora_alpha=_alpha(hyper),  # type: ignore[arg-type]  # peft takes any number
        lora_dropout=hyper.lora_dropout,
        target_modules=rf"language_model\..*\.({'|'.join(targets)})",
    )


def _alpha(hyper: Hyperparameters) -> float:
    return 2 * (hyper.lora or 0) if hyper.lora_alpha is None else hyper.lora_alpha


def split(model: nn.Module, weights: Tensors) -> tuple[Tensors, Tensors]:
    """A model with LoRA and its whole state dictionary -> (the untouched model's, the adapter's).

    The adapter's names are those of a peft model's file.
    """
    from peft import get_peft_model_state_dict

    adapter = get_peft_model_state_dict(model, weights, save_embedding_layers=False)
    base = {k.replace(".base_layer.", "."): v for k, v in weights.items() if "lora_" not in k}
    return base, {PREFIX + name: value for name, value in adapter.items()}


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
    names = {key.partition(".lora_")[0].rpartition(".")[2] for key in adapter}
    _peft_config(hyper, tuple(sorted(names))).save_pretrained(str(target))
    save_file({k: v.contiguous() for k, v in adapter.items()}, target / FILE)


def restore(folder: Path, model: nn.Module) -> None:
    """Read `folder`/adapter into a model that `attach` has prepared; UserError for another one."""
    from peft import set_peft_model_state_dict

    path = Path(folder) / "adapter" / FILE
    saved = {name.removeprefix(PREFIX): tensor for name, tensor in tensors([path])}
    try:
        found: Any = set_peft_model_state_dict(model, saved)  # names missing and unexpected
    except RuntimeError as error:  # of another shape
        raise UserError(f"{path} does not fit the model: {shortened(error)}") from error
    missing = [name for name in found.missing_keys if "lora_" in name]
    for what, names in (("lacks", missing), ("has unknown", found.unexpected_keys)):
        if names:
            raise UserError(f"{path} {what} {len(names)} tensors: {', '.join(names[:3])}")
