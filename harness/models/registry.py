"""Models under evaluation by kind: `--model KIND:NAME`, or NAME alone for this project's own.

    @eval_models.add("mine")
    def load(name: str, options: ModelOptions) -> EvalModel: ...

    model = eval_models.load("mine:some/model", ModelOptions(batch_size=8))

An entry is such a function, or "MODULE:FUNCTION" of one: its module is imported when it is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from harness.models.base import EvalModel
from vlmamba_core.errors import UserError
from vlmamba_core.names import choose

OWN = "vlmamba"


@dataclass(frozen=True)
class ModelOptions:
    """How a model is run; a kind that has no use for one that was chosen says so (UserError)."""

    revision: str | None = None
    batch_size: int = 32
    device: str = "auto"
    dtype: str = "auto"
    backend: str = "auto"
    blind: bool = False
    seed: int = 0
    template: str | None = None
    temperature: float = 0.0
    quantize: str | None = None

    def refuse(self, kind: str, *names: str) -> None:
        """Raise UserError where one of these was chosen: `kind` has no use for it."""
        for name in names:
            if getattr(self, name) != getattr(ModelOptions, name):
                raise UserError(f"--{name} has no meaning for {kind}: models")


Factory = Callable[[str, ModelOptions], EvalModel]


class EvalModels(dict[str, Factory | str]):
    """Functions that make a model under evaluation, by the kind in front of its name."""

    def add(self, kind: str) -> Callable[[Factory], Factory]:
        """Decorate a function: it makes the models called KIND:NAME."""

        def register(factory: Factory) -> Factory:
            self[kind] = factory
            return factory

        return register

    def split(self, model: str) -> tuple[str, str]:
        """(kind, name) of what `--model` was given. Raises UserError for an unknown kind."""
        kind, colon, name = model.partition(":")
        if not colon or Path(model).exists():
            return OWN, model
        kind = choose("kind of model", kind, self)
        if not name:
            raise UserError(f"--model {model!r} names no model; expected {kind}:NAME")
        return kind, name

    def load(self, model: str, options: ModelOptions) -> EvalModel:
        """The model that `--model` names. Raises UserError where it cannot be made."""
        kind, name = self.split(model)
        factory = self[kind]
        if isinstance(factory, str):
            module, _, function = factory.partition(":")
            factory = getattr(import_module(module), function)
        return factory(name, options)


eval_models = EvalModels(
    {
        OWN: "harness.models.vlmamba:load",
        "hf": "harness.models.transformers:load",
        "lmms": "harness.models.lmms_models:load",
        "api": "harness.models.api:load",
    }
)
ABOUT = {  # what `--model` takes, for lists
    "nano": "the bundled demo model",
    "nano-attention": "a bundled one of its size with attention layers, from the controlled study",
    "FOLDER": "a checkpoint of this package",
    "ORG/NAME": "such a checkpoint on the hub",
    "hf:FOLDER_OR_ID": "any image-text-to-text model of transformers",
    "lmms:NAME,KEY=VALUE,...": "any of lmms-eval's model classes",
    "api:URL,model=NAME": "a model behind an OpenAI-compatible endpoint",
}
