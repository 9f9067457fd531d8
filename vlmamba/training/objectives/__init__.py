"""Training objectives, one file each with its settings; importing them fills the registry."""

from vlmamba.training.objectives import contrastive, distillation, square_average  # noqa: F401
from vlmamba.training.objectives.base import Objective, Options, declared, objectives_with

__all__ = ["Objective", "Options", "declared", "objectives_with"]
