"""Save a model with int8 or int4 weights, rounded to nearest or with learned gains (QSLAW).

    python -m vlmamba.quantize --model nano --kind int8 --out nano-int8
    python -m vlmamba.quantize --model runs/finetune/final --kind int4 --out nano-int4 \\
        --data finetune.json --images DIR --steps 200

The language model's projections and head become whole numbers (vlmamba/models/quantized.py), packed
in model.safetensors; every command loads the folder.  With --data a gain for every group of 128
weights learns first, from the loss of conversations with and without pictures, all else frozen:
the scale-learning stage of QSLAW (2408.03735), as a step of its own.  `vlmamba.train --lora RANK`
with the folder as --init goes on from there; the whole numbers stay as they are.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlmamba import checkpoints
from vlmamba.data import llava
from vlmamba.data.collate import Batch, MicroBatches
from vlmamba.data.examples import ConversationExamples
from vlmamba.data.images import PixelImages
from vlmamba.models import learned_scale
from vlmamba.models.quantized import quantize
from vlmamba.models.vlm import VLMambaForConditionalGeneration
from vlmamba_core.cli import Parser, cli
from vlmamba_core.errors import UserError
from vlmamba_core.names import QUANTIZED, choose

COMPARED = 32  # conversations whose loss is printed before and after


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="python -m vlmamba.quantize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, help="a bundled name, folder or hub id[@revision]")
    add("--kind", default="int4", help=f"{', '.join(QUANTIZED)} (default: int4)")
    add("--out", type=Path, required=True, help="folder of the packed model")
    add("--data", type=Path, help="LLaVA JSON to learn gains from (default: none, nearest)")
    add("--images", type=Path, help="folder that the image paths are relative to")
    add("--template", default="vicuna_v1", help="vicuna_v1 (default) or plain, for captions")
    add("--steps", type=int, default=200, help="updates (default: 200)")
    add("--batch-size", type=int, default=8, help="conversations of an update (default: 8)")
    add("--lr", type=float, default=2e-3, help="of AdamW, constant (default: 2e-3)")
    add("--seed", type=int, default=0)
    return parser


@cli
def main(argv: Sequence[str] | None = None) -> int:
    """Quantize and save."""
    args = build_parser().parse_args(argv)
    args.kind = choose("kind of quantized weights", args.kind, QUANTIZED)
    _check(args)
    model, processor = checkpoints.load(args.model, dtype="float32")
    if model.config.quantized:
        raise UserError(f"{args.model} has {model.config.quantized} weights already")
    if args.data:
        _learn(model, processor, args)
    quantize(model.language_model, args.kind)  # what is packed already is left as it is
    model.config.quantized = args.kind
    model.untie_packed()
    model.save_pretrained(args.out)
    processor.save_pretrained(args.out)
    size = (args.out / "model.safetensors").stat().st_size
    print(f"written to {args.out}: {size / 2**20:.1f} MiB of weights")
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raise UserError for arguments that make no sense together."""
    for name in ("steps", "batch_size", "lr"):
        if not getattr(args, name) > 0:
            raise UserError(
                f"--{name.replace('_', '-')} is {getattr(args, name)}; expected above 0"
            )
    if args.out.exists() and any(args.out.iterdir() if args.out.is_dir() else [args.out]):
        raise UserError(f"--out {args.out} exists; give a new folder")
    if (args.data is None) != (args.images is None):
        raise UserError("--data and --images belong together")
    for path in (args.data, args.images):
        if path is not None and not path.exists():
            raise UserError(f"{path} is missing")
    if args.data and args.kind != "int4":
        raise UserError("gains are learned for groups of weights: --kind int4")


def _learn(
    model: VLMambaForConditionalGeneration, processor: Any, args: argparse.Namespace
) -> None:
    """Learn the gains and pack the blocks with them; prints the loss of the same conversations."""
    file = llava.LlavaFile(args.data)
    tokens = processor.num_image_tokens * processor.most_tiles
    found = llava.index_samples(file, args.images, tokens, template=args.template)
    source = PixelImages(args.images, processor)
    examples = ConversationExamples(file, found, processor, args.template, 2048, source)
    if not len(examples):
        raise UserError(f"{args.data} holds no usable sample: {found.describe()}")
    batches = MicroBatches(examples, processor.tokenizer.pad_token_id)
    compared = list(range(min(COMPARED, len(examples))))
    losses = {"as it was": _loss(model, batches, compared)}
    gains = learned_scale.attach(model.language_model, args.kind)
    losses["rounded to nearest"] = _loss(model, batches, compared)
    train_gains(model, gains, _order(batches, args), args.lr)
    losses["with learned gains"] = _loss(model, batches, compared)
    for name, loss in losses.items():
        print(f"loss {name}: {loss:.4f}")
    learned_scale.pack(model.language_model)


def _order(batches: MicroBatches, args: argparse.Namespace) -> Iterator[Batch]:
    """`steps` batches of conversations drawn by the seed."""
    drawn = random.Random(args.seed)
    everything = range(len(batches.examples.lengths))
    for _ in range(args.steps):
        yield batches[[drawn.choice(everything) for _ in range(args.batch_size)]]


def train_gains(
    model: VLMambaForConditionalGeneration,
    gains: list[nn.Parameter],
    batches: Iterator[Batch],
    lr: float,
) -> None:
    """One update of the gains a batch; everything else is frozen."""
    model.requires_grad_(False)
    for gain in gains:
        gain.requires_grad_(True)
    optimizer = torch.optim.AdamW(gains, lr=lr, weight_decay=0.0)
    model.train()
    for batch in batches:
        if batch.n_labels:
            model(**batch.inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    model.eval().requires_grad_(False)


@torch.inference_mode()
def _loss(
    model: VLMambaForConditionalGeneration, batches: MicroBatches, positions: Sequence[int]
) -> float:
    """Mean cross-entropy of the supervised tokens of these conversations."""
    total = labels = 0.0
    for position in positions:
        batch = batches[[position]]
        if batch.n_labels:
            total += float(model(**batch.inputs, logits_to_keep=1).loss) * batch.n_labels
            labels += batch.n_labels
    return total / max(1.0, labels)


if __name__ == "__main__":
    raise SystemExit(main())
