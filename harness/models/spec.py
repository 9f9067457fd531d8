"""What stands behind KIND: in `--model KIND:NAME,key=value,...`: a name and its settings.

name, settings = read("http://localhost:8000/v1,model=llava,key_env=KEY", API_SETTINGS)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vlmamba_core.errors import UserError, unknown

Settings = Mapping[str, Callable[[str], Any]]


def read(text: str, known: Settings | None = None) -> tuple[str, dict[str, Any]]:
    """(name, settings) with each value read by the function that `known` has for it.

    known: None lets any setting through as text.  Raises UserError for another setting or a value
    that its function refuses (ValueError).
    """
    name, *pairs = text.split(",")
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        key = key.strip()
        if not equals or not key:
            raise UserError(f"{pair!r} in {text!r} is no setting; expected NAME,key=value,...")
        if known is not None and key not in known:
            raise unknown("setting", key, known)
        try:
            found[key] = value if known is None else known[key](value)
        except ValueError as error:
            raise UserError(f"{key}={value!r} in {text!r} cannot be read: {error}") from error
    return name, found
