"""VL-Mamba: a vision encoder, a 2D-scanning connector and a Mamba language model.

Importing the package registers the model with transformers' Auto classes.
"""

from vlmamba.config import VLMambaConfig
from vlmamba.models.vlm import VLMambaForConditionalGeneration
from vlmamba.processing import VLMambaProcessor
from vlmamba_core import __version__

__all__ = [
    "VLMambaConfig",
    "VLMambaForConditionalGeneration",
    "VLMambaProcessor",
    "__version__",
]
