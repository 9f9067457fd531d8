"""Make a VL-Mamba checkpoint of a published Mamba VLM.

    python -m vlmamba.convert cobra cobra+3b --out runs/cobra
    python -m vlmamba.convert cobra cobra+3b/checkpoints/latest-checkpoint.pt --out runs/cobra \\
        --encoder dinov2=FOLDER --encoder siglip=FOLDER --tokenizer FOLDER
    python -m harness.run --model runs/cobra --tasks pope
    python -m vlmamba.ask photo.jpg "What is it?" --model runs/cobra

Every tensor is accounted for: a missing, unexpected or ill-shaped one is an error that names it.
Without a network, encoders and tokenizer are folders too. Nothing in the files is executed. The
prompt around a question, and how a picture is shown, become those of the system.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vlmamba_core.cli import Parser, cli
from vlmamba_core.errors import UserError
from vlmamba_core.names import choose

DTYPES = ("float32", "bfloat16", "float16")


def build_parser() -> Parser:
    """The command line of `vlmamba.convert`."""
    from vlmamba.convert import SYSTEMS

    systems = "\n".join(f"  {system.name:<10} {system.about}" for system in SYSTEMS.values())
    parser = Parser(
        prog="python -m vlmamba.convert",
        description=f"{__doc__}\nSystems:\n{systems}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("system", help=", ".join(SYSTEMS))
    add("source", help="the checkpoint: its folder, its file, or a hub id[@REVISION]")
    add("--out", type=Path, required=True, help="folder to write, which is not there yet")
    add(
        "--encoder",
        action="append",
        default=[],
        metavar="NAME=FOLDER_OR_ID",
        help="timm weights of an encoder that is not in the checkpoint (default: timm's hub ids)",
    )
    add("--tokenizer", metavar="FOLDER_OR_ID", help="default: the one that the system names")
    add("--dtype", help=f"{', '.join(DTYPES)} (default: the language model's)")
    return parser


@cli
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    import torch

    from vlmamba.convert import SYSTEMS, convert

    args = build_parser().parse_args(argv)
    system = SYSTEMS[choose("system", args.system, SYSTEMS)]
    encoders = dict(_pair(text) for text in args.encoder)
    dtype = getattr(torch, choose("dtype", args.dtype, DTYPES)) if args.dtype else None
    config = convert(system, args.source, args.out, encoders, args.tokenizer, dtype)
    print(
        f"{args.out}: {config.n_layer} layers of width {config.hidden_size}, "
        f"{config.num_image_tokens} tokens a picture, connector {config.connector}"
    )
    return 0


def _pair(text: str) -> tuple[str, str]:
    name, equals, place = text.partition("=")
    if not (name and equals and place):
        raise UserError(f"--encoder {text}; expected NAME=FOLDER_OR_ID")
    return name, place


if __name__ == "__main__":
    sys.exit(main())
