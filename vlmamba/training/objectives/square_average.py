"""Cross-entropy with a weight for each answer's length.

python -m vlmamba.train --stage finetune --objective square_average ...
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vlmamba import registry
from vlmamba.data.collate import Batch
from vlmamba.training.objectives.base import Objective
from vlmamba_core.tokens import IGNORE


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
