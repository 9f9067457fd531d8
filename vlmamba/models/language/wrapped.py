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
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, DynamicCache, PretrainedConfig, PreTrainedModel

from vlmamba.config import split_revision
from vlmamba.models.language.base import Cache, LanguageModel
from vlmamba.models.linear import decoding
from vlmamba.models.offloaded import device_of
from vlmamba.models.quantized import QuantizedLinear
from vlmamba.weight_files import check_finite
from vlmamba_core.errors import UserError

PROBE_TOKENS = 12
BARE_MATRICES = ("out_proj", "dt_proj")  # of a Mamba layer, in its fused kernels
LAYER_NUMBERS = ("hybrid_layer_ids", "attn_layer_indices")  # settings that list layers
SAME_RESULT = (  # settings that change no hidden state
    *("architectures", "dtype", "transformers_version", "use_cache", "vocab_size", "auto_map"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "return_dict", "name_or_path"),
    *("output_hidden_states", "output_attentions", "id2label", "label2id", "problem_type"),
)
SMALL = {  # sizes of `shrunk`, by their names in one family or another
    "hidden_size": 32,
    "intermediate_size": 48,
    "vocab_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "kv_channels": 8,
    "attention_head_dim": 16,
    "adapter_rank": 4,
    "mamba_d_state": 8,
    "mamba_headdim": 8,
    "mamba_d_head": 8,
    "mamba_d_ssm": 64,
    "mamba_n_heads": 8,
    "n_mamba_heads": 8,
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
    "lru_width": 32,
    "mamba_ngroups": 1,
    "mamba_n_groups": 1,
    "num_mem_blocks": 1,
    "chunk_size": 16,
    "mamba_chunk_size": 16,
}
NOT_SHRUNK = (  # what building a model of sizes that do not fit each other raises
    *(ValueError, TypeError, RuntimeError, AttributeError, KeyError, IndexError),
    StrictDataclassError,
)
EXACT = 1e-5  # largest difference, relative to the largest value, that counts as the same


@dataclass
class WrappedCache(Cache):
    """What a transformers model keeps of each row: its own cache and which columns are real.

    layers: transformers' cache.  mask: (B, T) bool, False on padding.  padded: whether it has any;
    known here, for asking the mask makes the host wait for the device (None: ask it).
    """

    layers: DynamicCache
    mask: Tensor
    padded: bool | None = None

    def __post_init__(self) -> None:
        if self.padded is None:
            self.padded = _has_padding(self.mask)

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
        return WrappedCache(copy.deepcopy(self.layers), self.mask.clone(), self.padded)

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
        self.padded = _has_padding(self.mask)

    def write(self, other: WrappedCache) -> None:
        """Take over all of `other`."""
        self.layers, self.mask, self.padded = other.layers, other.mask, other.padded

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns consumed so far, padding included."""
        return self.mask.shape[1]

    @property
    def lengths_apart(self) -> tuple[int, ...]:
        """Lengths of what layers keep besides the text's columns: keys of pictures, windows."""
        kept = (x.shape[2] for _, name, x in _tensors(self.layers) if name == "keys")
        return tuple(length for length in kept if length != self.mask.shape[1])

    def _pad_left(self, columns: int) -> None:
        missing = columns - self.mask.shape[1]
        if not missing:
            return
        if any(self.layers.is_sliding):
            raise UserError("rows of different lengths cannot be joined under a sliding window")
        for holder, name, tensor in _tensors(self.layers):
            if name in ("keys", "values") and tensor.shape[2] == self.mask.shape[1]:
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


def _has_padding(mask: Tensor) -> bool:
    return not bool(mask.all())


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
        # the dtype that the whole model is made in, not the one that its weights were published in
        dtype = torch.get_default_dtype()
        try:
            self.model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
        except ValueError as error:
            raise UserError(
                f"{config.model_type!r} is no causal language model of transformers: "
                f"{' '.join(str(error).split())[:200]}"
            ) from error
        width = self.embedding.embedding_dim
        if width != config.hidden_size:  # opt-350m: narrow embeddings, widened by the model
            raise UserError(
                f"this {config.model_type!r} model has embeddings of width {width} and states of "
                f"{config.hidden_size}; expected one width, which its image tokens get too"
            )
        takes = inspect.signature(self.model.base_model.forward).parameters
        self._positions = "position_ids" in takes
        self._cache_name = "cache_params" if "cache_params" in takes else "past_key_values"
        self._continues: bool | None = None
        self._batches: bool | None = None
        self._plain_head: bool | None = None

    @property
    def block_names(self) -> tuple[str, ...]:  # type: ignore[override]  # known per model here
        """The classes that transformers says are not to be split, of those that are there.

        Blocks that share weights with another one (Zamba2's attention) are left out: FSDP gives
        every parameter to one block.
        """
        wanted, shared = set(self.model._no_split_modules or ()), self._shared()
        found: dict[str, bool] = {}
        for path, module in self.model.named_modules():
            name = type(module).__name__
            if name in wanted:
                own = (f"{path}.{leaf}" for leaf, _ in _every_parameter(module))
                found[name] = found.get(name, True) and shared.isdisjoint(own)
        return tuple(sorted(name for name, alone in found.items() if alone))

    @property
    def lora_targets(self) -> tuple[str, ...]:  # type: ignore[override]
        """The linear layers whose own weight is what they multiply with, but the head.

        Left out are names that stand for a shared layer anywhere, since an addition would be made
        for each of its places, and what Mamba's kernels read as a bare matrix.
        """
        shared, usable = self._shared(), dict[str, bool]()
        for path, module in self.model.base_model.named_modules(
            prefix=self.model.base_model_prefix, remove_duplicate=False
        ):
            if isinstance(module, nn.Linear | QuantizedLinear):  # packed ones keep their names
                home, _, name = path.rpartition(".")
                mixer = type(self.model.get_submodule(home)).__name__
                bare = "Mamba" in mixer and name in BARE_MATRICES
                fits = not name.isdigit() and f"{path}.weight" not in shared and not bare
                usable[name] = usable.get(name, True) and fits
        return tuple(sorted(name for name, fits in usable.items() if fits))

    def _shared(self) -> set[str]:
        """Names of the parameters inside the blocks that have several places in the model."""
        return {name for pair in self.model.all_tied_weights_keys.items() for name in pair}

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

    def __setattr__(self, name: str, value: Any) -> None:
        """nn.Module would put a new embedding or head beside the model that has its own."""
        if name in ("embedding", "lm_head"):
            object.__setattr__(self, name, value)  # the properties around it
        else:
            super().__setattr__(name, value)

    @property
    def lm_head(self) -> nn.Module:  # type: ignore[override]
        """The output head."""
        return self.model.get_output_embeddings()

    @lm_head.setter
    def lm_head(self, value: nn.Module) -> None:
        self.model.set_output_embeddings(value)
        self._plain_head = None  # to be found out again

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., D) -> logits (..., V); some families scale or cap what comes out."""
        if self._plain_head is None and not hidden.is_meta:
            with torch.no_grad():
                probe = torch.linspace(-4, 4, 2 * hidden.shape[-1], device=hidden.device)
                probe = probe.to(hidden.dtype).view(1, 2, -1)
                self._plain_head = torch.equal(self.lm_head(probe), self._family_head(probe))
        return self.lm_head(hidden) if self._plain_head else self._family_head(hidden)

    def _family_head(self, hidden: Tensor) -> Tensor:
        """What transformers' model does with its last hidden states."""
        ends = copy.copy(self.model)
        ends._modules = self.model._modules | {
            self.model.base_model_prefix: _Given(self.model.base_model)
        }
        rows = hidden.reshape(1, -1, hidden.shape[-1])
        logits = type(self.model).forward(ends, inputs_embeds=rows, return_dict=True).logits
        return logits.view(*hidden.shape[:-1], logits.shape[-1])

    @property
    def shares_prefix(self) -> bool:
        """Whether continuation is exact, measured once (see `continues_exactly`).

        Not with sliding windows: they count columns, and so the padding between a prefix and the
        shorter ones of several questions.
        """
        windows = any(DynamicCache(config=self.config).is_sliding)
        return not windows and self.continues_exactly()

    @property
    def batches(self) -> bool:
        """Whether a row is exact beside longer ones, measured once (see `batches_exactly`)."""
        return self.batches_exactly()

    def new_cache(self, batch: int) -> WrappedCache:
        """Nothing seen yet, in `batch` rows."""
        mask = torch.zeros(batch, 0, dtype=torch.bool, device=device_of(self.embedding))
        return WrappedCache(DynamicCache(config=self.config), mask, padded=False)

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
        with decoding():
            return self._run(inputs_embeds.unsqueeze(1), cache, None, None)[0].squeeze(1)

    def _run(
        self,
        embeds: Tensor,
        cache: WrappedCache,
        real: Tensor | None,
        collect: list[Tensor] | None,
    ) -> tuple[Tensor, WrappedCache]:
        """transformers' model over left-padded rows; real (B, L) bool, None: no padding."""
        padded = real is not None and _has_padding(real)
        if real is None:
            real = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        seen = cache.lengths.unsqueeze(1)
        cache.mask, cache.padded = torch.cat([cache.mask, real], dim=1), cache.padded or padded
        # a layer that is run again would go on from the state that it has already written;
        # transformers' checkpoints leave out the cache that attention takes, and only that one
        again = self._cache_name == "cache_params" and self.training
        again = again and self.model.is_activation_checkpointing
        options: dict[str, Any] = {} if again else {self._cache_name: cache.layers}
        # without attention there is nothing to mask behind this call's own tokens
        own = all(cache.layers.is_linear) and cache.layers.layers
        if padded if own else cache.padded:
            options["attention_mask"] = (real if own else cache.mask).long()
        if self._positions:
            options["position_ids"] = (seen + real.cumsum(dim=1) - 1).clamp(min=0)
        output = self.model.base_model(
            inputs_embeds=embeds,
            use_cache=not again,
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
            self._continues = self._continuation_error() <= self._tolerance()
        return self._continues

    @torch.no_grad()
    def batches_exactly(self) -> bool:
        """Whether rows padded on the left give what each of them gives alone, the next token too.

        Measured once on random embeddings, in the model's own dtype.
        """
        if self._batches is None:
            self._batches = self._batch_error() <= self._tolerance()
        return self._batches

    def _tolerance(self) -> float:
        return max(EXACT, 8 * torch.finfo(self.embedding.weight.dtype).eps)

    def load_published(self, source: str | Path, **options: Any) -> None:
        """Fill the weights with transformers' own loading (folder or hub id[@revision]).

        A vocabulary smaller than the model's fills its first rows; the others start at the mean
        of those, which no answer chooses before they are trained.  Raises UserError where a tensor
        is missing or has another shape, and for settings that are not this model's.
        """
        name, revision = split_revision(str(source))
        options |= {"revision": revision} if revision else {}
        weight = self.embedding.weight
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, dtype=weight.dtype, output_loading_info=True, trust_remote_code=False, **options
        )
        published, info = loaded
        _check_settings(self.config, published.config, source)
        check_finite(str(source), published)
        for what, keys in (("lacks", "missing_keys"), ("has wrong shapes for", "mismatched_keys")):
            names = sorted(str(key) for key in info[keys])
            if names:
                more = "..." if len(names) > 3 else ""
                raise UserError(
                    f"{source}: the checkpoint {what} {len(names)} tensors: "
                    f"{', '.join(names[:3])}{more}"
                )
        if (known := len(published.get_input_embeddings().weight)) != len(weight):
            published.resize_token_embeddings(len(weight), mean_resizing=False)
            with torch.no_grad():
                for part in (published.get_input_embeddings(), published.get_output_embeddings()):
                    part.weight[known:] = part.weight[:known].mean(dim=0)
        self.model = published.requires_grad_(weight.requires_grad).train(self.training)

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

    def _probe(self) -> Tensor:
        """Embeddings (2, PROBE_TOKENS, D) of random tokens."""
        weight = self.embedding.weight
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(len(weight), (2, PROBE_TOKENS), generator=generator)
        return self.embedding(rows.to(weight.device))

    def _continuation_error(self) -> float:
        """Largest difference, relative to the largest value."""
        with _answering(self):
            embeds = self._probe()
            whole = self(embeds[:1])[0][0]
            cut = PROBE_TOKENS // 2
            first, cache = self(embeds[:, :cut])
            lengths = torch.tensor([PROBE_TOKENS - cut, 1], device=embeds.device)
            second, cache = self._extend(embeds[:, cut:], cache, lengths)
            error = (torch.cat([first[0], second[0]]) - whole).abs().max()
            other = self(embeds[1:, : cut + 1])[0][0, -1]
            error = torch.maximum(error, (second[1, 0] - other).abs().max())
            return float(error / whole.abs().max())

    def _batch_error(self) -> float:
        """Largest difference, relative to the largest value."""
        with _answering(self):
            embeds, lengths = self._probe(), [PROBE_TOKENS, PROBE_TOKENS // 3]
            together, cache = self(embeds, None, torch.tensor(lengths, device=embeds.device))
            following = self.step(embeds[:, 0], cache)
            error = torch.zeros((), device=embeds.device)
            for row, length in enumerate(lengths):
                alone, cache = self(embeds[row : row + 1, :length])
                error = torch.maximum(error, (together[row, :length] - alone[0]).abs().max())
                after = self.step(embeds[row : row + 1, 0], cache)
                error = torch.maximum(error, (following[row] - after[0]).abs().max())
            return float(error / together[0].abs().max())


class _Given(nn.Module):
    """Stands where a family's model has its layers: what comes in are the last hidden states.

    A part of that model that the head asks instead (OPT's `model.decoder`) is this one again; its
    settings (Falcon-H1's `model.lm_head_multiplier`) are its own.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.__dict__["_instead_of"] = model  # not one of this module's parts

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.__dict__["_instead_of"], name)
        return self if isinstance(found, nn.Module) else found

    def forward(self, *args: Any, inputs_embeds: Tensor, **options: Any) -> _Outputs:
        return _Outputs((inputs_embeds,))


class _Outputs(tuple):
    """The last hidden states alone, by place and by name; whatever else is asked for is None."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self[0] if name == "last_hidden_state" else None


def shrunk(config: PretrainedConfig) -> PretrainedConfig:
    """The same architecture with few and narrow layers, one of each kind that there is.

    Raises UserError for a family whose sizes depend on each other in another way than these.
    """
    fields = config.to_dict()
    heads = fields.get("num_attention_heads")
    kinds = getattr(config, "layer_types", None)  # a property where a period says them
    kept = _one_of_each_kind(fields | {"layer_types": kinds}, config.num_hidden_layers)
    sizes = SMALL | {"num_hidden_layers": len(kept)}
    if "attention_hidden_size" in fields:
        ratio = fields["attention_hidden_size"] // config.hidden_size
        sizes["attention_hidden_size"] = ratio * SMALL["hidden_size"]
    if fields.get("num_key_value_heads") not in (None, heads):
        sizes["num_key_value_heads"] = 2
    for name, value in fields.items():
        if name in LAYER_NUMBERS and isinstance(value, list):
            fields[name] = [kept.index(layer) for layer in value if layer in kept]
        elif isinstance(value, list) and len(value) == config.num_hidden_layers:
            fields[name] = [value[layer] for layer in kept]
    if "attn_layer_period" in fields and kinds:  # Jamba's: one attention layer, where it is now
        first = kinds.index("full_attention")
        fields |= {"attn_layer_period": len(kept), "attn_layer_offset": kept.index(first)}
    names = {own: common for common, own in type(config).attribute_map.items()}
    fields |= {n: sizes[m] for n in fields if (m := n if n in sizes else names.get(n)) in sizes}
    for name in ("mamba_expand", "expand"):
        for heads_of in ("n_mamba_heads", "mamba_n_heads", "num_heads"):
            if name in fields and heads_of in fields:
                fields[heads_of] = fields[name] * SMALL["hidden_size"] // SMALL["mamba_headdim"]
    fields |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    try:
        small = type(config)(**fields)
        with torch.device("meta"):
            model = WrappedLM(small)
        model._run_on_meta(2, torch.float32)
    except NOT_SHRUNK as error:
        raise UserError(
            f"--tiny cannot shrink a {config.model_type!r} model: {' '.join(str(error).split())}"
        ) from error
    return small


def _one_of_each_kind(fields: dict[str, Any], number: int) -> list[int]:
    """Numbers of the layers that are kept: the first two, and the first of every further kind."""
    lists = [v for v in fields.values() if isinstance(v, list) and len(v) == number]
    listed = [fields[name] for name in LAYER_NUMBERS if isinstance(fields.get(name), list)]
    lists += [[layer in chosen for layer in range(number)] for chosen in listed]
    kept, seen = [], set[str]()
    for layer in range(number):
        kind = str([one[layer] for one in lists])
        if layer < 2 or kind not in seen:
            kept.append(layer)
        seen.add(kind)
    return kept


@contextmanager
def _answering(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _every_parameter(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return module.named_parameters(remove_duplicate=False)


def _check_settings(expected: PretrainedConfig, published: PretrainedConfig, source: Any) -> None:
    """Raise UserError where the model is built in another way than its weights were trained."""
    here, there = expected.to_dict(), published.to_dict()
    for name in sorted(here.keys() | there.keys()):
        if name in SAME_RESULT or name.startswith("_") or here.get(name) == there.get(name):
            continue
        raise UserError(
            f"{source}: {name} is {there.get(name)!r} in its config.json, and {here.get(name)!r} "
            "here; choose the preset of this model (hf:FOLDER_OR_ID)"
        )


def _take(rows: Tensor, index: Tensor) -> Tensor:
    """rows (B, L, D) at index (B, L) -> (B, L, D)."""
    return rows.gather(1, index.unsqueeze(-1).expand_as(rows))
