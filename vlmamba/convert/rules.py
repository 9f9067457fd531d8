"""Another project's tensors by our names, every one of both sides accounted for.

    rules = [Rule(r"connector\.mlp\.(\d)\.(.+)", r"projector.projector.\1.\2")]
    weights = translate(shapes, found, rules, aside=[r"lm_head\.weight"], source="cobra")

A rule names, for tensors of this project, the published one that it is made of.  What no rule asks
for has to be in `aside`, patterns of what is known and not needed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmamba.weight_files import is_finite
from vlmamba_core.errors import UserError


@dataclass(frozen=True)
class Rule:
    """name: a pattern of whole names here.  published: what stands for it, with its groups.

    take: what is made of the published tensor; None: it is taken as it is.
    """

    name: str
    published: str
    take: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Absent:
    """Tensors that the published model has not and that no result depends on: zeros."""

    name: str


def translate(
    shapes: Mapping[str, torch.Size],
    found: Mapping[str, Tensor],
    rules: Sequence[Rule | Absent],
    aside: Sequence[str],
    source: str,
) -> dict[str, Tensor]:
    """Names here -> tensors of the shapes given, made of the published ones in `found`.

    Raises UserError naming, by their names, tensors that are missing, unexpected, of another
    shape, or not finite.
    """
    weights: dict[str, Tensor] = {}
    used: set[str] = set()
    missing: list[str] = []
    for name, shape in shapes.items():
        rule, published = _rule(name, rules)
        if isinstance(rule, Absent):
            weights[name] = torch.zeros(shape)
            continue
        used.add(published)
        if published not in found:
            missing.append(published)
            continue
        weights[name] = _taken(rule, published, found[published], shape, source)
    unexpected = [k for k in found if k not in used and not _matches(k, aside)]
    for what, keys in (("lacks", missing), ("has unexpected", unexpected)):
        if keys:
            names = ", ".join(sorted(set(keys))[:3])
            more = "..." if len(set(keys)) > 3 else ""
            raise UserError(
                f"{source}: the checkpoint {what} {len(set(keys))} tensors: {names}{more}"
            )
    return weights


def need(found: Mapping[str, Tensor], key: str, source: str) -> Tensor:
    """The tensor `key`, from which sizes are read. Raises UserError."""
    if key not in found:
        raise UserError(f"{source}: the checkpoint lacks the tensor {key}")
    return found[key]


def layers(found: Mapping[str, Tensor], prefix: str) -> int:
    """How many layers `prefix`0., `prefix`1., ... there are tensors of."""
    numbers = (re.match(re.escape(prefix) + r"(\d+)\.", key) for key in found)
    return 1 + max((int(number[1]) for number in numbers if number), default=-1)


def _rule(name: str, rules: Sequence[Rule | Absent]) -> tuple[Rule | Absent, str]:
    for rule in rules:
        if match := re.fullmatch(rule.name, name):
            return rule, match.expand(rule.published) if isinstance(rule, Rule) else ""
    raise AssertionError(f"no rule for {name}")  # the map is not complete


def _taken(rule: Rule, key: str, tensor: Tensor, shape: torch.Size, source: str) -> Tensor:
    try:
        value = tensor if rule.take is None else rule.take(tensor)
    except (RuntimeError, IndexError, ValueError):
        value = tensor  # of a shape that cannot be cut: refused below
    if value.shape != shape:
        raise UserError(
            f"{source}: {key} has shape {tuple(tensor.shape)}; the model's part is {tuple(shape)}"
        )
    if not is_finite(value):
        raise UserError(f"{source}: {key} holds NaN or infinite values")
    return value


def _matches(key: str, patterns: Sequence[str]) -> bool:
    return any(re.fullmatch(pattern, key) for pattern in patterns)
