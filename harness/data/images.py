"""Images as data sets store them: a content key without decoding, and a decoder that may fail.

A stored image is {"bytes", "path"} (undecoded) or a PIL image (decoded by the reader); the bytes
may be a view of memory that belongs to a file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image


class UnreadableImage(Exception):
    """An image that cannot be decoded; the message says why."""


def is_stored(value: Any) -> bool:
    """Whether a document's value is an undecoded image."""
    return isinstance(value, Mapping) and value.keys() == {"bytes", "path"}


def image_key(value: Any) -> str:
    """A key of the content: equal for equal files, or for equal pixels when already decoded."""
    if is_stored(value):
        return hashlib.sha256(_stored_bytes(value)).hexdigest()[:32]
    pixels = hashlib.sha256(f"{value.mode}{value.size}".encode())
    shown = value.convert("RGB") if value.mode in ("P", "PA") else value  # else places in a palette
    pixels.update(shown.tobytes())
    return pixels.hexdigest()[:32]


def decode(value: Any) -> Image.Image:
    """The first frame as a PIL image. Raises UnreadableImage for anything that is not whole."""
    if not is_stored(value):
        return value
    from vlmamba.data.decode import BrokenPicture, decode_picture  # the package loads torch

    try:
        return decode_picture(bytes(_stored_bytes(value)))
    except BrokenPicture as error:
        raise UnreadableImage(str(error)) from error


def _stored_bytes(value: Mapping[str, Any]) -> bytes | memoryview:
    if value["bytes"] is not None:
        return value["bytes"]
    try:
        return Path(value["path"]).read_bytes()
    except (OSError, TypeError, ValueError) as error:
        raise UnreadableImage(f"{value['path']}: {error}") from error
