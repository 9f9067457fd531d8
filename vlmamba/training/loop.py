"""The training loop: batches -> gradients -> AdamW, on Hugging Face accelerate.

One step is one global batch of `hyper.batch_size` sequences, whatever the number of processes:
each process runs its share in micro-batches, and every scored token of the global batch weighs
the same.  The loss curve therefore does not depend on how the batch was cut.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from vlmamba.data.collate import Batch, MicroBatches
from vlmamba.data.examples import Examples
from vlmamba.data.sampler import MicroBatchOrder
from vlmamba.models.vlm import VLMambaForConditionalGeneration
from vlmamba.training import lora, sharded, trainer_state
from vlmamba.training.evaluation import Evaluation, benchmark, mean_loss, without_dropout
from vlmamba.training.objectives import Objective
from vlmamba.training.optimizer import build_optimizer
from vlmamba.training.picture_use import picture_gains
from vlmamba.training.plot import draw
from vlmamba.training.precision import products_of
from vlmamba.training.recipe import Hyperparameters, build_objective
from vlmamba.training.schedule import SCHEDULES
from vlmamba.training.stages import Stage, freeze
from vlmamba_core.errors import UserError
from vlmamba_core.memory import peak_resident_bytes


@dataclass
class Progress:
    """How far a run is; saved with every checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    truncated: int = 0  # samples cut at max_length
    without_labels: int = 0  # steps whose batch had nothing to learn: no update
    skipped: dict[str, int] = field(default_factory=dict)  # reason -> samples


@dataclass
class Run:
    """Everything the loop works on."""

    model: VLMambaForConditionalGeneration
    processor: Any
    examples: Examples
    stage: Stage
    hyper: Hyperparameters
    out: Path
    settings: dict[str, Any]
    workers: int = 0
    strict: bool = False
    tensorboard: bool = False
    wandb: str | None = None  # project
    evaluation: Evaluation | None = None
    objective: Objective = field(init=False)

    def __post_init__(self) -> None:
        self.objective = build_objective(self.hyper)


def make_accelerator(hyper: Hyperparameters, cpu: bool = False) -> Accelerator:
    """Devices and processes as `accelerate launch` set them up; batches are cut by the loop.

    The others may wait for the main process longer than a GPU's ten minutes: it looks through the
    data, fills caches and runs benchmarks.
    """
    precision = "bf16" if hyper.dtype == "bf16" else "no"
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=12))
    accelerator = Accelerator(mixed_precision=precision, cpu=cpu, kwargs_handlers=[patience])
    sharded.shard_on_cpus(accelerator)
    sharded.leave_numbers_to_autocast(accelerator)
    return accelerator


def train(run: Run, accelerator: Accelerator, resume_from: Path | None = None) -> Path:
    """Run the stage to its end; returns the folder with the trained model, `OUT/final`.

    `resume_from`: a checkpoint folder, from which `run.model` was loaded.  The last step is kept
    as a checkpoint too, so that the run can be made longer.  Raises UserError when there is
    nothing to learn, the loss stops being finite, the disk is full, or (strict) a sample cannot
    be used.
    """
    hyper, total = run.hyper, run.hyper.total_steps(len(run.examples.lengths))
    if accelerator.is_main_process:
        trainer_state.clear_leftovers(run.out)
    model, optimizer = prepare(run, accelerator, resume_from)
    progress = Progress()
    if resume_from is not None:
        saved = trainer_state.restore(resume_from, model, optimizer.optimizer, accelerator)
        progress = Progress(**saved)
    if total < progress.step:
        raise UserError(
            f"{run.out} has trained for {progress.step} steps, more than {total}; "
            "give more --steps or --epochs"
        )
    log = StepLog(run, progress.step, total, accelerator)
    began = time.perf_counter()
    for batches in steps(run, progress.step, total, accelerator):
        lr = set_learning_rate(optimizer, hyper, progress.step, total)
        loss, norm, counts = update(
            model, optimizer, batches, run.objective, hyper.clip_norm, accelerator
        )
        _account(run, progress, batches, counts, accelerator)
        seconds = time.perf_counter() - began
        progress.seconds += seconds
        _refuse_nothing_to_learn(run, progress, total)
        measured = evaluate(run, model, progress.step, total, accelerator)
        log.write(progress, loss, lr, norm, counts, seconds, measured)
        if progress.step % hyper.save_every == 0 or progress.step == total:
            trainer_state.save_checkpoint(
                run.out,
                model,
                run.processor,
                optimizer.optimizer,
                asdict(progress),
                run.settings,
                accelerator,
                hyper,
            )
        began = time.perf_counter()
    with trainer_state.atomic_folder(run.out / "final", accelerator) as folder:
        parts = (folder, model, run.processor, accelerator, hyper)
        scores = trainer_state.evaluation_folder(run.out, progress.step) / "record.json"
        trainer_state.write_model(*parts, final=True, settings=run.settings, scores=scores)
    log.close(progress)
    return run.out / "final"


def prepare(
    run: Run, accelerator: Accelerator, resume_from: Path | None = None
) -> tuple[nn.Module, Any]:
    """Model and optimizer on their devices: what is trainable is free, LoRA in place."""
    hyper = run.hyper
    run.objective.prepare(run.model, run.processor, accelerator.device)
    freeze(run.model, run.stage)
    lora.check_packed(run.model, hyper)
    if hyper.lora:
        lora.attach(run.model, hyper)
        if resume_from is not None and not lora.packed(run.model):
            lora.restore(resume_from, run.model)
    if hyper.gradient_checkpointing:
        run.model.activation_checkpointing_enable()
        # checkpoints need no inputs with gradients; asked for them, frozen embeddings get a graph
        run.model.disable_input_require_grads()
    if hyper.compile:
        # block by block: they are alike, so one compilation serves all, for every length
        for block in run.model.language_model.blocks():
            block.compile(dynamic=True)
    return sharded.prepare(accelerator, run.model, build_optimizer(run.model, hyper))


def set_learning_rate(
    optimizer: torch.optim.Optimizer, hyper: Hyperparameters, step: int, total: int
) -> float:
    """Each group's rate for update number `step` (0-based); returns the language model's."""
    factor = SCHEDULES[hyper.schedule](step, total, hyper.warmup_ratio)
    for group in optimizer.param_groups:
        group["lr"] = factor * group["peak_lr"]
    return factor * hyper.lr


def evaluate(
    run: Run, model: nn.Module, step: int, total: int, accelerator: Accelerator
) -> dict[str, Any]:
    """What a step's line says of held-out samples and the benchmark; empty where none is due."""
    asked, hyper = run.evaluation, run.hyper
    found: dict[str, Any] = {}
    if asked is None or not asked.due(step, total):
        return {}
    if asked.examples is not None:
        pad = run.processor.tokenizer.pad_token_id
        with products_of(accelerator):
            found["eval_loss"] = mean_loss(model, asked.examples, pad, hyper, accelerator)
            if asked.shown is not None:
                with torch.no_grad(), without_dropout(model):
                    gains = picture_gains(model, asked.shown, pad, hyper, accelerator)
                found["eval_picture_gains"] = gains
    if asked.command is not None:
        found["eval_scores"] = benchmark(
            asked.command, run.out, step, model, run.processor, hyper, accelerator
        )
    return found


def try_one_update(run: Run, accelerator: Accelerator) -> str:
    """One update by the first micro-batch of each process; -> what it took, one line of text.

    Nothing is written.  Raises UserError where an epoch has no label, as `train` does.
    """
    hyper, total = run.hyper, run.hyper.total_steps(len(run.examples.lengths))
    model, optimizer = prepare(run, accelerator)
    set_learning_rate(optimizer, hyper, 0, total)
    progress = Progress()
    for batch in micro_batches(run, 0, total, accelerator)[0]:
        loss, norm, counts = update(
            model, optimizer, [batch], run.objective, hyper.clip_norm, accelerator
        )
        _account(run, progress, [batch], counts, accelerator)
        if loss is not None:
            break
        _refuse_nothing_to_learn(run, progress, total)
    return (
        f"one update made, nothing written: {counts['tokens']} tokens, {counts['labels']} labels, "
        f"loss {loss:.3f}, gradient norm {norm:.3f}, "
        f"peak memory {peak_memory(accelerator.device) / 2**30:.2f} GiB"
    )


def steps(run: Run, first: int, total: int, accelerator: Accelerator) -> Iterator[list[Batch]]:
    """This process's micro-batches of each step from `first` on."""
    batches, rounds = micro_batches(run, first, total, accelerator)
    for _ in range(first, total):
        yield [next(batches) for _ in range(rounds)]


def micro_batches(
    run: Run, first: int, total: int, accelerator: Accelerator
) -> tuple[Iterator[Batch], int]:
    """This process's micro-batches from step `first` on, and how many a step has."""
    order = MicroBatchOrder(
        run.examples.lengths,
        run.hyper.batch_size,
        run.hyper.micro_batch,
        run.hyper.seed,
        (first, total),
        accelerator.num_processes,
        accelerator.process_index,
    )
    loader = DataLoader(
        MicroBatches(
            run.examples,
            run.processor.tokenizer.pad_token_id,
            masked=run.model.language_model.weighs_padding,
        ),
        sampler=order,
        batch_size=None,
        num_workers=run.workers,
        pin_memory=accelerator.device.type == "cuda",
        generator=torch.Generator(),  # else each start draws from the state that dropout uses
    )
    return iter(loader), order.rounds


def update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[Batch],
    objective: Objective,
    clip_norm: float,
    accelerator: Accelerator,
) -> tuple[float | None, float | None, dict[str, Any]]:
    """One optimizer step; -> (mean loss per scored token, gradient norm, counts of the batch).

    A global batch without a label makes no step, since weight decay and moments would still move
    the weights; its loss and norm are None.
    """
    counts = _count(batches, objective, accelerator)
    if not counts["labels"]:
        return None, None, counts
    scored = counts["labels"]
    total_loss = torch.zeros((), device=accelerator.device)
    for number, batch in enumerate(batches):
        last = number == len(batches) - 1
        together = nullcontext() if last else accelerator.no_sync(model)
        with together, products_of(accelerator):
            loss = objective(model, batch, accelerator.device) / scored
            # DDP and FSDP average over processes, the batch's loss is a sum over them
            accelerator.backward(loss * accelerator.num_processes)
        total_loss += loss.detach()
    trainable = [p for group in optimizer.param_groups for p in group["params"]]
    norm = float(accelerator.clip_grad_norm_(trainable, clip_norm))
    mean_loss = float(accelerator.reduce(total_loss, "sum"))
    if not (math.isfinite(mean_loss) and math.isfinite(norm)):
        raise UserError(f"loss {mean_loss}, gradient norm {norm}: training diverged; lower --lr")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return mean_loss, norm, counts


def _count(batches: list[Batch], objective: Objective, accelerator: Accelerator) -> dict[str, Any]:
    """Of the global batch: scored tokens as the objective counts, tokens, samples cut, left out."""
    local = [
        sum(objective.count(batch) for batch in batches),
        sum(batch.n_tokens for batch in batches),
        sum(batch.n_truncated for batch in batches),
        sum(len(batch.skipped) for batch in batches),
    ]
    if accelerator.num_processes > 1:
        sums = torch.tensor(local, dtype=torch.float64, device=accelerator.device)
        local = accelerator.reduce(sums, "sum").tolist()
    numbers = (int(n) if n == int(n) else n for n in local)  # an objective may count in parts
    return dict(zip(("labels", "tokens", "truncated", "skipped"), numbers, strict=True))


def _account(
    run: Run,
    progress: Progress,
    batches: list[Batch],
    counts: dict[str, Any],
    accelerator: Accelerator,
) -> None:
    """Add a global batch to `progress`, the same on all processes. UserError where it is strict."""
    progress.step += 1
    progress.tokens += counts["tokens"]
    progress.without_labels += not counts["labels"]
    progress.truncated += counts["truncated"]
    skipped = [pair for batch in batches for pair in batch.skipped]
    if counts["skipped"]:  # so told to all processes: each takes part
        skipped = gather_object(skipped)
    for name, reason in skipped:
        if run.strict:
            raise UserError(f"{name}: {reason}; fix it or run without --strict")
        progress.skipped[reason] = progress.skipped.get(reason, 0) + 1
        if accelerator.is_main_process:
            tqdm.write(f"skipped {name}: {reason}")


def _refuse_nothing_to_learn(run: Run, progress: Progress, total: int) -> None:
    """Raise UserError where a whole epoch, or the whole run, had no label in it."""
    epoch = -(-len(run.examples.lengths) // run.hyper.batch_size)
    if progress.step == progress.without_labels >= min(epoch, total):
        reasons = ", ".join(f"{count} {why}" for why, count in progress.skipped.items())
        raise UserError(
            f"nothing to learn: the first {progress.step} batches hold no answer "
            f"({reasons or 'no labels'}); raise --max-length, or check --data"
        )


class StepLog:
    """`OUT/train.jsonl`, the progress bar and, if asked for, TensorBoard; main process only."""

    def __init__(self, run: Run, first: int, total: int, accelerator: Accelerator):
        self.active = accelerator.is_main_process
        if not self.active:
            return
        self.device = accelerator.device
        path = run.out / "train.jsonl"
        _cut_log(path, first)
        self.out = run.out
        self.file = path.open("a", buffering=1)  # one line at a time reaches the disk
        self.bar = tqdm(total=total, initial=first, desc=run.stage.name, unit="step")
        self.board = _tensorboard(run.out) if run.tensorboard else None
        self.wandb = _wandb(run) if run.wandb else None

    def write(
        self,
        progress: Progress,
        loss: float | None,
        lr: float,
        norm: float | None,
        counts: dict[str, int],
        seconds: float,
        measured: dict[str, Any],
    ) -> None:
        """One step, which took `seconds`: a JSON line; loss, speed and memory on the bar."""
        if not self.active:
            return
        line = {
            "step": progress.step,
            "loss": loss,
            "lr": lr,
            "grad_norm": norm,
            "tokens": progress.tokens,
            "labels": counts["labels"],
            "tokens_per_s": round(counts["tokens"] / seconds, 1),
            "peak_mem_bytes": peak_memory(self.device),
            **measured,
        }
        self.file.write(json.dumps(line) + "\n")
        self.bar.set_postfix(
            {
                "loss": "no labels" if loss is None else f"{loss:.3f}",
                "tok/s": f"{line['tokens_per_s']:.0f}",
                "mem": f"{line['peak_mem_bytes'] / 2**30:.1f}G",
            },
            refresh=False,
        )
        self.bar.update()
        if self.wandb is not None:
            self.wandb.log(line, step=progress.step)
        if self.board is not None:
            for name in ("loss", "lr", "grad_norm", "tokens_per_s", "eval_loss"):
                if line.get(name) is not None:
                    self.board.add_scalar(name, line[name], progress.step)
            for name, score in (line.get("eval_scores") or {}).items():
                self.board.add_scalar(name, score, progress.step)

    def close(self, progress: Progress) -> None:
        """Finish the bar and the files; say what was cut or left out."""
        if not self.active:
            return
        self.bar.close()
        self.file.close()
        if self.board is not None:
            self.board.close()
        if self.wandb is not None:
            self.wandb.finish()
        draw([self.out], self.out / "loss.png")
        (self.out / "summary.json").write_text(json.dumps(asdict(progress), indent=2) + "\n")
        if progress.truncated or progress.skipped:
            print(
                f"{progress.truncated} samples cut at the maximum length, left out: "
                f"{progress.skipped or 'none'}"
            )
        if progress.without_labels:
            print(f"{progress.without_labels} steps without a label made no update")


def _cut_log(path: Path, step: int) -> None:
    """Cut the log after `step`: what an interrupted run wrote later is redone."""
    kept = 0
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    for line in lines:
        if not line.endswith(b"\n") or json.loads(line)["step"] > step:
            break
        kept += len(line)
    if lines:
        os.truncate(path, kept)  # in one step: a kill leaves the lines before it


def require_packages(run_flags: dict[str, bool]) -> None:
    """Raise UserError where a flag (tensorboard, wandb, lora) is set and its package is absent."""
    for flag, package in (("tensorboard", "tensorboard"), ("wandb", "wandb"), ("lora", "peft")):
        # not imported: wandb makes temporary folders, which a dry run leaves alone
        if run_flags[flag] and importlib.util.find_spec(package) is None:
            raise missing(f"--{flag}", package)


def missing(flag: str, package: str) -> UserError:
    """The error for an optional package that a flag needs."""
    extra = "lora" if package == "peft" else "logs"
    return UserError(
        f"{flag} needs its package: pip install {package} (or 'vlmamba-harness[{extra}]')"
    )


def _tensorboard(out: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise missing("--tensorboard", "tensorboard") from error
    return SummaryWriter(str(out / "tensorboard"))


def _wandb(run: Run) -> Any:
    """A Weights & Biases run; WANDB_MODE=offline writes it to OUT/wandb, to be sent later."""
    try:
        import wandb
    except ImportError as error:
        raise missing("--wandb", "wandb") from error
    return wandb.init(project=run.wandb, name=run.out.name, dir=run.out, config=run.settings)


def peak_memory(device: torch.device) -> int:
    """Bytes: the GPU allocator's peak, or this process's largest resident size on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_bytes()
