"""The machine's own limits: the bandwidth of its memory and its rate of multiplying matrices.

Reading a prompt must multiply every weight with every token: `prefill_floor_s`. No implementation
in this dtype that runs the whole model can be faster, so a time divided by its floor says how much
is left to gain. (A generated token at batch 1 must read every weight once; what that takes is
measured beside it, in `language_model.decode`.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch

from harness.speed.timing import Contender, Effort, side_by_side
from vlmamba.models import products
from vlmamba_core.processor import processor_name

BUFFER_BYTES = 2**29  # larger than a core's share of any cache
GEMM_SHAPES = ((1024, 768, 3072), (2048, 2048, 2048))  # a 130M prefill's largest; a square one


@dataclass(frozen=True)
class Machine:
    """Rates measured with this process's threads: the best of some runs, which no load flatters.

    copy counts the bytes read and those written; read is a sum over a buffer; gemm is the faster
    of the libraries that `vlmamba.models.products` chooses from.
    """

    copy_bytes_per_s: float
    read_bytes_per_s: float
    gemm_flops_per_s: float
    gemm_bf16_flops_per_s: float = math.nan

    def prefill_floor_s(self, flops: float) -> float:
        """Seconds for the matrix products alone."""
        return flops / self.gemm_flops_per_s


@torch.inference_mode()
def measure(effort: Effort, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Machine:
    """Measure this machine (about 3 seconds on a CPU, 1 GiB of memory)."""
    source = torch.ones(BUFFER_BYTES // 4, device=device)
    target = torch.empty_like(source)
    moves = side_by_side(
        {"copy": Contender(lambda: target.copy_(source)), "read": Contender(source.sum)},
        effort,
        device,
    )
    return Machine(
        copy_bytes_per_s=2 * BUFFER_BYTES / min(moves["copy"].wall_s),
        read_bytes_per_s=BUFFER_BYTES / min(moves["read"].wall_s),
        gemm_flops_per_s=_product_rate(effort, device, dtype),
        gemm_bf16_flops_per_s=_product_rate(effort, device, torch.bfloat16),
    )


def _product_rate(effort: Effort, device: str, dtype: torch.dtype) -> float:
    """FLOPs a second of the best library and shape."""
    libraries = ("pytorch",) if device != "cpu" else tuple(products.chosen(dtype).gflop_per_s)
    return max(
        2 * m * k * n / min(side_by_side({"": Contender(run)}, effort, device)[""].wall_s)
        for m, k, n in GEMM_SHAPES
        for name in libraries
        for run in [_product(products.LIBRARIES[name], m, k, n, device, dtype)]
    )


def _product(
    run: products.Product, m: int, k: int, n: int, device: str, dtype: torch.dtype
) -> Callable[[], object]:
    x = torch.randn(m, k, device=device, dtype=dtype)
    weight = torch.randn(n, k, device=device, dtype=dtype)
    return lambda: run(x, weight, None)


def state(device: str, dtype: torch.dtype) -> dict[str, object]:
    """What a reader must know of the machine and its settings."""
    return {
        "processor": processor_name(),
        "cpu_count": psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "load_average": [round(x, 2) for x in psutil.getloadavg()],
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "dtype": str(dtype).removeprefix("torch."),
    }
