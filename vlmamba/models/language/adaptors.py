"""Inner adaptors: what rows with a picture have beside a frozen language model (IAA, 2408.12902).

    x <- layer(x);  x <- adaptor(x)      behind the layers that config.adaptors lists
    y = head_own(norm_own(x))            config.adaptor_ends; words come in by embedding_own

for rows that hold a picture; the others go through the frozen model alone and stay its, bit for
bit.  As released (360CVGroup/Inner-Adaptor-Architecture, modeling_llama_iaa.py), whose multimodal
path has an embedding, a last norm and a head of its own, the two tables not tied.  Other than
released: an adaptor is a Mamba block and starts with zero output, the ends as copies of the frozen
model's (how theirs start is not said), and what a row holds decides, not a task that is named.

Which rows hold a picture goes with them as one more channel: `mark` puts it behind embeddings and
hidden states, `unmarked` takes it off again.
Sizes: B batch, L sequence, D d_model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from vlmamba.configs.language import MambaConfig
from vlmamba.models.language.blocks import MambaBlock, build_norm, normed
from vlmamba.models.linear import Linear
from vlmamba.models.mixers import MIXERS

Pair = tuple[Tensor, Tensor]  # a block's two states
NO_INT4 = 0x88  # two zeros of packed int4, as `quantized.pack` writes them
ENDS = ("embedding", "norm_f", "lm_head")


class AdaptorBlock(MambaBlock):
    """One more block, for rows that hold a picture alone; its output is zero at first."""

    def __init__(self, config: MambaConfig):
        super().__init__(config)
        self.mixer.starts_silent = True


class AdaptorEnds(nn.Module):
    """The embedding, the last norm and the output head of rows that hold a picture."""

    def __init__(self, config: MambaConfig):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.norm_f = build_norm(config)
        self.lm_head = Linear(config.d_model, config.vocab_size, bias=False)

    @torch.no_grad()
    def copy_from(self, frozen: nn.Module, tied: bool) -> None:
        """Become the frozen model's, as far as a file has not filled them; tied: its head is its
        embedding, whatever its own weight holds by now."""
        for name in ENDS:
            source = frozen.get_submodule("embedding" if tied and name == "lm_head" else name)
            pairs = zip(self.get_submodule(name).parameters(), source.parameters(), strict=True)
            for own, its in pairs:
                init.copy_(own, its)

    def resize(self, frozen: nn.Module) -> None:
        """Have the frozen model's number of words; a new word is what it is there."""
        for name in ("embedding", "lm_head"):
            old, its = (part.get_parameter(f"{name}.weight") for part in (self, frozen))
            rows = torch.cat([old[: len(its)], its[len(old) :].to(old)]).detach()
            self.get_submodule(name).weight = nn.Parameter(rows, old.requires_grad)
        self.embedding.num_embeddings = self.lm_head.out_features = len(rows)


class InnerAdaptors(nn.Module):
    """The adaptors, named by their numbers, and `ends` where config.adaptor_ends."""

    def __init__(self, config: MambaConfig):
        super().__init__()
        self.config, self.width = config, config.d_model
        self.places = {layer: number for number, layer in enumerate(config.adaptors)}
        for number in self.places.values():
            self.add_module(str(number), AdaptorBlock(config))
        self.ends = AdaptorEnds(config) if config.adaptor_ends else None

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> AdaptorBlock:
        return self.get_submodule(str(number))  # type: ignore[return-value]

    def __iter__(self) -> Iterator[AdaptorBlock]:
        return (self[number] for number in range(len(self)))

    def pictured(self, embeds: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """Embeddings without the mark, and which rows (B,) hold a picture, now or `before`."""
        embeds, pictured = unmarked(embeds, self.width)
        return embeds, pictured if before is None else pictured | before

    def behind(
        self,
        layer: int,
        x: Tensor,
        before: Pair | None,
        lengths: Tensor | None,
        pictured: Tensor,
    ) -> tuple[Tensor, Pair]:
        """x (B, L, D) behind the adaptor of a layer where a row holds a picture, and its states.

        before: the states that it continues.  Rows without a picture leave no trace in them: they
        would depend on what the batch holds besides.
        """
        block, old = self[self.places[layer]], before or self._fresh(x)
        if not torch.is_grad_enabled() and not bool(pictured.any()):
            return x, old
        y, *after = block(x, *(before or (None, None)), lengths)
        kept = [
            torch.where(_over(pictured, its), new.to(its.dtype), its)
            for new, its in zip(after, old, strict=True)
        ]
        return torch.where(_over(pictured, x), y, x), (kept[0], kept[1])

    def _fresh(self, x: Tensor) -> Pair:
        """The states of one adaptor before the first token, of the rows of x (B, ...)."""
        dtype, rows, device = next(self.parameters()).dtype, len(x), x.device
        conv, ssm = MIXERS[self.config.recurrent].state_shapes(self.config)
        return (
            torch.zeros((rows, *conv), dtype=dtype, device=device),
            torch.zeros((rows, *ssm), dtype=torch.float32, device=device),
        )

    def step(
        self, layer: int, x: Tensor, conv_state: Tensor, ssm_state: Tensor, pictured: Tensor
    ) -> Tensor:
        """One token (B, D), as `behind`; the states in place."""
        if not bool(pictured.any()):
            return x
        old = conv_state.clone(), ssm_state.clone()
        y = self[self.places[layer]].step(x, conv_state, ssm_state)
        for state, before in zip((conv_state, ssm_state), old, strict=True):
            state[~pictured] = before[~pictured]
        return torch.where(pictured[:, None], y, x)

    def embed(self, input_ids: Tensor, frozen: nn.Module, pictured: Tensor | None) -> Tensor:
        """(B, ...) -> (B, ..., D), by the table of each row."""
        if self.ends is None:
            return frozen(input_ids)
        if pictured is None:
            pictured = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        return by_rows(pictured, input_ids, frozen, self.ends.embedding)

    def final_norm(self, x: Tensor, frozen: nn.Module, pictured: Tensor) -> Tensor:
        """(B, ..., D) -> (B, ..., D), with a mark where the rows have heads of their own."""
        if self.ends is None:
            return normed(frozen, x)  # type: ignore[arg-type]
        return mark(by_rows(pictured, x, frozen, self.ends.norm_f, normed), pictured)

    def head(self, hidden: Tensor, frozen: nn.Module) -> Tensor:
        """What `final_norm` gave, (B, ..., D + 1), -> logits (B, ..., V) of each row's head."""
        if self.ends is None:
            return frozen(hidden)
        x, pictured = unmarked(hidden, self.width)
        # matrix products of rows that lie D + 1 apart are slow, or copy by themselves
        return by_rows(pictured, x.contiguous(), frozen, self.ends.lm_head)


def mark(x: Tensor, pictured: Tensor) -> Tensor:
    """(B, ..., D), with one more channel that says which rows (B,) hold a picture."""
    return torch.cat([x, _over(pictured, x).to(x.dtype).expand(*x.shape[:-1], 1)], dim=-1)


def unmarked(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """(B, ..., D), marked or not, -> (B, ..., D) and which rows (B,) hold a picture."""
    return x[..., :width], x[..., width:].bool().flatten(1).any(dim=1)


def by_rows(
    pictured: Tensor,
    x: Tensor,
    frozen: nn.Module,
    own: nn.Module,
    call: Callable[[Any, Tensor], Tensor] = lambda part, x: part(x),
) -> Tensor:
    """`frozen` of x (B, ...), and `own` in the rows that hold a picture.

    What learns runs whatever the batch holds, on no row if need be: where several processes train,
    each must give every parameter a gradient.
    """
    if not bool(pictured.any()) and not _learns(own):
        return call(frozen, x)
    if bool(pictured.all()) and not _learns(frozen):
        return call(own, x)
    return call(frozen, x).index_put((pictured,), call(own, x[pictured]))


def new_weights(config: MambaConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of adaptors that a trained model lacks, by its weights: they compute what it does.

    A block is a copy of the layer that it follows, with zero output; the ends are copies.
    """
    found: dict[str, Tensor] = {}
    if "adaptors.0.norm.weight" not in weights:
        for number, layer in enumerate(config.adaptors):
            found |= _copies(weights, f"layers.{layer}.", f"adaptors.{number}.")
            out = found[f"adaptors.{number}.mixer.out_proj.weight"]
            out.fill_(NO_INT4 if out.dtype == torch.uint8 else 0)
    if config.adaptor_ends and "adaptors.ends.norm_f.weight" not in weights:
        for name in ENDS:
            found |= _copies(weights, f"{name}.", f"adaptors.ends.{name}.")
    return found


def _copies(weights: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {new + k.removeprefix(old): w.clone() for k, w in weights.items() if k.startswith(old)}


def _learns(part: nn.Module) -> bool:
    return torch.is_grad_enabled() and any(p.requires_grad for p in part.parameters())


def _over(rows: Tensor, x: Tensor) -> Tensor:
    """(B,) as (B, 1, ...), for x (B, ...)."""
    return rows.view(-1, *[1] * (x.ndim - 1))
