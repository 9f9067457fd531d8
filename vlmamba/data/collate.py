"""Examples -> batches: right padding, images behind each other, what was left out.

`MicroBatches` turns a list of positions into the tensors that the model's forward takes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from vlmamba.data.examples import Example, Examples
from vlmamba.data.llava import SampleError
from vlmamba_core.tokens import IGNORE

PAD_MULTIPLE = 8  # what matrix units like; fewer distinct shapes to prepare kernels for


@dataclass
class Batch:
    """`inputs` are the forward's keyword arguments; the rest is for logs and reports."""

    inputs: dict[str, torch.Tensor]
    n_labels: int  # positions whose prediction is scored
    n_tokens: int  # positions that are not padding
    n_truncated: int
    skipped: list[tuple[str, str]]  # (sample, reason)

    def pin_memory(self) -> Batch:
        """What a DataLoader calls, so that copies to a GPU go on while it computes."""
        self.inputs = {name: tensor.pin_memory() for name, tensor in self.inputs.items()}
        return self


class MicroBatches(torch.utils.data.Dataset):
    """Map a list of positions to a Batch; unusable samples are left out and named in it."""

    def __init__(self, examples: Examples, pad_token_id: int, masked: bool = False):
        self.examples, self.pad_token_id, self.masked = examples, pad_token_id, masked

    def __getitem__(self, positions: list[int]) -> Batch:
        kept, skipped = [], []
        for position in positions:
            try:
                kept.append(self.examples[position])
            except SampleError as error:
                skipped.append((self.examples.name(position), str(error)))
        return collate(kept, self.pad_token_id, self.examples.image_argument, skipped, self.masked)


def collate(
    examples: list[Example],
    pad_token_id: int,
    image_argument: str = "pixel_values",
    skipped: list[tuple[str, str]] | None = None,
    masked: bool = False,
) -> Batch:
    """Right-pad to one length: input_ids, labels (B, T); images (n_images, ...).

    T is the longest row's length, rounded up to a multiple of PAD_MULTIPLE.  There is an attention
    mask only where `masked`: in a causal model padding on the right reaches no real position, but
    what is a mean over all tokens counts it (`LanguageModel.weighs_padding`).  No example gives a
    placeholder without labels: the process that holds it still takes part in every collective of
    the step.
    """
    blank = torch.full((2,), pad_token_id)
    rows = examples or [Example(blank, torch.full((2,), IGNORE))]
    labels = _pad([row.labels for row in rows], IGNORE)
    inputs = {
        "input_ids": _pad([row.input_ids for row in rows], pad_token_id),
        "labels": labels,
    }
    if masked:
        inputs["attention_mask"] = _pad([torch.ones_like(row.input_ids) for row in rows], 0)
    images = [row.images for row in rows if row.images is not None]
    if images:
        inputs[image_argument] = torch.cat(images)
    return Batch(
        inputs,
        n_labels=int((labels[:, 1:] != IGNORE).sum()),
        n_tokens=sum(len(example.input_ids) for example in examples),
        n_truncated=sum(row.truncated for row in rows),
        skipped=skipped or [],
    )


def _pad(rows: list[torch.Tensor], value: int) -> torch.Tensor:
    length = PAD_MULTIPLE * math.ceil(max(map(len, rows)) / PAD_MULTIPLE)
    padded = torch.full((len(rows), length), value)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = row
    return padded
