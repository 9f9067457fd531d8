"""One point of a profile, measured in a process of its own, so that nothing outlives its death.

    python -m harness.speed.sweep.worker POINT_AS_JSON     # or: machine TERMS_AS_JSON

Prints one line of JSON: {"status", "detail", "result"}.  `harness.speed.sweep.lengths` starts it.

Prefill is the language model from embeddings to the logits after the last token; time to first
token adds the connector, the embedding and the choice of the token.  Image features are given:
the vision encoder, the same on every side, is left out.  Weights are random, which changes no
time: no layer skips work by value.  Decoding is greedy, one step at a time over the model's cache.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from harness.speed.sweep.points import FAILED, OK, OUT_OF_MEMORY, Point, Terms

if TYPE_CHECKING:
    from torch import Tensor, nn

    from harness.speed.baselines import VLMBase

MOST_RUNS = 5
WARM_UP_TOKENS, WARM_UP_STEPS = 32, 2
EXHAUSTED = (
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "out of memory",
    "bad_alloc",
)


def measure(point: Point) -> dict[str, Any]:
    """Everything that is known of a point afterwards; times in seconds, memory in bytes.

    prefill_s, ttft_s: every run; decode_s: every step (for the whole batch).  loaded_mem_bytes:
    with the model loaded; prefill_/decode_peak_mem_bytes: the most held at once during each.
    """
    import torch

    terms, device = point.terms, point.terms.device
    memory: Memory = CudaMemory() if device.startswith("cuda") else ProcessMemory()
    energy = EnergyMeter(device)
    with torch.inference_mode():
        model = load(point)
        warm_up(model, point)
        loaded = memory.reset()
        prefill_s, ttft_s, first, cache, prefill_j = prefill(model, point, energy)
        prefill_peak, state = memory.peak(), _held(cache)
        memory.reset()
        decode_s, decode_j = decode(model, first, cache, point, energy)
        decode_peak = memory.peak()
    median_step_s = statistics.median(decode_s)
    return {
        "weights": "random",
        "attention": _attention(model),
        "prefill_s": prefill_s,
        "ttft_s": ttft_s,
        "decode_s": decode_s,
        "decode_tok_per_s": point.batch_size / median_step_s,
        "state_bytes": state,
        "state_bytes_after_decode": _held(cache),
        "loaded_mem_bytes": loaded,
        "prefill_peak_mem_bytes": prefill_peak,
        "decode_peak_mem_bytes": decode_peak,
        "peak_mem_bytes": max(prefill_peak, decode_peak),
        "weight_bytes": model.weight_bytes(),
        "prefill_flops": point.batch_size * prefill_flops(model, point.seq_len),
        "prefill_energy_j": prefill_j,
        "decode_energy_j_per_tok": decode_j and decode_j / (len(decode_s) * point.batch_size),
        "load_average": os.getloadavg()[0],
        "dtype": terms.dtype,
        "threads": torch.get_num_threads(),
    }


def load(point: Point) -> VLMBase:
    """The model, compiled where the sweep asks for it: the same two functions on every side."""
    import torch

    from harness.speed.baselines import build

    terms = point.terms
    torch.set_num_threads(terms.threads)
    model = build(
        point.model,
        image_tokens=terms.image_tokens or 1,
        tiny=terms.tiny,
        dtype=getattr(torch, terms.dtype),
        device=terms.device,
    )
    if terms.compile:
        model.prefill = torch.compile(model.prefill)  # type: ignore[method-assign]
        model.step = torch.compile(model.step)  # type: ignore[method-assign]
    return model


def inputs(model: VLMBase, point: Point, seq_len: int) -> tuple[Tensor, Tensor | None]:
    """(input_ids (B, T), image features (B, P, Dv) or None) of `seq_len` tokens together."""
    import torch

    generator = torch.Generator().manual_seed(0)
    patches = point.image_tokens if point.image_tokens < seq_len else 0
    shape = (point.batch_size, seq_len - patches)
    ids = torch.randint(1000, shape, generator=generator).to(point.terms.device)
    if not patches:
        return ids, None
    weight = next(model.connector.parameters())
    width = _linear_layers(model.connector)[0].in_features  # Dv: every connector begins with it
    features = torch.randn(point.batch_size, patches, width, generator=generator)
    return ids, features.to(weight.device, weight.dtype)


def warm_up(model: VLMBase, point: Point) -> None:
    """Kernels built, threads started: a short prompt and two steps, through the same calls."""
    tokens = min(point.seq_len, point.image_tokens + WARM_UP_TOKENS)
    logits, cache = model.prefill(model.embed(*inputs(model, point, tokens)))
    for _ in range(WARM_UP_STEPS):
        logits = model.step(logits.argmax(-1), cache)


def prefill(
    model: VLMBase, point: Point, energy: EnergyMeter
) -> tuple[list[float], list[float], Tensor, Any, float | None]:
    """(prefill_s, ttft_s of every run, first token (B,), cache, joules of a run).

    Repeats until terms.seconds are over, at least once: a long run needs no second one.
    """
    ids, features = inputs(model, point, point.seq_len)
    prefill_s: list[float] = []
    ttft_s: list[float] = []
    joules = energy.joules()
    started = time.perf_counter()
    while True:
        _synchronize(point)
        begin = time.perf_counter()
        embeds = model.embed(ids, features)
        _synchronize(point)
        embedded = time.perf_counter()
        logits, cache = model.prefill(embeds)
        _synchronize(point)
        read = time.perf_counter()
        token = logits.argmax(-1)
        _synchronize(point)
        ttft_s.append(time.perf_counter() - begin)
        prefill_s.append(read - embedded)
        if len(ttft_s) == MOST_RUNS or time.perf_counter() - started > point.terms.seconds:
            break
        del embeds, logits, cache, token  # no two caches at once
    return prefill_s, ttft_s, token, cache, energy.since(joules, len(ttft_s))


def decode(
    model: VLMBase, token: Tensor, cache: Any, point: Point, energy: EnergyMeter
) -> tuple[list[float], float | None]:
    """(seconds of every step, joules of all steps)."""
    steps: list[float] = []
    joules = energy.joules()
    for _ in range(point.terms.decode):
        _synchronize(point)
        begin = time.perf_counter()
        token = model.step(token, cache).argmax(-1)
        _synchronize(point)
        steps.append(time.perf_counter() - begin)
    return steps, energy.since(joules, 1)


def prefill_flops(model: VLMBase, tokens: int) -> float:
    """Multiplications and additions of one prompt's matrix products, two for a weight and token.

    The head counts at the last token only.  Attention adds, per layer, scores and mixing over the
    causal half: 2 * tokens**2 * width.  A selective scan is no matrix product and counts nothing.
    """
    linear = sum(layer.weight.numel() for layer in _linear_layers(model.language_model))
    config: Any = model.language_model.config
    embedding: Any = model.embedding
    head = embedding.weight.numel()
    layers = linear - head  # the head is one of them
    causal = 0 if _attention(model) is None else config.num_hidden_layers * config.hidden_size
    return 2.0 * (tokens * layers + head) + 2.0 * causal * tokens**2


def _linear_layers(module: nn.Module) -> list[nn.Linear]:
    from torch import nn

    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


def _attention(model: VLMBase) -> str | None:
    """transformers' attention function, such as "sdpa"; None for a model without attention."""
    config: Any = model.language_model.config
    if "mamba" in str(config.model_type):
        return None
    return getattr(config, "_attn_implementation", None)


def _held(cache: Any) -> int:
    from harness.speed.baselines import cache_bytes

    return cache_bytes(cache)


def _synchronize(point: Point) -> None:
    if point.terms.device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()


class Memory(Protocol):
    """Counts bytes; `reset` starts a new maximum and gives what is held now."""

    def reset(self) -> int: ...

    def peak(self) -> int: ...


class CudaMemory:
    """PyTorch's allocator on the current GPU."""

    def reset(self) -> int:
        """Bytes of tensors now."""
        import torch

        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def peak(self) -> int:
        """The most bytes of tensors since `reset`."""
        import torch

        return torch.cuda.max_memory_allocated()


class ProcessMemory:
    """Resident memory of this process, as Linux counts it.

    Where the kernel does not let a process reset its maximum, the maximum is that of its life.
    """

    def reset(self) -> int:
        """Resident bytes now; freed memory is given back first."""
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        return self._status("VmRSS")

    def peak(self) -> int:
        """The most resident bytes since `reset`."""
        return self._status("VmHWM")

    def _status(self, name: str) -> int:
        """A line of /proc/self/status in bytes; elsewhere the life's maximum."""
        file = Path("/proc/self/status")
        for line in file.read_text().splitlines() if file.exists() else ():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class EnergyMeter:
    """Joules of a GPU by NVML's counter (package nvidia-ml-py); None where there is none."""

    def __init__(self, device: str) -> None:
        self._read = _nvml_counter(device) if device.startswith("cuda") else None

    def joules(self) -> float | None:
        """The counter now."""
        return self._read() if self._read else None

    def since(self, before: float | None, runs: int) -> float | None:
        """Joules for each of `runs` since the counter stood at `before`."""
        now = self.joules()
        return None if now is None or before is None else (now - before) / runs


def _nvml_counter(device: str) -> Any:
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(int(device.partition(":")[2] or 0))
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # no package, no driver, a card without a counter: each its own class
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3


def measure_machine(terms: Terms) -> dict[str, float]:
    """The machine's limits, as `harness.speed.machine` measures them."""
    from dataclasses import asdict

    import torch

    from harness.speed import machine
    from harness.speed.timing import QUICK, Effort

    torch.set_num_threads(terms.threads)
    if terms.tiny:
        machine.BUFFER_BYTES, machine.GEMM_SHAPES = 2**20, ((16, 16, 16), (8, 8, 8))
    effort = Effort(least=1, most=2, seconds=0) if terms.tiny else QUICK
    dtype = getattr(torch, terms.dtype)
    limits = asdict(machine.measure(effort, terms.device, dtype))
    return limits | machine.state(terms.device, dtype)


@contextlib.contextmanager
def memory_limit(limit_bytes: int | None) -> Iterator[None]:
    """Refuse this process more data than `limit_bytes`, so that it fails before the machine does.

    Of a GPU's memory the allocator keeps count itself.
    """
    before = resource.getrlimit(resource.RLIMIT_DATA)
    if limit_bytes is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def outcome(point: Point) -> dict[str, Any]:
    """What the child prints: the result, or why there is none."""
    try:
        import transformers

        import harness.speed.baselines  # noqa: F401  # all code is loaded before memory is limited

        transformers.utils.logging.set_verbosity_error()
        limit = None if point.terms.device.startswith("cuda") else point.terms.memory_limit_bytes
        with memory_limit(limit):
            return {"status": OK, "detail": None, "result": measure(point)}
    except Exception as error:  # want of memory comes as many classes, also wrapped in others
        text = str(error).strip().partition("\n")[0][:300]
        exhausted = isinstance(error, MemoryError) or any(x in text.lower() for x in EXHAUSTED)
        if exhausted:
            return {"status": OUT_OF_MEMORY, "detail": text or "MemoryError", "result": None}
        return {"status": FAILED, "detail": f"{type(error).__name__}: {text}", "result": None}


def main(argv: list[str]) -> None:
    """Measure what the arguments say; see the module's text."""
    if argv[0] == "machine":
        print(json.dumps(measure_machine(Terms(**json.loads(argv[1])))))
    else:
        print(json.dumps(outcome(Point.from_json(argv[0])), allow_nan=False))


if __name__ == "__main__":
    main(sys.argv[1:])
