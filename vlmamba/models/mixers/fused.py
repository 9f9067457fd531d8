"""A norm, a residual sum, and one token through a whole Mamba layer, by a call of `csrc` each.

Outside the products a layer computes little for a token; calling some twenty functions for it takes
longer.  The result is that of norm, `MambaMixer.step` and residual, to rounding, in any batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlmamba.models.linear import MOST_ROWS
from vlmamba.models.mixers.mamba import MambaMixer
from vlmamba.models.products import DTYPES
from vlmamba.models.scan_backends.build import kernels
from vlmamba.models.selective_scan import resolve_backend


def fused_norm(norm: nn.RMSNorm | nn.LayerNorm, x: Tensor) -> Tensor | None:
    """norm(x) in float32 and in its weight's dtype; None where this needs the usual way."""
    weight = norm.weight
    if (
        x.device.type != "cpu"
        or torch.is_grad_enabled()
        or weight.dtype not in DTYPES
        or x.dtype not in (torch.float32, weight.dtype)
        or not weight.is_contiguous()
        or kernels() is None
    ):
        return None
    return kernels().norm(x.contiguous(), weight, getattr(norm, "bias", None), norm.eps)


def residual_sum(x: Tensor, y: Tensor) -> Tensor:
    """x + y; of float32 and bfloat16 on a CPU in one pass."""
    if (
        (x.dtype, y.dtype) == (torch.float32, torch.bfloat16)
        and x.device.type == y.device.type == "cpu"
        and x.shape == y.shape
        and not torch.is_grad_enabled()
        and (module := kernels()) is not None
    ):
        return module.add(x.contiguous(), y.contiguous())
    return x + y


def fused_step(
    norm: nn.RMSNorm | nn.LayerNorm,
    mixer: nn.Module,
    x: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
) -> Tensor | None:
    """x (B, D) + mixer(norm(x)), states updated in place; None where this needs the usual way.

    That is: another device, kind of layer or dtype, gradients, autocast, a backend other than the
    C++ one, hooks, or projections that something has been wrapped around.
    """
    dtype = norm.weight.dtype
    if (
        x.device.type != "cpu"
        or torch.is_grad_enabled()
        or type(mixer) is not MambaMixer
        or dtype not in DTYPES
        or x.dtype not in (torch.float32, dtype)
        or len(x) > MOST_ROWS
        or torch.is_autocast_enabled("cpu")
        or resolve_backend(mixer.backend, "cpu") != "cpu"
    ):
        return None
    projections = (mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj)
    if any(p._forward_hooks or p._forward_pre_hooks for p in (norm, mixer.conv1d, *projections)):
        return None
    numbers = [getattr(projection, "numbers", None) for projection in projections]
    conv, bias = mixer.conv1d.weight, mixer.conv1d.bias
    plain = [norm.weight, conv, bias, mixer.dt_proj.bias, mixer.A_log, mixer.D, conv_state]
    plain += [read[0] for read in numbers if read is not None and read[1] is None]
    given = [p for p in plain if p is not None]  # a bias may be absent
    if None in numbers or any(p.dtype != dtype or not p.is_contiguous() for p in given):
        return None
    if ssm_state.dtype != torch.float32 or not ssm_state.is_contiguous():
        return None
    in_proj, x_proj, dt_proj, out_proj = numbers
    return kernels().mamba_step(
        x.contiguous(),
        conv_state,
        ssm_state,
        norm.weight,
        getattr(norm, "bias", None),
        norm.eps,
        in_proj,
        conv.squeeze(1),
        bias,
        x_proj,
        dt_proj,
        mixer.dt_proj.bias,
        mixer.A_log,
        mixer.D,
        out_proj,
    )
