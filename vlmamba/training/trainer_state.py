"""Checkpoints that survive a kill: written beside the old ones, then renamed into place.

`OUT/checkpoints/step-00000100/` is a model folder for from_pretrained, plus what an exact resume
needs: optimizer.safetensors, rng-RANK.safetensors and state.json (step, counts, Python's random
state).  Nothing is pickled.  A folder of that name is always complete: files are written to
`.step-00000100.partial`, flushed to disk, and only then does the folder get its name.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from vlmamba import model_card
from vlmamba.training import lora
from vlmamba.training.recipe import Hyperparameters
from vlmamba.weight_files import read_object, tensors
from vlmamba_core.errors import UserError

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


@contextmanager
def atomic_folder(target: Path, accelerator: Accelerator) -> Iterator[Path]:
    """Yield a scratch folder that becomes `target` when the block ends without an error.

    All processes enter; the main one creates and renames.  Raises UserError if the disk refuses
    (full, read-only); what was at `target` before is then still there.
    """
    partial = target.parent / f".{target.name}.partial"
    try:
        if accelerator.is_main_process:
            partial.mkdir(parents=True)
        accelerator.wait_for_everyone()
        yield partial
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            _commit(partial, target)
        accelerator.wait_for_everyone()
    except (OSError, RuntimeError, SafetensorError) as error:
        if not _is_disk_error(error):
            raise
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"cannot write {target}: {error}; make room and start again with --resume auto "
            "(earlier checkpoints are untouched)"
        ) from error


def _is_disk_error(error: Exception) -> bool:
    """safetensors reports a failed write as its own exception type with the system's text."""
    return isinstance(error, OSError) or "os error" in str(error).lower()


def _commit(partial: Path, target: Path) -> None:
    for path in partial.rglob("*"):
        if path.is_file():
            _sync(path)
    _sync(partial)
    old = target.parent / f".{target.name}.old"
    if target.exists():
        target.rename(old)
    partial.rename(target)
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_model(
    folder: Path,
    model: nn.Module,
    processor: Any,
    accelerator: Accelerator,
    hyper: Hyperparameters,
    final: bool = False,
    settings: dict[str, Any] | None = None,
    scores: Path | None = None,
) -> None:
    """Model and processor as from_pretrained reads them; all processes call it.

    LoRA lies beside them, and is part of the weights too if `final`.  settings: of the run, for the
    model's card; scores: record.json of its benchmark, where there is one.
    """
    weights = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        whole = accelerator.unwrap_model(model)
        for copy in whole.all_tied_weights_keys:  # gathered shards no longer share their memory
            weights.pop(copy, None)
        if hyper.lora and not lora.packed(whole):  # there it is in the weights
            weights, adapter = lora.split(whole, weights)
            lora.save(folder, adapter, hyper)
            weights = lora.merged(weights, adapter, hyper) if final else weights
        for part in (whole.config.vision_config, whole.config.text_config):
            part.dtype = None  # the model's own counts; set where it was loaded
        for name in ("is_local", "local_files_only"):  # likewise: a resumed run writes equal files
            processor.tokenizer.init_kwargs.pop(name, None)
        model_card.write_card(folder, whole.config, settings)
        if scores is not None:
            model_card.add_scores_of(folder, scores)
        whole.save_pretrained(folder, state_dict=weights)
        processor.save_pretrained(folder)


def save_checkpoint(
    out: Path,
    model: nn.Module,
    processor: Any,
    optimizer: torch.optim.Optimizer,
    progress: dict[str, Any],
    settings: dict[str, Any],
    accelerator: Accelerator,
    hyper: Hyperparameters,
) -> Path:
    """Write the checkpoint of `progress["step"]`, then delete all but the newest `hyper.keep`."""
    target = checkpoint_root(out) / f"step-{progress['step']:08d}"
    with atomic_folder(target, accelerator) as folder:
        scores = evaluation_folder(out, progress["step"]) / "record.json"
        write_model(folder, model, processor, accelerator, hyper, settings=settings, scores=scores)
        # full on the main process, empty on the others
        moments: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=FULL)
        save_file(random_state(), folder / f"rng-{accelerator.process_index:05d}.safetensors")
        if accelerator.is_main_process:
            save_file(_flatten(moments["state"]), folder / "optimizer.safetensors")
            state = {"progress": progress, "settings": settings, "python_random": random.getstate()}
            (folder / "state.json").write_text(json.dumps(state, indent=1) + "\n")
    if accelerator.is_main_process:
        rotate(out, hyper.keep)
    return target


def checkpoint_root(out: Path) -> Path:
    """Where a run's checkpoints lie."""
    return Path(out) / "checkpoints"


def evaluation_folder(out: Path, step: int) -> Path:
    """Where the benchmark of a step leaves its record."""
    return Path(out) / "eval" / f"step-{step:08d}"


def checkpoints(out: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(checkpoint_root(out).glob("step-*"))


def rotate(out: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints; a name disappears before its files do."""
    for folder in checkpoints(out)[: -max(1, keep)]:
        doomed = folder.with_name(f".{folder.name}.old")
        folder.rename(doomed)
        shutil.rmtree(doomed)


def clear_leftovers(out: Path) -> None:
    """Delete what a killed run was writing or deleting; complete folders have other names."""
    for folder in (Path(out), checkpoint_root(out), Path(out) / "eval"):
        for leftover in (*folder.glob(".*.partial"), *folder.glob(".*.old")):
            shutil.rmtree(leftover, ignore_errors=True)


def read_state(folder: Path) -> dict[str, Any]:
    """`progress` and `settings` of a checkpoint; UserError if the folder is not one."""
    path = Path(folder) / "state.json"
    if not path.is_file():
        raise UserError(f"{folder} is not a training checkpoint (it has no state.json)")
    state = read_object(path)
    absent = [name for name in ("progress", "settings", "python_random") if name not in state]
    if absent:
        raise UserError(f"{path} is not of a training checkpoint: it has no {absent[0]}")
    return state


def restore(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator
) -> dict[str, Any]:
    """Put optimizer and random states back (the model was loaded from `folder`); -> progress."""
    current: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=FULL)
    if accelerator.is_main_process:  # the others receive theirs from it
        moments = dict(tensors([Path(folder) / "optimizer.safetensors"]))
        current["state"] = _unflatten(moments)
    several = accelerator.num_processes > 1
    options = replace(FULL, broadcast_from_rank0=several)
    set_optimizer_state_dict(model, optimizer, current, options=options)
    state = read_state(folder)
    version, values, gauss = state["python_random"]
    random.setstate((version, tuple(values), gauss))
    rng = Path(folder) / f"rng-{accelerator.process_index:05d}.safetensors"
    if rng.is_file():  # absent where the run goes on with more processes
        set_random_state(dict(tensors([rng])))
    return state["progress"]


def _flatten(moments: dict[str, dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {
        f"{name}|{key}": torch.as_tensor(value).contiguous()
        for name, values in moments.items()
        for key, value in values.items()
    }


def _unflatten(flat: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    moments: dict[str, dict[str, torch.Tensor]] = {}
    for joined, value in flat.items():
        name, key = joined.rsplit("|", 1)
        moments.setdefault(name, {})[key] = value
    return moments


def random_state() -> dict[str, torch.Tensor]:
    """States of torch's and numpy's generators as tensors."""
    numpy_state: Any = np.random.get_state()
    _, keys, position, has_gauss, gauss = numpy_state
    states = {
        "torch": torch.get_rng_state(),
        "numpy_keys": torch.from_numpy(keys.astype(np.int64)),
        "numpy_rest": torch.tensor([position, has_gauss, gauss], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_state(states: dict[str, torch.Tensor]) -> None:
    """Undo `random_state`."""
    torch.set_rng_state(states["torch"])
    position, has_gauss, gauss = states["numpy_rest"].tolist()
    keys = states["numpy_keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), gauss))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
