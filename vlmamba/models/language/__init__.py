"""Language models: one file a family.

mamba    Mamba and Mamba-2, computed here
wrapped  any causal language model of transformers (Llama, GPT-NeoX, Phi, Zamba2, ...)
"""

from transformers import PretrainedConfig

from vlmamba import registry
from vlmamba.models.language.base import Cache, LanguageModel
from vlmamba.models.language.mamba import MambaLM
from vlmamba.models.language.wrapped import WrappedLM

__all__ = [
    "Cache",
    "LanguageModel",
    "MambaLM",
    "WrappedLM",
    "build_language_model",
    "language_model_class",
]


def language_model_class(config: PretrainedConfig) -> type[LanguageModel]:
    """The family of a text configuration."""
    return registry.language_models.get(config.model_type, WrappedLM)


def build_language_model(config: PretrainedConfig) -> LanguageModel:
    """The language model (random weights) of a text configuration."""
    return language_model_class(config)(config)
