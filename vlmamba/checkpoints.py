"""Loading models: the bundled demo, saved folders, hub ids, and published language-model weights.

`load` gives a ready (model, processor); `build` makes a model for training from a configuration,
with its pretrained parts; `load_language_model` reads a Mamba or Mamba-2 checkpoint in either
published layout: the original `state-spaces` one (backbone.embedding.weight) or transformers'
(backbone.embeddings.weight).  Weights are read as safetensors; the published `.bin` files, which
have no such form, are read with weights_only=True, so nothing in them is executed.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoTokenizer, Mamba2Config, MambaConfig, PretrainedConfig

from vlmamba.config import VLMambaConfig, split_revision
from vlmamba.models.connector import build_connector
from vlmamba.models.language import WrappedLM
from vlmamba.models.vision import build_vision_encoder
from vlmamba.models.vlm import EMBEDDING_STD, VLMambaForConditionalGeneration
from vlmamba.processing import VLMambaProcessor, follow_tokenizer
from vlmamba.weight_files import (
    in_dtype,
    language_model_files,
    model_files,
    read_object,
    tensors,
)
from vlmamba_core.errors import UserError, unknown

FLOAT16_ON_CPU = "float16 on a CPU is slower than float32; load with dtype float32 or bfloat16"
BUNDLED = {"nano": Path(__file__).parent / "assets" / "nano"}
NAMES = {"nano": "nano", "demo": "nano"}
TRANSFORMERS_CONFIGS: dict[str, type[PretrainedConfig]] = {
    "mamba": MambaConfig,
    "mamba2": Mamba2Config,
}
# Entries of `ssm_cfg` about initialisation and about speed
SAME_RESULT = (
    *("layer", "dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "A_init_range"),
    *("chunk_size", "use_fast_path", "use_mem_eff_path"),
)
RESULT_ONLY = ("rms_eps", "residual_in_fp32")  # of a published model; they change no shape


def load(
    name: str = "nano",
    dtype: torch.dtype | str = "auto",
    device: str | torch.device = "cpu",
    revision: str | None = None,
    adapter: bool = True,
) -> tuple[VLMambaForConditionalGeneration, VLMambaProcessor]:
    """The model and processor called `name`: a bundled name, a folder, or a hub id[@revision].

    A LoRA run's training checkpoint comes with its adapter added, without it if `adapter` is False.
    Only safetensors weights are accepted.  Raises UserError, one line, for a name that is none of
    these, a folder without a usable checkpoint, a pickled, truncated or ill-fitting one, and for
    a hub that cannot be reached.
    """
    source, pinned = split_revision(name) if not Path(name).exists() else (name, None)
    source, revision = _resolve(source), revision or pinned
    try:
        model, info = VLMambaForConditionalGeneration.from_pretrained(
            source,
            dtype="auto",  # mapped files; `_change_dtype` needs no second copy
            revision=revision or "main",
            use_safetensors=True,
            output_loading_info=True,
            adapter=adapter,
        )
        processor = VLMambaProcessor.from_pretrained(
            source, revision=revision or "main", trust_remote_code=False
        )
    except UserError:
        raise
    except Exception as error:  # other libraries' readers have no common type for damaged files
        raise UserError(f"cannot load model {name!r}: {_in_one_line(error)}") from error
    _check_complete(name, info)
    if not model.config.num_image_tokens or not getattr(
        model.config.vision_config, "num_hidden_layers", 1
    ):
        raise UserError(f"cannot load model {name!r}: its encoder gives no image tokens")
    if dtype != "auto":
        _change_dtype(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    _check_finite(f"cannot load model {name!r}", model)
    follow_tokenizer(model, processor.tokenizer)
    if model.dtype == torch.float16 and torch.device(device).type == "cpu":
        warnings.warn(FLOAT16_ON_CPU, stacklevel=2)
    return model.to(device).eval(), processor


def read_config(name: str) -> VLMambaConfig:
    """The configuration of the model called `name` (see `load`); no weights are read.

    Raises UserError for a name that is none, and for a model of another kind.
    """
    source, revision = split_revision(name)
    try:
        fields, _ = VLMambaConfig.get_config_dict(_resolve(source), revision=revision or "main")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load model {name!r}: {_in_one_line(error)}") from error
    if fields.get("model_type") != VLMambaConfig.model_type:
        raise UserError(
            f"cannot load model {name!r}: it is a {fields.get('model_type')!r} model, "
            f"expected {VLMambaConfig.model_type!r}"
        )
    return VLMambaConfig.from_dict(fields)


def _resolve(name: str) -> str:
    """A folder path or hub id that from_pretrained takes, checked where it is local."""
    if name in NAMES:
        folder = BUNDLED[NAMES[name]]
        if not (folder / "config.json").is_file():
            raise UserError(
                f"the bundled model {name!r} is not installed at {folder.name}/; "
                "reinstall the package, or train it with `make demo-model`"
            )
        return str(folder)
    folder = Path(name)
    if folder.is_dir():
        try:
            model_files(folder)
        except UserError as error:
            raise UserError(f"cannot load model {name!r}: {error}") from error
        return str(folder)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        mistake = unknown("model", name, NAMES)
        raise UserError(f"{mistake} (or an existing folder, or a hub id ORGANISATION/NAME)")
    return name


def _check_complete(name: str, info: dict[str, Any]) -> None:
    """Raise UserError where the checkpoint does not fill the model exactly."""
    missing = [key for key in info["missing_keys"] if not key.startswith("vision_encoder.")]
    for what, keys in (
        ("lacks", missing),
        ("has unknown", info["unexpected_keys"]),
        ("has wrong shapes for", info["mismatched_keys"]),
    ):
        names = sorted(key if isinstance(key, str) else key[0] for key in keys)
        if names:
            raise UserError(
                f"cannot load model {name!r}: the checkpoint {what} {len(names)} tensors: "
                f"{', '.join(names[:3])}{'...' if len(names) > 3 else ''}"
            )


def _change_dtype(model: VLMambaForConditionalGeneration, dtype: torch.dtype) -> None:
    """As from_pretrained(dtype=...) leaves the model, but tensor by tensor."""
    for parameter in model.parameters():
        parameter.data = in_dtype(parameter.data, dtype)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point():
                setattr(module, name, buffer.to(dtype))
    if not model.vision_encoder.weights_in_checkpoint:
        model.vision_encoder.load_pretrained()  # its buffers are computed in that dtype
    model.config.dtype = model.config.vision_config.dtype = dtype


def _check_finite(what: str, model: torch.nn.Module) -> None:
    for key, parameter in model.named_parameters():
        if not _is_finite(parameter):
            raise UserError(f"{what}: {key} holds NaN or infinite values")


def _is_finite(tensor: Tensor) -> bool:
    """No NaN and no infinity in it.

    Either stays in a sum, which is far quicker than isfinite of every value and needs no memory; a
    sum may also overflow, so only where it is not finite is every value looked at.
    """
    tensor = tensor.detach()
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def _in_one_line(error: Exception) -> str:
    """All that the error says, up to 300 characters: its first line often hides the cause."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."


def build(
    config: VLMambaConfig, pretrained: bool = True, **load_options: Any
) -> VLMambaForConditionalGeneration:
    """A model for training: random connector, pretrained encoder, and LLM weights if it has any.

    Norms' epsilon and the residual's precision become those of the published language model, in
    `config` too.  load_options go to from_pretrained (revision, cache_dir, local_files_only).
    """
    if pretrained and config.language_model_id:
        published = language_model_config(
            _checkpoint_folder(config.language_model_id, **load_options)
        )
        for name in RESULT_ONLY:
            setattr(config, name, published[name])
        config._check()
        _check_agreement(config, published, config.language_model_id)
    if pretrained and config.language_model_id:
        model = hollow(config)
    else:
        model = VLMambaForConditionalGeneration(config)
    if not model.vision_encoder.weights_in_checkpoint or pretrained:
        with _fetching("vision encoder", config.vision_model_id):
            model.vision_encoder.load_pretrained(**load_options)
        _check_finite(str(config.vision_model_id), model.vision_encoder)
    if pretrained and config.language_model_id:
        load_language_model(model, config.language_model_id, **load_options)
    return model


def hollow(config: VLMambaConfig) -> VLMambaForConditionalGeneration:
    """A model whose language model and encoder have no memory yet (meta device), to be filled.

    The connector is there, with random weights; so is an encoder whose weights a package brings.
    """
    with torch.device("meta"):
        model = VLMambaForConditionalGeneration(config)
    model.connector = build_connector(config)
    model.connector.apply(model._init_weights)
    if not model.vision_encoder.weights_in_checkpoint:
        model.vision_encoder = build_vision_encoder(config)
    return model


def tokenizer_for(config: VLMambaConfig, **load_options: Any) -> Any:
    """The published tokenizer, config.tokenizer_id: hub id[@revision] or folder.

    Raises UserError where there is none, as for the demo, whose tokenizer is trained with it.
    """
    if config.tokenizer_id is None:
        raise UserError("this language model has no published tokenizer; train one (stage text)")
    name, revision = split_revision(config.tokenizer_id)
    if revision:
        load_options["revision"] = revision
    with _fetching("tokenizer", config.tokenizer_id):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False, **load_options)


@contextmanager
def _fetching(what: str, source: str | None) -> Iterator[None]:
    """What is published and can be neither reached nor read is a UserError, one line."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:  # transformers' and the hub's errors
        name, revision = split_revision(str(source))
        message = f"cannot fetch the {what} {str(source)!r}: {_in_one_line(error)}"
        if isinstance(error, OSError) and not Path(name).exists():
            pin = f" --revision {revision}" if revision else ""
            message += f" Without a network, run `hf download {name}{pin}` where there is one"
            message += " and bring its cache, or name a folder"
        raise UserError(message) from error


def load_language_model(
    model: VLMambaForConditionalGeneration, source: str | Path, **load_options: Any
) -> None:
    """Fill the language model from a published checkpoint (folder or hub id[@revision]).

    A wrapped model is read by transformers; what follows is of Mamba's.

    Either layout, sharded or not, safetensors or .bin.  A vocabulary smaller than the model's
    fills its first rows.  Raises UserError naming keys that are missing, unknown or ill-shaped,
    and settings of its config.json that are not the model's.
    """
    if isinstance(model.language_model, WrappedLM):
        with _fetching("language model", str(source)):
            model.language_model.load_published(source, **load_options)
        return
    folder = _checkpoint_folder(source, **load_options)
    _check_agreement(model.config, language_model_config(folder), source)
    own = dict(model.language_model.named_parameters())
    own.pop("lm_head.weight", None)  # where it is not the embedding: refused below
    seen: set[str] = set()
    head: Tensor | None = None
    for key, tensor in tensors(language_model_files(folder)):
        name = _own_name(key)
        if name is None:
            head = tensor
            continue
        if name not in own:
            raise UserError(f"{source}: unexpected tensor {key!r} in a Mamba checkpoint")
        _check_shape(own[name], tensor, f"{source}: {key}")
        if not _is_finite(tensor):
            raise UserError(f"{source}: {key} holds NaN or infinite values")
        _fill(model.language_model, name, tensor)
        seen.add(name)
    missing = sorted(set(own) - seen)
    if missing:
        raise UserError(
            f"{source}: the checkpoint lacks {len(missing)} tensors: {', '.join(missing[:3])}"
            f"{'...' if len(missing) > 3 else ''}"
        )
    model.tie_weights()
    _check_head(head, model.language_model.embedding.weight, folder)


def _check_head(head: Tensor | None, embedding: Tensor, folder: Path) -> None:
    """Raise UserError unless the output head is the embedding, in the file or by config.json."""
    published = read_object(folder / "config.json")
    of_its_own = published.get("model_type") == "mamba2"  # transformers' default
    tied = published.get("tie_word_embeddings", published.get("tie_embeddings", not of_its_own))
    if head is None and not tied:
        raise UserError(f"{folder}: the checkpoint lacks lm_head.weight, its own output head")
    if head is not None and not torch.equal(head.to(embedding.dtype), embedding[: len(head)]):
        raise UserError(
            f"{folder}: the output head differs from the embedding (tie_word_embeddings is "
            f"{tied!r}); only models that share the two can be read"
        )


def _own_name(key: str) -> str | None:
    """Our name of a published tensor; None for the output head, which has to be the embedding."""
    if key == "lm_head.weight":
        return None
    return key.removeprefix("backbone.").replace("embeddings.weight", "embedding.weight")


def _check_shape(target: Tensor, tensor: Tensor, what: str) -> None:
    rows_may_differ = target.shape[1:] == tensor.shape[1:] and what.endswith(
        ("embedding.weight", "embeddings.weight")
    )
    fits = target.shape == tensor.shape or (rows_may_differ and len(tensor) <= len(target))
    if not fits:
        raise UserError(
            f"{what} has shape {tuple(tensor.shape)}; the model expects {tuple(target.shape)}"
        )


@torch.no_grad()
def _fill(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Make a file's tensor the parameter `name`, in its dtype; fewer rows are its first ones."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    target: nn.Parameter = getattr(module, leaf)
    if tensor.shape != target.shape:
        if target.is_meta:
            rows = torch.empty_like(target, device=tensor.device).normal_(std=EMBEDDING_STD)
        else:
            rows = target.detach().clone()
        rows[: len(tensor)] = tensor
        tensor = rows
    value = in_dtype(tensor, target.dtype)
    setattr(module, leaf, nn.Parameter(value, requires_grad=target.requires_grad))


def _checkpoint_folder(source: str | Path, **load_options: Any) -> Path:
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    known = ("revision", "cache_dir", "local_files_only")
    options = {k: v for k, v in load_options.items() if k in known}
    name, revision = split_revision(str(source))
    if revision:
        options["revision"] = revision
    with _fetching("language model", str(source)):
        return Path(snapshot_download(name, **options))


def language_model_config(folder: str | Path) -> dict[str, Any]:
    """Our configuration fields from a published config.json, either layout, Mamba or Mamba-2.

    What a published file leaves out has the value that its own library gives it.  Raises UserError
    for another kind of model, and for a setting that would change the results and that our layers
    lack.
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
        raise UserError(f"{path}: {_in_one_line(error)}") from error


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

    How weights are initialised and how the scan is cut and run changes no result.
    """
    kinds, kind = {"Mamba1": "mamba", "Mamba2": "mamba2"}, str(published.get("layer", "Mamba1"))
    if kind not in kinds:
        raise unknown(f"layer in {path}", kind, kinds)
    fields: dict[str, Any] = {"mixer": kinds[kind], "d_conv": 4, "expand": 2}
    ours = {name: name for name in ("d_state", "d_conv", "expand")}
    if kind == "Mamba1":
        fields |= {"d_state": 16, "dt_rank": "auto"}
        ours |= {"dt_rank": "dt_rank"}
    else:
        fields |= {"d_state": 128, "head_dim": 64, "n_groups": 1}
        ours |= {"headdim": "head_dim", "ngroups": "n_groups"}
    for name, value in published.items():
        if name in ours:
            fields[ours[name]] = value
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


def _check_agreement(config: VLMambaConfig, published: dict[str, Any], source: str | Path) -> None:
    """Raise UserError where the model is built in another way than its weights were trained."""
    for name, theirs in published.items():
        ours = getattr(config, name)
        if ours != theirs and not (name == "vocab_size" and theirs <= ours):
            raise UserError(
                f"{source}: {name} is {theirs!r} in its config.json, and {ours!r} here; choose the "
                f"preset of this model, or give --set {name}={json.dumps(theirs)}"
            )
