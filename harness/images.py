"""Images as data sets store them: a content key without decoding, and a decoder that may fail.

A stored image is {"bytes", "path"} (undecoded) or a PIL image (decoded by the reader).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageFile

# What PIL's decoders raise on damaged files.
DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    MemoryError,
    NotImplementedError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


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
    pixels.update(value.tobytes())
    return pixels.hexdigest()[:32]


def decode(value: Any) -> Image.Image:
    """The first frame as a PIL image. Raises UnreadableImage for anything that is not whole."""
    if not is_stored(value):
        return value
    try:
        with _strict():
            image = Image.open(io.BytesIO(_stored_bytes(value)))
            image.load()
            return _eight_bit(image)
    except DAMAGE as error:
        raise UnreadableImage(f"{type(error).__name__}: {error}") from error


@contextlib.contextmanager
def _strict() -> Iterator[None]:
    """PIL refusing truncated files (importing lmms-eval makes it fill them in) and huge ones."""
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _stored_bytes(value: Mapping[str, Any]) -> bytes:
    if value["bytes"] is not None:
        return value["bytes"]
    try:
        return Path(value["path"]).read_bytes()
    except (OSError, TypeError, ValueError) as error:
        raise UnreadableImage(f"{value['path']}: {error}") from error


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit grey scaled to 8 bits (PIL's own conversion would clip it to white)."""
    if image.mode.startswith("I;16") or image.mode == "I":
        return image.convert("I").point(lambda level: level / 257).convert("L")
    return image
