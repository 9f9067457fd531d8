"""Published parts, by hub id[@revision] or folder: fetched, or refused in one line that says how.

Each family reads its own weights (`LanguageModel.load_published`, `VisionEncoder`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import AutoTokenizer

from vlmamba.config import VLMambaConfig, split_revision
from vlmamba.weight_files import tensors
from vlmamba_core.errors import UserError, shortened


@contextmanager
def fetching(what: str, source: str | None) -> Iterator[None]:
    """What is published and can be neither reached nor read is a UserError, one line."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:  # transformers' and the hub's errors
        name, revision = split_revision(str(source))
        message = f"cannot fetch the {what} {str(source)!r}: {shortened(error)}"
        if isinstance(error, OSError) and not Path(name).exists():
            pin = f" --revision {revision}" if revision else ""
            message += f" Without a network, run `hf download {name}{pin}` where there is one"
            message += " and bring its cache, or name a folder"
        raise UserError(message) from error


def published_folder(source: str | Path, what: str = "language model", **load_options: Any) -> Path:
    """The local folder of a published model: the folder itself, or a hub id[@revision].

    load_options: of revision, cache_dir and local_files_only; others are for other readers.
    """
    if Path(source).is_dir():
        return Path(source)
    known = ("revision", "cache_dir", "local_files_only")
    options = {k: v for k, v in load_options.items() if k in known}
    name, revision = split_revision(str(source))
    if revision:
        options["revision"] = revision
    with fetching(what, str(source)):
        return Path(snapshot_download(name, **options))


def timm_tensors(source: str | Path, **load_options: Any) -> dict[str, Tensor]:
    """The tensors of a timm model without its classifier: a folder, or a hub id[@revision].

    Of model.safetensors, else pytorch_model.bin; a hub repository may hold other layouts beside it.
    """
    folder = published_folder(source, what="vision encoder", **load_options)
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            found = tensors([folder / name])
            return {key: tensor for key, tensor in found if not key.startswith("head.")}
    raise UserError(f"{folder}: no model.safetensors or pytorch_model.bin; expected a timm model")


def tokenizer_for(config: VLMambaConfig, **load_options: Any) -> Any:
    """The published tokenizer, config.tokenizer_id: hub id[@revision] or folder.

    Raises UserError where there is none, as for the demo, whose tokenizer is trained with it.
    """
    if config.tokenizer_id is None:
        raise UserError("this language model has no published tokenizer; train one (stage text)")
    name, revision = split_revision(config.tokenizer_id)
    if revision:
        load_options["revision"] = revision
    with fetching("tokenizer", config.tokenizer_id):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False, **load_options)
