"""May this command go on in its --out, and from where?  What is saved with a run, and compared.

A run is resumed only as what it was: everything that decides its result has to be the same, the
data files by their content (`flags.OnResume` says it of each flag).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from vlmamba import __version__, registry
from vlmamba.data.index import file_digest
from vlmamba.models.selective_scan import resolve_backend
from vlmamba.training import trainer_state
from vlmamba.training.flags import OnResume, fields, json_value, settings, values
from vlmamba.training.plan import Plan
from vlmamba_core.errors import UserError

OLD_LORA_TARGETS = "in_proj,x_proj,out_proj"


def run_settings(plan: Plan, digests: list[str]) -> dict[str, Any]:
    """Everything that decides the result, resolved, as JSON; digests: of the data files."""
    gpu = torch.cuda.is_available() and not plan.args.cpu
    return {
        **settings(plan.args),
        "data_digests": digests,
        "hyperparameters": settings(plan.hyper),
        "model": json.loads(plan.config.to_json_string(use_diff=False)),
        "scan_backend": resolve_backend(
            getattr(plan.config.text_config, "scan_backend", "auto"), "cuda" if gpu else "cpu"
        ),
        "packages": {
            "vlmamba": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def data_digests(paths: tuple[Path, ...], accelerator: Accelerator) -> list[str]:
    """A digest of each data file; the main process reads them for all."""
    main = accelerator.is_main_process
    return broadcast_object_list([file_digest(path) if main else "" for path in paths])


def finished(out: Path) -> bool:
    """Whether a run in `out` came to its end: the summary is the last file that it writes."""
    return (out / "summary.json").is_file() and (out / "final").is_dir()


def keep_finished(plan: Plan, digests: list[str]) -> bool:
    """Whether the finished run in --out is all that the command asks for; else it gets longer.

    Raises UserError where the command asks for another run.
    """
    out = plan.args.folder
    if plan.args.resume == "never":
        raise UserError(
            f"{out} holds a finished run; keep it with --resume auto, train it further with "
            "--resume longer and more --steps, or change --out"
        )
    saved = json.loads((out / "config.json").read_text())
    check_same_run(saved, plan, digests, out)
    old = saved["hyperparameters"]
    longer = any(old[field.name] != value for field, value in values(plan.hyper, OnResume.LENGTH))
    if plan.args.resume != "longer" or not longer:
        return True
    if not trainer_state.checkpoints(out):
        raise UserError(
            f"{out} has no checkpoint to train further from; "
            f"start another --out with --init {out}/final"
        )
    return False


def checkpoint_to_resume(plan: Plan) -> Path | None:
    """The newest checkpoint with --resume auto; UserError where one would be overwritten."""
    out = plan.args.folder
    saved = trainer_state.checkpoints(out)
    if saved and plan.args.resume == "never":
        raise UserError(
            f"{out} holds checkpoints; continue them with --resume auto or change --out"
        )
    return saved[-1] if saved else None


def check_same_run(saved: dict[str, Any], plan: Plan, digests: list[str], folder: Path) -> None:
    """Raise UserError if a resumed run differs from the one that saved its settings in `folder`.

    Its length may, with --resume longer.  A setting that an older version did not have was its
    default.
    """
    fixed = [OnResume.SAME] if plan.args.resume == "longer" else [OnResume.SAME, OnResume.LENGTH]
    lengths = {field.name for field in fields(plan.hyper, OnResume.LENGTH)}
    pairs = [
        *_compared(saved, plan.args, fixed),
        *_compared(saved["hyperparameters"], plan.hyper, fixed),
    ]
    if registry.objectives[plan.hyper.objective].depends_on_cut:
        cut = saved["hyperparameters"].get("micro_batch", plan.hyper.micro_batch)
        pairs.append(("micro_batch", cut, plan.hyper.micro_batch))
    for name, before, after in pairs:
        if name == "lora_targets":  # older versions wrote Mamba's where none were named
            before, after = (None if v == OLD_LORA_TARGETS else v for v in (before, after))
        if before != after:
            more = ", or --resume longer to train further" if name in lengths else ""
            raise UserError(
                f"cannot resume {folder}: {name} was {before!r} and is now {after!r}; "
                f"give the same value or another --out{more}"
            )
    for path, before, after in zip(
        plan.args.data, saved.get("data_digests", digests), digests, strict=True
    ):
        if before != after:
            raise UserError(
                f"cannot resume {folder}: the data file {path} has changed since (its digest was "
                f"{before} and is now {after}); bring it back or give another --out"
            )


def _compared(
    saved: dict[str, Any], instance: Any, fixed: list[OnResume]
) -> Iterator[tuple[str, Any, Any]]:
    """(name, value then, value now) of the fields that have to be the same."""
    for field, value in values(instance, *fixed):
        yield field.name, saved.get(field.name, json_value(field.default)), json_value(value)
