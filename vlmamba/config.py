"""The model's configuration, and the named presets.

A preset is `LLM[+ENCODER][+CONNECTOR][+SCAN]`, in any order after the first, for instance
`2.8b-slimpj+siglip-so400m-384+vss_l2+bsm` (the paper's final model) or `nano` (the demo). Several
encoders are fused, patch by patch: `2.8b+dinov2-l-384+siglip-so400m-384+mlp`.
`hf:FOLDER_OR_ID[@REVISION]` as LLM is any causal language model of transformers in its published
form, for instance `hf:EleutherAI/pythia-1.4b+clip-l-336+mlp`; nothing in it may contain a `+`.
A published VLM has one name (`cobra-3b`, see vlmamba.configs.vlms).
Sizes: `state-spaces/mamba-*` and `mamba2-*`; connectors and scans: VL-Mamba, section 3.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from vlmamba import hub_files, registry
from vlmamba.configs.checks import LARGEST_SIZE, check_type, sub_config
from vlmamba.configs.encoders import check_encoder, encoder_config
from vlmamba.configs.language import LAYER_FIELDS, MIXER_NAMES, TEXT_FIELDS, MambaConfig
from vlmamba.configs.presets import (
    DEFAULT_ENCODER,
    LANGUAGE_MODELS,
    TOKENIZER_ID,
    VISION_ENCODERS,
    VISION_MODEL_IDS,
)
from vlmamba.configs.vlms import VLM_PRESETS
from vlmamba.models.scan2d import SCANS
from vlmamba_core.errors import UserError
from vlmamba_core.names import QUANTIZED, choose

LARGEST_GRID = 2**7  # patches along one side
HUB_PREFIX = "hf:"  # of a language model that a preset takes as it was published


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
            vision_config = encoder_config(vision_config)
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
            check_type(name, getattr(self, name), int, "an integer")
        if self.scan_shared != "projections":
            check_type("scan_shared", self.scan_shared, bool, 'true, false or "projections"')
        for name in ("vision_model_id", "language_model_id", "tokenizer_id"):
            check_type(name, getattr(self, name), str | None, "text or null")
        for vision in getattr(self.vision_config, "encoders", [self.vision_config]):
            check_encoder(vision, self.vision_feature_layer)
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
    return sub_config("text_config", fields)


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
