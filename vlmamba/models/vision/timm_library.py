"""timm, imported only where one of its encoders is built."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import cast


def import_timm() -> ModuleType:
    """timm, loaded only where it is needed, and without wandb, which costs it a second."""
    hidden = "wandb" not in sys.modules
    if hidden:
        sys.modules["wandb"] = cast(ModuleType, None)  # importing it fails, as where it is absent
    try:
        import timm
    finally:
        if hidden:
            del sys.modules["wandb"]
    return timm
