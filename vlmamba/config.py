"""The model's configuration, and the named presets.

A preset is `LLM[+ENCODER][+CONNECTOR][+SCAN]`, in any order after the first, for instance
`2.8b-slimpj+siglip-so400m-384+vss_l2+bsm` (the paper's final model) or `nano` (the demo). Several
encoders are fused, patch by patch: `2.8b+dinov2-l-384+siglip-so400m-384+mlp`.
`hf:FOLDER_OR_ID[@REVISION]` as LLM is any causal language model of transformers in its published
form, for instance `hf:EleutherAI/pythia-1.4b+clip-l-336+mlp`; nothing in it may contain a `+`.
A published VLM has one name (`cobra-3b`, see vlmamba.vlm_presets).
Sizes: `state-spaces/mamba-*` and `mamba2-*`; connectors and scans: VL-Mamba, section 3.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from vlmamba import hub_files, registry
from vlmamba.models.scan2d import SCANS
from vlmamba.vlm_presets import VLM_PRESETS
from vlmamba_core.errors import UserError, unknown
from vlmamba_core.names import QUANTIZED, choose

MIXER_NAMES = ("mamba", "mamba2")
LAYER_KINDS = (*MIXER_NAMES, "attention", "mlp", "experts")  # what a pattern of layers is made of
NORMS = ("rms", "layer")

# Mamba-2's are those of its published models (their vocabulary is padded to a multiple of 16)
MAMBA2: dict[str, Any] = {"mixer": "mamba2", "d_state": 128, "vocab_size": 50288}

NANO: dict[str, Any] = {
    "d_model": 256,
    "n_layer": 6,
    "vocab_size": 4096,
    "language_model_id": None,
}
EIGHT_MAMBA_THEN_ATTENTION = ",".join(["mamba"] * 8 + ["attention"])

# d_model, n_layer, vocab_size, hub id of the pretrained weights (None: trained here)
LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "nano": NANO,
    # families of as many parameters (2 % apart) as nano, for a comparison from scratch
    "nano-mamba2": {**NANO, "mixer": "mamba2", "d_state": 64},
    "nano-transformer": {**NANO, "n_layer": 8, "mixer": "attention,mlp", "d_intermediate": 512},
    "nano-hybrid": {
        **NANO,
        "n_layer": 7,
        "mixer": "mamba,mamba,mamba,attention,mlp,mamba,mamba",
        "d_intermediate": 228,
    },
    # nano with two attention layers more, which start with zero output
    "nano-plus-attention": {**NANO, "n_layer": 8, "mixer": "mamba,mamba,mamba,attention"},
    # nano with an inner adaptor behind every second layer
    "nano-iaa": {**NANO, "adaptors": [1, 3, 5], "adaptor_ends": True},
    # nano with three layers of four experts more, which start with zero output
    "nano-plus-experts": {
        **NANO,
        "n_layer": 9,
        "mixer": "mamba,mamba,experts",
        "d_intermediate": 256,
        "n_experts": 4,
    },
    # BlackMamba's layout, half of the layers experts, and by its totals the size of its largest
    "mamba-experts-2.8b": {
        "d_model": 1472,
        "n_layer": 36,
        "mixer": "mamba,experts",
        "d_intermediate": 3872,
        "vocab_size": 50304,
        "language_model_id": None,
    },
    "130m": {"d_model": 768, "n_layer": 24, "language_model_id": "state-spaces/mamba-130m"},
    "790m": {"d_model": 1536, "n_layer": 48, "language_model_id": "state-spaces/mamba-790m"},
    "1.4b": {"d_model": 2048, "n_layer": 48, "language_model_id": "state-spaces/mamba-1.4b"},
    "2.8b": {"d_model": 2560, "n_layer": 64, "language_model_id": "state-spaces/mamba-2.8b"},
    "2.8b-slimpj": {
        "d_model": 2560,
        "n_layer": 64,
        "language_model_id": "state-spaces/mamba-2.8b-slimpj",
    },
    "2.8b-iaa": {  # at IAA-14's places, of a model twice as deep
        "d_model": 2560,
        "n_layer": 64,
        "adaptors": [1, 3, 11, 13, 21, 23, 31, 33, 41, 43, 51, 53, 61, 63],
        "adaptor_ends": True,
        "language_model_id": "state-spaces/mamba-2.8b",
    },
    "2.8b-plus-attention": {  # eight attention layers more
        "d_model": 2560,
        "n_layer": 72,
        "mixer": EIGHT_MAMBA_THEN_ATTENTION,
        "language_model_id": "state-spaces/mamba-2.8b",
    },
    **{
        f"mamba2-{size}": {
            "d_model": d_model,
            "n_layer": n_layer,
            "language_model_id": f"state-spaces/mamba2-{size}",
            **MAMBA2,
        }
        for size, d_model, n_layer in (
            ("130m", 768, 24),
            ("370m", 1024, 48),
            ("780m", 1536, 48),
            ("1.3b", 2048, 48),
            ("2.7b", 2560, 64),
        )
    },
}

# model_type picks the class in models/vision.py
VISION_ENCODERS: dict[str, dict[str, Any]] = {
    "efficientnet-lite0": {
        "model_type": "efficientnet_lite0",
        "hidden_size": 1280,
        "image_size": 224,
        "patch_size": 32,
    },
    "efficientnet-lite0-160": {  # the same weights on smaller and larger pictures, for ablations
        "model_type": "efficientnet_lite0",
        "hidden_size": 1280,
        "image_size": 160,
        "patch_size": 32,
    },
    "efficientnet-lite0-320": {
        "model_type": "efficientnet_lite0",
        "hidden_size": 1280,
        "image_size": 320,
        "patch_size": 32,
    },
    # Color, small things and letters are in its early stages alone: the last features say what kind
    # of thing a patch shows.  Several stages for one patch: Dense Connector (2405.13800)
    "efficientnet-lite0-levels": {
        "model_type": "efficientnet_lite0",
        "hidden_size": 1280 + 4 * 4 * 40 + 2 * 2 * 112,
        "image_size": 224,
        "patch_size": 32,
        "levels": [2, 4],
    },
    "efficientnet-lite0-cells": {  # 16 patches: a cell of the demo's scenes with signs is one
        "model_type": "efficientnet_lite0",
        "hidden_size": 1280 + 4 * 4 * 112,
        "image_size": 256,
        "patch_size": 64,
        "levels": [4],
    },
    "clip-l-336": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
    },
    "siglip-so400m-384": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
        "vision_use_head": False,
    },
}
VISION_ENCODERS["dinov2-l-384"] = {
    "model_type": "dinov2",
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 518,  # of its position embeddings, interpolated to
    "resolution": 384,
    "patch_size": 14,
    "layer_norm_eps": 1e-6,
}
# With four register tokens: what Prismatic, Cobra and ML-Mamba fuse with SigLIP
VISION_ENCODERS["dinov2-reg-l-384"] = VISION_ENCODERS["dinov2-l-384"] | {
    "model_type": "dinov2_with_registers",
    "num_register_tokens": 4,
}
VISION_ENCODERS["eva02-l-336"] = {  # EVA-02-CLIP, of "Shaking up VLMs" (2409.05395)
    "model_type": "eva02",
    "hidden_size": 1024,
    "intermediate_size": 2730,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
VISION_MODEL_IDS = {
    "eva02-l-336": "timm/eva02_large_patch14_clip_336.merged2b",
    "dinov2-l-384": "facebook/dinov2-large",
    "dinov2-reg-l-384": "facebook/dinov2-with-registers-large",
    "clip-l-336": "openai/clip-vit-large-patch14-336",
    "siglip-so400m-384": "google/siglip-so400m-patch14-384",
}
VISION_SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_channels", "image_size", "patch_size"),
)
MAY_BE_ZERO = ("num_hidden_layers", "image_size")  # to measure a model without its encoder
# No model comes near these; a damaged config.json may ask for more memory than there is.
LARGEST_SIZE = 2**17
LARGEST = {"vocab_size": 2**22, "n_layer": 2**10, "num_hidden_layers": 2**10}
LARGEST |= {"d_conv": 2**6, "expand": 2**6, "d_state": 2**12, "n_experts": 2**10}
LARGEST_GRID = 2**7  # patches along one side
TOKENIZER_ID = "EleutherAI/gpt-neox-20b"  # of all published Mamba and Mamba-2 language models
HUB_PREFIX = "hf:"  # of a language model that a preset takes as it was published
DEFAULT_ENCODER = {n: "efficientnet-lite0" for n in LANGUAGE_MODELS if n.startswith("nano")}


class EfficientNetLite0Config(PretrainedConfig):
    """The demo's encoder: ImageNet EfficientNet-Lite0 without its classifier.

    patch_size: 32, or a multiple over which the last features are averaged.  levels: stages, 0 to
    6, whose outputs stand beside them, those of all places that a patch covers; hidden_size: the
    width of all together.
    """

    model_type = "efficientnet_lite0"

    def __init__(
        self,
        hidden_size: int = 1280,
        image_size: int = 224,
        patch_size: int = 32,
        levels: Sequence[int] = (),
        **kwargs: Any,
    ):
        self.hidden_size, self.image_size, self.patch_size = hidden_size, image_size, patch_size
        self.levels = list(levels)
        super().__init__(**kwargs)


AutoConfig.register("efficientnet_lite0", EfficientNetLite0Config, exist_ok=True)


class Eva02Config(PretrainedConfig):
    """timm's EVA-02-CLIP vision tower: rotary positions, SwiGLU, norms inside attention and MLP.

    reference_grid: patches along a side at which its rotary positions have their unit step.
    """

    model_type = "eva02"

    def __init__(
        self,
        hidden_size: int = 1024,
        intermediate_size: int = 2730,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 16,
        image_size: int = 336,
        patch_size: int = 14,
        reference_grid: int = 16,
        **kwargs: Any,
    ):
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.image_size, self.patch_size = image_size, patch_size
        self.reference_grid = reference_grid
        super().__init__(**kwargs)


AutoConfig.register("eva02", Eva02Config, exist_ok=True)


class FusedVisionConfig(PretrainedConfig):
    """Several encoders of one picture side by side: `encoders` holds their configurations."""

    model_type = "fused_vision_model"

    def __init__(self, encoders: Sequence[Any] = (), **kwargs: Any):
        given = [e if isinstance(e, PretrainedConfig) else _vision_config(e) for e in encoders]
        self.encoders = [part for one in given for part in getattr(one, "encoders", [one])]
        super().__init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """As transformers writes it, the parts as objects."""
        return super().to_dict() | {"encoders": [encoder.to_dict() for encoder in self.encoders]}


AutoConfig.register("fused_vision_model", FusedVisionConfig, exist_ok=True)


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
        _check_size("d_model", d_model)
        _check_size("vocab_size", vocab_size, LARGEST["vocab_size"])
        if dt_rank != "auto":
            _check_size("dt_rank", dt_rank)
        if d_intermediate != "auto":
            _check_size("d_intermediate", d_intermediate)
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
            _check_size(name, getattr(self, name), LARGEST.get(name, LARGEST_SIZE))
        _check_type("residual_in_fp32", self.residual_in_fp32, bool, "true or false")
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
        _check_type("adaptor_ends", self.adaptor_ends, bool, "true or false")
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


class VLMambaConfig(PretrainedConfig):
    """Everything that fixes the model's shape.

    Language model: text_config, a MambaConfig or the configuration of any causal language model
    of transformers (or its dictionary).  A MambaConfig's settings may also be given by their own
    names, as older checkpoints hold them.
    Connector: connector, scan, scan_merge ("sum" or "mean"), scan_shared (true: one Mamba layer for
    all directions; false: one each; "projections": one each around common projections),
    connector_layer (that layer's mixer, d_state, d_conv, expand, dt_rank, head_dim and n_groups;
    where they are not given, a Mamba language model's own or the defaults).
    Vision: vision_config (a transformers configuration or its dictionary), vision_feature_layer
    (which hidden state is read: second to last, patch tokens only, as LLaVA does; the paper does
    not say).
    Published parts, each a folder or a hub id[@revision], or None for a part that is trained here:
    vision_model_id, language_model_id, tokenizer_id.
    quantized: "int8" or "int4" where the language model's weights are saved as whole numbers;
    low_rank: rank, alpha and targets of what LoRA has learned beside them (models/low_rank.py).
    Raises UserError for unknown names and impossible sizes.
    """

    model_type = "vlmamba"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}  # noqa: RUF012
    # what Trainer does not collect: neither the state nor the images' vectors are rows of a batch
    keys_to_ignore_at_inference = ["cache_params", "image_hidden_states"]  # noqa: RUF012
    attribute_map = {"hidden_size": "d_model", "num_hidden_layers": "n_layer"}  # noqa: RUF012

    def __init__(
        self,
        text_config: dict[str, Any] | PretrainedConfig | None = None,
        connector: str = "vss_l2",
        scan: str = "bsm",
        scan_merge: str = "sum",
        scan_shared: bool | str = True,
        connector_layer: dict[str, Any] | None = None,
        vision_config: dict[str, Any] | PretrainedConfig | None = None,
        vision_model_id: str | None = None,
        vision_feature_layer: int = -2,
        language_model_id: str | None = None,
        tokenizer_id: str | None = None,
        quantized: str | None = None,
        low_rank: dict[str, Any] | None = None,
        image_token_id: int = 1,
        bos_token_id: int | None = 0,
        eos_token_id: int | list[int] | None = 0,
        pad_token_id: int = 0,
        **kwargs: Any,
    ):
        own = {name: kwargs.pop(name) for name in TEXT_FIELDS if name in kwargs}
        self.text_config = _text_config(text_config, own)
        self.connector = connector
        self.scan = scan
        self.scan_merge = scan_merge
        self.scan_shared = scan_shared
        vision_config = vision_config or VISION_ENCODERS["efficientnet-lite0"]
        if not isinstance(vision_config, PretrainedConfig):
            vision_config = _vision_config(vision_config)
        self.vision_config = vision_config
        self.vision_model_id = vision_model_id
        self.vision_feature_layer = vision_feature_layer
        self.language_model_id = language_model_id
        self.tokenizer_id = tokenizer_id
        self.quantized, self.low_rank = quantized, low_rank
        self.image_token_id = image_token_id
        self.connector_layer = _connector_layer(connector_layer, self.text_config)
        self._check()
        shared: dict[str, Any] = {
            "bos_token_id": bos_token_id,
            "eos_token_id": eos_token_id,
            "pad_token_id": pad_token_id,
            "tie_word_embeddings": self.text_config.tie_word_embeddings,
        }
        kwargs.pop("auto_map", None)  # of a saved folder; `save_pretrained` writes its own
        super().__init__(**shared, **kwargs)

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """config.json, and the module that finds this package where it is not imported."""
        hub_files.write_code(save_directory)
        self.auto_map = dict(hub_files.CONFIG_MAP)
        try:
            return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        finally:
            del self.auto_map

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing: transformers would copy this package's modules into what is saved."""

    def _check(self) -> None:
        self.connector = registry.connectors.choose(self.connector)
        self.scan = choose("scan", self.scan, SCANS)
        if self.quantized is not None:
            self.quantized = choose("quantized", str(self.quantized), QUANTIZED)
        self._check_low_rank()
        self.scan_merge = choose("scan_merge", self.scan_merge, ("sum", "mean"))
        for name in ("image_token_id", "vision_feature_layer"):
            _check_type(name, getattr(self, name), int, "an integer")
        if self.scan_shared != "projections":
            _check_type("scan_shared", self.scan_shared, bool, 'true, false or "projections"')
        for name in ("vision_model_id", "language_model_id", "tokenizer_id"):
            _check_type(name, getattr(self, name), str | None, "text or null")
        for vision in getattr(self.vision_config, "encoders", [self.vision_config]):
            self._check_encoder(vision)
        if self.grid[0] > LARGEST_GRID:
            raise UserError(f"config: {self.grid[0]} patches a side; expected up to {LARGEST_GRID}")

    def _check_low_rank(self) -> None:
        if self.low_rank is None:
            return
        given = self.low_rank if isinstance(self.low_rank, dict) else {}
        rank, alpha, targets = (given.get(name) for name in ("rank", "alpha", "targets"))
        fits = type(rank) is int and 0 < rank <= LARGEST_SIZE
        fits = fits and isinstance(alpha, int | float) and math.isfinite(alpha)
        fits = fits and isinstance(targets, list) and bool(targets)
        if not (fits and len(given) == 3 and self.quantized):
            raise UserError(
                f"config: low_rank is {self.low_rank!r}; expected rank, alpha and targets, a list "
                "of projections, beside `quantized`"
            )

    def _check_encoder(self, vision: PretrainedConfig) -> None:
        for name in (*VISION_SIZES, "resolution"):
            if hasattr(vision, name):
                value = getattr(vision, name)
                if value != 0 or name not in MAY_BE_ZERO:
                    _check_size(f"vision_config.{name}", value, LARGEST.get(name, LARGEST_SIZE))
        layers = getattr(vision, "num_hidden_layers", 0)
        if layers and not -layers - 1 <= self.vision_feature_layer <= layers:
            raise UserError(
                f"config: vision_feature_layer is {self.vision_feature_layer}; the encoder has "
                f"{layers} layers"
            )

    @property
    def vision_encoder(self) -> Any:
        """The encoder's class (vlmamba.models.vision): what knows its width, grid and transform."""
        return registry.vision_encoders[self.vision_config.model_type]

    @property
    def grid(self) -> tuple[int, int]:
        """Patch rows and columns of one image."""
        return self.vision_encoder.grid(self.vision_config)

    @property
    def vision_width(self) -> int:
        """Dv: the width of a patch."""
        return self.vision_encoder.width(self.vision_config)

    @property
    def num_patches(self) -> int:
        """P: how many patches the encoder makes of one image."""
        return self.grid[0] * self.grid[1]

    @property
    def num_image_tokens(self) -> int:
        """How many tokens the connector makes of an image's patches."""
        return registry.connectors[self.connector].tokens(self.grid)

    def connector_layer_config(self, width: int) -> MambaConfig:
        """The Mamba layer of a scanning connector at `width`."""
        text, layer = self.text_config, dict(self.connector_layer)
        if isinstance(text, MambaConfig) and width == text.d_model:
            layer.setdefault("dt_rank", text.dt_rank)
        backend = getattr(text, "scan_backend", "auto")
        return MambaConfig(d_model=width, scan_backend=backend, **layer)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> VLMambaConfig:
        """The configuration called `name` (see the module's text); overrides replace fields."""
        if (whole := name.casefold()) in VLM_PRESETS:
            return cls(**copy.deepcopy(VLM_PRESETS[whole]) | overrides)
        llm, *parts = name.split("+")
        if llm.casefold().startswith(HUB_PREFIX):
            fields = _published_language_model(llm[len(HUB_PREFIX) :])
        else:
            whole_models = [] if parts else VLM_PRESETS
            known = [*LANGUAGE_MODELS, *whole_models, "hf:FOLDER_OR_ID"]
            llm = choose("language model preset", llm, known)
            fields = dict(LANGUAGE_MODELS[llm])
        if overrides.get("text_config") is not None:  # another language model altogether
            fields = {"language_model_id": None}
        encoders = []
        known_parts = [*VISION_ENCODERS, *registry.connectors, *SCANS]
        for part in (choose("preset part", part, known_parts) for part in parts):
            if part in VISION_ENCODERS:
                encoders.append(part)
            elif part in registry.connectors:
                fields["connector"] = part
            else:
                fields["scan"] = part
        fields |= _encoders(encoders or [DEFAULT_ENCODER.get(llm, "siglip-so400m-384")])
        if "tokenizer_id" not in fields:
            fields["tokenizer_id"] = TOKENIZER_ID if fields["language_model_id"] else None
        return cls(**{**fields, **overrides})


def _published_language_model(source: str) -> dict[str, Any]:
    """The fields of a causal language model of transformers: folder or hub id[@revision].

    Its vocabulary gets room for one more token, `<image>`, and becomes a multiple of 64.  Raises
    UserError where there is no configuration of such a model.
    """
    name, revision = split_revision(source)
    try:
        text = AutoConfig.from_pretrained(
            name, revision=revision or "main", trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read the configuration of {source!r}: {' '.join(str(error).split())[:300]}"
        ) from error
    absent = [
        field
        for field in ("hidden_size", "num_hidden_layers", "vocab_size")
        if not hasattr(text, field)
    ]
    if absent:
        raise UserError(
            f"{source}: its config.json, of a {text.model_type!r} model, has no {absent[0]}; "
            "expected a causal language model"
        )
    text.dtype = None  # what it was published in; ours is the whole model's
    text.vocab_size = (text.vocab_size // 64 + 1) * 64
    return {"text_config": text, "language_model_id": source, "tokenizer_id": source}


def split_revision(name: str) -> tuple[str, str | None]:
    """`ORGANIZATION/NAME@REVISION` -> (hub id, branch, tag or commit), else (name, None).

    A folder is its own name, whatever it is called.
    """
    if Path(name).exists():
        return name, None
    head, at, revision = name.rpartition("@")
    return (head, revision) if at else (name, None)


def _check_size(name: str, value: Any, largest: int = LARGEST_SIZE) -> None:
    if type(value) is not int or not 1 <= value <= largest:
        raise UserError(f"config: {name} is {value!r}; expected a positive integer up to {largest}")


def _check_type(name: str, value: Any, kind: Any, expected: str) -> None:
    wrong = not isinstance(value, kind) or (kind is int and isinstance(value, bool))
    if wrong:
        raise UserError(f"config: {name} is {value!r}; expected {expected}")


def _text_config(given: Any, own: dict[str, Any]) -> PretrainedConfig:
    """The language model's configuration; `own`: settings given by their own names."""
    if given is None:
        return MambaConfig(**own)
    if isinstance(given, PretrainedConfig):
        for name, value in own.items():
            setattr(given, name, value)
        return given
    if not isinstance(given, dict):
        raise UserError(f"config: text_config is {given!r}; expected a JSON object")
    fields = {"model_type": "vlmamba_text", **given, **own}
    return _sub_config("text_config", fields)


def _connector_layer(given: Any, text_config: PretrainedConfig) -> dict[str, Any]:
    """A scanning connector's own layer, as given or as a Mamba language model has it."""
    own = {} if given is None else given
    if not isinstance(own, dict) or not set(own) <= set(LAYER_FIELDS):
        raise UserError(
            f"config: connector_layer is {own!r}; expected an object with some of "
            f"{', '.join(LAYER_FIELDS)}"
        )
    names = [name for name in LAYER_FIELDS if name != "dt_rank"]  # that goes with the width
    inherited = {n: getattr(text_config, n) for n in names if isinstance(text_config, MambaConfig)}
    if isinstance(text_config, MambaConfig):
        inherited["mixer"] = text_config.recurrent
    if "mixer" in own:
        choose("mixer of connector_layer", str(own["mixer"]), MIXER_NAMES)
    return inherited | own


def _sub_config(name: str, fields: dict[str, Any]) -> PretrainedConfig:
    """A part's configuration from its dictionary. Raises UserError."""
    try:
        return AutoConfig.for_model(**fields)
    except (MemoryError, UserError):
        raise
    except Exception as error:  # transformers checks each model's fields in its own way
        raise UserError(f"config: {name}: {' '.join(str(error).split())}") from error


def _encoders(names: list[str]) -> dict[str, Any]:
    """The fields of one encoder, or of several fused ones, by their preset names."""
    if len(names) == 1:
        return {
            "vision_config": VISION_ENCODERS[names[0]],
            "vision_model_id": VISION_MODEL_IDS.get(names[0]),
        }
    parts = [VISION_ENCODERS[name] for name in names]
    ids = [VISION_MODEL_IDS.get(name) for name in names]
    return {
        "vision_config": {"model_type": "fused_vision_model", "encoders": parts},
        "vision_model_id": ",".join(map(str, ids)) if all(ids) else None,
    }


def _vision_config(fields: Any) -> PretrainedConfig:
    if not isinstance(fields, dict):
        raise UserError(f"config: vision_config is {fields!r}; expected a JSON object")
    kind = str(fields.get("model_type"))
    if kind not in registry.vision_encoders:
        raise unknown("vision encoder", kind, registry.vision_encoders)
    return _sub_config("vision_config", fields)


def _forwarded(name: str) -> property:
    """A setting of the language model, read and written through the whole model's configuration."""

    def read(config: VLMambaConfig) -> Any:
        return getattr(config.text_config, name)

    def write(config: VLMambaConfig, value: Any) -> None:
        setattr(config.text_config, name, value)

    return property(read, write)


for _name in (*(set(TEXT_FIELDS) - {"tie_word_embeddings"}), "d_inner"):
    _of = {"d_model": "hidden_size", "n_layer": "num_hidden_layers"}.get(_name, _name)
    setattr(VLMambaConfig, _name, _forwarded(_of))

AutoConfig.register("vlmamba", VLMambaConfig, exist_ok=True)
