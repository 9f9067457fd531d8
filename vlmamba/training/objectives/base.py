"""What a training step makes small: a loss summed over what it counts, one class an objective.

    @dataclass(frozen=True)
    class ZLossOptions(Options):
        z_weight: float = flag(1e-4, at_least=0, help="of the square of log Z")

    @registry.objectives.add("z_loss")
    class ZLoss(Objective):
        options_class = ZLossOptions                  # --z-weight, z_weight in a recipe
        outputs = ("logits",)

        def summed(self, model, inputs, batch):
            output = self.forward(model, inputs)
            ...                                   # output.loss, output.logits (B, T, V)

The step's loss is the sum over all micro-batches and processes, divided by the sum of `count`, so
it does not depend on how the batch was cut.  A recipe names one by stage (`objective = "..."`), as
does `--objective`.  Nothing here knows the other hyperparameters: recipes are above objectives.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_type_hints

import torch
from torch import Tensor, nn

from vlmamba import registry
from vlmamba.data.collate import Batch
from vlmamba.training.flags import check, fields
from vlmamba_core.errors import UserError, unknown

if TYPE_CHECKING:
    from vlmamba.models.vlm import VLMambaForConditionalGeneration

OUTPUTS = ("logits", "hidden_states")


@dataclass(frozen=True)
class Options:
    """An objective's settings: fields made by `flags.flag`, checked when they are made.

    Each is a flag, a recipe key and a saved setting under its own name; objectives may share one.
    Raises UserError for a value of another type or out of its bounds.
    """

    def __post_init__(self) -> None:
        check(self)


@registry.objectives.add("cross_entropy")
class Objective:
    """Cross-entropy of the supervised tokens.

    options_class: the dataclass of its settings.  outputs: what it needs of the model besides the
    loss: "logits" (B, T, V), "hidden_states" (a tuple of (B, T, D), see `VLMambaOutput`).  They are
    made at every position and take memory.  depends_on_cut: whether a loss depends on how a batch
    was cut into micro-batches, which a resumed run then keeps.
    """

    depends_on_cut: bool = False
    options_class: type[Options] = Options
    outputs: tuple[str, ...] = ()

    def __init__(self, options: Options | None = None, dtype: str = "fp32") -> None:
        """options: its settings, of `options_class`.  dtype: fp32, or bf16 for mixed precision."""
        self.options: Any = self.options_class() if options is None else options
        self.dtype = dtype
        for name in self.outputs:
            if name not in OUTPUTS:
                raise unknown(f"output of objective {type(self).__name__}", name, OUTPUTS)

    def prepare(
        self, model: VLMambaForConditionalGeneration, processor: Any, device: torch.device
    ) -> None:
        """Called once before the first step, with the model that is trained. Raises UserError."""

    def forward(self, model: nn.Module, inputs: dict[str, Tensor]) -> Any:
        """The model's output for `inputs`, with what `outputs` names."""
        return model(**inputs, **{f"output_{name}": True for name in self.outputs})

    def count(self, batch: Batch) -> float:
        """What the summed loss is divided by; zero: nothing to learn from this batch."""
        return batch.n_labels

    def summed(self, model: nn.Module, inputs: dict[str, Tensor], batch: Batch) -> Tensor:
        """The loss (scalar) summed over what `count` counts, which is above zero.

        model: the VLM, perhaps wrapped for several processes; run it once, by `forward`.  inputs:
        the batch's own, on the model's device.
        """
        return self.forward(model, inputs).loss * batch.n_labels

    def __call__(self, model: nn.Module, batch: Batch, device: torch.device) -> Tensor:
        """The summed loss; zero, with gradients, where there is nothing to count."""
        inputs = {k: tensor.to(device, non_blocking=True) for k, tensor in batch.inputs.items()}
        if self.count(batch):
            return self.summed(model, inputs, batch)
        del inputs["labels"]  # every process must give every parameter a gradient
        return model(**inputs).logits.sum() * 0.0


def declared() -> dict[str, type[Options]]:
    """Setting -> the options that declare it, of every registered objective.

    Raises UserError where two objectives give one name different types or defaults.
    """
    found: dict[str, type[Options]] = {}
    for kind in dict.fromkeys(
        objective.options_class for objective in registry.objectives.values()
    ):
        for name, what in _settings(kind):
            first = found.setdefault(name, kind)
            if dict(_settings(first))[name] != what:
                raise UserError(
                    f"{first.__name__} and {kind.__name__} both declare {name}, of different types "
                    "or defaults; call one of them otherwise"
                )
    return found


def _settings(kind: type[Options]) -> Iterator[tuple[str, Any]]:
    """(name, its type and default) of each setting."""
    hints = get_type_hints(kind)
    yield from ((field.name, (hints[field.name], field.default)) for field in fields(kind))


def objectives_with(setting: str) -> list[str]:
    """The registered objectives that have this setting."""
    kinds = {name: objective.options_class for name, objective in registry.objectives.items()}
    return [name for name, kind in kinds.items() if setting in dict(_settings(kind))]
