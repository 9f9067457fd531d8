"""Values of a configuration that are refused before a model is built of them.

A damaged config.json may ask for more memory than there is, or say text where a number belongs.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig

from vlmamba_core.errors import UserError

# No model comes near these; a damaged config.json may ask for more memory than there is.
LARGEST_SIZE = 2**17
LARGEST = {"vocab_size": 2**22, "n_layer": 2**10, "num_hidden_layers": 2**10}
LARGEST |= {"d_conv": 2**6, "expand": 2**6, "d_state": 2**12, "n_experts": 2**10}


def check_size(name: str, value: Any, largest: int = LARGEST_SIZE) -> None:
    """Raise UserError unless the value is a whole number from 1 to `largest`."""
    if type(value) is not int or not 1 <= value <= largest:
        raise UserError(f"config: {name} is {value!r}; expected a positive integer up to {largest}")


def check_type(name: str, value: Any, kind: Any, expected: str) -> None:
    """Raise UserError unless the value is of a type; expected: what the message says of it."""
    wrong = not isinstance(value, kind) or (kind is int and isinstance(value, bool))
    if wrong:
        raise UserError(f"config: {name} is {value!r}; expected {expected}")


def sub_config(name: str, fields: dict[str, Any]) -> PretrainedConfig:
    """A part's configuration from its dictionary. Raises UserError."""
    try:
        return AutoConfig.for_model(**fields)
    except (MemoryError, UserError):
        raise
    except Exception as error:  # transformers checks each model's fields in its own way
        raise UserError(f"config: {name}: {' '.join(str(error).split())}") from error
