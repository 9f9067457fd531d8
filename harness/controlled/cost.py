"""What a trained model costs: prefill and decode of its language model, and what it remembers.

    python -m harness.controlled.cost --model FOLDER --out cost.json --lengths 64,256,1024

Batch 1, random tokens, float32 on a CPU and bfloat16 on a GPU, medians of three.  Times are of this
machine and of whatever else it did; bytes and parameters are exact.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlmamba_core.cli import Parser, cli
from vlmamba_core.errors import UserError
from vlmamba_core.folder import write_atomically

REPEATS, STEPS = 3, 32


def measure(model: Any, lengths: Sequence[int]) -> dict[str, Any]:
    """Parameters, FLOPs a token, and of each length seconds and bytes of the state."""
    import torch

    from vlmamba.models.quantized import count_parameters

    lm, generator = model.language_model, torch.Generator().manual_seed(0)
    embedding = model.get_input_embeddings()
    points = []
    with torch.inference_mode():
        for length in lengths:
            ids = torch.randint(len(embedding.weight), (1, length), generator=generator)
            embedded = embedding(ids.to(model.device))
            made: list[Any] = []
            prefill = _median(lambda: made.append(lm(embedded)[1]), model.device)  # noqa: B023
            points.append(
                {
                    "tokens": length,
                    "prefill_s": prefill,
                    "decode_s": _decode(lm, embedded[:, -1], made[-1], model.device),
                    "state_bytes": made[0].nbytes,
                }
            )
    longest = max(lengths)
    return {
        "language_model_parameters": count_parameters(lm),
        "connector_parameters": count_parameters(model.connector),
        "flops_per_token": {str(n): lm.flops(n) / n for n in (min(lengths), longest)},
        "connector_flops": model.connector.flops(),
        "device": model.device.type,
        "points": points,
    }


def _decode(lm: Any, token: Any, state: Any, device: Any) -> float:
    """Seconds of one step behind `state`, which is consumed."""
    lm.step(token, state)

    def steps() -> None:
        for _ in range(STEPS):
            lm.step(token, state)

    return _median(steps, device) / STEPS


def _median(call: Callable[[], Any], device: Any) -> float:
    """Seconds of a call, the median of REPEATS after one that is not counted."""
    import torch

    seconds = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


@cli
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = Parser(prog="python -m harness.controlled.cost", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lengths", default="64,256,1024")
    args = parser.parse_args(argv)
    try:
        lengths = [int(length) for length in args.lengths.split(",")]
    except ValueError as error:
        raise UserError(f"--lengths {args.lengths!r}: expected numbers of tokens") from error
    from harness.models.vlmamba import choose_device, choose_dtype
    from vlmamba import checkpoints

    device = choose_device("auto")
    model, _ = checkpoints.load(args.model, dtype=choose_dtype("auto", device), device=device)
    write_atomically(args.out, json.dumps(measure(model, lengths), indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
