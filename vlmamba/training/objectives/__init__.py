"""Training objectives, one file each with its settings; importing them fills the registry."""

from vlmamba.training.objectives import (  # noqa: F401
    contrastive,
    distillation,
    square_average,
    text_distance,
)
from vlmamba.training.objectives.base import Objective, Options, declared, objectives_with

__all__ = ["Objective", "Options", "declared", "objectives_with"]
