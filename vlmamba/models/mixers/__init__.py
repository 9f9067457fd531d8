"""Mamba layers, of the language model and of the connector's scan: one file a kind."""

from vlmamba.models.mixers.base import Mixer
from vlmamba.models.mixers.mamba import MambaMixer
from vlmamba.models.mixers.mamba2 import Mamba2Mixer

MIXERS: dict[str, type[Mixer]] = {"mamba": MambaMixer, "mamba2": Mamba2Mixer}
