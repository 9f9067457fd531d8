"""A checkpoint's files, looked at before anything in them is loaded.

    files = model_files(folder)          # of a folder that save_pretrained wrote, all checked
    for name, tensor in tensors(files):  # of safetensors, or of .bin without running anything

A folder may come from anybody.  Its index may name only files that lie in it, none of its files may
be a link to somewhere else (the hub's own cache, whose snapshots are links, apart), the weights may
be no pickle, their headers must be whole, and the sizes in config.json those of the tensors: a
config that asks for a thousand times the memory is refused here, not by the machine.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import os
import pickle
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlmamba_core.errors import UserError, first_line
from vlmamba_core.paths import is_inside

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
READ = (".json", ".safetensors", ".jinja", ".txt", ".model")  # what loading may open
MODEL = "model.safetensors"
EMBEDDING = "language_model.embedding.weight"
LAYER = re.compile(r"language_model\.layers\.(\d+)\.")


def model_files(folder: Path) -> list[Path]:
    """The weight files of a folder that save_pretrained wrote. Raises UserError, one line."""
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder}: no config.json; expected a folder written by save_pretrained "
            "(a training run writes one at OUT/final)"
        )
    for path in folder.iterdir():
        if path.suffix in READ:
            _inside(folder, path.name)
    config = read_object(folder / "config.json")
    if config.get("model_type") != "vlmamba":
        raise UserError(
            f"{folder}: config.json is of model_type {config.get('model_type')!r}, expected "
            "'vlmamba'; `harness.run --model hf:FOLDER_OR_ID` takes transformers' own"
        )
    files = [folder / MODEL] if (folder / MODEL).is_file() else _indexed(folder, f"{MODEL}.index")
    if not files:
        _refuse_pickles(folder)
        raise UserError(f"{folder}: no *.safetensors weights; expected {MODEL}")
    _check_sizes(config, files)
    return files


def language_model_files(folder: Path) -> list[Path]:
    """The weight files of a published language model: safetensors, else .bin.

    By the names that everyone gives them; only where there are none, any of the kind: training
    leaves other files beside them (training_args.bin, optimizer.bin, adapters).
    """
    for name in (MODEL, "pytorch_model.bin"):
        if (folder / name).is_file():
            return [_inside(folder, name)]
        if files := _indexed(folder, f"{name}.index"):
            return files
    for suffix in ("safetensors", "bin"):
        for index in sorted(folder.glob(f"*.{suffix}.index.json")):
            return _indexed(folder, index.name.removesuffix(".json"))
        if files := sorted(folder.glob(f"*.{suffix}")):
            return [_inside(folder, path.name) for path in files]
    raise UserError(f"{folder}: no *.safetensors or *.bin weights")


def tensors(files: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    """All (name, tensor), file by file, mapped into memory. Raises UserError for a damaged file."""
    for path in files:
        if path.suffix == ".safetensors":
            with open_safetensors(path) as file:
                yield from ((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
        else:
            yield from _unpickled(path).items()


def in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of a file in `dtype`; its own memory, the file's mapping, where it has that already.

    A copy takes the place of its source: the pages that were read for it are given back, or file
    and copy would be in memory together.  The source is not to be read again.
    """
    if tensor.dtype == dtype or not tensor.is_floating_point():
        return tensor
    copy = tensor.to(dtype)
    _give_back(tensor)
    return copy


def check_finite(what: str, model: torch.nn.Module) -> None:
    """Raise UserError where a parameter of `what` holds NaN or infinity."""
    for key, parameter in model.named_parameters():
        if not is_finite(parameter):
            raise UserError(f"{what}: {key} holds NaN or infinite values")


def is_finite(tensor: Tensor) -> bool:
    """No NaN and no infinity in it.

    Either stays in a sum, which is far quicker than isfinite of every value and needs no memory; a
    sum may also overflow, so only where it is not finite is every value looked at.
    """
    tensor = tensor.detach()
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def weights_sha256(model: torch.nn.Module) -> str:
    """A digest of every parameter and buffer by name: the same weights, whatever their origin."""
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        total.update(flat.view(torch.uint8).numpy().data)
    return total.hexdigest()


def take_buffers(model: torch.nn.Module, donor: torch.nn.Module) -> None:
    """Give a model that was made without memory the donor's buffers, which no file holds."""
    for name, buffer in donor.named_buffers():
        path, _, leaf = name.rpartition(".")
        if model.get_buffer(name).is_meta:
            setattr(model.get_submodule(path), leaf, buffer)


def _give_back(tensor: Tensor) -> None:
    """Let the system drop the pages that hold only this tensor, which nobody reads any more."""
    advise = getattr(ctypes.CDLL(None), "madvise", None) if os.name == "posix" else None
    if advise is None or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
    if length > 0:
        advise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


def open_safetensors(path: Path) -> Any:
    """The opened file, its header read. Raises UserError where that is damaged."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path} is not a readable safetensors file: {first_line(error)}"
        ) from error


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object")
    return content


def _indexed(folder: Path, index: str) -> list[Path]:
    """The files that an index names; none without an index."""
    path = folder / f"{index}.json"
    if not path.is_file():
        return []
    names = read_object(path).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{path} has no weight_map from tensors to files")
    return [_inside(folder, name) for name in sorted(set(map(str, names.values())))]


def _inside(folder: Path, name: str) -> Path:
    """The file `name` of the folder. Raises UserError if it is not there, or is not in there."""
    if Path(name).name != name or "\0" in name:
        raise UserError(
            f"{folder}: the index names {name!r}, which leads out of the folder; refused"
        )
    path, home = folder / name, folder.resolve()
    if home.parent.name == "snapshots":  # the hub's cache: a snapshot's files link to its blobs
        home = home.parent.parent
    if not is_inside(path, home):
        raise UserError(f"{folder}: {name} is a link out of the folder; put the file itself there")
    if not path.is_file():
        raise UserError(f"{folder}: the file {name} is missing; fetch the checkpoint again")
    return path


def _refuse_pickles(folder: Path) -> None:
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"{folder}: {pickles[0]} is a pickled checkpoint, which can run code when loaded; "
            "convert it to safetensors (save_pretrained writes that) and try again"
        )


def _check_sizes(config: dict[str, Any], files: Sequence[Path]) -> None:
    """Raise UserError where config.json is of another language model than the weights."""
    layers: set[str] = set()
    shape: list[int] | None = None
    for path in files:
        with open_safetensors(path) as file:
            names = list(file.keys())
            layers |= {found[1] for name in names if (found := LAYER.match(name))}
            if EMBEDDING in names:
                shape = list(file.get_slice(EMBEDDING).get_shape())
    # older folders have the language model's settings beside the rest
    text = config.get("text_config")
    config = {**(text if isinstance(text, dict) else {}), **config}
    wanted = [config.get("vocab_size"), config.get("d_model", config.get("hidden_size"))]
    if shape is not None and shape != wanted:
        raise UserError(
            f"the checkpoint has wrong shapes for {EMBEDDING}: {shape}, but config.json gives "
            f"{wanted}"
        )
    if layers and "n_layer" in config and len(layers) != config["n_layer"]:
        raise UserError(
            f"config.json asks for {config.get('n_layer')!r} layers, the checkpoint lacks or "
            f"exceeds them with {len(layers)}"
        )


def _unpickled(path: Path) -> dict[str, Tensor]:
    """A published .bin: tensors only, nothing in it is executed."""
    found = plain_objects(path)
    if not isinstance(found, dict) or not all(map(torch.is_tensor, found.values())):
        raise UserError(f"{path} holds something else than named tensors")
    return {str(name): tensor for name, tensor in found.items()}


def plain_objects(path: Path) -> Any:
    """What torch.save wrote: tensors, numbers, text and their containers; nothing is executed.

    Raises UserError for a damaged file, and for one that holds anything else.
    """
    try:
        # files of torch before 1.6 are no archives, which alone can be mapped
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except (pickle.UnpicklingError, BadZipFile, RuntimeError, OSError, EOFError) as error:
        raise UserError(f"{path} is not a file of plain tensors: {first_line(error)}") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a file of plain tensors: {first_line(error)}") from error
