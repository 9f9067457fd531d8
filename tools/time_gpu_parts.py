"""Scan, step, prefill, decoding and training steps in bfloat16, beside what else a GPU has of them.

    python tools/time_gpu_parts.py --out results/gpu/parts.json           # one card with 80 GB
    python tools/time_gpu_parts.py --device cpu --tiny --out /tmp/parts.json

Ours with every scan backend that runs on the device; mamba-ssm's own functions and model where the
package is installed; transformers' Mamba; Pythia of the same size with SDPA and, where flash-attn
is installed, FlashAttention.  Then an update of each training stage at real size, SigLIP included,
with its peak memory.  Contenders alternate; medians.  A part that fails says why and the next one
runs.  Ends in one JSON line.  On a GPU: not run so far.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.speed import models, training, transformers_direct
from harness.speed.memory import Memory
from harness.speed.timing import Contender, Effort, side_by_side
from vlmamba.models.language import WrappedLM
from vlmamba.models.scan_backends.check import fault_of
from vlmamba.models.selective_scan import (
    resolve_backend,
    selective_scan,
    selective_scan_step,
    use_backend,
)
from vlmamba_core.errors import UserError, first_line
from vlmamba_core.folder import write_atomically
from vlmamba_core.names import SCAN_BACKENDS

WIDTHS = {"130m": 1536, "2.8b": 5120}  # d_inner
STATES, LENGTHS, ROWS = 16, (1024, 4096), (1, 16)
PROMPT, NEW_TOKENS, LAYERS = 1024, 32, 27  # SigLIP so400m's layers
STAGES = ("pretrain", "finetune")
EFFORT = Effort(least=2, most=20, seconds=2.0, patience=20.0)
ONCE = Effort(least=1, most=1, seconds=0.0)
FLASH = "flash_attention_2"
TINY: dict[str, Any] = {"WIDTHS": {"130m": 8}, "LENGTHS": (16,), "ROWS": (2,), "PROMPT": 16}
TINY |= {"NEW_TOKENS": 2, "LAYERS": 1, "EFFORT": ONCE}

Runs = dict[str, Callable[[], object]]
Part = tuple[str, Callable[[], Mapping[str, Any]]]


def backends(device: str) -> list[str]:
    """Scan backends that run on the device; the slow reference is none of them."""
    found = []
    for name in SCAN_BACKENDS:
        if name in ("auto", "reference"):
            continue
        try:
            resolved = resolve_backend(name, device)
        except UserError:
            continue
        fault = fault_of(resolved, torch.device(device)) if resolved == "triton" else ""
        if fault:  # one that computes something else is not timed
            print(f"{resolved} is left out: {fault}", file=sys.stderr)
        else:
            found.append(resolved)
    return list(dict.fromkeys(found))


def installed(name: str, attribute: str) -> Any:
    """What a module of an optional package holds; None without the package or its kernels."""
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        return None
    try:
        return getattr(importlib.import_module(name), attribute)
    except ImportError:
        return None


def medians(runs: Runs, device: str) -> dict[str, float]:
    """Seconds of one run of each, in alternation."""
    timings = side_by_side({name: Contender(run) for name, run in runs.items()}, EFFORT, device)
    return {name: timing.median_s for name, timing in timings.items()}


def scan_inputs(width: int, shape: Sequence[int], device: str) -> list[Tensor]:
    """u, delta, A, B, C, D, z, delta_bias of these rows and steps, or of one token each."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device, torch.bfloat16)

    a = -torch.arange(1.0, STATES + 1).repeat(width, 1).to(device)
    u, delta, z = (normal(*shape, width) for _ in range(3))
    b, c = normal(*shape, STATES), normal(*shape, STATES)
    return [u, delta, a, b, c, normal(width).float(), z, normal(width).float() - 4]


def scan(width: int, length: int, device: str, train: bool) -> Mapping[str, Any]:
    """Seconds of a scan over (1, length, width), or of it and its gradients."""
    x = scan_inputs(width, (1, length), device)
    first = [t.transpose(1, 2).contiguous() if t.ndim == 3 else t for t in x]
    calls: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
        name: (lambda *t, n=name: selective_scan(*t, backend=n)[0], x) for name in backends(device)
    }
    if own := device != "cpu" and installed(
        "mamba_ssm.ops.selective_scan_interface", "selective_scan_fn"
    ):
        calls["mamba-ssm"] = (lambda *t: own(*t, delta_softplus=True), first)
    if not train:
        with torch.inference_mode():
            return medians({n: functools.partial(f, *t) for n, (f, t) in calls.items()}, device)
    return medians({name: with_gradients(*call) for name, call in calls.items()}, device)


def with_gradients(function: Callable[..., Tensor], x: Sequence[Tensor]) -> Callable[[], object]:
    """The function and the gradients of all its tensors."""
    leaves = [t.clone().requires_grad_() for t in x]
    grad = torch.ones_like(x[0])
    return lambda: torch.autograd.grad(function(*leaves), leaves, grad)


@torch.inference_mode()
def step(width: int, rows: int, device: str) -> Mapping[str, Any]:
    """Seconds of one token of each row."""
    x = scan_inputs(width, (rows,), device)
    state = torch.zeros(rows, width, STATES, device=device)
    runs: Runs = {
        name: functools.partial(selective_scan_step, state, *x, backend=name)
        for name in backends(device)
    }
    name = "mamba_ssm.ops.triton.selective_state_update"
    if own := device != "cpu" and installed(name, "selective_state_update"):
        u, delta, a, b, c, d, z, bias = x
        more = {"D": d, "z": z, "dt_bias": bias, "dt_softplus": True}
        runs["mamba-ssm"] = lambda: own(state, u, delta, a, b, c, **more)
    return medians(runs, device)


@torch.inference_mode()
def language(size: str, device: str, tiny: bool) -> Mapping[str, Any]:
    """Seconds of a prompt, and of a token after it, of each model; built one after the other."""
    found: dict[str, dict[str, float]] = {}
    for name, calls in contenders(size, device, tiny):
        found[name] = medians(calls, device)
        if "decode" in found[name]:
            found[name]["decode"] /= NEW_TOKENS
        free()
    return found


def contenders(size: str, device: str, tiny: bool) -> Iterator[tuple[str, Runs]]:
    """(name, {"prefill", "decode"}) of each model with random weights."""
    ids = torch.randint(2, 1000, (1, PROMPT), generator=torch.Generator().manual_seed(0)).to(device)
    pythia = {"130m": "pythia-160m"}.get(size, f"pythia-{size}")
    build = functools.partial(models.build, tiny=tiny, dtype=torch.bfloat16, device=device)
    model = build(f"vl-mamba-{size}")
    for backend in backends(device):
        with use_backend(backend):
            yield f"VL-Mamba, {backend}", own_calls(model, ids)
    del model
    yield "transformers Mamba", transformers_calls(build(f"transformers-mamba-{size}"), ids)
    flash = device != "cpu" and installed("flash_attn", "flash_attn_func") is not None
    for attention in ("sdpa", *[FLASH] * flash):
        model = build(pythia)
        inner(model).set_attn_implementation(attention)
        yield f"{pythia}, {attention}", transformers_calls(model, ids)
    if device != "cpu":
        yield from mamba_ssm_model(size, ids)


def own_calls(model: Any, ids: Tensor) -> Runs:
    """Ours: the embeddings and the model, then greedy tokens from the state behind the prompt."""
    logits, cache = models.prefill(model, models.embed(model, ids))

    def decode() -> None:
        token = logits.argmax(-1)
        for _ in range(NEW_TOKENS):
            token = models.step(model, token, cache).argmax(-1)

    return {"prefill": lambda: models.prefill(model, models.embed(model, ids)), "decode": decode}


def transformers_calls(model: Any, ids: Tensor) -> Runs:
    """The same of a model of transformers, as its users call it."""
    lm = inner(model)
    embedding = lm.get_input_embeddings()
    logits, cache = transformers_direct.prefill(lm, embedding(ids))

    def decode() -> None:
        token = logits.argmax(-1)
        for _ in range(NEW_TOKENS):
            token = transformers_direct.step(lm, token, cache).argmax(-1)
        transformers_direct.crop(cache, ids.shape[1])

    return {"prefill": lambda: transformers_direct.prefill(lm, embedding(ids)), "decode": decode}


def mamba_ssm_model(size: str, ids: Tensor) -> Iterator[tuple[str, Runs]]:
    """mamba-ssm's own language model: a prompt, and that with its generate() by CUDA graphs.

    Nothing where the package is not installed.
    """
    build = installed("mamba_ssm.models.mixer_seq_simple", "MambaLMHeadModel")
    config = installed("mamba_ssm.models.config_mamba", "MambaConfig")
    if build is None or config is None:
        return
    shape = models.BASELINES[f"transformers-mamba-{size}"]
    sizes = {"d_model": shape["hidden_size"], "n_layer": shape["num_hidden_layers"]}
    told = config(**sizes, vocab_size=shape["vocab_size"])
    model = build(told, device=ids.device, dtype=torch.bfloat16).eval()
    length = PROMPT + NEW_TOKENS
    yield (
        "mamba-ssm",
        {
            "prefill": lambda: model(ids, num_last_tokens=1).logits,
            "prefill and decode": lambda: model.generate(ids, max_length=length, cg=True),
        },
    )


def inner(model: Any) -> Any:
    """transformers' own model inside a baseline."""
    assert isinstance(model.language_model, WrappedLM)
    return model.language_model.model


def update(size: str, stage: str, device: str, tiny: bool) -> Mapping[str, Any]:
    """Seconds of an update of one sample with its picture, and the most memory held.

    The encoder is run, layers are recomputed in the backward pass; weights are bfloat16.
    """
    memory = Memory(device)
    memory.reset()
    model = models.build(
        f"vl-mamba-{size}",
        encoder_layers=LAYERS,
        tiny=tiny,
        dtype=torch.bfloat16,
        device=device,
    )
    make = training.stepper(model, checkpointing=True, stage=stage)
    side = model.config.vision_config.image_size
    pixels = torch.randn(1, 3, side, side, device=device)
    ids = training.sample(model)[1].to(device)
    losses = [make(None, ids)] if stage != "pretrain" else []

    def run() -> None:
        with torch.no_grad():
            features = model.encode_images(pixels)
        losses.append(make(features, ids))

    seconds = medians({"update": run}, device)["update"]
    tokens = model.config.num_patches + ids.shape[1]
    finite = all(torch.tensor(losses).isfinite().tolist())
    return {"seconds": seconds, "tokens": tokens, "peak_bytes": memory.peak(), "finite": finite}


def parts(device: str, tiny: bool) -> list[Part]:
    """(name, measurement) in order."""
    found: list[Part] = []
    for size, width in WIDTHS.items():
        for length in LENGTHS:
            for train in (False, True):
                kind = "scan training" if train else "scan"
                call = functools.partial(scan, width, length, device, train)
                found.append((f"{kind} {size} {length}", call))
        for rows in ROWS:
            found.append((f"step {size} {rows}", functools.partial(step, width, rows, device)))
        found.append((f"language {size}", functools.partial(language, size, device, tiny)))
        for stage in STAGES:
            call = functools.partial(update, size, stage, device, tiny)
            found.append((f"{stage} {size}", call))
    return found


def free() -> None:
    """Give back what the last part held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 1 where a part failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="shrink everything, for tests")
    parser.add_argument("--out", type=Path, default=Path("results/gpu/parts.json"))
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("this machine has no usable GPU; use --device cpu")
    before = {name: globals()[name] for name in TINY}
    globals().update(TINY if args.tiny else {})
    args.out.parent.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    try:
        for name, measure in parts(args.device, args.tiny):
            try:
                found[name] = dict(measure())
            except Exception as error:  # kernels of several packages: each fails in its own way
                found[name] = {"failed": f"{type(error).__name__}: {first_line(error, 300)}"}
            print(f"{name}: {json.dumps(found[name])}", flush=True)
            write_atomically(args.out, json.dumps(found, indent=2) + "\n")
            free()
    finally:
        globals().update(before)
    failed = [name for name, part in found.items() if "failed" in part]
    print(json.dumps({"parts": len(found), "failed": failed}))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
