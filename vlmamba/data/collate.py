"""Examples -> batches: tokens and labels of a conversation, right padding, image tensors.

`ConversationExamples` (LLaVA JSON) and `text.PackedText` give `Example`s by position;
`MicroBatches` turns a list of positions into the tensors that the model's forward takes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from vlmamba.data.decode import BrokenPicture, decode_picture
from vlmamba.data.llava import IMAGE_TAG, LlavaFile, Sample, SampleError, Survey, check_template

IGNORE = -100  # label of a position that is not trained on
PAD_MULTIPLE = 8  # what matrix units like; fewer distinct shapes to prepare kernels for


@dataclass(frozen=True)
class Example:
    """One training sequence. input_ids, labels: int64 (T,).

    images: None or float (n_images, 3, H, W) or (n_images, P, D_v), see `ImageSource`.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    images: torch.Tensor | None = None
    truncated: bool = False


class ImageSource(Protocol):
    """Where a sample's image tensors come from, and the forward argument they are for."""

    argument: str  # "pixel_values" or "image_features"

    def load(self, images: tuple[str, ...]) -> torch.Tensor:
        """Tensor with one leading row per image; raises SampleError for a broken one."""
        ...


class PixelImages:
    """Images decoded and transformed when they are needed: (n_images, 3, H, W)."""

    argument = "pixel_values"

    def __init__(self, folder: Path, processor: Any):
        self.folder, self.processor = Path(folder), processor

    def load(self, images: tuple[str, ...]) -> torch.Tensor:
        return self.processor.pixel_values([open_image(self.folder / image) for image in images])


def open_image(path: Path) -> Image.Image:
    """Decode an image file to RGB; raises SampleError if it is missing or broken."""
    try:
        return decode_picture(path.read_bytes()).convert("RGB")
    except FileNotFoundError as error:
        raise SampleError("missing image file") from error
    except (OSError, ValueError, BrokenPicture) as error:
        raise SampleError("broken image file") from error


class Examples(Protocol):
    """What the loop trains on: `lengths` (n,) for grouping, `examples[i]`, the image argument."""

    lengths: np.ndarray
    image_argument: str

    def __getitem__(self, position: int) -> Example: ...

    def name(self, position: int) -> str: ...


class ConversationExamples:
    """The usable samples of a LLaVA file as token sequences with labels on the answers only."""

    def __init__(
        self,
        file: LlavaFile,
        found: Survey,
        processor: Any,
        template: str,
        max_length: int,
        images: ImageSource | None,
    ):
        self.file, self.records, self.lengths = file, found.usable, found.lengths
        self.processor, self.template, self.max_length = processor, template, max_length
        self.images = images
        self.image_argument = images.argument if images else "pixel_values"
        self.image_token_id = processor.tokenizer.convert_tokens_to_ids(IMAGE_TAG)

    def __len__(self) -> int:
        return len(self.records)

    def name(self, position: int) -> str:
        """How messages name a sample: its file and record number."""
        return f"{self.file.path}: record {self.records[position]}"

    def __getitem__(self, position: int) -> Example:
        sample = self.file[int(self.records[position])]
        example, shown = self.tokenize(sample)
        if not shown or self.images is None:
            return example
        pixels = self.images.load(sample.images[:shown])
        return Example(example.input_ids, example.labels, pixels, example.truncated)

    def tokenize(self, sample: Sample) -> tuple[Example, int]:
        """Template, tokens and labels, cut at max_length; and how many images are left.

        An image that would be cut, and all behind it, is left out.  SampleError if no answer is
        left.
        """
        check_template(sample, self.template)
        ids, labels = map(
            torch.as_tensor,
            self.processor.training_example(
                sample.conversations, images=len(sample.images), template=self.template
            ),
        )
        shown, length = len(sample.images), self.max_length
        if len(ids) <= length:
            return Example(ids, labels), shown
        patches = self.processor.num_image_tokens
        image_tokens = (ids == self.image_token_id).nonzero().flatten().tolist()
        while shown and image_tokens[shown * patches - 1] >= length:
            shown -= 1
            length = min(length, image_tokens[shown * patches])
        ids, labels = ids[:length], labels[:length]
        if (labels == IGNORE).all():
            cut = shown < len(sample.images)
            what = "image lies beyond" if cut else "no answer within"
            raise SampleError(f"{what} the maximum length")
        return Example(ids, labels, truncated=True), shown


@dataclass
class Batch:
    """`inputs` are the forward's keyword arguments; the rest is for logs and reports."""

    inputs: dict[str, torch.Tensor]
    n_labels: int  # positions whose prediction is scored
    n_tokens: int  # positions that are not padding
    n_truncated: int
    skipped: list[tuple[str, str]]  # (sample, reason)


class MicroBatches(torch.utils.data.Dataset):
    """Map a list of positions to a Batch; unusable samples are left out and named in it."""

    def __init__(self, examples: Examples, pad_token_id: int):
        self.examples, self.pad_token_id = examples, pad_token_id

    def __getitem__(self, positions: list[int]) -> Batch:
        kept, skipped = [], []
        for position in positions:
            try:
                kept.append(self.examples[position])
            except SampleError as error:
                skipped.append((self.examples.name(position), str(error)))
        return collate(kept, self.pad_token_id, self.examples.image_argument, skipped)


def collate(
    examples: list[Example],
    pad_token_id: int,
    image_argument: str = "pixel_values",
    skipped: list[tuple[str, str]] | None = None,
) -> Batch:
    """Right-pad to one length: input_ids, labels (B, T); images (n_images, ...).

    T is the longest row's length, rounded up to a multiple of PAD_MULTIPLE.  There is no attention
    mask: in a causal model padding on the right reaches no real position.  No example
    gives a placeholder without labels: the process that holds it still takes part in every
    collective of the step.
    """
    blank = torch.full((2,), pad_token_id)
    rows = examples or [Example(blank, torch.full((2,), IGNORE))]
    labels = _pad([row.labels for row in rows], IGNORE)
    inputs = {
        "input_ids": _pad([row.input_ids for row in rows], pad_token_id),
        "labels": labels,
    }
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
