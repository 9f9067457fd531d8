"""What a command resolves to: hyperparameters of recipe and flags, the model, the stage."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from vlmamba import registry
from vlmamba.checkpoints import read_config
from vlmamba.config import VLMambaConfig
from vlmamba.configs.language import MambaConfig
from vlmamba.training.arguments import RunArguments
from vlmamba.training.init_model import tiny
from vlmamba.training.recipe import Hyperparameters, default_recipe, hyperparameters, load_recipe
from vlmamba.training.stages import Stage, get_stage
from vlmamba_core.errors import UserError, unknown


@dataclass(frozen=True)
class Plan:
    """A run before anything is built: its arguments and all that follows from them."""

    args: RunArguments
    hyper: Hyperparameters
    config: VLMambaConfig
    stage: Stage


def resolve(args: RunArguments, flags: dict[str, Any]) -> Plan:
    """Arguments, hyperparameter flags (None: not given) and recipe -> the plan.

    The model is the preset's, of the flag or the recipe, or else that of --init.
    """
    args = replace(args, image_layout=registry.image_layouts.choose(args.image_layout))
    stage, changes = get_stage(args.stage), config_fields(args.set)
    recipe = load_recipe(args.recipe) if args.recipe else {}
    args = replace(args, preset=args.preset or recipe.get("preset"))
    if args.preset is not None:
        config = VLMambaConfig.preset(args.preset, **changes)
    elif args.init is not None:
        config = VLMambaConfig(**(read_config(args.init).to_dict() | changes))
    else:
        raise UserError("no preset; give --preset NAME, --init MODEL or a --recipe that names one")
    recipe = recipe or load_recipe(default_recipe(config))
    if args.tiny:
        config = tiny(config)
    return Plan(args, hyperparameters(recipe, stage.name, flags), config, stage)


def config_fields(pairs: Iterable[str]) -> dict[str, Any]:
    """`FIELD=VALUE` flags -> fields of the model's configuration; UserError for unknown ones."""
    parameters = [
        parameter
        for config in (MambaConfig, VLMambaConfig)
        for parameter in inspect.signature(config.__init__).parameters.values()
    ]
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    fields = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if name not in defaults:
            raise unknown("configuration field", name, defaults)
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        switch = isinstance(defaults[name], bool) and (name, value) != (
            "scan_shared",
            "projections",
        )
        if not equals or (switch and not isinstance(value, bool)):
            raise UserError(
                f"--set {pair}: expected FIELD=VALUE with a value like {defaults[name]!r}"
            )
        fields[name] = value
    return fields
