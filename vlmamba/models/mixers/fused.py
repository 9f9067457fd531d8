"""A norm, a residual sum, and one token through a whole Mamba layer, by a call of `csrc` each.

Outside the products a layer computes little for a token; calling some twenty functions for it takes
longer.  The result is that of norm, `MambaMixer.step` and residual, to rounding, in any batch.
"""

from __future__ import annotations

from typing import Any, cast

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
    if (
        type(mixer) is not MambaMixer
        or not x.is_cpu
        or torch.is_grad_enabled()
        or len(x) > MOST_ROWS
        or torch.is_autocast_enabled("cpu")
        or resolve_backend(mixer.backend, "cpu") != "cpu"
    ):
        return None
    # by nn.Module's own attributes a layer's parameters take longer to find than to multiply with
    own, parts = mixer._parameters, cast(dict[str, Any], mixer._modules)
    projections = [parts[name] for name in ("in_proj", "x_proj", "dt_proj", "out_proj")]
    for part in (norm, parts["conv1d"], *projections):
        if part._forward_hooks or part._forward_pre_hooks:
            return None
    numbers = [getattr(part, "numbers", None) for part in projections]
    if None in numbers:
        return None
    in_proj, x_proj, dt_proj, out_proj = numbers
    conv = parts["conv1d"]._parameters
    try:
        given = (
            norm._parameters["weight"],
            norm._parameters.get("bias"),
            norm.eps,
            in_proj,
            conv["weight"],
            conv["bias"],
            x_proj,
            dt_proj,
            projections[2]._parameters["bias"],
            own["A_log"],
            own["D"],
            out_proj,
        )
    except KeyError:  # pruned or parametrized: computed where it is asked for
        return None
    return kernels().mamba_step(x.contiguous(), conv_state, ssm_state, *given)
