"""Any causal language model that transformers knows, wrapped: Llama, GPT-NeoX, Phi, Zamba2, ...

Nothing of a family is implemented again: this file turns the two things that the rest of the
project asks for, rows of different lengths and a cache that is a value, into what transformers'
models take, which is left padding with a mask, positions and a `Cache` of theirs.

A prompt may be continued from a cache by several tokens at once (an image's prefix, then each of
its questions) only where the family computes that exactly.  transformers 5.23 does for attention;
most hybrids restart their recurrent layers there.  `continues_exactly` measures it.

Sizes: B batch, L new tokens, T tokens in the cache with their padding, D width, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, DynamicCache, PretrainedConfig, PreTrainedModel

from vlmamba.config import split_revision
from vlmamba.models.language.base import Cache, LanguageModel
from vlmamba.weight_files import take_buffers
from vlmamba_core.errors import UserError

PROBE_TOKENS = 12
EXACT = 1e-5  # largest difference, relative to the largest value, that counts as the same


@dataclass
class WrappedCache(Cache):
    """What a transformers model keeps of each row: its own cache and which columns are real.

    layers: transformers' cache.  mask: (B, T) bool, False on padding.
    """

    layers: DynamicCache
    mask: Tensor

    @property
    def batch(self) -> int:
        """Rows."""
        return self.mask.shape[0]

    @property
    def lengths(self) -> Tensor:
        """(B,) int64: real tokens of each row."""
        return self.mask.sum(dim=1)

    @property
    def nbytes(self) -> int:
        """Memory of all keys, values and recurrent states in bytes; the mask is not counted."""
        return sum(tensor.nbytes for _, _, tensor in _tensors(self.layers))

    def clone(self) -> WrappedCache:
        """An independent copy."""
        return WrappedCache(copy.deepcopy(self.layers), self.mask.clone())

    def select(self, rows: Tensor) -> WrappedCache:
        """A new cache with the given rows (int64 indices; repeats allowed)."""
        chosen = copy.copy(self.layers)
        chosen.layers = [copy.copy(layer) for layer in self.layers.layers]
        for layer in chosen.layers:
            for name in ("conv_states", "recurrent_states", "has_previous_state"):
                if isinstance(getattr(layer, name, None), dict):
                    setattr(layer, name, dict(getattr(layer, name)))
        for holder, name, tensor in _tensors(chosen):
            _set(holder, name, tensor.index_select(0, rows.to(tensor.device)))
        return WrappedCache(chosen, self.mask[rows.to(self.mask.device)])

    def write_rows(self, rows: Tensor, other: WrappedCache) -> None:
        """Replace the given rows by those of `other`, which has one for each.

        Both get the same number of columns first, by padding on the left.  Raises UserError for a
        sliding window, whose columns cannot be moved.
        """
        columns = max(self.mask.shape[1], other.mask.shape[1])
        source = other.select(torch.arange(other.batch, device=rows.device))
        if not any(True for _ in _tensors(self.layers)):
            self.layers = copy.deepcopy(other.layers)
            for holder, name, tensor in _tensors(self.layers):
                _set(holder, name, tensor.new_zeros(self.batch, *tensor.shape[1:]))
            self.mask = self.mask.new_zeros(self.batch, other.mask.shape[1])
        for cache in (self, source):
            cache._pad_left(columns)
        pairs = zip(_tensors(self.layers), _tensors(source.layers), strict=True)
        for (_, _, target), (_, _, tensor) in pairs:
            target[rows] = tensor
        self.mask[rows] = source.mask

    def write(self, other: WrappedCache) -> None:
        """Take over all of `other`."""
        self.layers, self.mask = other.layers, other.mask

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns consumed so far, padding included."""
        return self.mask.shape[1]

    def _pad_left(self, columns: int) -> None:
        missing = columns - self.mask.shape[1]
        if not missing:
            return
        if any(self.layers.is_sliding):
            raise UserError("rows of different lengths cannot be joined under a sliding window")
        for holder, name, tensor in _tensors(self.layers):
            if name in ("keys", "values"):
                _set(holder, name, nn.functional.pad(tensor, (0, 0, missing, 0)))
        self.mask = nn.functional.pad(self.mask, (missing, 0))


def _tensors(cache: DynamicCache) -> Iterator[tuple[Any, Any, Tensor]]:
    """(holder, name, tensor) of everything with a row a batch entry in transformers' cache."""
    for layer in cache.layers:
        for name in ("keys", "values"):
            tensor = getattr(layer, name, None)
            if isinstance(tensor, Tensor) and tensor.ndim == 4:
                yield layer, name, tensor
        for name in ("conv_states", "recurrent_states"):
            states = getattr(layer, name, None) or {}
            for index, tensor in states.items():
                if tensor is not None:
                    yield states, index, tensor


def _set(holder: Any, name: Any, tensor: Tensor) -> None:
    if isinstance(holder, dict):
        holder[name] = tensor
    else:
        setattr(holder, name, tensor)


class WrappedLM(LanguageModel):
    """A causal language model of transformers behind the project's interface."""

    def __init__(self, config: PretrainedConfig):
        super().__init__()
        self.config = config
        self.model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        takes = inspect.signature(self.model.base_model.forward).parameters
        self._positions = "position_ids" in takes
        self._cache_name = "cache_params" if "cache_params" in takes else "past_key_values"
        self._continues: bool | None = None

    @property
    def block_names(self) -> tuple[str, ...]:  # type: ignore[override]  # known per model here
        """The classes that transformers says are not to be split."""
        return tuple(self.model._no_split_modules or ())

    @property
    def lora_targets(self) -> tuple[str, ...]:  # type: ignore[override]
        """Every linear layer but the head."""
        layers = self.model.base_model.named_modules()
        return tuple(sorted({n.rpartition(".")[2] for n, m in layers if isinstance(m, nn.Linear)}))

    @property
    def tied_weights(self) -> dict[str, str]:  # type: ignore[override]
        """What the family ties, the head to the embedding and shared blocks."""
        tied = self.model.all_tied_weights_keys
        return {f"model.{copy}": f"model.{original}" for copy, original in tied.items()}

    @property
    def embedding(self) -> nn.Embedding:
        """The token embedding."""
        return cast(nn.Embedding, self.model.get_input_embeddings())

    @embedding.setter
    def embedding(self, value: nn.Embedding) -> None:
        self.model.set_input_embeddings(value)

    @property
    def lm_head(self) -> nn.Module:  # type: ignore[override]
        """The output head."""
        return self.model.get_output_embeddings()

    @lm_head.setter
    def lm_head(self, value: nn.Module) -> None:
        self.model.set_output_embeddings(value)

    @property
    def shares_prefix(self) -> bool:
        """Whether continuation is exact, measured once (see `continues_exactly`)."""
        return self.continues_exactly()

    def new_cache(self, batch: int) -> WrappedCache:
        """Nothing seen yet, in `batch` rows."""
        mask = torch.zeros(batch, 0, dtype=torch.bool, device=self.embedding.weight.device)
        return WrappedCache(DynamicCache(config=self.config), mask)

    def forward(
        self,
        inputs_embeds: Tensor,
        cache: WrappedCache | None = None,
        lengths: Tensor | None = None,
        collect: list[Tensor] | None = None,
    ) -> tuple[Tensor, WrappedCache]:
        """(B, L, D), continued from `cache` -> hidden states (B, L, D) and the new cache.

        lengths (B,) int64: the real tokens of each right-padded row; what comes out beyond them
        is meaningless.  `cache` itself is left as it was.  `collect` receives every layer's input.
        """
        if cache is not None and cache.mask.shape[1] and not self.continues_exactly():
            raise UserError(
                f"{self.config.model_type} cannot continue a cache by several tokens in this "
                "version of transformers: its answer would be another one; give the whole prompt"
            )
        cache = self.new_cache(len(inputs_embeds)) if cache is None else cache.clone()
        return self._extend(inputs_embeds, cache, lengths, collect)

    def _extend(
        self,
        inputs_embeds: Tensor,
        cache: WrappedCache,
        lengths: Tensor | None,
        collect: list[Tensor] | None = None,
    ) -> tuple[Tensor, WrappedCache]:
        if lengths is None:
            return self._run(inputs_embeds, cache, None, collect)
        columns = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
        shift = inputs_embeds.shape[1] - lengths.unsqueeze(1)  # (B, 1): padding on the left
        real = columns >= shift
        left = _take(inputs_embeds, (columns - shift) % len(columns))
        hidden, cache = self._run(left * real.unsqueeze(-1), cache, real, collect)
        back = (columns + shift) % len(columns)
        if collect is not None:
            collect[:] = [_take(x, back) for x in collect]
        return _take(hidden, back), cache

    def step(self, inputs_embeds: Tensor, cache: WrappedCache) -> Tensor:
        """One token: (B, D) -> (B, D) hidden; `cache` is updated in place."""
        return self._run(inputs_embeds.unsqueeze(1), cache, None, None)[0].squeeze(1)

    def _run(
        self,
        embeds: Tensor,
        cache: WrappedCache,
        real: Tensor | None,
        collect: list[Tensor] | None,
    ) -> tuple[Tensor, WrappedCache]:
        """transformers' model over left-padded rows; real (B, L) bool, None: no padding."""
        if real is None:
            real = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        seen = cache.lengths.unsqueeze(1)
        cache.mask = torch.cat([cache.mask, real], dim=1)
        options: dict[str, Any] = {self._cache_name: cache.layers}
        # without attention there is nothing to mask behind this call's own tokens
        mask = real if all(cache.layers.is_linear) and cache.layers.layers else cache.mask
        if not bool(mask.all()):
            options["attention_mask"] = mask.long()
        if self._positions:
            options["position_ids"] = (seen + real.cumsum(dim=1) - 1).clamp(min=0)
        output = self.model.base_model(
            inputs_embeds=embeds,
            use_cache=True,
            output_hidden_states=collect is not None,
            **options,
        )
        if collect is not None:
            collect.extend(output.hidden_states[:-1])
        return output.last_hidden_state, cache

    @torch.no_grad()
    def continues_exactly(self) -> bool:
        """Whether a cache continued by several tokens gives what the whole sequence gives.

        Measured once on random embeddings, padding included, in the model's own dtype.
        """
        if self._continues is None:
            self._continues = self._continuation_error() <= max(
                EXACT, 8 * torch.finfo(self.embedding.weight.dtype).eps
            )
        return self._continues

    def load_published(self, source: str | Path, **options: Any) -> None:
        """Fill the weights with transformers' own loading (folder or hub id[@revision])."""
        name, revision = split_revision(str(source))
        options |= {"revision": revision} if revision else {}
        dtype = self.embedding.weight.dtype
        published = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **options)
        self.model.load_state_dict(published.state_dict(), assign=True)
        take_buffers(self.model, published)

    def flops(self, tokens: int) -> float:
        """Counted by running the model on the meta device, attention over what a token may see.

        That is half of the sequence on average, so a causal pass costs as much as its two halves
        do with every token seeing all of its half.
        """
        half = tokens // 2
        return sum(self._all_seeing_flops(n) for n in (half, tokens - half) if n)

    def _all_seeing_flops(self, tokens: int) -> float:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            self._run_on_meta(tokens, torch.float32)
        return float(counter.get_total_flops())

    def activation_bytes(self, dtype: torch.dtype, checkpointing: bool) -> tuple[int, int]:
        """What autograd keeps of a forward pass on the meta device, parameters left out."""
        kept: dict[int, int] = {}  # several tensors may share a storage: it is there once

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            weights = self._run_on_meta(PROBE_TOKENS, dtype)
        for weight in weights:
            kept.pop(weight.untyped_storage()._cdata, None)
        total = sum(kept.values()) // PROBE_TOKENS
        layers = self.config.num_hidden_layers
        if not checkpointing:
            return total, 0
        return layers * self.config.hidden_size * dtype.itemsize, total // layers

    def _run_on_meta(self, tokens: int, dtype: torch.dtype) -> list[nn.Parameter]:
        """One sequence through the model's shape; its weights, which have none of their memory.

        With a cache: without one, transformers looks into the positions for packed sequences, and
        on the meta device there is nothing to look into.
        """
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config, dtype=dtype).base_model
            embeds = torch.empty(1, tokens, self.config.hidden_size, dtype=dtype)
            cache = {self._cache_name: DynamicCache(config=self.config)}
            embeds.requires_grad_(torch.is_grad_enabled())
            model(inputs_embeds=embeds, use_cache=True, **cache)
        return list(model.parameters())

    def _continuation_error(self) -> float:
        weight = self.embedding.weight
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(len(weight), (2, PROBE_TOKENS), generator=generator)
        embeds = self.embedding(rows.to(weight.device))
        was_training = self.training
        self.eval()
        whole = self(embeds[:1])[0][0]
        cut = PROBE_TOKENS // 2
        first, cache = self(embeds[:, :cut])
        lengths = torch.tensor([PROBE_TOKENS - cut, 1], device=weight.device)
        second, cache = self._extend(embeds[:, cut:], cache, lengths)
        self.train(was_training)
        error = (torch.cat([first[0], second[0]]) - whole).abs().max()
        other = self(embeds[1:, : cut + 1])[0][0, -1]
        error = torch.maximum(error, (second[1, 0] - other).abs().max())
        return float(error / whole.abs().max())


def _take(rows: Tensor, index: Tensor) -> Tensor:
    """rows (B, L, D) at index (B, L) -> (B, L, D)."""
    return rows.gather(1, index.unsqueeze(-1).expand_as(rows))
