"""Image files -> pictures, or the reason why not: one set of rules for training and benchmarks.

Whole files of any kind that Pillow reads are taken, animations by their first frame; 16-bit grey is
scaled to 8 bits. A damaged file, one with more pixels than Pillow's limit for decompression bombs,
and pixels without a known range (floating point, 32 bits) are refused: showing a model a black or
half-grey picture instead would change a score in silence.
"""

from __future__ import annotations

import contextlib
import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from typing import cast

from PIL import Image, ImageFile, UnidentifiedImageError

# What Pillow's decoders raise on damaged files.
DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    AttributeError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    MemoryError,
    NotImplementedError,
    RuntimeError,
    AssertionError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
MOST_LEVEL = 65535  # of 16-bit grey


class BrokenPicture(Exception):
    """A file that gives no picture; the message says why."""


def decode_picture(data: bytes) -> Image.Image:
    """The first frame, loaded, 8 bits a channel, in its own mode. Raises BrokenPicture."""
    try:
        with _strict():
            image = Image.open(io.BytesIO(data))
            if image.format == "PNG":  # Pillow shows pixels that do not fit their checksum
                image.verify()
                image = Image.open(io.BytesIO(data))
            image.load()
            return _eight_bit(image)
    except UnidentifiedImageError as error:
        raise BrokenPicture("no picture, or one whose header is damaged") from error
    except DAMAGE as error:
        raise BrokenPicture(f"{type(error).__name__}: {error}") from error


@contextlib.contextmanager
def _strict() -> Iterator[None]:
    """Pillow refusing truncated files (importing lmms-eval makes it fill them in) and huge ones."""
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit grey scaled to 8 bits; Pillow's own conversion would clip it to white."""
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range is not known")
    if not image.mode.startswith("I"):
        return image
    levels = image.convert("I")
    least, most = cast(tuple[int, int], levels.getextrema())
    if least < 0 or most > MOST_LEVEL:
        raise ValueError("32-bit pixels, whose range is not known")
    return levels.point(lambda level: level / 257).convert("L")
