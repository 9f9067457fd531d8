"""Which experts see pictures and which see words: a table of a model with experts.

    python -m vlmamba.experts --model runs/finetune/final --data finetune.json --images DIR

Of each layer of experts, the share of its choices that each expert gets, for image tokens and for
text tokens of conversations as in training, and how even that is (entropy over that of an even
choice: 1).  VL-MoE (2303.07226) reads its experts so.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from vlmamba import checkpoints
from vlmamba.data import llava
from vlmamba.data.examples import ConversationExamples
from vlmamba.data.images import PixelImages
from vlmamba.data.llava import SampleError
from vlmamba.models.mixers.experts import Experts
from vlmamba.models.vlm import VLMambaForConditionalGeneration
from vlmamba_core.cli import Parser, cli
from vlmamba_core.errors import UserError

MODALITIES = ("image", "text")


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="python -m vlmamba.experts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, help="a checkpoint with experts: folder or hub id[@revision]")
    add("--data", type=Path, required=True, help="LLaVA JSON")
    add("--images", type=Path, required=True, help="folder that the image paths are relative to")
    add("--limit", type=int, default=100, help="conversations (default: 100)")
    return parser


@cli
def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    args = build_parser().parse_args(argv)
    if args.limit < 1:
        raise UserError(f"--limit is {args.limit}; expected at least 1")
    for path in (args.data, args.images):
        if not path.exists():
            raise UserError(f"{path} is missing")
    model, processor = checkpoints.load(args.model)
    layers = expert_layers(model)
    if not layers:
        raise UserError(f"{args.model} has no experts; its layers are {model.config.mixer}")
    file = llava.LlavaFile(args.data)
    found = llava.index_samples(file, args.images, processor.num_image_tokens)
    source = PixelImages(args.images, processor)
    examples = ConversationExamples(file, found, processor, "vicuna_v1", 2048, source)
    counts = count(model, examples, min(args.limit, len(examples)))
    print("\n".join(lines(layers, counts)))
    return 0


def expert_layers(model: VLMambaForConditionalGeneration) -> dict[int, Experts]:
    """Number of the layer -> its experts."""
    layers = getattr(model.language_model, "layers", ())
    return {
        n: cast(Experts, block.mixer)
        for n, block in enumerate(layers)
        if isinstance(block.mixer, Experts)
    }


@torch.inference_mode()
def count(
    model: VLMambaForConditionalGeneration, examples: ConversationExamples, number: int
) -> dict[int, Tensor]:
    """Choices by layer: (2, E) int64, a row for each of MODALITIES."""
    layers = expert_layers(model)
    counts = {
        n: torch.zeros(2, layer.router.out_features, dtype=torch.int64)
        for n, layer in layers.items()
    }
    for position in range(number):
        try:
            example = examples[position]
        except SampleError as error:  # as training leaves it out
            print(f"left out: {examples.name(position)}: {error}", file=sys.stderr)
            continue
        pixels = None if example.images is None else example.images.to(model.device)
        model(input_ids=example.input_ids[None].to(model.device), pixel_values=pixels)
        is_text = (example.input_ids != model.config.image_token_id).long()
        for n, layer in layers.items():
            assert layer.chosen is not None  # it has just run
            for modality in (0, 1):
                chosen = layer.chosen[0].cpu()[is_text == modality].flatten()
                counts[n][modality] += torch.bincount(chosen, minlength=counts[n].shape[1])
    return counts


def evenness(counts: Tensor) -> float:
    """Entropy of the shares (E,) over log E; NaN where nothing was chosen."""
    shares = counts.double() / counts.sum()
    return float(torch.special.entr(shares).sum()) / math.log(max(2, len(counts)))


def lines(layers: dict[int, Experts], counts: dict[int, Tensor]) -> Iterator[str]:
    """The table, a row a layer and modality."""
    most = max(layer.router.out_features for layer in layers.values())
    yield "layer  tokens " + "".join(f"{f'expert {e}':>10}" for e in range(most)) + "   evenness"
    for n in layers:
        for name, of_it in zip(MODALITIES, counts[n], strict=True):
            shares = of_it.double() / of_it.sum()
            cells = "".join(f"{100 * float(share):>9.1f}%" for share in shares)
            yield f"{n:>5}  {name:<7}" + cells + f"{evenness(of_it):>11.2f}"


if __name__ == "__main__":
    raise SystemExit(main())
