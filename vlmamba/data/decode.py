"""Pictures from files and arrays, or the reason why not: one set of rules wherever one is shown.

Whole files of any kind that Pillow reads are taken, animations by their first frame; 16-bit gray is
scaled to 8 bits. A damaged file, one with more pixels than Pillow's limit for decompression bombs,
and pixels without a known range (floating point, 32 bits) are refused: showing a model a black or
half-gray picture instead would change a score in silence. Pixels are taken as they are stored: an
EXIF orientation is not applied, as LLaVA does not.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import os
import struct
import threading
import urllib.request
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
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
)
MOST_LEVEL = 65535  # of 16-bit gray
URL = ("http://", "https://")
URL_TIMEOUT_S = 60
CHANNELS = (1, 3, 4)  # of an array: gray, RGB, RGBA


class BrokenPicture(Exception):
    """A file that gives no picture; the message says why."""


def decode_picture(data: bytes, check: Callable[[int, int], object] | None = None) -> Image.Image:
    """The first frame, loaded, 8 bits a channel, in its own mode. Raises BrokenPicture.

    check: of width and height, before a pixel is decoded; what it raises is passed on.
    """
    try:
        with _STRICT:
            image = Image.open(io.BytesIO(data))
            _no_bomb(*image.size)
            if check is not None:
                check(*image.size)
            if image.format == "PNG":  # Pillow shows pixels that do not fit their checksum
                image.verify()
                image = Image.open(io.BytesIO(data))
            image.load()
            return _eight_bit(image)
    except UnidentifiedImageError as error:
        raise BrokenPicture("no picture, or one whose header is damaged") from error
    except DAMAGE as error:
        raise BrokenPicture(f"{type(error).__name__}: {error}") from error


class _Strict:
    """Pillow refusing truncated files, which importing lmms-eval makes it fill in; no warnings.

    Both settings are the process's: the first thread that decodes sets them, the last one puts them
    back.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._before = threading.Lock(), 0, contextlib.ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before.callback(
                    setattr, ImageFile, "LOAD_TRUNCATED_IMAGES", ImageFile.LOAD_TRUNCATED_IMAGES
                )
                ImageFile.LOAD_TRUNCATED_IMAGES = False
                self._before.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._before.close()


_STRICT = _Strict()


def _no_bomb(width: int, height: int) -> None:
    """Raise DecompressionBombError above Pillow's limit, at which it warns alone."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise Image.DecompressionBombError(f"{width * height} pixels, more than {limit}")


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit gray scaled to 8 bits; Pillow's own conversion would clip it to white."""
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range is not known")
    if image.mode == "La":  # gray multiplied by its opacity, which Pillow makes no RGB of
        return image.convert("LA")
    if not image.mode.startswith("I"):
        return image
    levels = image.convert("I")
    least, most = cast(tuple[int, int], levels.getextrema())
    if least < 0 or most > MOST_LEVEL:
        raise ValueError("32-bit pixels, whose range is not known")
    return levels.point(lambda level: level / 257).convert("L")


def rgb_picture(source: Any) -> Image.Image:
    """The 8-bit RGB picture that `source` is or names. Raises BrokenPicture.

    source: a PIL image, a path, http(s) URL, data URL, base64 text or a file's bytes, or an array
    or tensor (H, W), (H, W, C) or (C, H, W) of 8- or 16-bit levels, or of floats in 0..1.
    """
    try:
        if isinstance(source, Image.Image):
            image = _eight_bit(source)
        elif isinstance(source, str | os.PathLike | bytes):
            image = decode_picture(_content(source))
        else:
            image = _from_array(source)
        return image.convert("RGB")
    except DAMAGE as error:
        raise BrokenPicture(f"{type(error).__name__}: {error}") from error


def _content(source: str | os.PathLike | bytes) -> bytes:
    """A picture file's bytes."""
    if isinstance(source, bytes):
        return source
    if isinstance(source, str) and source.startswith(URL):
        try:
            with urllib.request.urlopen(source, timeout=URL_TIMEOUT_S) as answer:
                return answer.read()
        except (OSError, ValueError) as error:
            raise BrokenPicture(f"cannot fetch {source}: {error}") from error
    text = os.fspath(source)
    with contextlib.suppress(OSError, ValueError):  # base64 is no name that a file could have
        if os.path.isfile(text):
            return Path(text).read_bytes()
    try:
        return base64.b64decode("".join(text.rpartition(",")[2].split()), validate=True)
    except (binascii.Error, ValueError) as error:
        shown = text if len(text) < 100 else text[:100] + "..."
        raise BrokenPicture(f"no file, URL or base64 text: {shown!r}") from error


def _from_array(source: Any) -> Image.Image:
    """A picture of an array or tensor of levels."""
    if hasattr(source, "detach"):  # a tensor, whose channels come first where both could
        source, first = source.detach().cpu(), True
        levels = source.float().numpy() if source.is_floating_point() else source.numpy()
    else:
        levels, first = np.asarray(source), False
    if levels.ndim == 3:
        ends = {"first": levels.shape[0] in CHANNELS, "last": levels.shape[2] in CHANNELS}
        if not any(ends.values()):
            raise ValueError(f"an array of shape {levels.shape}; expected 1, 3 or 4 channels")
        if ends["first"] and (first or not ends["last"]):
            levels = levels.transpose(1, 2, 0)
        levels = levels[..., 0] if levels.shape[2] == 1 else levels
    if levels.ndim not in (2, 3) or 0 in levels.shape:
        raise ValueError(f"an array of shape {levels.shape}; expected (H, W) or (H, W, channels)")
    return Image.fromarray(np.ascontiguousarray(_byte_levels(levels)))


def _byte_levels(levels: np.ndarray) -> np.ndarray:
    """Levels as uint8: 16-bit ones and floats in 0..1 are scaled, whole numbers to 255 kept."""
    if levels.dtype == np.uint8:
        return levels
    if levels.dtype == np.uint16:
        return (levels / 257).astype(np.uint8)  # cut off, as in `_eight_bit`
    if levels.dtype == np.bool_:
        return levels.astype(np.uint8) * 255
    if levels.dtype.kind not in "iuf":
        raise TypeError(f"pixels of dtype {levels.dtype}; expected numbers")
    least, most = levels.min(), levels.max()
    if levels.dtype.kind == "f" and least >= 0 and most <= 1:
        return np.rint(levels * 255).astype(np.uint8)
    if least >= 0 and most <= 255 and (levels == np.rint(levels)).all():
        return levels.astype(np.uint8)
    raise ValueError(f"pixels of {least}..{most}, whose range is not known; give 8-bit levels")
