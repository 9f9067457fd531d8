"""Hyperparameters of a run: a recipe file (vlmamba/recipes/*.toml) with the flags laid over it.

A recipe may name a `preset` and a `base` recipe, and has one table per stage.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from vlmamba import registry
from vlmamba.config import VLMambaConfig
from vlmamba.training.flags import OnResume, check, fields, flag, group
from vlmamba.training.objectives import Objective, Options, declared, objectives_with
from vlmamba.training.schedule import SCHEDULES
from vlmamba_core.errors import UserError, unknown
from vlmamba_core.names import choose, choose_dtype

DTYPES = ("fp32", "bf16")
PLAIN = "cross_entropy"


@dataclass(frozen=True)
class Hyperparameters:
    """Defaults are LLaVA-1.5's where it has one; each is a flag, too (see `flags`).

    batch_size: sequences per update over all processes; micro_batch: sequences per forward of one
    process; steps: number of updates, or None to follow `epochs`; max_length in tokens;
    connector_lr: the connector's own rate, where it should differ from lr; lora: rank of LoRA on
    the language model (None: all of it learns), lora_alpha (None: twice the rank), lora_dropout,
    lora_targets (comma-separated projections; None: all that the family names); objective: what is
    made small (objectives/), objective_options: its settings (None: their defaults), beside the
    others in recipes, flags and what is saved (see `from_flat`).
    """

    lr: float = flag(above=0)
    batch_size: int = flag(above=0)
    micro_batch: int = flag(above=0, on_resume=OnResume.FREE)
    epochs: float = flag(1.0, above=0, on_resume=OnResume.LENGTH)
    steps: int | None = flag(None, at_least=1, on_resume=OnResume.LENGTH)
    connector_lr: float | None = flag(None, at_least=0)
    schedule: str = "cosine"
    warmup_ratio: float = flag(0.03, at_least=0, at_most=1)
    weight_decay: float = flag(0.0, at_least=0)
    beta1: float = 0.9
    beta2: float = 0.999
    clip_norm: float = flag(1.0, above=0)
    max_length: int = flag(2048, above=0)
    dtype: str = "bf16"
    objective: str = PLAIN
    gradient_checkpointing: bool = flag(False, on_resume=OnResume.FREE)
    compile: bool = flag(False, on_resume=OnResume.FREE)
    lora: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float = flag(0.0, at_least=0, at_most=1)
    lora_targets: str | None = None
    seed: int = 0
    save_every: int = flag(500, at_least=1, on_resume=OnResume.FREE)
    keep: int = flag(2, at_least=0, on_resume=OnResume.FREE)
    objective_options: Options = group()

    def __post_init__(self) -> None:
        check(self)
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed is {self.seed}; expected 0 to {2**32 - 1}")
        if self.lora is not None and self.lora < 1:
            raise UserError(f"lora is {self.lora}; expected a rank of at least 1")
        self._set("schedule", choose("schedule", self.schedule, SCHEDULES))
        self._set("objective", registry.objectives.choose(self.objective))
        self._set("dtype", choose_dtype(self.dtype, DTYPES))
        kind = registry.objectives[self.objective].options_class
        if self.objective_options is None:
            self._set("objective_options", kind())
        if not isinstance(self.objective_options, kind):
            raise UserError(
                f"objective {self.objective!r} takes {kind.__name__}; "
                f"objective_options is {self.objective_options!r}"
            )

    def _set(self, field: str, value: Any) -> None:
        """Keep a name as this project spells it, or what follows from another field."""
        object.__setattr__(self, field, value)

    @classmethod
    def from_flat(cls, values: Mapping[str, Any]) -> Hyperparameters:
        """Of a table in which the objective's settings stand beside the others.

        So recipes and saved runs have them.  Settings of other objectives are left aside.
        """
        objective = values.get("objective", PLAIN)
        options: Any = None
        others = declared().keys() - {field.name for field in fields(cls)}
        if isinstance(objective, str):  # else it is refused below
            kind = registry.objectives[registry.objectives.choose(objective)].options_class
            taken = {field.name for field in fields(kind)}
            options = kind(**{name: v for name, v in values.items() if name in taken})
        own = {name: value for name, value in values.items() if name not in others}
        return cls(**own, objective_options=options)

    def total_steps(self, n_samples: int) -> int:
        """Number of updates: `steps`, or what `epochs` passes over the samples take."""
        per_epoch = -(-n_samples // self.batch_size)
        return self.steps or max(1, round(self.epochs * per_epoch))


def build_objective(hyper: Hyperparameters) -> Objective:
    """The objective that the recipe or --objective names, with its settings."""
    return registry.objectives[hyper.objective](hyper.objective_options, hyper.dtype)


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
    """The stage's table of a recipe, with every flag that is not None laid over it.

    Raises UserError for an unknown key, and for a setting that the objective does not have: as a
    flag, or in a table whose own objective is another (one with a default may stand there).
    """
    table = recipe.get(stage)
    if not isinstance(table, dict):
        raise UserError(f"the recipe has no table [{stage}]; add one with lr, batch_size, ...")
    settings = declared()
    known = [*(field.name for field in fields(Hyperparameters)), *settings]
    for key in table:
        if key not in known:
            raise unknown(f"recipe key in [{stage}]", key, known)
    absent = [name for name in ("lr", "batch_size", "micro_batch") if name not in table]
    if absent:
        raise UserError(f"the recipe's table [{stage}] has no {absent[0]}")
    given = {key: value for key, value in flags.items() if value is not None}
    meant = {key for key in table if key in settings and _default(settings[key], key) is None}
    _check_belongs(meant, table.get("objective", PLAIN), f"{{}} in [{stage}]".format)
    chosen = Hyperparameters.from_flat({**table, **given})
    _check_belongs(given, chosen.objective, lambda key: f"--{key.replace('_', '-')}")
    return chosen


def _default(owner: type[Options], name: str) -> Any:
    return next(field.default for field in fields(owner) if field.name == name)


def _check_belongs(names: Iterable[str], objective: Any, shown: Callable[[str], str]) -> None:
    """Raise UserError for a setting of objectives other than the one named."""
    name = registry.objectives.choose(objective) if isinstance(objective, str) else PLAIN
    own = {field.name for field in fields(registry.objectives[name].options_class)}
    for key in names:
        if key in declared() and key not in own:
            raise UserError(
                f"{shown(key)} belongs to --objective {' or '.join(objectives_with(key))}; "
                f"the objective is {name}"
            )
