"""The Mamba language model, and its state as a value.

A whole model state is a `MambaState`, which can be cloned, gathered and resumed; right-padded rows
leave it untouched.  `config.mixer` chooses the layer of every block: Mamba's or Mamba-2's, and,
among or instead of them, attention and an MLP (vlmamba.models.mixers): a hybrid, a transformer.
Sizes: B batch, L sequence, D d_model, Di d_inner, N d_state, K d_conv.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from vlmamba import registry
from vlmamba.config import MambaConfig
from vlmamba.models.language.base import Cache, LanguageModel
from vlmamba.models.language.mamba_config import (
    check_agreement,
    published_fields,
    take_results_only,
    without_insertions,
)
from vlmamba.models.language.mamba_weights import fill
from vlmamba.models.language.memory import ActivationBytes
from vlmamba.models.linear import Linear
from vlmamba.models.mixers import MIXERS
from vlmamba.models.mixers.attention import ROOM, CausalAttention, KeyValues
from vlmamba.models.mixers.base import Layer, Mixer
from vlmamba.models.mixers.experts import Experts
from vlmamba.models.mixers.mlp import GatedMLP
from vlmamba.published import published_folder

KEPT_BYTES = 2**28  # what a batch may keep rather than compute again in its backward pass


@dataclass
class MambaState(Cache):
    """What a Mamba model remembers of a sequence; constant in size whatever its length.

    conv: (Mamba layers, B, K-1, Di), the last K-1 inputs of each convolution.
    ssm: (Mamba layers, B, Di, N) float32, the scan's hidden state (Mamba-2: its state_shapes).
    positions: how many columns of input (padding included) made it; transformers asks for it.
    attention: what attention layers remember, which grows; None where there are none.
    """

    conv: Tensor
    ssm: Tensor
    positions: int = 0
    attention: KeyValues | None = None

    @classmethod
    def zeros(
        cls, config: MambaConfig, batch: int, dtype: torch.dtype, device: torch.device
    ) -> MambaState:
        """The state before the first token."""
        conv, ssm = MIXERS[config.recurrent].state_shapes(config)
        layers = config.layer_kinds.count(config.recurrent)
        attends = "attention" in config.layer_kinds
        return cls(
            torch.zeros((layers, batch, *conv), dtype=dtype, device=device),
            torch.zeros((layers, batch, *ssm), dtype=torch.float32, device=device),
            attention=KeyValues.zeros(config, batch, dtype, device) if attends else None,
        )

    @property
    def batch(self) -> int:
        """Rows."""
        return self.conv.shape[1]

    @property
    def nbytes(self) -> int:
        """Memory of the state in bytes."""
        grows = 0 if self.attention is None else self.attention.nbytes
        return sum(t.numel() * t.element_size() for t in (self.conv, self.ssm)) + grows

    def clone(self) -> MambaState:
        """An independent copy."""
        attention = None if self.attention is None else self.attention.clone()
        return MambaState(self.conv.clone(), self.ssm.clone(), self.positions, attention)

    def select(self, rows: Tensor) -> MambaState:
        """A new state with the given rows (int64 indices; repeats allowed)."""
        rows = rows.to(self.conv.device)
        attention = None if self.attention is None else self.attention.select(rows)
        return MambaState(self.conv[:, rows], self.ssm[:, rows], self.positions, attention)

    def write_rows(self, rows: Tensor, other: MambaState) -> None:
        """Replace the given rows by those of `other`, in place."""
        self.conv[:, rows], self.ssm[:, rows] = other.conv, other.ssm
        if self.attention is not None and other.attention is not None:
            self.attention.write_rows(rows, other.attention)
        self.positions = max(self.positions, other.positions)

    def write(self, other: MambaState) -> None:
        """Take over the content of `other`, in place where the shapes agree."""
        if self.conv.shape == other.conv.shape:
            self.conv.copy_(other.conv)
            self.ssm.copy_(other.ssm)
        else:
            self.conv, self.ssm = other.conv, other.ssm
        self.positions, self.attention = other.positions, other.attention

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of input consumed so far."""
        return self.positions

    def reset(self) -> None:
        """Back to the state before the first token."""
        self.conv.zero_()
        self.ssm.zero_()
        if self.attention is not None:
            self.attention.lengths.zero_()
        self.positions = 0


def _element(x: Tensor) -> int:
    """Bytes of a number that a layer keeps, under autocast too."""
    kind = x.device.type
    return (torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype).itemsize


def _build_norm(config: MambaConfig) -> nn.RMSNorm | nn.LayerNorm:
    kind = nn.LayerNorm if config.norm == "layer" else nn.RMSNorm
    return kind(config.d_model, eps=config.rms_eps)


def _normed(norm: nn.RMSNorm | nn.LayerNorm, x: Tensor) -> Tensor:
    """The norm in float32, in its weight's dtype."""
    weight, x = norm.weight, x.float()
    if isinstance(norm, nn.LayerNorm):
        normed = F.layer_norm(x, weight.shape, weight.float(), norm.bias.float(), norm.eps)
    else:
        normed = F.rms_norm(x, weight.shape, weight.float(), norm.eps)
    return normed.to(weight.dtype)


class Block(GradientCheckpointingLayer):
    """Pre-norm residual block: x + layer(norm(x)); the residual stream stays in float32."""

    def __init__(self, config: MambaConfig, layer: Layer):
        super().__init__()
        self.norm = _build_norm(config)
        self.mixer = layer
        self.residual_in_fp32 = config.residual_in_fp32

    def _norm(self, x: Tensor) -> Tensor:
        return _normed(self.norm, x)

    def _residual(self, x: Tensor) -> Tensor:
        return x.float() if self.residual_in_fp32 else x


class MambaBlock(Block):
    """One around a Mamba layer."""

    mixer: Mixer

    def __init__(self, config: MambaConfig):
        super().__init__(config, MIXERS[config.recurrent](config))

    def forward(
        self,
        x: Tensor,
        conv_state: Tensor | None = None,
        ssm_state: Tensor | None = None,
        lengths: Tensor | None = None,
        recompute: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, D) -> (B, L, D) and the two states, as MambaMixer.forward."""
        again = recompute and not self.gradient_checkpointing  # else the block runs again anyway
        y, conv_state, ssm_state = self.mixer(self._norm(x), conv_state, ssm_state, lengths, again)
        return self._residual(x) + y, conv_state, ssm_state

    def step(self, x: Tensor, conv_state: Tensor, ssm_state: Tensor) -> Tensor:
        """One token: (B, D) -> (B, D); states in place."""
        return self._residual(x) + self.mixer.step(self._norm(x), conv_state, ssm_state)


class AttentionBlock(Block):
    """One around an attention layer."""

    mixer: CausalAttention

    def __init__(self, config: MambaConfig):
        super().__init__(config, CausalAttention(config))

    def forward(
        self,
        x: Tensor,
        past: tuple[Tensor, Tensor] | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, D) -> (B, L, D), keys and values, as CausalAttention.forward."""
        y, keys, values = self.mixer(self._norm(x), past, lengths)
        return self._residual(x) + y, keys, values

    def step(self, x: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
        """One token: (B, D) -> (B, D); keys and values in place."""
        return self._residual(x) + self.mixer.step(self._norm(x), keys, values, lengths)


class MLPBlock(Block):
    """One around an MLP."""

    def __init__(self, config: MambaConfig):
        super().__init__(config, GatedMLP(config))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self._residual(x) + self.mixer(self._norm(x))


class ExpertsBlock(Block):
    """One around a mixture of experts."""

    def __init__(self, config: MambaConfig):
        super().__init__(config, Experts(config))

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(..., D) -> (..., D); lengths as Experts.forward."""
        return self._residual(x) + self.mixer(self._norm(x), lengths)


BLOCKS: dict[str, Callable[[MambaConfig], Block]] = {
    "mamba": MambaBlock,
    "mamba2": MambaBlock,
    "attention": AttentionBlock,
    "mlp": MLPBlock,
    "experts": ExpertsBlock,
}


@registry.language_models.add("vlmamba_text")
class MambaLM(LanguageModel):
    """The language model: embedding, n_layer blocks, final norm, tied output head."""

    lora_targets = ("in_proj", "x_proj", "out_proj")  # dt_proj is read as a bare matrix by the scan
    tied_weights = {"lm_head.weight": "embedding.weight"}  # noqa: RUF012  # if the config says so
    config: MambaConfig

    def __init__(self, config: MambaConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(BLOCKS[kind](config) for kind in config.layer_kinds)
        self.norm_f = _build_norm(config)
        self.lm_head = Linear(config.d_model, config.vocab_size, bias=False)

    @property
    def block_names(self) -> tuple[str, ...]:  # type: ignore[override]  # by the pattern of layers
        """The classes of the blocks that there are."""
        return tuple(sorted({type(layer).__name__ for layer in self.layers}))

    def new_cache(self, batch: int) -> MambaState:
        """The state before the first token, on the model's device and in its dtype."""
        weight = self.embedding.weight
        return MambaState.zeros(self.config, batch, weight.dtype, weight.device)

    def forward(
        self,
        inputs_embeds: Tensor,
        cache: MambaState | None = None,
        lengths: Tensor | None = None,
        collect: list[Tensor] | None = None,
    ) -> tuple[Tensor, MambaState]:
        """(B, L, D) embeddings, continued from `cache` -> (B, L, D) hidden states, new state.

        `lengths` (B,) int64: each right-padded row's real tokens; the state is taken at each
        row's own last one, and stays as it was where a row has none.  `collect` receives every
        layer's input (hidden states).
        """
        x = inputs_embeds
        recurrent: list[tuple[Tensor, Tensor]] = []
        attended: list[tuple[Tensor, Tensor]] = []
        again = not self.spared_bytes(x[..., 0].numel(), _element(x))
        past = self._past(cache, inputs_embeds.shape[1])
        for layer in self.layers:
            if collect is not None:
                collect.append(x)
            if isinstance(layer, MambaBlock):
                n = len(recurrent)
                before = (None, None) if cache is None else (cache.conv[n], cache.ssm[n])
                x, *states = layer(x, *before, lengths, again)
                recurrent.append((states[0], states[1]))
            elif isinstance(layer, AttentionBlock):
                n = len(attended)
                columns = None if past is None else (past.keys[n], past.values[n])
                x, *states = layer(x, columns, None if past is None else past.lengths)
                attended.append((states[0], states[1]))
            else:
                x = layer(x, lengths) if isinstance(layer, ExpertsBlock) else layer(x)
        new_state = self._new_state(x, cache, recurrent)
        if attended:
            new_state.attention = _grown(attended, past, x, lengths)
        return self._final_norm(x), new_state

    def _past(self, cache: MambaState | None, length: int) -> KeyValues | None:
        """What attention layers saw before, with room for `length` more columns; `cache` stays."""
        if cache is None or cache.attention is None:
            return None
        old = cache.attention
        past = KeyValues(old.keys, old.values, old.lengths)
        past.resize(cache.positions + length)  # no row is longer than the columns consumed
        return past

    def _new_state(
        self, x: Tensor, cache: MambaState | None, recurrent: list[tuple[Tensor, Tensor]]
    ) -> MambaState:
        """Of every Mamba layer the two states; the attention layers' are not in it yet."""
        if recurrent:
            conv, ssm = (torch.stack(states) for states in zip(*recurrent, strict=True))
            state = MambaState(conv, ssm)
        else:
            state = self.new_cache(len(x))
        state.positions = x.shape[1] + (0 if cache is None else cache.positions)
        return state

    def step(self, inputs_embeds: Tensor, cache: MambaState) -> Tensor:
        """One token: (B, D) -> (B, D) hidden; `cache` is updated in place."""
        x, past = inputs_embeds, cache.attention
        if past is not None and past.keys.shape[2] <= cache.positions:
            past.resize(cache.positions + ROOM)
        recurrent = attended = 0
        for layer in self.layers:
            if isinstance(layer, MambaBlock):
                x = layer.step(x, cache.conv[recurrent], cache.ssm[recurrent])
                recurrent += 1
            elif isinstance(layer, AttentionBlock):
                assert past is not None  # `zeros` makes it where such a layer is
                x = layer.step(x, past.keys[attended], past.values[attended], past.lengths)
                attended += 1
            else:
                x = layer(x)
        if past is not None:
            past.lengths = past.lengths + 1
        cache.positions += 1
        return self._final_norm(x)

    def auxiliary_loss(self) -> Tensor | None:
        """What the experts of the last training pass add to its loss; None without experts."""
        terms = []
        for layer in self.layers:
            if isinstance(layer, ExpertsBlock):
                experts = cast(Experts, layer.mixer)
                if experts.auxiliary is not None:
                    terms.append(experts.auxiliary)
                experts.auxiliary = None
        return torch.stack(terms).sum() if terms else None

    def _final_norm(self, x: Tensor) -> Tensor:
        return _normed(self.norm_f, x)

    @classmethod
    def take_published_settings(
        cls, config: MambaConfig, source: str | Path, **options: Any
    ) -> None:
        """Norms' epsilon and the residual's precision; UserError where the rest is another's."""
        published = published_fields(published_folder(source, **options))
        take_results_only(config, published)
        check_agreement(without_insertions(config), published, source)

    def load_published(self, source: str | Path, **options: Any) -> None:
        """Fill the weights from a published checkpoint of either layout (see `mamba_weights`).

        Layers of other kinds among the Mamba ones are new (see `weights_from`).  Raises UserError
        for keys that are missing, unknown or ill-shaped, and for settings of its config.json that
        are not the model's.
        """
        folder = published_folder(source, **options)
        plain = without_insertions(self.config)
        check_agreement(plain, published_fields(folder), source)
        if plain.layer_kinds == self.config.layer_kinds:
            fill(self, folder, source)
            return
        with torch.device("meta"):
            donor = MambaLM(plain)
        donor.load_published(source, **options)
        self.load_state_dict(self.weights_from(donor), assign=True)

    def weights_from(self, donor: LanguageModel) -> dict[str, Tensor]:
        """Those of a model whose layers are some of this one's; the new ones add nothing yet."""
        places = None
        if isinstance(donor, MambaLM):
            places = _places(self.config.layer_kinds, donor.config.layer_kinds)
        if places is None:
            return super().weights_from(donor)
        theirs = donor.state_dict()
        weights = {name: w for name, w in theirs.items() if not name.startswith("layers.")}
        for own, (kind, place) in enumerate(zip(self.config.layer_kinds, places, strict=True)):
            blocks = cast(nn.ModuleList, donor.layers)
            block = self._silent_block(kind) if place is None else blocks[place]
            weights |= {f"layers.{own}.{name}": w for name, w in block.state_dict().items()}
        return weights

    def _silent_block(self, kind: str) -> Block:
        """A new block, on the CPU, whose output is zero: the model computes what it did."""
        with torch.device("cpu"):
            block = BLOCKS[kind](self.config)
        with torch.no_grad():
            block.mixer.initialise(self.config.n_layer)
            block.mixer.silence()
        return block

    def flops(self, tokens: int) -> float:
        """Every layer's matrices, scan and attention; A_log is a matrix of no product."""
        total = 0.0
        for block in self.layers:
            layer = cast(Block, block).mixer
            total += 2.0 * tokens * layer.product_parameters() + layer.inner_flops(tokens)
        return total

    def activation_bytes(self, rows: int, tokens: int, dtype: torch.dtype) -> ActivationBytes:
        """Per layer the float32 residual, of its norm and first projection what their own weights'
        gradients need, and the mixer's share; with checkpointing the residual alone.  At the peak
        what the layer at work makes again.  Autocast's copies of weights come on top."""
        residual = 4 * self.config.d_model
        blocks = [cast(Block, block) for block in self.layers]
        recomputes, spared = blocks[0].gradient_checkpointing, 0
        if not recomputes:
            spared = self.spared_bytes(rows * tokens, dtype.itemsize)
        shares = [self._block_bytes(block, dtype.itemsize) for block in blocks]
        if recomputes:
            held, at_work = len(shares) * residual, max(map(sum, shares))
        else:
            held, at_work = sum(kept for kept, _ in shares), max(work for _, work in shares)
        ends = 3 * residual  # embeddings, the last residual and its norm
        held = rows * tokens * (held + ends) + spared
        copies = [_copied_bytes(block, dtype, keeps_all=bool(spared)) for block in blocks]
        in_forward, in_graph = (sum(sizes) for sizes in zip(*copies, strict=True))
        kept = held + in_graph
        return ActivationBytes(held + in_forward, kept, kept + rows * tokens * at_work)

    def _block_bytes(self, block: Block, element: int) -> tuple[int, int]:
        """Bytes a token that one block keeps, and further ones while it is at work."""
        residual = 4 * self.config.d_model
        trainable = {name for name, p in block.named_parameters() if p.requires_grad}
        kept, at_work = block.mixer.activation_bytes(element)
        kept += residual
        kept += residual if "norm.weight" in trainable else 0
        kept += element * self.config.d_model if any("in_proj" in n for n in trainable) else 0
        return kept, at_work + 2 * residual

    def spared_bytes(self, tokens: int, element: int) -> int:
        """What all Mamba layers but the one at work keep; 0 where that is too much."""
        mixers = [layer.mixer for layer in self.layers if isinstance(layer, MambaBlock)]
        spared = tokens * sum(mixer.activation_bytes(element)[1] for mixer in mixers[1:])
        return spared if spared <= KEPT_BYTES else 0


def _copied_bytes(block: Block, dtype: torch.dtype, keeps_all: bool) -> tuple[int, int]:
    """Autocast's copies of a block's weights: to the forward pass's end, and in the graph.

    Those of trainable weights stay to the end; the graph keeps those that a gradient goes through,
    unless the block, or what follows a Mamba layer's first projection, is run again.
    """
    in_forward = in_graph = 0
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear) and dtype != module.weight.dtype:
            size = dtype.itemsize * module.weight.numel()
            again = block.gradient_checkpointing
            if isinstance(block, MambaBlock) and "in_proj" not in name and not keeps_all:
                again = True
            in_graph += 0 if again else size
            in_forward += 0 if again and not module.weight.requires_grad else size
    return in_forward, in_graph


def _places(kinds: list[str], donors: list[str]) -> list[int | None] | None:
    """For each layer the donor's layer that it takes over, None for a new one.

    In order, each the first of its kind that is left; None in place of the list where some of the
    donor's layers find no place.
    """
    places: list[int | None] = []
    taken = 0
    for kind in kinds:
        same = taken < len(donors) and donors[taken] == kind
        places.append(taken if same else None)
        taken += same
    return places if taken == len(donors) else None


def _grown(
    attended: list[tuple[Tensor, Tensor]],
    past: KeyValues | None,
    x: Tensor,
    lengths: Tensor | None,
) -> KeyValues:
    """Of every attention layer keys and values, and how long each row is now; x (B, L, D)."""
    keys, values = (torch.stack(states) for states in zip(*attended, strict=True))
    if lengths is None:
        lengths = torch.full((len(x),), x.shape[1], device=x.device)
    return KeyValues(keys, values, lengths + (0 if past is None else past.lengths))
