"""Products of a sequence's rows and a weight on a CPU: y = x W^T + b by the faster library.

    y = product(x, weight, bias)
    chosen(torch.float32).library     # one of LIBRARIES: what a run should record

PyTorch gives float32 products to MKL, which takes half of an AMD processor's rate; oneDNN, which
comes with PyTorch too, takes more on either kind, but brings every weight into another order first.
`csrc/product.cpp`, for AVX-512, reads weights as they lie.  A processor without bfloat16 products
takes such numbers by float32's, and rounds after.  Which of them is fastest is measured at first
use (a fifth of a second) and kept in `$VLMAMBA_CACHE/products`, by processor, PyTorch,
threads and kernels.  Processes that start together take what one of them has measured; only on a
busy machine nothing is kept, and each measures for itself.

MKL and oneDNN sum in another order where there are few rows, and from some number of rows on in the
same one.  That number is measured too, and shorter inputs are filled up with zeros: what a row
becomes never depends on which rows stand beside it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmamba.models.scan_backends import build
from vlmamba_core.errors import UserError
from vlmamba_core.folder import lock_folder, write_atomically
from vlmamba_core.paths import cache_dir
from vlmamba_core.processor import processor_name

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
DTYPES = (torch.float32, torch.bfloat16)
ROUNDS = 20
NOISY = 1.5  # median over fastest: other work on the processors decides, nothing is kept
SHAPE = (256, 768, 1536)  # rows, width, outputs: what is timed
WEIGHTS = 12  # of that shape, in turn: in a model a weight comes from memory, not from the caches
STEADY_SHAPES = ((256, 4096), (512, 48))  # width and outputs whose bits are compared
MOST_ROWS = 32  # a library whose bits still change there is taken as it is


def _pytorch(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _kernels(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return build.kernels().product(x, weight, bias)


def _widened(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide = None if bias is None else bias.float()
    return F.linear(x.float(), weight.float(), wide).to(x.dtype)


LIBRARIES: dict[str, Product] = {
    "kernels": _kernels,
    "onednn": _onednn,
    "pytorch": _pytorch,
    "widened": _widened,
}


@dataclass(frozen=True)
class Choice:
    """The library for one dtype, and the number of rows from which a row's bits are its own."""

    library: str
    steady_rows: int
    gflop_per_s: dict[str, float]  # of every library that was tried


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(..., in) and (out, in) -> (..., out), as F.linear; without a gradient on a CPU faster."""
    if (
        x.device.type != "cpu"
        or torch.is_grad_enabled()
        or x.dtype != weight.dtype
        or x.dtype not in DTYPES
        or x.numel() == 0
        or weight.numel() == 0
        or torch.is_autocast_enabled("cpu")
    ):
        return F.linear(x, weight, bias)
    choice = chosen(x.dtype)
    run, width = LIBRARIES[choice.library], x.shape[-1]
    rows = x.numel() // width
    if rows >= choice.steady_rows:
        return run(x.contiguous(), weight, bias)
    filled = x.new_zeros(choice.steady_rows, width)
    filled[:rows] = x.reshape(rows, width)
    return run(filled, weight, bias)[:rows].reshape(*x.shape[:-1], len(weight))


def chosen(dtype: torch.dtype) -> Choice:
    """What was measured on this machine for a dtype and PyTorch's present number of threads."""
    return _chosen(dtype, torch.get_num_threads())


@functools.cache
def _chosen(dtype: torch.dtype, threads: int) -> Choice:
    known = {
        "timed": (ROUNDS, *SHAPE, WEIGHTS),
        "processor": processor_name(),
        "machine": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "threads": threads,
        "libraries": _there(dtype),
        "dtype": str(dtype).removeprefix("torch."),
    }
    digest = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]
    file = cache_dir() / "products" / f"{known['dtype']}-{threads}-{digest}.json"
    if (kept := _read(file)) is not None:
        return kept
    try:
        # one at a time: they would disturb each other's times, and choose differently
        with lock_folder(file.parent, wait=True):
            return _read(file) or _measured(file, known, dtype)
    except UserError:  # a cache that cannot be written: this process measures for itself
        return measure(dtype)[0]


def _measured(file: Path, known: dict[str, object], dtype: torch.dtype) -> Choice:
    """Measure, and keep it for all processes that come after; not what a busy machine measured."""
    choice, noisy = measure(dtype)
    if not noisy:
        with contextlib.suppress(UserError):
            write_atomically(file, json.dumps(known | asdict(choice), indent=2))
    return choice


def _read(file: Path) -> Choice | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        choice = Choice(**{name: content[name] for name in Choice.__dataclass_fields__})
    except (OSError, ValueError, KeyError, TypeError):  # none yet, or cut short
        return None
    return choice if choice.library in LIBRARIES else None


@torch.inference_mode()
def measure(dtype: torch.dtype) -> tuple[Choice, bool]:
    """Time every library, in turn, and find from which number of rows on its bits stay.

    Also whether the machine was too busy for the times to be trusted.
    """
    rows, width, outputs = SHAPE
    x, weight = _random(rows, width, dtype), _random(outputs, width, dtype)
    weights = [weight.clone() for _ in range(WEIGHTS)]
    runs: dict[str, list[float]] = {name: [] for name in _there(dtype)}
    for place in range(ROUNDS + 1):
        for number, (name, spent) in enumerate(runs.items()):
            weight = weights[(place + number * WEIGHTS // len(runs)) % WEIGHTS]
            began = time.perf_counter()
            LIBRARIES[name](x, weight, None)
            spent.append(time.perf_counter() - began)
    timed = {name: spent[1:] for name, spent in runs.items()}  # the first call prepares itself
    seconds = {name: min(spent) for name, spent in timed.items()}
    noisy = any(statistics.median(spent) > NOISY * seconds[name] for name, spent in timed.items())
    fastest = min(seconds, key=seconds.__getitem__)
    flops = 2 * rows * width * outputs
    rates = {name: round(flops / s / 1e9, 1) for name, s in seconds.items()}
    # rounded results hide most of the bits that change
    summed = torch.float32 if fastest == "widened" else dtype
    return Choice(fastest, steady_rows(LIBRARIES[fastest], summed), rates), noisy


def _there(dtype: torch.dtype) -> list[str]:
    """Of LIBRARIES, what this machine has for a dtype."""
    has = {
        "kernels": _has_kernels(dtype),
        # F.linear takes oneDNN itself for bfloat16
        "onednn": dtype == torch.float32 and torch.backends.mkldnn.is_available(),
        "pytorch": True,
        "widened": dtype == torch.bfloat16 and not build.has_bfloat16_products(),
    }
    return [name for name in LIBRARIES if has[name]]


def _has_kernels(dtype: torch.dtype) -> bool:
    module, x = build.kernels(), torch.zeros(1, 1, dtype=dtype)
    return module is not None and module.product(x, x, None) is not None


def steady_rows(run: Product, dtype: torch.dtype) -> int:
    """From which number of rows on a row's result is bit for bit the same; 1 where none is."""
    steady = 1
    for width, outputs in STEADY_SHAPES:
        x, weight = _random(MOST_ROWS + 1, width, dtype), _random(outputs, width, dtype)
        whole = run(x, weight, None)
        changed = [
            rows
            for rows in range(1, MOST_ROWS + 1)
            if not torch.equal(run(x[:rows], weight, None), whole[:rows])
        ]
        steady = max([steady, *(rows + 1 for rows in changed)])
    return steady if steady <= MOST_ROWS else 1


def _random(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)  # the process's own draws stay as they are
    return torch.randn(rows, width, generator=generator).to(dtype)
