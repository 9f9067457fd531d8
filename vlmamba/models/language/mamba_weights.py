"""A published Mamba or Mamba-2 checkpoint's tensors -> the language model's parameters.

Either layout: the original `state-spaces` one (backbone.embedding.weight) or transformers'
(backbone.embeddings.weight); sharded or not, safetensors or .bin.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from vlmamba.models.language.base import EMBEDDING_STD
from vlmamba.weight_files import in_dtype, is_finite, language_model_files, read_object, tensors
from vlmamba_core.errors import UserError


def fill(model: nn.Module, folder: Path, source: str | Path) -> None:
    """Fill a `MambaLM` from the weight files in `folder`; `source` is what errors name.

    A vocabulary smaller than the model's fills its first rows.  Raises UserError naming keys that
    are missing, unknown or ill-shaped, and an output head that is not the embedding.
    """
    own = dict(model.named_parameters())
    own.pop("lm_head.weight", None)  # where it is not the embedding: refused below
    seen: set[str] = set()
    head: Tensor | None = None
    for key, tensor in tensors(language_model_files(folder)):
        name = _own_name(key)
        if name is None:
            head = tensor
            continue
        if name not in own:
            raise UserError(f"{source}: unexpected tensor {key!r} in a Mamba checkpoint")
        _check_shape(own[name], tensor, f"{source}: {key}")
        if not is_finite(tensor):
            raise UserError(f"{source}: {key} holds NaN or infinite values")
        _fill(model, name, tensor)
        seen.add(name)
    missing = sorted(set(own) - seen)
    if missing:
        raise UserError(
            f"{source}: the checkpoint lacks {len(missing)} tensors: {', '.join(missing[:3])}"
            f"{'...' if len(missing) > 3 else ''}"
        )
    embedding = model.get_parameter("embedding.weight")
    _check_head(head, embedding, folder)
    model.get_submodule("lm_head").weight = embedding


def _check_head(head: Tensor | None, embedding: Tensor, folder: Path) -> None:
    """Raise UserError unless the output head is the embedding, in the file or by config.json."""
    published = read_object(folder / "config.json")
    of_its_own = published.get("model_type") == "mamba2"  # transformers' default
    tied = published.get("tie_word_embeddings", published.get("tie_embeddings", not of_its_own))
    if head is None and not tied:
        raise UserError(f"{folder}: the checkpoint lacks lm_head.weight, its own output head")
    if head is not None and not torch.equal(head.to(embedding.dtype), embedding[: len(head)]):
        raise UserError(
            f"{folder}: the output head differs from the embedding (tie_word_embeddings is "
            f"{tied!r}); only models that share the two can be read"
        )


def _own_name(key: str) -> str | None:
    """Our name of a published tensor; None for the output head, which has to be the embedding."""
    if key == "lm_head.weight":
        return None
    return key.removeprefix("backbone.").replace("embeddings.weight", "embedding.weight")


def _check_shape(target: Tensor, tensor: Tensor, what: str) -> None:
    rows_may_differ = target.shape[1:] == tensor.shape[1:] and what.endswith(
        ("embedding.weight", "embeddings.weight")
    )
    fits = target.shape == tensor.shape or (rows_may_differ and len(tensor) <= len(target))
    if not fits:
        raise UserError(
            f"{what} has shape {tuple(tensor.shape)}; the model expects {tuple(target.shape)}"
        )


@torch.no_grad()
def _fill(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Make a file's tensor the parameter `name`, in its dtype; fewer rows are its first ones."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    target: nn.Parameter = getattr(module, leaf)
    if tensor.shape != target.shape:
        if target.is_meta:
            rows = torch.empty_like(target, device=tensor.device).normal_(std=EMBEDDING_STD)
        else:
            rows = target.detach().clone()
        rows[: len(tensor)] = tensor
        tensor = rows
    value = in_dtype(tensor, target.dtype)
    setattr(module, leaf, nn.Parameter(value, requires_grad=target.requires_grad))
