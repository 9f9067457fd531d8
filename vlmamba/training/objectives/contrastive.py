"""Learning to look before learning to tell: captions' loss and a contrast of pictures and captions.

    python -m vlmamba.train --stage pretrain --objective contrastive ...

VLKD (2203.06386) aligns a frozen CLIP with a language model by several terms; the one that needs
no text tower is its image-text contrast (ITCL).  Here, where the language model is frozen and the
connector learns, it is

    loss = cross-entropy + w (InfoNCE(v -> u) + InfoNCE(u -> v)) / 2     for each caption's tokens

with v the mean of the connector's tokens of a picture and u the mean of the last hidden states of
its caption, read by the language model without the picture, both of length one; the other pairs of
the micro-batch are the negatives, softened by a temperature.

Other than published: the mean of hidden states stands for BART's sentence embedding; the
temperature is a setting, not learned, and negatives come from one process's micro-batch; of its
other terms, text infilling is the captions' own loss, and the distance of two texts (TTDM), which
needs a text side that learns, is objective `text_distance`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmamba import registry
from vlmamba.data import patch_words
from vlmamba.data.collate import Batch
from vlmamba.training.flags import flag
from vlmamba.training.objectives.base import Objective, Options

if TYPE_CHECKING:
    from vlmamba.models.vlm import VLMambaForConditionalGeneration


@dataclass(frozen=True)
class ContrastiveOptions(Options):
    """contrastive_weight: w of the equation above; contrastive_temperature: what softens it."""

    contrastive_weight: float = flag(1.0, at_least=0, help="weight of the contrast")
    contrastive_temperature: float = flag(0.07, above=0, help="what softens it")


@registry.objectives.add("contrastive")
class Contrastive(Objective):
    """Cross-entropy of captions, and each picture nearer to its own caption than to others."""

    options_class = ContrastiveOptions
    depends_on_cut = True  # negatives are the micro-batch's others
    options: ContrastiveOptions
    student: VLMambaForConditionalGeneration

    def prepare(
        self, model: VLMambaForConditionalGeneration, processor: Any, device: torch.device
    ) -> None:
        """Keep the model: its language model reads captions alone."""
        self.student = model

    def summed(self, model: nn.Module, inputs: dict[str, Tensor], batch: Batch) -> Tensor:
        """Both terms (scalar), summed over the supervised tokens.

        A batch whose rows do not have one picture each (in tiles: of equal number) has no contrast.
        """
        output = self.forward(model, inputs)
        loss = output.loss
        images, rows = output.image_hidden_states, len(inputs["labels"])
        told = patch_words.answers(inputs).any(dim=1)
        if images is not None and rows > 1 and bool(told.all()) and self._one_each(inputs, images):
            seen = images.float().mean(dim=1)
            chosen = self.options
            term = info_nce(seen, self._captions(inputs), chosen.contrastive_temperature)
            loss = loss + chosen.contrastive_weight * term
        return loss * batch.n_labels

    def _one_each(self, inputs: dict[str, Tensor], images: Tensor) -> bool:
        """Whether every row has one picture."""
        rows, counts = len(inputs["labels"]), len(images)
        ids = inputs["input_ids"]
        return counts == rows and self.student.images_per_row(ids, None, counts) == [1] * rows

    @torch.no_grad()
    def _captions(self, inputs: dict[str, Tensor]) -> Tensor:
        """(B, D): the mean last hidden state of each row's answers, read alone."""
        chosen = patch_words.answers(inputs)
        order = (~chosen).int().argsort(dim=1, stable=True)  # the caption first
        lengths = chosen.sum(dim=1)
        ids = inputs["input_ids"].gather(1, order)[:, : int(lengths.max())]
        language = cast(Any, self.student).language_model
        hidden, _ = language(language.embed(ids), None, lengths)
        real = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        summed = (language.bare(hidden).float() * real.unsqueeze(-1)).sum(dim=1)
        return summed / lengths[:, None]


def info_nce(one: Tensor, other: Tensor, temperature: float) -> Tensor:
    """Of pairs (N, D), (N, D): mean cross-entropy of finding the partner, both ways (scalar)."""
    similarity = F.normalize(one, dim=-1) @ F.normalize(other, dim=-1).T / temperature
    partner = torch.arange(len(one), device=one.device)
    return (F.cross_entropy(similarity, partner) + F.cross_entropy(similarity.T, partner)) / 2
