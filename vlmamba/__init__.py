"""VL-Mamba: a vision encoder, a 2D-scanning connector and a Mamba language model.

The heavy classes load on first use, so `import vlmamba` costs nothing and the data and error
modules can be used where torch is not installed.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_LAZY = {
    "VLMambaConfig": "vlmamba.config",
    "VLMambaProcessor": "vlmamba.processing",
    "VLMambaForConditionalGeneration": "vlmamba.models.vlm",
}

__all__ = ["VLMambaConfig", "VLMambaForConditionalGeneration", "VLMambaProcessor", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'vlmamba' has no attribute {name!r}")
    importlib.import_module("vlmamba.auto")  # registers all three with transformers
    return getattr(importlib.import_module(_LAZY[name]), name)
