"""Our own models by name: the bundled demo, folders that save_pretrained wrote, hub ids.

`load` gives a ready (model, processor), `read_config` its configuration alone.  Weights are
safetensors.  What others published is read by each part itself (`published`, `models.assemble`).
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from vlmamba.config import VLMambaConfig, split_revision
from vlmamba.models.quantized import QuantizedLinear
from vlmamba.models.vlm import VLMambaForConditionalGeneration
from vlmamba.processing import VLMambaProcessor, follow_tokenizer
from vlmamba.weight_files import check_finite, in_dtype, model_files
from vlmamba_core import hub
from vlmamba_core.errors import UserError, shortened, unknown
from vlmamba_core.names import choose_dtype, match

FLOAT16_ON_CPU = "float16 on a CPU is slower than float32; load with dtype float32 or bfloat16"
DTYPES = ("auto", "float32", "bfloat16", "float16")
ASSETS = Path(__file__).parent / "assets"
BUNDLED = {name: ASSETS / name for name in ("nano", "nano-attention")}
NAMES = {"nano": "nano", "demo": "nano", "nano-attention": "nano-attention"}


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
    if isinstance(dtype, str):
        dtype = choose_dtype(dtype, DTYPES)
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
        raise UserError(f"cannot load model {name!r}: {shortened(error)}") from error
    _check_complete(name, info)
    if not model.config.num_image_tokens or not getattr(
        model.config.vision_config, "num_hidden_layers", 1
    ):
        raise UserError(f"cannot load model {name!r}: its encoder gives no image tokens")
    if dtype != "auto":
        _change_dtype(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    check_finite(f"cannot load model {name!r}", model)
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
        raise UserError(f"cannot load model {name!r}: {shortened(error)}") from error
    if fields.get("model_type") != VLMambaConfig.model_type:
        raise UserError(
            f"cannot load model {name!r}: it is a {fields.get('model_type')!r} model, "
            f"expected {VLMambaConfig.model_type!r}"
        )
    return VLMambaConfig.from_dict(fields)


def _resolve(name: str) -> str:
    """A folder path or hub id that from_pretrained takes, checked where it is local."""
    if bundled := match(name, NAMES):
        folder = BUNDLED[NAMES[bundled]]
        if not (folder / "config.json").is_file():
            raise UserError(
                f"the bundled model {name!r} is not installed at {folder.name}/; "
                "reinstall the package"
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
        raise UserError(f"{mistake} (or an existing folder, or a hub id ORGANIZATION/NAME)")
    hub.offline_unless_reachable()
    return name


def _check_complete(name: str, info: dict[str, Any]) -> None:
    """Raise UserError where the checkpoint does not fill the model exactly.

    An encoder whose weights a package brings (`weights_in_checkpoint`) is never said to be missing:
    the model tells transformers so.
    """
    for what, keys in (
        ("lacks", info["missing_keys"]),
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
            # transformers keeps the frequencies of rotary positions in float32
            kept = isinstance(module, QuantizedLinear) or name.endswith("inv_freq")
            if buffer.is_floating_point() and not kept:
                setattr(module, name, buffer.to(dtype))
    if not model.vision_encoder.weights_in_checkpoint:
        model.vision_encoder.load_pretrained()  # its buffers are computed in that dtype
    model.config.dtype = model.config.vision_config.dtype = dtype
