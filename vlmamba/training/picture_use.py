"""Does a model use its picture?  Held-out losses with the right pictures and with another sample's.

    python -m vlmamba.train ... --eval-data held_out.json --eval-every 100 --eval-other-pictures

Every N steps, and after the last, the step's line in train.jsonl has `eval_picture_gains`: for each
held-out sample with pictures its mean loss a label with the pictures of another sample, minus that
with its own, in nats.  A model that answers from the text alone has gains around zero.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from vlmamba.data.collate import MicroBatches
from vlmamba.data.examples import ConversationExamples, Example
from vlmamba.data.llava import SampleError
from vlmamba.data.sampler import micro_batches
from vlmamba.training.recipe import Hyperparameters
from vlmamba_core.errors import UserError
from vlmamba_core.tokens import IGNORE


class OtherPictures:
    """Samples with pictures, each of which shows those of the next sample that has as many.

    positions (n,): of the samples in the examples that they are taken from; donors (n,): of those
    whose pictures they show, none of which is their own.
    """

    def __init__(self, examples: ConversationExamples):
        """Raises UserError where no two samples could change their pictures."""
        self.examples, self.image_argument = examples, examples.image_argument
        images = [examples.file[int(record)].images for record in examples.records]
        pairs = [(at, donor) for at in range(len(images)) if (donor := _donor(images, at)) >= 0]
        if not pairs:
            raise UserError("--eval-other-pictures: no two samples of --eval-data have pictures")
        self.positions, self.donors = np.array(pairs).T
        self.lengths = examples.lengths[self.positions]

    def name(self, position: int) -> str:
        """How messages name a sample."""
        return self.examples.name(int(self.positions[position]))

    def __getitem__(self, position: int) -> Example:
        own = self.examples[int(self.positions[position])]
        images = self.examples[int(self.donors[position])].images
        if own.images is None or images is None or images.shape != own.images.shape:
            raise SampleError("another sample's pictures have other tiles")
        return Example(own.input_ids, own.labels, images, own.truncated)


def _donor(images: list[tuple[str, ...]], at: int) -> int:
    """The next sample with as many pictures and none in common; -1 where there is none."""
    for step in range(1, len(images) if images[at] else 0):
        other = (at + step) % len(images)
        if len(images[other]) == len(images[at]) and not {*images[other]} & {*images[at]}:
            return other
    return -1


class OwnPictures(OtherPictures):
    """The same samples in the same order, with their own pictures."""

    def __getitem__(self, position: int) -> Example:
        return self.examples[int(self.positions[position])]


def picture_gains(
    model: nn.Module,
    examples: ConversationExamples,
    pad_token_id: int,
    hyper: Hyperparameters,
    accelerator: Accelerator,
) -> list[float | None]:
    """Each sample's loss a label with another's pictures minus with its own, in nats.

    None for a sample that cannot be measured.  Call it without dropout and gradients.
    """
    losses = [
        _sample_losses(model, kind(examples), pad_token_id, hyper, accelerator)
        for kind in (OtherPictures, OwnPictures)
    ]
    gains = (losses[0] - losses[1]).tolist()
    return [round(gain, 4) if gain == gain else None for gain in gains]


def _sample_losses(
    model: nn.Module,
    examples: OtherPictures,
    pad_token_id: int,
    hyper: Hyperparameters,
    accelerator: Accelerator,
) -> Tensor:
    """Mean loss a label of each sample, float64 (n,); nan where a sample was left out."""
    found = torch.zeros(len(examples.lengths), dtype=torch.float64)
    order = np.argsort(-examples.lengths, kind="stable")
    source = MicroBatches(examples, pad_token_id)
    share = accelerator.num_processes, accelerator.process_index
    for start in range(0, len(order), hyper.batch_size):
        batch = order[start : start + hyper.batch_size]
        for part in micro_batches(batch, *share, hyper.micro_batch, hyper.batch_size):
            collated = source[part.tolist()]
            inputs = {key: value.to(accelerator.device) for key, value in collated.inputs.items()}
            labels = inputs.pop("labels")
            rows = _row_losses(model(**inputs).logits, labels).cpu()
            left_out = {name for name, _ in collated.skipped}
            kept = [at for at in part.tolist() if examples.name(at) not in left_out]
            found[kept] = rows[: len(kept)]
    if accelerator.num_processes > 1:
        found = accelerator.reduce(found.float().to(accelerator.device), "sum").double().cpu()
    return torch.where(found == 0, torch.nan, found)


def _row_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits (B, L, vocabulary), labels (B, L) -> mean cross-entropy of each row, float64 (B,)."""
    targets = labels[:, 1:]
    each = F.cross_entropy(
        logits[:, :-1].transpose(1, 2), targets, reduction="none", ignore_index=IGNORE
    )
    counts = (targets != IGNORE).sum(dim=1)
    return each.double().sum(dim=1) / counts.clamp(min=1)
