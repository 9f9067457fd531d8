"""What the loop trains on, by position: a conversation's tokens, its labels, its pictures.

`ConversationExamples` (LLaVA JSON) and `text.PackedText` are `Examples`; `collate` makes batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
import torch

from vlmamba.data import patch_words
from vlmamba.data.images import ImageSource
from vlmamba.data.llava import LlavaFile, Sample, SampleError, SampleIndex, check_template
from vlmamba.processing import tokens_behind
from vlmamba_core.tokens import IGNORE, IMAGE


@dataclass(frozen=True)
class Example:
    """One training sequence. input_ids, labels: int64 (T,).

    images: None or float (tiles, 3, H, W) or (tiles, P, D_v), see `ImageSource`.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    images: torch.Tensor | None = None
    truncated: bool = False


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
        found: SampleIndex,
        processor: Any,
        template: str,
        max_length: int,
        images: ImageSource | None,
    ):
        self.file, self.records, self.lengths = file, found.usable, found.lengths
        self.processor, self.template, self.max_length = processor, template, max_length
        self.images = images
        self.image_argument = images.argument if images else "pixel_values"
        self.image_token_id = processor.tokenizer.convert_tokens_to_ids(IMAGE)
        self._first_tokens: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.records)

    def _first_token(self, word: str) -> int:
        """A word's, inside a text."""
        if word not in self._first_tokens:
            first = tokens_behind(self.processor.tokenizer, f" {word}")[0]
            self._first_tokens[word] = first
        return self._first_tokens[word]

    def name(self, position: int) -> str:
        """How messages name a sample: its file and record number."""
        return f"{self.file.path}: record {self.records[position]}"

    def __getitem__(self, position: int) -> Example:
        sample = self.file[int(self.records[position])]
        loaded = None
        if self.images is not None and sample.images and self.processor.most_tiles > 1:
            loaded = self.images.load(sample.images)  # only the picture tells how many tiles it has
        tiles = [1] * len(sample.images) if loaded is None else list(map(len, loaded))
        example, shown = self.tokenize(sample, tiles)
        if not shown or self.images is None:
            return example
        if loaded is None:
            loaded = self.images.load(sample.images[:shown])
        pixels = torch.cat(loaded[:shown])
        return Example(example.input_ids, example.labels, pixels, example.truncated)

    def tokenize(self, sample: Sample, tiles: list[int]) -> tuple[Example, int]:
        """Template, tokens and labels, cut at max_length; and how many images are left.

        tiles: of each image.  An image that would be cut, and all behind it, is left out.
        SampleError if no answer is left.
        """
        check_template(sample, self.template)
        ids, labels = map(
            torch.as_tensor,
            self.processor.training_example(
                sample.conversations, len(sample.images), self.template, tiles
            ),
        )
        if sample.patch_words and set(tiles) == {1}:  # a tile is a part of its picture
            shown_at = (ids == self.image_token_id).nonzero().flatten().tolist()
            patch_words.learn(labels, shown_at, sample.patch_words, self._first_token)
        shown, length = len(sample.images), self.max_length
        if len(ids) <= length:
            return Example(ids, labels), shown
        ends = [0, *accumulate(count * self.processor.num_image_tokens for count in tiles)]
        image_tokens = (ids == self.image_token_id).nonzero().flatten().tolist()
        while shown and image_tokens[ends[shown] - 1] >= length:
            shown -= 1
            length = min(length, image_tokens[ends[shown]])
        ids, labels = ids[:length], labels[:length]
        if (labels == IGNORE).all():
            cut = shown < len(sample.images)
            what = "image lies beyond" if cut else "no answer within"
            raise SampleError(f"{what} the maximum length")
        return Example(ids, labels, truncated=True), shown
