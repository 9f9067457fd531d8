"""Image files that are odd or broken, made by code: name -> content, and why it is refused."""

from __future__ import annotations

import base64
import io
import pickle
import struct
import zlib
from collections.abc import Callable

from PIL import Image

SIZE = (40, 30)


def picture(mode: str = "RGB", size: tuple[int, int] = SIZE) -> Image.Image:
    """A picture with a gradient in it, so that no coder shrinks it to nothing."""
    ramp = Image.linear_gradient("L").resize(size)
    return Image.merge("RGB", (ramp, ramp.rotate(180), ramp)).convert(mode)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """The file of an image."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def half(kind: str) -> bytes:
    """The first half of a file."""
    whole = encoded(picture(size=(200, 150)), kind)
    return whole[: len(whole) // 2]


def chunk(name: bytes, content: bytes) -> bytes:
    """A PNG chunk."""
    checksum = zlib.crc32(name + content)
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)


def png_of(width: int, height: int, data: bytes, depth: int = 8, color: int = 2) -> bytes:
    """A PNG whose header may say anything."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def deep(level: int) -> Image.Image:
    """16-bit gray of one level."""
    image = Image.new("I;16", SIZE)
    image.putdata([level] * (SIZE[0] * SIZE[1]))
    return image


def frames(kind: str) -> bytes:
    """Three frames."""
    first, *others = (Image.new("RGB", SIZE, color) for color in ("red", "green", "blue"))
    return encoded(first, kind, save_all=True, append_images=others)


def bad_checksum() -> bytes:
    """A PNG whose header does not fit its checksum."""
    whole = bytearray(encoded(picture(), "PNG"))
    whole[19] ^= 0xFF
    return bytes(whole)


def holes(kind: str) -> bytes:
    """A file whose second half is zeros."""
    whole = encoded(picture(size=(200, 150)), kind)
    return whole[: len(whole) // 2] + b"\0" * (len(whole) - len(whole) // 2)


def bad_exif() -> bytes:
    """A JPEG with an EXIF block of garbage: nothing here reads it."""
    return encoded(picture(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\x80" * 60)


def turned() -> bytes:
    """A JPEG that asks to be shown turned."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture(), "JPEG", exif=exif)


def transparent_palette() -> bytes:
    """A palette with transparency by index."""
    return encoded(picture().quantize(16), "PNG", transparency=bytes(range(0, 256, 16)))


def bilevel_bomb() -> bytes:
    """225 million pixels in some kilobytes."""
    side = 15_000
    line = b"\0" * (side // 8 + 1)
    return png_of(side, side, zlib.compress(line * side), depth=1, color=0)


Maker = Callable[[], bytes]

ODD: dict[str, Maker] = {
    "one pixel": lambda: encoded(picture(size=(1, 1)), "PNG"),
    "a strip of 20,000 x 10": lambda: encoded(picture(size=(20_000, 10)), "PNG"),
    "a strip of 10 x 20,000": lambda: encoded(picture(size=(10, 20_000)), "JPEG"),
    "CMYK": lambda: encoded(picture("CMYK"), "JPEG"),
    "CMYK TIFF": lambda: encoded(picture("CMYK"), "TIFF"),
    "16-bit gray PNG": lambda: encoded(deep(40_000), "PNG"),
    "16-bit gray TIFF": lambda: encoded(deep(40_000), "TIFF"),
    "16-bit color PNG": lambda: png_of(2, 1, zlib.compress(b"\0" + b"\x80\x01" * 6), depth=16),
    "animated GIF": lambda: frames("GIF"),
    "animated PNG": lambda: frames("PNG"),
    "animated WebP": lambda: frames("WEBP"),
    "TIFF of three pages": lambda: frames("TIFF"),
    "palette": lambda: encoded(picture().quantize(16), "PNG"),
    "palette with transparency": transparent_palette,
    "GIF with transparency": lambda: encoded(picture().quantize(16), "GIF", transparency=0),
    "gray with alpha": lambda: encoded(picture("LA"), "PNG"),
    "color with alpha": lambda: encoded(picture("RGBA"), "PNG"),
    "one bit": lambda: encoded(picture("1"), "PNG"),
    "gray JPEG": lambda: encoded(picture("L"), "JPEG"),
    "progressive JPEG": lambda: encoded(picture(), "JPEG", progressive=True),
    "corrupt EXIF": bad_exif,
    "turned by EXIF": turned,
    "JPEG with a tail": lambda: encoded(picture(), "JPEG") + b"tail" * 99,
    "PNG with a tail": lambda: encoded(picture(), "PNG") + b"tail" * 99,
    "BMP": lambda: encoded(picture(), "BMP"),
    "PPM": lambda: encoded(picture(), "PPM"),
    "ICO": lambda: encoded(picture(size=(32, 32)), "ICO"),
    "lossless WebP": lambda: encoded(picture(), "WEBP", lossless=True),
}
BROKEN: dict[str, tuple[Maker, str]] = {
    "no bytes": (lambda: b"", "no picture"),
    "one byte": (lambda: b"\xff", "no picture"),
    "text": (lambda: b"not an image", "no picture"),
    "an error page": (lambda: b"<html><body>404 Not Found</body></html>", "no picture"),
    "SVG": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', "no picture"),
    "PDF": (lambda: b"%PDF-1.7\n%%EOF", "no picture"),
    "Zip": (lambda: b"PK\x05\x06" + b"\0" * 18, "no picture"),
    "pickle": (lambda: pickle.dumps({"a": 1}), "no picture"),
    "pointer of Git LFS": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
        "no picture",
    ),
    "base64 of a PNG": (lambda: base64.b64encode(encoded(picture(), "PNG")), "no picture"),
    "zeros": (lambda: b"\0" * 4096, "no picture"),
    "half a JPEG": (lambda: half("JPEG"), "truncated"),
    "half a PNG": (lambda: half("PNG"), "truncated|Truncated"),
    "half a GIF": (lambda: half("GIF"), ""),
    "half a WebP": (lambda: half("WEBP"), ""),
    "half a BMP": (lambda: half("BMP"), "truncated"),
    "half a TIFF": (lambda: half("TIFF"), ""),
    "half a PPM": (lambda: half("PPM"), ""),
    "half an ICO": (lambda: half("ICO"), ""),
    "a PNG's signature": (lambda: b"\x89PNG\r\n\x1a\n", ""),
    "a PNG's header": (lambda: encoded(picture(), "PNG")[:33], ""),
    "a JPEG's first marker": (lambda: b"\xff\xd8\xff", "no picture"),
    "PNG with a bad checksum": (bad_checksum, ""),
    "PNG with holes": (lambda: holes("PNG"), ""),
    "PNG of bad pixels": (lambda: png_of(40, 30, b"not zlib"), ""),
    "PNG with too few pixels": (lambda: png_of(40, 30, zlib.compress(b"\0" * 50)), "truncated"),
    "PNG without width": (lambda: png_of(0, 30, zlib.compress(b"")), ""),
    "PNG of an unknown color type": (lambda: png_of(4, 3, zlib.compress(b"\0" * 50), 8, 5), ""),
    "PNG of 50,000 x 50,000": (
        lambda: png_of(50_000, 50_000, zlib.compress(b"\0" * 50)),
        "DecompressionBomb",
    ),
    "PNG of 10,000 x 10,000": (
        lambda: png_of(10_000, 10_000, zlib.compress(b"\0" * 50)),
        "DecompressionBomb",
    ),
    "PNG of 4,294,967,295 x 1": (
        lambda: png_of(2**32 - 1, 1, zlib.compress(b"\0" * 50)),
        "",
    ),
    "a bomb of one bit a pixel": (bilevel_bomb, "DecompressionBomb"),
    "floating-point TIFF": (
        lambda: encoded(picture("F"), "TIFF"),
        "floating-point pixels, whose range is not known",
    ),
    "32-bit TIFF": (
        lambda: encoded(Image.new("I", SIZE, 2**30), "TIFF"),
        "32-bit pixels, whose range is not known",
    ),
    "TIFF whose directory is itself": (lambda: b"II*\0\x08\0\0\0\0\0\x08\0\0\0", ""),
    "GIF without a frame": (lambda: b"GIF89a\x04\0\x03\0\0\0\0;", ""),
}
