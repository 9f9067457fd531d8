"""Hyperparameters of a run: a recipe file (vlmamba/recipes/*.toml) with the flags laid over it.

A recipe may name a `preset` and a `base` recipe, and has one table per stage.
"""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from vlmamba import registry
from vlmamba.config import VLMambaConfig
from vlmamba.training import contrastive, distillation, objectives  # noqa: F401  # fill the registry
from vlmamba.training.flags import OnResume, flag
from vlmamba.training.schedule import SCHEDULES
from vlmamba_core.errors import UserError, unknown
from vlmamba_core.names import choose, choose_dtype

DTYPES = ("fp32", "bf16")


@dataclass(frozen=True)
class Hyperparameters:
    """Defaults are LLaVA-1.5's where it has one; each is a flag, too (see `flags`).

    batch_size: sequences per update over all processes; micro_batch: sequences per forward of one
    process; steps: number of updates, or None to follow `epochs`; max_length in tokens;
    connector_lr: the connector's own rate, where it should differ from lr; lora: rank of LoRA on
    the language model (None: all of it learns), lora_alpha (None: twice the rank), lora_dropout,
    lora_targets (comma-separated projections; None: all that the family names); objective: what is
    made small (objectives.py).  Of objective distill: teacher (a model's name, folder or hub id),
    distill_logits and distill_features (weights of the two terms), distill_temperature.  Of
    objective contrastive: contrastive_weight, contrastive_temperature.
    """

    lr: float
    batch_size: int
    micro_batch: int = flag(on_resume=OnResume.FREE)
    epochs: float = flag(1.0, on_resume=OnResume.LENGTH)
    steps: int | None = flag(None, on_resume=OnResume.LENGTH)
    connector_lr: float | None = None
    schedule: str = "cosine"
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    clip_norm: float = 1.0
    max_length: int = 2048
    dtype: str = "bf16"
    objective: str = "cross_entropy"
    teacher: str | None = None
    distill_logits: float = 1.0
    distill_features: float = 1.0
    distill_temperature: float = 1.0
    contrastive_weight: float = 1.0
    contrastive_temperature: float = 0.07
    gradient_checkpointing: bool = flag(False, on_resume=OnResume.FREE)
    compile: bool = flag(False, on_resume=OnResume.FREE)
    lora: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    lora_targets: str | None = None
    seed: int = 0
    save_every: int = flag(500, on_resume=OnResume.FREE)
    keep: int = flag(2, on_resume=OnResume.FREE)

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_kind(field.name, getattr(self, field.name), str(field.type))
        above_zero = ("lr", "batch_size", "micro_batch", "epochs", "max_length", "clip_norm")
        for name in (*above_zero, "distill_temperature", "contrastive_temperature"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} is {getattr(self, name)!r}; expected a positive number")
        at_least_zero = ("connector_lr", "warmup_ratio", "weight_decay", "lora_dropout", "keep")
        weights = ("distill_logits", "distill_features", "contrastive_weight")
        for name in (*at_least_zero, *weights):
            if (getattr(self, name) or 0) < 0:
                raise UserError(f"{name} is {getattr(self, name)!r}; expected 0 or more")
        for name in ("warmup_ratio", "lora_dropout"):
            if getattr(self, name) > 1:
                raise UserError(f"{name} is {getattr(self, name)!r}; expected at most 1")
        if self.save_every < 1:
            raise UserError(f"save_every is {self.save_every}; expected at least 1")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed is {self.seed}; expected 0 to {2**32 - 1}")
        if self.steps is not None and self.steps < 1:
            raise UserError(f"steps is {self.steps}; expected at least 1")
        if self.lora is not None and self.lora < 1:
            raise UserError(f"lora is {self.lora}; expected a rank of at least 1")
        self._name("schedule", choose("schedule", self.schedule, SCHEDULES))
        self._name("objective", registry.objectives.choose(self.objective))
        if (self.teacher is None) == (self.objective == "distill"):
            raise UserError("--objective distill and --teacher MODEL belong together")
        self._name("dtype", choose_dtype(self.dtype, DTYPES))

    def _name(self, field: str, value: str) -> None:
        """Keep a name as this project spells it, whatever its case was."""
        object.__setattr__(self, field, value)

    def total_steps(self, n_samples: int) -> int:
        """Number of updates: `steps`, or what `epochs` passes over the samples take."""
        per_epoch = -(-n_samples // self.batch_size)
        return self.steps or max(1, round(self.epochs * per_epoch))


def _check_kind(name: str, value: Any, kinds: str) -> None:
    """Raise UserError unless a value is of one of the kinds that its annotation names, and finite.

    A whole number will do for a float.
    """
    wanted = [kind.strip() for kind in kinds.split("|")]
    kind = "None" if value is None else type(value).__name__
    fits = kind in wanted or (kind == "int" and "float" in wanted)
    if not fits or (kind == "float" and not math.isfinite(value)):
        raise UserError(f"{name} is {value!r}; expected {' or '.join(wanted)}")


def recipe_names() -> list[str]:
    """Recipes that ship with the package."""
    folder = files("vlmamba") / "recipes"
    return sorted(
        path.name.removesuffix(".toml") for path in folder.iterdir() if ".toml" in path.name
    )


def default_recipe(config: VLMambaConfig) -> str:
    """The recipe where none is named: the demo's for models from scratch, else LLaVA-1.5's."""
    return "nano" if config.language_model_id is None else "llava-1.5"


def load_recipe(name: str, above: tuple[str, ...] = ()) -> dict[str, Any]:
    """A recipe by name or file, with its base's entries filled in.

    `above`: the recipes that this one is a base of. Raises UserError for unusable files.
    """
    if name in above:
        raise UserError(f"recipe {name} is its own base: {' -> '.join((*above, name))}")
    path = Path(name)
    if path.suffix != ".toml":
        name = choose("recipe", name, recipe_names())
        path = Path(str(files("vlmamba") / "recipes" / f"{name}.toml"))
    try:
        recipe = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"no recipe file {name!r}; known recipes: {recipe_names()}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"recipe {name}: {error}") from error
    for key in ("base", "preset"):
        if not isinstance(recipe.get(key, ""), str):
            raise UserError(f"recipe {name}: {key} is {recipe[key]!r}; expected a name")
    base = load_recipe(recipe.pop("base"), (*above, name)) if "base" in recipe else {}
    for key, value in recipe.items():
        if isinstance(base.get(key, value), dict) != isinstance(value, dict):
            raise UserError(f"recipe {name}: {key} is a table here or in its base, but not in both")
    return {
        key: {**base.get(key, {}), **value} if isinstance(value, dict) else value
        for key, value in {**base, **recipe}.items()
    }


def hyperparameters(recipe: dict[str, Any], stage: str, flags: dict[str, Any]) -> Hyperparameters:
    """The stage's table of a recipe, with every flag that is not None laid over it."""
    if not isinstance(recipe.get(stage), dict):
        raise UserError(f"the recipe has no table [{stage}]; add one with lr, batch_size, ...")
    known = [field.name for field in fields(Hyperparameters)]
    for key in recipe[stage]:
        if key not in known:
            raise unknown(f"recipe key in [{stage}]", key, known)
    absent = [name for name in ("lr", "batch_size", "micro_batch") if name not in recipe[stage]]
    if absent:
        raise UserError(f"the recipe's table [{stage}] has no {absent[0]}")
    chosen = Hyperparameters(**recipe[stage])
    return replace(chosen, **{key: value for key, value in flags.items() if value is not None})
