"""The shape of our own language models: Mamba, Mamba-2, transformers, hybrids, experts."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from vlmamba.configs.checks import LARGEST, LARGEST_SIZE, check_size, check_type
from vlmamba_core.errors import UserError
from vlmamba_core.names import choose

MIXER_NAMES = ("mamba", "mamba2")
LAYER_KINDS = (*MIXER_NAMES, "attention", "mlp", "experts")  # what a pattern of layers is made of
NORMS = ("rms", "layer")


class MambaConfig(PretrainedConfig):
    """The shape of a Mamba language model, or of one with other layers among or instead of them.

    mixer: the kind of the layers, "mamba" or "mamba2", or a pattern of kinds that is repeated over
    the n_layer layers, such as "mamba,mamba,mamba,attention" (a hybrid) or "attention,mlp" (a
    transformer, two layers a block).  It may name one kind of Mamba.
    d_model, n_layer, d_state, d_conv, expand, vocab_size; of Mamba dt_rank ("auto": d_model / 16
    rounded up), of Mamba-2 n_groups, of it and of attention head_dim (channels of a head), of mlp
    and each of the experts d_intermediate ("auto": 8/3 d_model, rounded up to a multiple of 8), of
    experts n_experts, experts_per_token and the weights of their losses, balance_loss and
    router_z_loss.
    adaptors: the layers, counted from 0, behind which rows with a picture take one more Mamba block
    (IAA, see models/language/adaptors.py), which learns in stage `adaptors`; adaptor_ends: whether
    these rows have an embedding, a last norm and an output head of their own too, as released.
    norm: of every block and the last one, "rms" as published or "layer" (with a bias).
    scan_backend: "auto" or one of `names.SCAN_BACKENDS`; changes speed, not results.
    Raises UserError for unknown names and impossible sizes.
    """

    model_type = "vlmamba_text"
    attribute_map = {"hidden_size": "d_model", "num_hidden_layers": "n_layer"}  # noqa: RUF012

    def __init__(
        self,
        d_model: int = 256,
        n_layer: int = 6,
        vocab_size: int = 50280,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        mixer: str = "mamba",
        head_dim: int = 64,
        n_groups: int = 1,
        d_intermediate: int | str = "auto",
        n_experts: int = 8,
        experts_per_token: int = 2,
        adaptors: Sequence[int] = (),
        adaptor_ends: bool = False,
        balance_loss: float = 0.01,
        router_z_loss: float = 0.001,
        norm: str = "rms",
        rms_eps: float = 1e-5,
        residual_in_fp32: bool = True,
        scan_backend: str = "auto",
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ):
        check_size("d_model", d_model)
        check_size("vocab_size", vocab_size, LARGEST["vocab_size"])
        if dt_rank != "auto":
            check_size("dt_rank", dt_rank)
        if d_intermediate != "auto":
            check_size("d_intermediate", d_intermediate)
        self.d_model = d_model
        self.n_layer = n_layer
        self.vocab_size = vocab_size
        self.d_state = d_state
        self.d_conv = d_conv
        self.expand = expand
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else int(dt_rank)
        self.mixer = mixer
        self.head_dim = head_dim
        self.n_groups = n_groups
        auto = -(-8 * d_model // 24) * 8
        self.d_intermediate = auto if d_intermediate == "auto" else int(d_intermediate)
        self.n_experts, self.experts_per_token = n_experts, experts_per_token
        self.adaptors = list(adaptors) if isinstance(adaptors, list | tuple) else adaptors
        self.adaptor_ends = adaptor_ends
        self.balance_loss, self.router_z_loss = balance_loss, router_z_loss
        self.norm = norm
        self.rms_eps = rms_eps
        self.residual_in_fp32 = residual_in_fp32
        self.scan_backend = scan_backend
        self._check()
        shared: dict[str, Any] = {"tie_word_embeddings": tie_word_embeddings}
        super().__init__(**shared, **kwargs)

    def _check(self) -> None:
        kinds = [choose("mixer", kind.strip(), LAYER_KINDS) for kind in str(self.mixer).split(",")]
        self.mixer = ",".join(kinds)
        if set(MIXER_NAMES) <= set(kinds):
            raise UserError(f"config: mixer is {self.mixer!r}; expected one kind of Mamba in it")
        self.norm = choose("norm", self.norm, NORMS)
        sizes = ("d_model", "n_layer", "vocab_size", "d_state", "d_conv", "expand", "dt_rank")
        more = ("head_dim", "n_groups", "d_intermediate", "n_experts", "experts_per_token")
        for name in (*sizes, *more):
            check_size(name, getattr(self, name), LARGEST.get(name, LARGEST_SIZE))
        check_type("residual_in_fp32", self.residual_in_fp32, bool, "true or false")
        if type(self.rms_eps) not in (int, float) or not 0 < self.rms_eps < 1:
            raise UserError(f"config: rms_eps is {self.rms_eps!r}; expected a number in 0..1")
        for name in ("balance_loss", "router_z_loss"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value < math.inf:
                raise UserError(f"config: {name} is {value!r}; expected a number of 0 or more")
        layers = self.adaptors if isinstance(self.adaptors, list) else [None]
        kinds_at = self.layer_kinds
        wrong = any(type(n) is not int or not 0 <= n < len(kinds_at) for n in layers)
        if (
            wrong
            or layers != sorted(set(layers))
            or any(kinds_at[n] not in MIXER_NAMES for n in layers)
        ):
            raise UserError(
                f"config: adaptors is {self.adaptors!r}; expected numbers of Mamba layers, "
                f"from 0 to {self.n_layer - 1}, in order"
            )
        check_type("adaptor_ends", self.adaptor_ends, bool, "true or false")
        if self.adaptor_ends and not self.adaptors:
            raise UserError("config: adaptor_ends is true; expected adaptors in front of them")
        if self.experts_per_token > self.n_experts:
            raise UserError(
                f"config: experts_per_token is {self.experts_per_token}; there are "
                f"{self.n_experts} experts"
            )
        if "attention" in kinds and (self.d_model % self.head_dim or self.head_dim % 2):
            raise UserError(
                f"config: d_model={self.d_model} does not divide into attention heads of "
                f"head_dim={self.head_dim} channels, an even number"
            )

    @property
    def layer_kinds(self) -> list[str]:
        """The kind of every layer, one of LAYER_KINDS: the pattern, repeated."""
        pattern = self.mixer.split(",")
        return [pattern[layer % len(pattern)] for layer in range(self.n_layer)]

    @property
    def recurrent(self) -> str:
        """The kind of the Mamba layers; "mamba" where there is none (a scanning connector's)."""
        return "mamba2" if "mamba2" in self.mixer.split(",") else "mamba"

    @property
    def d_inner(self) -> int:
        """Channels inside a Mamba layer: expand * d_model."""
        return self.expand * self.d_model


AutoConfig.register("vlmamba_text", MambaConfig, exist_ok=True)

# Settings of a Mamba language model, which a VLMambaConfig also takes as its own
TEXT_FIELDS = tuple(inspect.signature(MambaConfig).parameters)[:-1]
# What of them shapes a scanning connector's own layer
LAYER_FIELDS = ("mixer", "d_state", "d_conv", "expand", "dt_rank", "head_dim", "n_groups")
