"""What the products of a training run are made in: bfloat16 where the machine multiplies it itself.

Elsewhere they are float32: a processor without bfloat16 products takes them apart, number by
number, and is 20 to 50 times slower with them (two cores of AMD's first EPYC: 0.7 to 1.8 GFLOP/s
a core, 35 with float32).  Weights and the optimizer's sums are float32 either way.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch

from vlmamba.models.scan_backends.build import has_bfloat16_products
from vlmamba.training import trainer_state


def settle(dtype: str, out: Path | None, cpu: bool) -> str:
    """fp32 or bf16, for a run in the folder `out` (None: nothing is written).

    "auto" is what the run there was begun with, on whatever machine, or else what this machine is
    fast with; cpu: no GPU is used.
    """
    if dtype != "auto":
        return dtype
    return _begun_with(out) or ("bf16" if multiplies_bfloat16(cpu) else "fp32")


def warn_if_slow(dtype: str, cpu: bool) -> None:
    """Warn where a run begins in bf16 and the machine has no such products."""
    if dtype == "bf16" and not multiplies_bfloat16(cpu):
        warnings.warn(
            "this machine has no bfloat16 products: training in bf16 can be 20 times slower here "
            "than with --dtype fp32",
            stacklevel=2,
        )


def multiplies_bfloat16(cpu: bool = False) -> bool:
    """Whether the device that training takes multiplies bfloat16 itself; cpu: no GPU is used."""
    if torch.cuda.is_available() and not cpu:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return has_bfloat16_products()


def _begun_with(out: Path | None) -> str | None:
    """The dtype of the run that would go on in `out`."""
    if out is None or not (trainer_state.checkpoints(out) or (out / "final").is_dir()):
        return None
    try:
        settings = json.loads((out / "config.json").read_text(encoding="utf-8"))
        return str(settings["hyperparameters"]["dtype"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # what is broken is refused where the run is resumed
