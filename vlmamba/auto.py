"""Makes transformers' Auto classes know VL-Mamba: each of these modules registers its class."""

from vlmamba import config, processing
from vlmamba.models import vlm

__all__ = ["config", "processing", "vlm"]
