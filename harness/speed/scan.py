"""The selective scan: VL-Mamba's against transformers' loop over time and mamba-ssm's reference.

All get the same numbers, each in its own memory layout: VL-Mamba's (B, L, Di), others (B, Di, L).
Shapes: B batch, L steps, Di channels, N states.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers.models.mamba.modeling_mamba import mamba_selective_scan

from harness.speed.timing import VL_MAMBA, Comparison, Contender, Effort, side_by_side
from vlmamba.models.selective_scan import resolve_backend, selective_scan

CHANNELS, STATES = 1536, 16
FORWARD_SHAPES = tuple((batch, length) for batch in (1, 4) for length in (256, 1024, 4096))
TRAIN_SHAPES = ((1, 1024), (4, 1024))
ERROR_SHAPE = (1, 1024)
TRANSFORMERS = "transformers loop"
MAMBA_SSM = "mamba-ssm reference"

Inputs = dict[str, Tensor]


def inputs(batch: int, length: int, dtype: torch.dtype = torch.float32) -> Inputs:
    """Random inputs of a Mamba layer's usual size, in our layout."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return {
        "u": normal(batch, length, CHANNELS),
        "delta": normal(batch, length, CHANNELS),
        "A": -torch.arange(1, STATES + 1).expand(CHANNELS, -1).to(dtype).contiguous(),
        "B": normal(batch, length, STATES),
        "C": normal(batch, length, STATES),
        "D": normal(CHANNELS),
        "z": normal(batch, length, CHANNELS),
        "delta_bias": normal(CHANNELS) - 4,
    }


def channels_first(x: Inputs) -> Inputs:
    """The same in the layout of transformers and mamba-ssm."""
    return {k: v.transpose(1, 2).contiguous() if v.ndim == 3 else v for k, v in x.items()}


def vl_mamba(x: Inputs) -> Tensor:
    """y (B, L, Di) of the backend that "auto" stands for."""
    return _scan(x)[0]


def _scan(x: Inputs, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """y and the final state (B, Di, N)."""
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    u, delta, a, b, c, d, z, bias = (x[name] for name in names)
    return selective_scan(u, delta, a, b, c, d, z, bias, backend=backend)


def transformers_loop(x: Inputs) -> Tensor:
    """y (B, Di, L) of what transformers runs on a CPU."""
    names = {"u": "hidden_states", "delta": "dt"}
    renamed = {names.get(k, k): v for k, v in x.items()}
    return mamba_selective_scan(**renamed, delta_softplus=True, return_last_state=True)[0]


def mamba_ssm_reference() -> Callable[[Inputs], Tensor] | None:
    """mamba-ssm's selective_scan_ref, y (B, Di, L); None where the package is not installed.

    It needs no compiled kernels but its module imports them: an empty one stands in for them where
    the package was installed without, which is how it installs where there is no nvcc.
    """
    kernels = "selective_scan_cuda"
    stand_in = importlib.util.find_spec(kernels) is None
    if stand_in:
        sys.modules[kernels] = types.ModuleType(kernels)
    try:
        module = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
    except ImportError:
        return None
    finally:
        if stand_in:
            del sys.modules[kernels]
    return lambda x: module.selective_scan_ref(**x, delta_softplus=True)


def functions() -> dict[str, Callable[[Inputs], Tensor]]:
    """Every implementation at hand, by name."""
    found = {VL_MAMBA: vl_mamba, TRANSFORMERS: transformers_loop, MAMBA_SSM: mamba_ssm_reference()}
    return {name: function for name, function in found.items() if function is not None}


@torch.inference_mode()
def forward(batch: int, length: int, effort: Effort) -> Comparison:
    """Forward only."""
    x = inputs(batch, length)
    first = channels_first(x)
    contenders = {
        name: Contender(functools.partial(f, x if name == VL_MAMBA else first))
        for name, f in functions().items()
    }
    shape = f"batch {batch}, {length} steps"
    return Comparison("scan_forward", shape, "run", side_by_side(contenders, effort))


def train(batch: int, length: int, effort: Effort) -> Comparison:
    """Forward and backward, with gradients of all eight inputs."""
    x = inputs(batch, length)
    first = channels_first(x)
    contenders = {
        name: Contender(_forward_backward(f, x if name == VL_MAMBA else first))
        for name, f in functions().items()
    }
    shape = f"batch {batch}, {length} steps"
    return Comparison("scan_train", shape, "run", side_by_side(contenders, effort))


def _forward_backward(function: Callable[[Inputs], Tensor], x: Inputs) -> Callable[[], object]:
    leaves = {name: value.clone().requires_grad_() for name, value in x.items()}
    grad = torch.ones_like(x["u"])
    return lambda: torch.autograd.grad(function(leaves), list(leaves.values()), grad)


def cases(effort: Effort, quick: bool) -> Iterator[tuple[str, Callable[[], Comparison]]]:
    """(name, measurement) for every shape; a quick run trains on the first one only."""
    for batch, length in FORWARD_SHAPES:
        yield f"scan {batch}x{length}", functools.partial(forward, batch, length, effort)
    for batch, length in TRAIN_SHAPES[: 1 if quick else None]:
        yield f"scan training {batch}x{length}", functools.partial(train, batch, length, effort)


@torch.inference_mode()
def errors() -> dict[str, float]:
    """Largest difference from the float64 reference, over the largest value, per backend.

    Of the outputs or of the final state, whichever is worse; in float32.
    """
    exact = _scan(inputs(*ERROR_SHAPE, torch.float64), "reference")
    backends = dict.fromkeys(("reference", "torch", resolve_backend("auto", "cpu")))
    return {
        backend: max(
            float((got.double() - want).abs().max() / want.abs().max())
            for got, want in zip(_scan(inputs(*ERROR_SHAPE), backend), exact, strict=True)
        )
        for backend in backends
    }
