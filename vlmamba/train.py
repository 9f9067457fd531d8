"""Train VL-Mamba, one stage at a time (VL-Mamba's training section, LLaVA-1.5's recipe).

    python -m vlmamba.train --preset nano --stage text --data glosses.txt finetune.json --out T
    python -m vlmamba.train --preset nano --stage pretrain --init T/final \\
        --data pretrain.json --images DIR --out P
    python -m vlmamba.train --preset nano --stage finetune --init P/final \\
        --data finetune.json --images DIR --out F

On several GPUs: `accelerate launch -m vlmamba.train ...` with the same arguments; the global
batch, and so the loss curve, stays the same.  OUT receives config.json (everything resolved),
train.jsonl (one line a step), summary.json, checkpoints/ and final/ (for from_pretrained).
The same command with `--resume auto` goes on after a kill; with `--resume longer` and more --steps
or --epochs it also trains a finished run further, from its last checkpoint.
`--eval-data` measures the loss of held-out samples every `--eval-every` steps (with
`--eval-other-pictures` also with each other's pictures: vlmamba/training/picture_use.py),
`--eval-command` runs a benchmark then (vlmamba/training/evaluation.py); OUT/loss.png shows both
losses.
`--estimate` prints parameters, memory and FLOPs; `--dry-run` makes one update with one micro-batch
and writes nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers.utils import logging

from vlmamba import checkpoints
from vlmamba.image_layouts import most_tiles
from vlmamba.training import data_setup, init_model, loop, resume, sharded, trainer_state
from vlmamba.training.arguments import RunArguments
from vlmamba.training.estimate import estimate, table
from vlmamba.training.plan import Plan, resolve
from vlmamba_core.cli import cli
from vlmamba_core.errors import UserError
from vlmamba_core.folder import explain, lock_folder
from vlmamba_core.memory import keep_freed

FILES = {
    "final": "the trained model, as from_pretrained takes it, with its card",
    "config.json": "every setting, resolved",
    "train.jsonl": "a line a step: loss, rate, tokens a second, memory",
    "loss.png": "the loss curve",
    "summary.json": "steps, tokens, samples cut or left out; written when all is done",
    "checkpoints": "step-N: model, optimizer and random state, which --resume takes up. Once final "
    "is there they may be deleted, unless the run is to be made longer",
    "eval": "with --eval-data or --eval-command: samples, each step's record and log",
    "samples.npz": "which samples of --data are usable, for --resume",
    "tokens.u32": "the text's tokens in stage text, for --resume",
    "tensorboard": "with --tensorboard: its log",
    "wandb": "with --wandb: its log",
}
NOTE = "Without summary.json the run is not finished: the same command with --resume auto goes on."


@cli
def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags, then estimate, try one update, or train."""
    args, flags = RunArguments.parse(argv, __doc__)
    limit_kernel_caches()
    keep_freed()
    plan = resolve(args, flags)
    require_packages(plan)
    if args.estimate:
        if args.devices < 1:
            raise UserError(f"--devices is {args.devices}; expected at least 1")
        tiles = most_tiles(args.image_layout)
        found = estimate(plan.config, plan.stage, plan.hyper, tiles)
        print(table(found, plan.hyper, args.devices))
        return
    args.check_paths()
    if args.dry_run:
        dry_run(plan)
    else:
        run(plan)


def require_packages(plan: Plan) -> None:
    """Raise UserError at once where a flag's optional package is absent."""
    args = plan.args
    asked = {"tensorboard": args.tensorboard, "wandb": bool(args.wandb)}
    with_peft = bool(plan.hyper.lora) and not plan.config.quantized
    loop.require_packages(asked | {"lora": with_peft})


def limit_kernel_caches() -> None:
    """Bound what torch's CPU matrix kernels keep per shape; unbounded it grew by 36 MB a step.

    Read once, when the first such kernel runs.  Changes memory, not results.
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, "256")


def run(plan: Plan) -> None:
    """Train under the output folder's lock; the main process holds it for all."""
    logging.disable_progress_bar()  # of every saved checkpoint
    accelerator = loop.make_accelerator(plan.hyper, plan.args.cpu)
    with lock_folder(plan.args.folder) if accelerator.is_main_process else nullcontext():
        accelerator.print(f"model written to {train(plan, accelerator)}")


def dry_run(plan: Plan) -> None:
    """Build everything, make one update with one micro-batch a process; print what it took."""
    accelerator = loop.make_accelerator(plan.hyper, plan.args.cpu)
    at_once = plan.hyper.micro_batch * accelerator.num_processes
    hyper = replace(plan.hyper, batch_size=min(plan.hyper.batch_size, at_once))
    plan = replace(plan, hyper=hyper)
    model, processor = sharded.read_once(lambda: start(plan), accelerator)
    model.to(accelerator.device)
    data = data_setup.first_examples(plan, model, processor, accelerator)
    job = loop.Run(model, processor, data, plan.stage, hyper, Path(), {}, strict=plan.args.strict)
    accelerator.print(f"dry run: {loop.try_one_update(job, accelerator)}")


def start(plan: Plan) -> tuple[Any, Any]:
    """Model and processor before the first step."""
    args = plan.args
    if not args.tiny:
        init_model.check_init(plan.config, plan.stage, args.init)
    texts = list(args.tokenizer_data or args.data)
    model, processor = init_model.initial_model(
        plan.config, plan.stage, args.init, texts, plan.hyper.seed
    )
    processor.image_aspect_ratio = args.image_aspect_ratio
    processor.image_layout = args.image_layout
    processor.image_place = args.image_place
    return model, processor


def train(plan: Plan, accelerator: Accelerator) -> Path:
    """Build model and data and train what is left; returns the folder of the final model."""
    args, out = plan.args, plan.args.folder
    digests = resume.data_digests(args.data, accelerator)
    if resume.finished(out) and resume.keep_finished(plan, digests):
        return out / "final"
    resume_from = resume.checkpoint_to_resume(plan)
    if resume_from is not None:
        saved = trainer_state.read_state(resume_from)["settings"]
        resume.check_same_run(saved, plan, digests, resume_from)
        folder = str(resume_from)
        model, processor = sharded.read_once(
            lambda: checkpoints.load(folder, adapter=False), accelerator
        )
        # from the tokenizer, as where it is built
        plan.config.image_token_id = model.config.image_token_id
    else:
        model, processor = sharded.read_once(lambda: start(plan), accelerator)
    settings = resume.run_settings(plan, digests)
    if accelerator.is_main_process:
        (out / "summary.json").unlink(missing_ok=True)
        explain(out, "vlmamba.train", FILES, NOTE)
        (out / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    model.to(accelerator.device)
    resuming = resume_from is not None
    data = data_setup.build_examples(plan, model, processor, accelerator, digests, resuming)
    job = loop.Run(model, processor, data, plan.stage, plan.hyper, out, settings)
    job.workers, job.strict, job.tensorboard = args.workers, args.strict, args.tensorboard
    job.wandb = args.wandb
    job.evaluation = data_setup.held_out(plan, model, processor, accelerator)
    return loop.train(job, accelerator, resume_from)


if __name__ == "__main__":
    raise SystemExit(main())
