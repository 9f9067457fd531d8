"""A step of instruction tuning (stage 2): VL-Mamba against the same model with transformers'
Mamba in it.

One sample: SigLIP features of an image (729 patches, as the trainer's feature cache gives them),
then text with an answer. One step is forward, backward and AdamW over connector and language
model. Both sides compute logits only where the answer is, which favors transformers' Mamba: its
own loss computes them everywhere.

A process's peak memory never goes down, so every contender runs in a process of its own:
`python -m harness.speed.training CONTENDER`, which `harness.bench --only train` starts.
transformers' Mamba may need half an hour for a step: a process stops itself after PATIENCE_S
seconds of one, and its time and memory so far are lower bounds, marked as such.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.speed import transformers_direct
from harness.speed.models import build, embed
from harness.speed.timing import VL_MAMBA, Comparison, Contender, Effort, Timing, side_by_side
from vlmamba.models.language import WrappedLM
from vlmamba.models.vlm import VLMambaForConditionalGeneration
from vlmamba.training.optimizer import build_optimizer
from vlmamba.training.recipe import Hyperparameters
from vlmamba.training.stages import STAGES, freeze
from vlmamba_core.errors import UserError
from vlmamba_core.memory import peak_resident_bytes

SIZE = "130m"
TEXT_TOKENS, ANSWER_TOKENS = 71, 40  # with 729 patches: 800 tokens
TRANSFORMERS = "transformers Mamba"
CONTENDERS = {VL_MAMBA: f"vl-mamba-{SIZE}", TRANSFORMERS: f"transformers-mamba-{SIZE}"}
KINDS = {"train": False, "train_checkpointed": True}  # kind of comparison -> recomputes layers

EFFORT = Effort(least=1, most=5, seconds=60)  # transformers' Mamba makes one step in minutes
PATIENCE_S = 300.0  # for a contender's steps, warm-up left out


@dataclass(frozen=True)
class Measured:
    """Seconds for a token, the process's peak memory in bytes; lower bounds where `stopped`."""

    timing: Timing
    peak_bytes: int
    stopped: bool = False


def compare(kind: str) -> Comparison:
    """Seconds for a token and peak memory of each contender, one process after the other."""
    found = {name: in_own_process(name, KINDS[kind]) for name in CONTENDERS}
    stopped = frozenset(name for name, measured in found.items() if measured.stopped)
    how = "with" if KINDS[kind] else "without"
    return Comparison(
        kind,
        f"stage 2, {SIZE} shape, batch 1, float32, {how} gradient checkpointing",
        "token",
        {name: measured.timing for name, measured in found.items()},
        peak_bytes={name: measured.peak_bytes for name, measured in found.items()},
        stopped=stopped,
    )


def in_own_process(contender: str, checkpointing: bool) -> Measured:
    """`measure` in a process of its own; UserError if the system killed it."""
    command = [sys.executable, "-m", __name__, contender, str(torch.get_num_threads())]
    command += ["--checkpointing"] * checkpointing
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(
            f"the process measuring {contender} ended with code {done.returncode} (-9: killed, "
            "probably because memory ran out; it needs about 12 GiB)"
        )
    found = json.loads(done.stdout)
    timing = Timing(tuple(found["wall_s"]), tuple(found["processor_s"]))
    return Measured(timing, found["peak_bytes"], found["stopped"])


def main() -> None:
    """Measure one contender and print the result as JSON."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("threads", type=int)
    parser.add_argument("--checkpointing", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    report(measure(arguments.contender, arguments.checkpointing))


def report(found: Measured) -> None:
    """Print a measurement as `in_own_process` reads it."""
    content = {**asdict(found.timing), "peak_bytes": found.peak_bytes, "stopped": found.stopped}
    print(json.dumps(content), flush=True)


def measure(contender: str, checkpointing: bool, patience: float = PATIENCE_S) -> Measured:
    """Some steps; a first one that takes longer than `patience` seconds ends the process."""
    model = build(CONTENDERS[contender])
    features, ids = sample(model)
    step = stepper(model, checkpointing)
    step(None, ids)  # warm-up without the image: from now on AdamW's moments take their memory
    tokens = features.shape[1] + ids.shape[1]
    work = Contender(lambda: step(features, ids), tokens)
    with _given_up_after(patience, tokens):
        timing = side_by_side({contender: work}, EFFORT)[contender]
    return Measured(timing, peak_resident_bytes())


@contextmanager
def _given_up_after(patience: float, tokens: int) -> Iterator[None]:
    """Report the bounds and end the process, in the middle of a backward pass if need be."""
    wall, processor = time.perf_counter(), time.process_time()

    def give_up() -> None:
        spent = (time.perf_counter() - wall) / tokens, (time.process_time() - processor) / tokens
        timing = Timing((spent[0],), (spent[1],))
        report(Measured(timing, peak_resident_bytes(), stopped=True))
        os._exit(0)

    timer = threading.Timer(patience, give_up)
    timer.daemon = True
    timer.start()
    yield
    timer.cancel()


def sample(model: VLMambaForConditionalGeneration) -> tuple[Tensor, Tensor]:
    """Image features (1, P, Dv) and text (1, T) of one sample."""
    config = model.config
    generator = torch.Generator().manual_seed(0)
    shape = (1, config.num_patches, config.vision_width)
    features = torch.randn(shape, generator=generator)
    return features, torch.randint(2, 1000, (1, TEXT_TOKENS), generator=generator)


def stepper(
    model: VLMambaForConditionalGeneration, checkpointing: bool, stage: str = "finetune"
) -> Callable[[Tensor | None, Tensor], float]:
    """A function (features, ids) that makes one update of a stage and returns the loss before."""
    freeze(model, STAGES[stage])
    if checkpointing:
        model.activation_checkpointing_enable()  # type: ignore[operator]
    optimizer = build_optimizer(model, Hyperparameters(lr=2e-5, batch_size=1, micro_batch=1))

    def step(features: Tensor | None, ids: Tensor) -> float:
        value = loss(model, features, ids)
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(value.detach())

    return step


def loss(model: VLMambaForConditionalGeneration, features: Tensor | None, ids: Tensor) -> Tensor:
    """Mean cross-entropy of the last ANSWER_TOKENS tokens after image and question."""
    language_model, embeds = model.language_model, embed(model, ids, features)
    if isinstance(language_model, WrappedLM):  # as transformers' own training calls it
        hidden = transformers_direct.hidden(language_model.model, embeds)
    else:
        hidden = language_model(embeds)[0]
    answer = ids[0, -ANSWER_TOKENS:]
    return F.cross_entropy(language_model.head(hidden[0, -ANSWER_TOKENS - 1 : -1]), answer)


if __name__ == "__main__":
    main()
