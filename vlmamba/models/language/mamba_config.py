"""A published Mamba or Mamba-2 model's config.json -> fields of `MambaConfig`, in either layout.

The original `state-spaces` one (d_model, n_layer, ssm_cfg) or transformers' (hidden_size, ...).
What a file leaves out has the value that its own library gives it; a setting that would change the
results and that our layers lack is refused.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import Mamba2Config, PretrainedConfig
from transformers import MambaConfig as PublishedMambaConfig

from vlmamba.configs.language import MambaConfig
from vlmamba.weight_files import read_object
from vlmamba_core.errors import UserError, shortened, unknown

TRANSFORMERS_CONFIGS: dict[str, type[PretrainedConfig]] = {
    "mamba": PublishedMambaConfig,
    "mamba2": Mamba2Config,
}
# Entries of `ssm_cfg` about initialization and about speed
SAME_RESULT = (
    *("layer", "dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "A_init_range"),
    *("chunk_size", "use_fast_path", "use_mem_eff_path"),
)
RESULT_ONLY = ("rms_eps", "residual_in_fp32")  # they change no shape, so no preset names them


def published_fields(folder: str | Path) -> dict[str, Any]:
    """The fields of `MambaConfig` that the config.json of a published model's folder sets.

    Raises UserError for another kind of model, and for a setting that is not supported.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: no config.json; a published Mamba model has one")
    published = read_object(path)
    if "hidden_size" not in published and "n_layer" in published:
        return _original_fields(published, path)
    kind = str(published.get("model_type"))
    if kind not in TRANSFORMERS_CONFIGS:
        raise unknown(f"language model in {path}: model_type", kind, TRANSFORMERS_CONFIGS)
    try:
        config: Any = TRANSFORMERS_CONFIGS[kind].from_json_file(str(path))
        return _transformers_fields(config, path)
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise UserError(f"{path}: {shortened(error)}") from error


def _original_fields(published: dict[str, Any], path: Path) -> dict[str, Any]:
    """state-spaces/mamba's `MambaConfig`, which has the defaults given here."""
    wanted = {"d_intermediate": 0, "attn_layer_idx": [], "rms_norm": True}
    _refuse_others(published, wanted, path)
    layer = published.get("ssm_cfg", {})
    sizes = [published.get("d_model", 2560), published["n_layer"]]
    sizes += [published.get("vocab_size", 50277), published.get("pad_vocab_size_multiple", 8)]
    if not isinstance(layer, dict) or not all(type(size) is int and size > 0 for size in sizes):
        raise UserError(f"{path}: the sizes are {sizes}, ssm_cfg is {layer!r}; expected a model's")
    width, layers, vocabulary, multiple = sizes
    return {
        "d_model": width,
        "n_layer": layers,
        "vocab_size": -(-vocabulary // multiple) * multiple,
        "rms_eps": 1e-5,
        "residual_in_fp32": published.get("residual_in_fp32", True),
        **_layer_fields(layer, width, path),
    }


def _layer_fields(published: dict[str, Any], width: int, path: Path) -> dict[str, Any]:
    """Fields of `ssm_cfg`, the original layout's keyword arguments of a layer, with its defaults.

    How weights are initialized and how the scan is cut and run changes no result.
    """
    kinds, kind = {"Mamba1": "mamba", "Mamba2": "mamba2"}, str(published.get("layer", "Mamba1"))
    if kind not in kinds:
        raise unknown(f"layer in {path}", kind, kinds)
    fields: dict[str, Any] = {"mixer": kinds[kind], "d_conv": 4, "expand": 2}
    known = {name: name for name in ("d_state", "d_conv", "expand")}
    if kind == "Mamba1":
        fields |= {"d_state": 16, "dt_rank": "auto"}
        known |= {"dt_rank": "dt_rank"}
    else:
        fields |= {"d_state": 128, "head_dim": 64, "n_groups": 1}
        known |= {"headdim": "head_dim", "ngroups": "n_groups"}
    for name, value in published.items():
        if name in known:
            fields[known[name]] = value
        elif name not in SAME_RESULT and (name, value) not in (
            ("bias", False),
            ("conv_bias", True),
        ):
            raise UserError(f"{path}: ssm_cfg has {name}={value!r}, which is not supported here")
    if fields.get("dt_rank") == "auto":
        fields["dt_rank"] = math.ceil(width / 16)
    return fields


def _transformers_fields(config: Any, path: Path) -> dict[str, Any]:
    """Of transformers' MambaConfig or Mamba2Config."""
    act = "silu" if config.hidden_act == "swish" else config.hidden_act
    published = {"use_bias": config.use_bias, "use_conv_bias": config.use_conv_bias}
    published["hidden_act"] = act
    wanted = {"use_bias": False, "use_conv_bias": True, "hidden_act": "silu"}
    fields = {
        "d_model": config.hidden_size,
        "n_layer": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "d_state": config.state_size,
        "d_conv": config.conv_kernel,
        "expand": config.expand,
        "rms_eps": config.layer_norm_epsilon,
        "residual_in_fp32": config.residual_in_fp32,
        "mixer": config.model_type,
    }
    if config.model_type == "mamba":
        _refuse_others(published, wanted, path)
        return fields | {"dt_rank": config.time_step_rank}
    published["time_step_limit"] = [float(limit) for limit in config.time_step_limit]
    _refuse_others(published, wanted | {"time_step_limit": [0.0, math.inf]}, path)
    return fields | {"head_dim": config.head_dim, "n_groups": config.n_groups}


def _refuse_others(published: dict[str, Any], wanted: dict[str, Any], path: Path) -> None:
    for name, value in wanted.items():
        if published.get(name, value) != value:
            raise UserError(f"{path}: {name} is {published[name]!r}; supported here is {value!r}")


def without_insertions(config: MambaConfig) -> MambaConfig:
    """The model of the Mamba layers alone, which others may have been put among."""
    plain = copy.deepcopy(config)
    plain.adaptors, plain.adaptor_ends = [], False
    plain.mixer, plain.n_layer = config.recurrent, config.layer_kinds.count(config.recurrent)
    return plain


def take_results_only(config: MambaConfig, published: dict[str, Any]) -> None:
    """Norms' epsilon and the residual's precision become the published model's."""
    for name in RESULT_ONLY:
        setattr(config, name, published[name])
    config._check()


def agree_with_trained(config: MambaConfig, trained: MambaConfig) -> None:
    """Take over what an earlier stage computed with, where the preset says nothing else.

    Raises UserError where it does.
    """
    usual = MambaConfig()
    for name in RESULT_ONLY:
        own, found = getattr(config, name), getattr(trained, name)
        if own not in (found, getattr(usual, name)):
            raise UserError(
                f"{name} is {own!r} here, and {found!r} in the earlier stage; its weights were "
                "trained with that"
            )
        setattr(config, name, found)


def check_agreement(config: MambaConfig, published: dict[str, Any], source: str | Path) -> None:
    """Raise UserError where the model is built in another way than its weights were trained."""
    for name, found in published.items():
        expected = getattr(config, name)
        if expected != found and not (name == "vocab_size" and found <= expected):
            raise UserError(
                f"{source}: {name} is {found!r} in its config.json, and {expected!r} here; choose "
                f"the preset of this model, or give --set {name}={json.dumps(found)}"
            )
