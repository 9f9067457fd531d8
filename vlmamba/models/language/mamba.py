"""The Mamba language model.

Its whole state is a `MambaState`, which can be cloned, gathered and resumed; right-padded rows
leave it untouched.  `config.mixer` chooses the layer of every block: Mamba's or Mamba-2's, and,
among or instead of them, attention and an MLP (vlmamba.models.mixers): a hybrid, a transformer.
Sizes: B batch, L sequence, D d_model, Di d_inner, N d_state, K d_conv.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from vlmamba import registry
from vlmamba.configs.language import MambaConfig
from vlmamba.models.language.adaptors import InnerAdaptors, mark, new_weights
from vlmamba.models.language.base import LanguageModel
from vlmamba.models.language.blocks import (
    BLOCKS,
    AttentionBlock,
    Block,
    ExpertsBlock,
    MambaBlock,
    build_norm,
    normed,
)
from vlmamba.models.language.mamba_config import (
    agree_with_trained,
    check_agreement,
    published_fields,
    take_results_only,
    without_insertions,
)
from vlmamba.models.language.mamba_weights import fill
from vlmamba.models.language.memory import ActivationBytes
from vlmamba.models.language.state import MambaState
from vlmamba.models.linear import Linear
from vlmamba.models.mixers.attention import ROOM, KeyValues
from vlmamba.models.mixers.experts import Experts
from vlmamba.models.offloaded import device_of
from vlmamba.published import published_folder
from vlmamba_core.errors import UserError

KEPT_BYTES = 2**28  # what a batch may keep rather than compute again in its backward pass


def _element(x: Tensor) -> int:
    """Bytes of a number that a layer keeps, under autocast too."""
    kind = x.device.type
    return (torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype).itemsize


LORA_TARGETS = ("in_proj", "x_proj", "out_proj")  # dt_proj is read as a bare matrix by the scan


@registry.language_models.add("vlmamba_text")
class MambaLM(LanguageModel):
    """The language model: embedding, n_layer blocks, final norm, tied output head."""

    tied_weights = {"lm_head.weight": "embedding.weight"}  # noqa: RUF012  # if the config says so
    config: MambaConfig

    def __init__(self, config: MambaConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(BLOCKS[kind](config) for kind in config.layer_kinds)
        self.adaptors = InnerAdaptors(config) if config.adaptors else None
        self.norm_f = build_norm(config)
        self.lm_head = Linear(config.d_model, config.vocab_size, bias=False)

    @property
    def lora_targets(self) -> tuple[str, ...]:  # type: ignore[override]  # by the kinds of layers
        """Those of LORA_TARGETS that there are."""
        parts = (part for block in self._every_block() for part in block.modules())
        there = {name for part in parts for name, _ in part.named_children()}
        return tuple(name for name in LORA_TARGETS if name in there)

    @property
    def block_names(self) -> tuple[str, ...]:  # type: ignore[override]  # by the pattern of layers
        """The classes of the blocks that there are."""
        return tuple(sorted({type(block).__name__ for block in self._every_block()}))

    def _every_block(self) -> list[Block]:
        """The layers', then the adaptors'."""
        return [cast(Block, b) for b in (*self.layers, *(self.adaptors or ()))]

    @property
    def heads(self) -> list[nn.Module]:
        """This model, and what holds the head of rows with a picture where they have one."""
        ends = None if self.adaptors is None else self.adaptors.ends
        return [self] if ends is None else [self, ends]

    def initialize_copies(self) -> None:
        """The ends of rows with a picture start as the frozen model's."""
        if self.adaptors is not None and self.adaptors.ends is not None:
            self.adaptors.ends.copy_from(self, self.config.tie_word_embeddings)

    def resize_copies(self) -> None:
        """Rows with a picture know the words that the others do."""
        if self.adaptors is not None and self.adaptors.ends is not None:
            self.adaptors.ends.resize(self)

    def embed(self, input_ids: Tensor, pictured: Tensor | None = None) -> Tensor:
        """Token ids (B, L) -> (B, L, D), by the table of each row."""
        if self.adaptors is None:
            return self.embedding(input_ids)
        return self.adaptors.embed(input_ids, self.embedding, pictured)

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., D), as forward and step give them, -> logits (..., V)."""
        return (
            self.lm_head(hidden)
            if self.adaptors is None
            else self.adaptors.head(hidden, self.lm_head)
        )

    def bare(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., D) without the mark of rows that hold a picture."""
        return hidden[..., : self.config.d_model]

    def mark_pictured(self, embeds: Tensor, pictured: Tensor) -> Tensor:
        """Embeddings (B, L, D), for a model with adaptors with a mark (see `adaptors`)."""
        return embeds if self.adaptors is None else mark(embeds, pictured)

    def _pictured(self, embeds: Tensor, cache: MambaState | None) -> tuple[Tensor, Tensor | None]:
        """Embeddings without the mark, and which rows (B,) hold a picture; None: no adaptors."""
        if self.adaptors is None:
            return embeds, None
        return self.adaptors.pictured(embeds, None if cache is None else cache.pictured)

    def new_cache(self, batch: int) -> MambaState:
        """The state before the first token, on the model's device and in its dtype."""
        weight = self.embedding.weight
        device = device_of(self.embedding)
        return MambaState.zeros(self.config, batch, weight.dtype, device)

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
        x, pictured = self._pictured(inputs_embeds, cache)
        recurrent: list[tuple[Tensor, Tensor]] = []
        attended: list[tuple[Tensor, Tensor]] = []
        again = not self.spared_bytes(x[..., 0].numel(), _element(x))
        adapted: list[tuple[Tensor, Tensor]] = []
        past = self._past(cache, inputs_embeds.shape[1])
        for number, layer in enumerate(self.layers):
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
            if self.adaptors is not None and number in self.adaptors.places:
                assert pictured is not None  # said of every row where there are adaptors
                n = len(adapted) - len(self.adaptors)  # the last ones
                own = None if cache is None else (cache.conv[n], cache.ssm[n])
                x, pair = self.adaptors.behind(number, x, own, lengths, pictured)
                adapted.append(pair)
        new_state = self._new_state(x, cache, recurrent + adapted)
        new_state.pictured = pictured
        if attended:
            new_state.attention = _grown(attended, past, x, lengths)
        return self._final_norm(x, pictured), new_state

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
            _check_one_device([state for pair in recurrent for state in pair])
            conv, ssm = (torch.stack(states) for states in zip(*recurrent, strict=True))
            state = MambaState(conv, ssm)
        else:
            state = self.new_cache(len(x))
        state.positions = x.shape[1] + (0 if cache is None else cache.positions)
        return state

    def step(self, inputs_embeds: Tensor, cache: MambaState) -> Tensor:
        """One token: (B, D) -> (B, D) hidden; `cache` is updated in place."""
        x, cache.pictured = self._pictured(inputs_embeds, cache)
        past = cache.attention
        if past is not None and past.keys.shape[2] <= cache.positions:
            past.resize(cache.positions + ROOM)
        attended = adapted = 0
        recurrent = zip(cache.conv.unbind(), cache.ssm.unbind(), strict=True)
        for number, layer in enumerate(self.layers):
            if isinstance(layer, MambaBlock):
                x = layer.step(x, *next(recurrent))
            elif isinstance(layer, AttentionBlock):
                assert past is not None  # `zeros` makes it where such a layer is
                x = layer.step(x, past.keys[attended], past.values[attended], past.lengths)
                attended += 1
            else:
                x = layer(x)
            if self.adaptors is not None and number in self.adaptors.places:
                assert cache.pictured is not None  # set above
                n = adapted - len(self.adaptors)
                states = (cache.conv[n], cache.ssm[n])
                x = self.adaptors.step(number, x, *states, cache.pictured)
                adapted += 1
        if past is not None:
            past.lengths = past.lengths + 1
        cache.positions += 1
        return self._final_norm(x, cache.pictured)

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

    @property
    def weighs_padding(self) -> bool:
        """Experts' terms are means over all tokens."""
        return "experts" in self.config.layer_kinds

    def _final_norm(self, x: Tensor, pictured: Tensor | None) -> Tensor:
        if self.adaptors is None or pictured is None:
            return normed(self.norm_f, x)
        return self.adaptors.final_norm(x, self.norm_f, pictured)

    @classmethod
    def take_published_settings(
        cls, config: MambaConfig, source: str | Path, **options: Any
    ) -> None:
        """Norms' epsilon and the residual's precision; UserError where the rest is another's."""
        published = published_fields(published_folder(source, **options))
        take_results_only(config, published)
        check_agreement(without_insertions(config), published, source)

    @classmethod
    def take_settings_of(cls, config: MambaConfig, trained: Any) -> None:
        """What changes results alone, which stage 1 took over from a published model."""
        if isinstance(trained, MambaConfig):
            agree_with_trained(config, trained)

    def load_published(self, source: str | Path, **options: Any) -> None:
        """Fill the weights from a published checkpoint of either layout (see `mamba_weights`).

        Layers of other kinds among the Mamba ones are new (see `weights_from`).  Raises UserError
        for keys that are missing, unknown or ill-shaped, and for settings of its config.json that
        are not the model's.
        """
        folder = published_folder(source, **options)
        plain = without_insertions(self.config)
        check_agreement(plain, published_fields(folder), source)
        if plain.layer_kinds == self.config.layer_kinds and not self.config.adaptors:
            fill(self, folder, source)
            return
        with torch.device("meta"):
            donor = MambaLM(plain)
        donor.load_published(source, **options)
        self.load_state_dict(self.weights_from(donor), assign=True)

    def weights_from(self, donor: LanguageModel) -> dict[str, Tensor]:
        """Those of a model whose layers are some of this one's; the new ones add nothing yet.

        Adaptors that the donor lacks are copies of its parts (see `adaptors.new_weights`).
        """
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
        return weights | new_weights(self.config, weights)

    def _silent_block(self, kind: str) -> Block:
        """A new block, on the CPU, whose output is zero: the model computes what it did."""
        with torch.device("cpu"):
            block = BLOCKS[kind](self.config)
        with torch.no_grad():
            block.mixer.initialize(self.config.n_layer)
            block.mixer.silence()
        return block

    def flops(self, tokens: int) -> float:
        """Every layer's matrices, scan and attention; A_log is a matrix of no product."""
        total = 0.0
        for block in self._every_block():
            layer = block.mixer
            total += 2.0 * tokens * layer.product_parameters() + layer.inner_flops(tokens)
        return total

    def activation_bytes(self, rows: int, tokens: int, dtype: torch.dtype) -> ActivationBytes:
        """Per layer the float32 residual, of its norm and first projection what their own weights'
        gradients need, and the mixer's share; with checkpointing the residual alone.  At the peak
        what the layer at work makes again.  Autocast's copies of weights come on top."""
        residual = 4 * self.config.d_model
        blocks = self._every_block()
        recomputes, spared = blocks[0].gradient_checkpointing, 0
        if not recomputes:
            spared = self.spared_bytes(rows * tokens, dtype.itemsize)
        shares = [self._block_bytes(block, dtype.itemsize) for block in blocks]
        if recomputes:
            held, at_work = len(shares) * residual, max(map(sum, shares))
        else:
            held, at_work = sum(kept for kept, _ in shares), max(work for _, work in shares)
        ends = 3 * residual  # embeddings, the last residual and its norm
        if len(self.heads) > 1:
            ends += 2 * residual  # the last two again, of rows with a picture
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


def _check_one_device(states: list[Tensor]) -> None:
    """Raise UserError for layers on several GPUs: the states of all layers are one tensor here."""
    devices = sorted({str(state.device) for state in states})
    if len(devices) > 1:
        raise UserError(
            f"the language model's layers are on {', '.join(devices)}, and their states would be; "
            "keep them on one GPU (what does not fit goes to the CPU: "
            'device_map="auto" with max_memory of one GPU)'
        )


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
