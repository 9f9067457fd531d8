"""Validation while a model trains: the loss of held-out samples and, if asked, a benchmark.

    python -m vlmamba.train ... --eval-data held_out.json --eval-every 200 \\
        --eval-command "python -m harness.run --tasks pope --data hub --limit 100"

Every N steps, and after the last, the step's line in train.jsonl has `eval_loss`, the mean over all
labels of the held-out samples, and `eval_scores`.  A benchmark is a command of its own, which gets
`--model FOLDER --out OUT/eval/step-N` and leaves a record.json there, as harness.run does:
{"tasks": {TASK: {"metrics": {METRIC: {"value": 0.8}}}}}.  Training waits for it.  Neither changes
what is trained: no update, no dropout, no random number.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from vlmamba.data.collate import Batch, MicroBatches
from vlmamba.data.examples import ConversationExamples, Examples
from vlmamba.data.sampler import micro_batches
from vlmamba.models.vlm import VLMambaForConditionalGeneration
from vlmamba.training import trainer_state
from vlmamba.training.objectives import Objective
from vlmamba.training.recipe import Hyperparameters
from vlmamba_core import processes
from vlmamba_core.errors import UserError

# How a launcher tells its processes of each other; a command of its own is not one of them
OF_A_LAUNCHER = (
    *("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_"),
    *("ACCELERATE_", "FSDP_"),
)


@dataclass
class Evaluation:
    """What is measured every `every` steps: examples (None: no loss), command (None: none).

    shown: those of the examples that are shown each other's pictures as well (None: none).
    """

    every: int
    examples: Examples | None = None
    command: str | None = None
    shown: ConversationExamples | None = None

    def due(self, step: int, total: int) -> bool:
        """Whether to measure after update number `step`, 1 to total."""
        return step % self.every == 0 or step == total


def mean_loss(
    model: nn.Module,
    examples: Examples,
    pad_token_id: int,
    hyper: Hyperparameters,
    accelerator: Accelerator,
) -> float:
    """The loss a label, over all examples and processes; it does not depend on how they are cut.

    Raises UserError where no example has a label.
    """
    total = torch.zeros(3, dtype=torch.float64)  # loss, labels, samples left out
    cross_entropy = Objective()
    with torch.no_grad(), without_dropout(model):
        for batch in _batches(examples, pad_token_id, hyper, accelerator):
            loss = cross_entropy(model, batch, accelerator.device)
            total += torch.tensor([float(loss), batch.n_labels, len(batch.skipped)])
    if accelerator.num_processes > 1:
        total = accelerator.reduce(total.float().to(accelerator.device), "sum").double().cpu()
    loss, labels, skipped = total.tolist()
    if not labels:
        raise UserError("--eval-data has no answer within --max-length; nothing can be measured")
    if skipped and accelerator.is_main_process:
        tqdm.write(f"evaluation: {skipped:.0f} of {len(examples.lengths)} samples left out")
    return loss / labels


def _batches(
    examples: Examples, pad_token_id: int, hyper: Hyperparameters, accelerator: Accelerator
) -> Iterator[Batch]:
    """This process's micro-batches, long samples with long ones; as many as the others have."""
    order = np.argsort(-examples.lengths, kind="stable")
    source = MicroBatches(examples, pad_token_id)
    for start in range(0, len(order), hyper.batch_size):
        for part in micro_batches(
            order[start : start + hyper.batch_size],
            accelerator.num_processes,
            accelerator.process_index,
            hyper.micro_batch,
            hyper.batch_size,
        ):
            yield source[part.tolist()]


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """All parts in evaluation mode: many ask it of themselves, and call a function for dropout.

    The whole stays in training mode, in which no logits are made where there are labels.
    """
    parts = [part for whole in _wholes(model) for part in whole.modules() if part is not whole]
    active = [part for part in parts if part.training]
    for part in active:
        part.training = False  # not eval(): it would change all that is below as well
    try:
        yield
    finally:
        for part in active:
            part.training = True


def _wholes(model: nn.Module) -> list[nn.Module]:
    """The model inside what processes wrap around it, or else what was given."""
    return [m for m in model.modules() if isinstance(m, VLMambaForConditionalGeneration)] or [model]


def benchmark(
    command: str,
    out: Path,
    step: int,
    model: nn.Module,
    processor: Any,
    hyper: Hyperparameters,
    accelerator: Accelerator,
) -> dict[str, float] | None:
    """Scores by "task/metric" of the model as it is, on the main process; None if it failed.

    A failed benchmark is reported and does not stop the training; its output is in
    OUT/eval/step-N.log.
    """
    home, scores = out / "eval", None
    place, folder = trainer_state.evaluation_folder(out, step), home / "model"
    if accelerator.is_main_process:
        for old in (place, folder, home / ".model.partial"):
            shutil.rmtree(old, ignore_errors=True)
    with trainer_state.atomic_folder(folder, accelerator) as partial:
        trainer_state.write_model(partial, model, processor, accelerator, hyper, final=True)
    if accelerator.is_main_process:
        call = [*split_command(command), "--model", str(folder), "--out", str(place)]
        with place.with_suffix(".log").open("wb") as log:
            alone = {k: v for k, v in os.environ.items() if not k.startswith(OF_A_LAUNCHER)}
            done = processes.run(call, env=alone, stdout=log, stderr=subprocess.STDOUT)
        scores = _scores(place / "record.json") if done.returncode == 0 else None
        if scores is None:
            tqdm.write(f"step {step}: `{shlex.join(call)}` gave no score, see {log.name}")
        shutil.rmtree(folder)
    accelerator.wait_for_everyone()
    return scores


def split_command(command: str) -> list[str]:
    """The words of --eval-command; `python` is this one.  Raises UserError where it is none."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UserError(f"--eval-command {command!r}: {error}") from error
    if not words or shutil.which(words[0]) is None:
        raise UserError(f"--eval-command {command!r}: no program of that name")
    return [sys.executable if words[0] in ("python", "python3") else words[0], *words[1:]]


def _scores(record: Path) -> dict[str, float] | None:
    """The values in a record.json; None where there is none."""
    try:
        found = json.loads(record.read_text(encoding="utf-8"))["tasks"]
        scores = {
            f"{task}/{metric}": float(entry["value"])
            for task, report in found.items()
            for metric, entry in report["metrics"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return scores or None
