"""A local page to ask a model about pictures, and an OpenAI-compatible endpoint beside it.

    python -m vlmamba.serve                     # http://127.0.0.1:8000, the bundled model
    python -m vlmamba.serve --model runs/finetune/final --port 8080
    curl http://127.0.0.1:8000/v1/models
    python -m harness.run --tasks pope --model api:http://127.0.0.1:8000/v1,model=nano

It listens on this machine only unless --host says otherwise; there is no password. Requests that
wait together are one batch, and answers do not depend on it. Needs the extra `serve`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from vlmamba.ask import DTYPES
from vlmamba_core.cli import Parser, cli
from vlmamba_core.errors import UserError
from vlmamba_core.names import choose_dtype


def build_parser() -> Parser:
    """The command line of `vlmamba.serve`."""
    parser = Parser(
        prog="python -m vlmamba.serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="nano", help="nano (bundled), a checkpoint folder or a hub id")
    add("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    add("--port", type=int, default=8000, help="default: 8000")
    add("--batch-size", type=int, default=32, help="requests answered together (default: 32)")
    add("--max-body-mb", type=int, default=32, help="largest request in MiB (default: 32)")
    add("--max-prompt-tokens", type=int, default=32_768, help="longest prompt (default: 32768)")
    add("--dtype", default="auto", help="auto (as stored), fp32, bf16 or fp16")
    add("--device", help="cpu, cuda, ... (default: a GPU where there is one)")
    return parser


@cli
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    args = build_parser().parse_args(argv)
    args.dtype = choose_dtype(args.dtype, DTYPES)
    for name in ("port", "batch_size", "max_body_mb", "max_prompt_tokens"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    try:
        import fastapi  # noqa: F401
        import uvicorn
    except ImportError:
        raise UserError("serving needs: pip install 'vlmamba-harness[serve]'") from None
    from vlmamba.serving.app import MEBIBYTE, create_app

    engine = load_engine(args)
    app = create_app(
        engine,
        args.model,
        max_body=args.max_body_mb * MEBIBYTE,
        most_tokens=args.max_prompt_tokens,
    )
    print(f"http://{args.host}:{args.port} (Ctrl-C ends it)", file=sys.stderr, flush=True)
    options: dict[str, Any] = {"log_level": "warning", "timeout_keep_alive": 30}
    try:
        uvicorn.run(app, host=args.host, port=args.port, limit_concurrency=2048, **options)
    finally:
        engine.close()
    return 0


def load_engine(args: argparse.Namespace) -> Any:
    """The model with its thread. Raises UserError where it cannot be loaded."""
    import torch

    from vlmamba import checkpoints
    from vlmamba.serving.engine import Engine

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model, processor = checkpoints.load(args.model, dtype=args.dtype, device=device)
    return Engine(model, processor, args.batch_size)


if __name__ == "__main__":
    sys.exit(main())
