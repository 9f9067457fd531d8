"""Time the paper's final model at its real size on this machine, with random weights.

    python tools/time_real_size.py                      # 2.8B and SigLIP, bfloat16: 8 GiB, minutes
    python tools/time_real_size.py --tiny

An image through encoder and connector, the tokens up to its end, a question of 24 tokens and one
step of its answer, each question alone and six at once behind one image.  Medians; ends in one JSON
line.  Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from harness.speed import models
from vlmamba.models.vlm import VLMambaForConditionalGeneration
from vlmamba_core.memory import keep_freed, peak_resident_bytes

WORDS, QUESTION, ROWS = 32, 24, (1, 6)  # tokens before the image; of a question; questions at once
LAYERS = 27  # of SigLIP so400m


def main() -> int:
    """Build the model, time its parts, print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="shrink every part, for a test")
    parser.add_argument("--repeats", type=int, default=5, help="of each part (default: 5)")
    arguments = parser.parse_args()
    keep_freed()
    torch.set_default_dtype(torch.bfloat16)  # 2.8 billion float32 numbers would not be needed
    layers = 2 if arguments.tiny else LAYERS
    began = time.perf_counter()
    model = models.build(
        "vl-mamba-2.8b", encoder_layers=layers, tiny=arguments.tiny, dtype=torch.bfloat16
    )
    found = {"build_s": time.perf_counter() - began}
    with torch.inference_mode():
        found |= {name: _median(run, arguments.repeats) for name, run in _parts(model).items()}
    found["parameters"] = sum(p.numel() for p in model.parameters())
    found["peak_resident_gib"] = peak_resident_bytes() / 2**30
    for name, value in found.items():
        print(f"{name:24}{value:12.4g}")
    print(json.dumps({name: float(f"{value:.4g}") for name, value in found.items()}))
    return 0


def _parts(model: VLMambaForConditionalGeneration) -> dict[str, Callable[[], object]]:
    side = model.config.vision_config.image_size
    pixels = torch.randn(1, 3, side, side)
    features = model.encode_images(pixels)
    language = model.language_model
    start = _words(model, 1, WORDS + model.connector(features).shape[1])
    _, after_image = language(start)
    parts: dict[str, Callable[[], object]] = {
        "encode_s": lambda: model.encode_images(pixels),
        "connector_s": lambda: model.connector(features),
        "prefill_s": lambda: language(start),
    }
    for rows in ROWS:
        state = after_image.select(torch.zeros(rows, dtype=torch.long))
        question, token = _words(model, rows, QUESTION), torch.full((rows,), 2)
        parts[f"question_{rows}_s"] = functools.partial(language, question, state)
        parts[f"step_{rows}_s"] = functools.partial(models.step, model, token, state.clone())
    return parts


def _words(model: VLMambaForConditionalGeneration, rows: int, length: int) -> Tensor:
    """Embeddings (rows, length, D) of some tokens."""
    ids = torch.randint(2, 1000, (rows, length), generator=torch.Generator().manual_seed(0))
    return model.get_input_embeddings()(ids)


def _median(run: Callable[[], object], repeats: int) -> float:
    run()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


if __name__ == "__main__":
    raise SystemExit(main())
