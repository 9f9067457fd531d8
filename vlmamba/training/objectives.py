"""What a training step makes small: a loss summed over what it counts, one class an objective.

    @registry.objectives.add("cross_entropy_twice")
    class Twice(Objective):
        def summed(self, model, inputs, batch):
            return 2 * super().summed(model, inputs, batch)

    @registry.objectives.add("z_loss")
    class ZLoss(Objective):
        outputs = ("logits",)

        def summed(self, model, inputs, batch):
            output = self.forward(model, inputs)
            ...                                   # output.loss, output.logits (B, T, V)

The step's loss is the sum over all micro-batches and processes, divided by the sum of `count`, so
it does not depend on how the batch was cut.  A recipe names one by stage (`objective = "..."`), as
does `--objective`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmamba import registry
from vlmamba.data.collate import Batch
from vlmamba_core.errors import unknown
from vlmamba_core.tokens import IGNORE

if TYPE_CHECKING:  # the recipe checks its objective's name, so it loads this file
    from vlmamba.models.vlm import VLMambaForConditionalGeneration
    from vlmamba.training.recipe import Hyperparameters

OUTPUTS = ("logits", "hidden_states")


@registry.objectives.add("cross_entropy")
class Objective:
    """Cross-entropy of the supervised tokens.

    outputs: what it needs of the model besides the loss: "logits" (B, T, V), "hidden_states" (a
    tuple of (B, T, D), see `VLMambaOutput`).  They are made at every position and take memory.
    """

    outputs: tuple[str, ...] = ()

    def __init__(self, hyper: Hyperparameters) -> None:
        """hyper: the run's, for an objective that has settings. Raises UserError."""
        self.hyper = hyper
        for name in self.outputs:
            if name not in OUTPUTS:
                raise unknown(f"output of objective {hyper.objective!r}", name, OUTPUTS)

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


@registry.objectives.add("square_average")
class SquareAverage(Objective):
    """Cross-entropy in which a token of a sample with x supervised tokens weighs 1 / sqrt(x).

    InternVL 2.5's "square averaging" (2412.05271): between token averaging, under which long
    answers decide, and sample averaging, under which short ones do.
    """

    outputs = ("logits",)

    def count(self, batch: Batch) -> float:
        """The sum of all weights: sqrt(x) a sample."""
        return float(_supervised(batch.inputs["labels"]).sum(dim=1).sqrt().sum())

    def summed(self, model: nn.Module, inputs: dict[str, Tensor], batch: Batch) -> Tensor:
        """The weighted loss (scalar), summed over the supervised tokens.

        What the model itself adds to its loss (the balance of experts) is added once for each of
        what is counted.
        """
        labels = inputs["labels"]
        supervised = _supervised(labels)
        output = self.forward(model, inputs)
        logits = output.logits[:, :-1][supervised]
        losses = F.cross_entropy(logits.float(), labels[:, 1:][supervised], reduction="none")
        weights = supervised.sum(dim=1, keepdim=True).rsqrt().expand_as(supervised)[supervised]
        return (weights * losses).sum() + self.count(batch) * (output.loss - losses.mean())


def _supervised(labels: Tensor) -> Tensor:
    """labels (B, T) -> (B, T - 1) bool: where the token before has something to predict."""
    return labels[:, 1:] != IGNORE


def build_objective(hyper: Hyperparameters) -> Objective:
    """The objective that the recipe or --objective names. Raises UserError for an unknown one."""
    return registry.objectives[hyper.objective](hyper)
