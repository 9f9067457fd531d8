"""What the whole model, generation, training and profiling ask of a language model.

A family is one file here and one entry of `registry.language_models`: the class registers itself
for the model_type of its configuration.  `Cache` is what a model remembers of a batch of
sequences, as a value: copied, cut to some rows, written into.

Sizes: B batch, L sequence, D width, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from vlmamba.models.language.memory import ActivationBytes, count_activations

EMBEDDING_STD = 0.02  # of embeddings and output projections that nothing is loaded into


class Cache(ABC):
    """What a language model remembers of each row.  Nothing outside its family looks inside.

    The methods from `get_seq_length` on are the names that transformers' generate() calls.
    """

    is_compileable = False
    is_croppable = False  # a recurrent state does not go back
    pictured: Tensor | None = None  # (B,) bool, which rows hold a picture; None: it is not kept

    @property
    @abstractmethod
    def batch(self) -> int:
        """Rows."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Memory in bytes."""

    @abstractmethod
    def clone(self) -> Self:
        """An independent copy."""

    @abstractmethod
    def select(self, rows: Tensor) -> Self:
        """A new cache with the given rows (int64 indices on any device; repeats allowed)."""

    @abstractmethod
    def write_rows(self, rows: Tensor, other: Self) -> None:
        """Replace the given rows by those of `other`, which has one for each, in place."""

    @abstractmethod
    def write(self, other: Self) -> None:
        """Take over all of `other`."""

    @abstractmethod
    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of input consumed so far, padding included."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: row i continues from row beam_idx[i]."""
        self.write(self.select(beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        self.write(self.select(torch.arange(self.batch).repeat_interleave(repeats)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows."""
        self.write(self.select(indices))


class LanguageModel(nn.Module):
    """A causal language model without its outer loop.

    block_names: classes of the blocks, which FSDP shards and torch.compile compiles one by one.
    lora_targets: names of the projections that LoRA may change.
    tied_weights: parameters that are another one of the model, copy -> original.
    """

    block_names: ClassVar[tuple[str, ...]]
    lora_targets: ClassVar[tuple[str, ...]]
    tied_weights: ClassVar[dict[str, str]] = {}
    config: PretrainedConfig
    embedding: nn.Embedding
    lm_head: nn.Module

    @property
    def shares_prefix(self) -> bool:
        """Whether a cache may be continued by several tokens at once, exactly."""
        return True

    @property
    def batches(self) -> bool:
        """Whether rows of different lengths may stand in one batch, each exact."""
        return True

    def blocks(self) -> list[nn.Module]:
        """The blocks that `block_names` names, in order."""
        return [m for m in self.modules() if type(m).__name__ in self.block_names]

    @property
    def heads(self) -> list[nn.Module]:
        """What has an output head as `lm_head`."""
        return [self]

    def initialize_copies(self) -> None:
        """Make what starts as a copy of another part one, when that part has its first weights."""

    def resize_copies(self) -> None:
        """Give such copies the number of words that the embedding and the head have."""

    def embed(self, input_ids: Tensor, pictured: Tensor | None = None) -> Tensor:
        """Token ids (B, L) -> (B, L, D).

        pictured: (B,) bool, which rows hold an image, in the same pass or in the cache that is
        continued (`Cache.pictured`); None: none of them.
        """
        return self.embedding(input_ids)

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., D), as forward and step give them, -> logits (..., V)."""
        return self.lm_head(hidden)

    def bare(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., D) without what forward has put behind them for `head`."""
        return hidden

    def mark_pictured(self, embeds: Tensor, pictured: Tensor) -> Tensor:
        """Embeddings (B, L, D) of rows of which `pictured` (B,) bool hold an image, as forward
        takes them: a model that treats such rows in another way marks them."""
        return embeds

    def new_cache(self, batch: int) -> Any:
        """The cache before the first token, on the model's device and in its dtype."""
        raise NotImplementedError

    def forward(
        self,
        inputs_embeds: Tensor,
        cache: Any = None,
        lengths: Tensor | None = None,
        collect: list[Tensor] | None = None,
    ) -> tuple[Tensor, Any]:
        """(B, L, D), continued from `cache` -> hidden states (B, L, D) and the new cache.

        lengths (B,) int64: the real tokens of each right-padded row; none of a row leaves its
        part of the cache as it was, and what comes out beyond them is meaningless.  `collect`
        receives every layer's input.
        """
        raise NotImplementedError

    def step(self, inputs_embeds: Tensor, cache: Any) -> Tensor:
        """One token: (B, D) -> (B, D) hidden; `cache` is updated in place."""
        raise NotImplementedError

    @classmethod
    def take_published_settings(cls, config: Any, source: str | Path, **options: Any) -> None:
        """Make `config` that of the published model where no shape changes, before it is built.

        source: folder or hub id[@revision]; options: of from_pretrained.  Raises UserError where
        the rest is another model's.  A family that leaves nothing to take over does nothing.
        """

    @classmethod
    def take_settings_of(cls, config: Any, trained: Any) -> None:
        """Make `config` an earlier stage's where no shape changes, before the model is built.

        A family whose configuration is whole without it does nothing.
        """

    def load_published(self, source: str | Path, **options: Any) -> None:
        """Fill the weights from what others published (folder or hub id[@revision]).

        Raises UserError for what is missing or does not fit.
        """
        raise NotImplementedError

    @property
    def weighs_padding(self) -> bool:
        """Whether padding would count in `auxiliary_loss`, so that a batch must say where it is."""
        return False

    def auxiliary_loss(self) -> Tensor | None:
        """What the last forward pass in training adds to its loss (scalar), asked for once."""
        return None

    def weights_from(self, donor: LanguageModel) -> dict[str, Tensor]:
        """The weights of a trained model by this one's names, to be loaded where they fit."""
        return donor.state_dict()

    def flops(self, tokens: int) -> float:
        """FLOPs of a forward pass over one sequence, without the head; a multiply-add is two."""
        raise NotImplementedError

    def activation_bytes(self, rows: int, tokens: int, dtype: torch.dtype) -> ActivationBytes:
        """Memory of a training pass over (rows, tokens, D), its products in `dtype`.

        Of the model as it is set up, with what is frozen, LoRA and gradient checkpointing.  A
        family whose kernels do not run without data, or that looks into the values of tensors,
        has a formula of its own.
        """
        return count_activations(self, rows, tokens, dtype)
