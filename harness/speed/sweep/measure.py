"""One point measured in this process: time, memory and energy of prefill and decoding.

Prefill is the language model from embeddings to the logits after the last token; time to first
token adds the connector, the embedding and the choice of the token.  Image features are given:
the vision encoder, the same in every model, is left out.  Weights are random, which changes no
time: no layer skips work by value.  Decoding is greedy, one step at a time over the model's cache.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch
from torch import Tensor

from harness.speed import machine, models
from harness.speed.certainty import OtherLoad
from harness.speed.energy import EnergyMeter
from harness.speed.memory import Memory
from harness.speed.sweep.points import Point, Settings
from harness.speed.sweep.subject import Subject, inputs, load, warm_up
from harness.speed.timing import QUICK, Effort, synchronize, use_device
from vlmamba.models.language import Cache

MOST_RUNS = 5


@torch.inference_mode()
def measure(point: Point) -> dict[str, Any]:
    """Everything that is known of a point afterwards; times in seconds, memory in bytes.

    prefill_s, ttft_s: every run; decode_s: every step (for the whole batch).  loaded_mem_bytes:
    with the model loaded; prefill_/decode_peak_mem_bytes: the most held at once during each.
    other_load_cores: cores that other processes kept busy meanwhile.
    """
    use_device(point.settings.device)
    memory, energy = Memory(point.settings.device), EnergyMeter(point.settings.device)
    subject = load(point)
    warm_up(subject, point)
    load_before, others = psutil.getloadavg()[0], OtherLoad()
    loaded = memory.reset()
    read = prefill(subject, point, energy)
    prefill_peak, state_bytes = memory.peak(), read.cache.nbytes
    memory.reset()
    decode_s, decode_j = decode(subject, read, point, energy)
    decode_peak = memory.peak()
    language_model = subject.model.language_model
    return {
        "weights": "random",
        "attention": models.attention(language_model),
        "prefill_s": read.prefill_s,
        "ttft_s": read.ttft_s,
        "decode_s": decode_s,
        "decode_tok_per_s": point.batch_size / statistics.median(decode_s),
        "state_bytes": state_bytes,
        "state_bytes_after_decode": read.cache.nbytes,
        "loaded_mem_bytes": loaded,
        "prefill_peak_mem_bytes": prefill_peak,
        "decode_peak_mem_bytes": decode_peak,
        "peak_mem_bytes": max(prefill_peak, decode_peak),
        "weight_bytes": models.weight_bytes(language_model),
        "prefill_energy_j": read.joules,
        "decode_energy_j_per_tok": decode_j and decode_j / (len(decode_s) * point.batch_size),
        "load_average": load_before,
        "other_load_cores": others.cores(),
        "prefill_flops": point.batch_size * models.prefill_flops(language_model, point.seq_len),
        "dtype": point.settings.dtype,
        **({"quantize": point.quantize} if point.quantize else {}),
        "threads": torch.get_num_threads(),
    }


@dataclass(frozen=True)
class Prefilled:
    """Seconds of every run, joules of one, and what the last left: first token (B,) and cache."""

    prefill_s: list[float]
    ttft_s: list[float]
    joules: float | None
    token: Tensor
    cache: Cache


def prefill(subject: Subject, point: Point, energy: EnergyMeter) -> Prefilled:
    """Repeats until settings.seconds are over, at least once: a long run needs no second one."""
    device = point.settings.device
    ids, features = inputs(subject, point, point.seq_len)
    prefill_s: list[float] = []
    ttft_s: list[float] = []
    if device != "cpu":  # kernels are compiled for lengths of other divisors, graphs for each one
        subject.prefill(models.embed(subject.model, ids, features))
        synchronize(device)
    joules = energy.joules()
    started = time.perf_counter()
    while True:
        synchronize(device)
        begin = time.perf_counter()
        embeds = models.embed(subject.model, ids, features)
        synchronize(device)
        embedded = time.perf_counter()
        logits, cache = subject.prefill(embeds)
        synchronize(device)
        read = time.perf_counter()
        token = logits.argmax(-1)
        synchronize(device)
        ttft_s.append(time.perf_counter() - begin)
        prefill_s.append(read - embedded)
        if len(ttft_s) == MOST_RUNS or time.perf_counter() - started > point.settings.seconds:
            break
        del embeds, logits, cache, token  # no two caches at once
    return Prefilled(prefill_s, ttft_s, energy.since(joules, len(ttft_s)), token, cache)


def decode(
    subject: Subject, read: Prefilled, point: Point, energy: EnergyMeter
) -> tuple[list[float], float | None]:
    """(seconds of every step, joules of all steps); the cache grows or changes in place."""
    token, steps = read.token, []
    joules = energy.joules()
    for _ in range(point.settings.decode):
        synchronize(point.settings.device)
        begin = time.perf_counter()
        token = subject.step(token, read.cache).argmax(-1)
        synchronize(point.settings.device)
        steps.append(time.perf_counter() - begin)
    return steps, energy.since(joules, 1)


def measure_machine(settings: Settings) -> dict[str, Any]:
    """The machine's limits, as `harness.speed.machine` measures them."""
    torch.set_num_threads(settings.threads)
    use_device(settings.device)
    if settings.tiny:
        machine.BUFFER_BYTES, machine.GEMM_SHAPES = 2**20, ((16, 16, 16), (8, 8, 8))
    effort = Effort(least=1, most=2, seconds=0) if settings.tiny else QUICK
    dtype = getattr(torch, settings.dtype)
    limits = asdict(machine.measure(effort, settings.device, dtype))
    return limits | machine.state(settings.device, dtype)
