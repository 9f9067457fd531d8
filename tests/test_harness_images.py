"""Stored images: keys by content, damage found and named."""

from __future__ import annotations

import io

import pytest
from harness_world import png
from PIL import Image, ImageFile

from harness.data.images import UnreadableImage, decode, image_key, is_stored


def stored(data: bytes | None, path: str | None = None) -> dict:
    return {"bytes": data, "path": path}


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_key_is_the_content(tmp_path):
    data = png((1, 2, 3))
    (tmp_path / "a.png").write_bytes(data)
    assert image_key(stored(data, "x")) == image_key(stored(None, str(tmp_path / "a.png")))
    assert image_key(stored(data)) != image_key(stored(png((1, 2, 4))))
    first, second = (Image.new("RGB", size) for size in ((2, 8), (8, 2)))
    assert image_key(first) != image_key(second)
    assert image_key(first) == image_key(first.copy())


def test_pictures_of_other_colors_have_other_keys():
    """What a palette's picture stores are places in it."""
    red, blue = (Image.new("P", (2, 2)) for _ in range(2))
    red.putpalette([255, 0, 0])
    blue.putpalette([0, 0, 255])
    assert image_key(red) != image_key(blue)
    assert image_key(red) == image_key(red.copy())


def test_is_stored():
    assert is_stored(stored(b""))
    assert not is_stored(Image.new("L", (1, 1)))
    assert not is_stored({"bytes": b""})


WHOLE = encoded(Image.effect_noise((64, 64), 80).convert("RGB"), "JPEG")


@pytest.mark.parametrize(
    "value",
    [
        stored(b""),
        stored(b"not an image"),
        stored(WHOLE[: len(WHOLE) // 2]),
        stored(png((9, 9, 9), (64, 64))[:60]),
        stored(None, "/no/such/file.png"),
        stored(None, None),
    ],
    ids=["empty", "text", "half a JPEG", "half a PNG", "no file", "nothing"],
)
def test_damage_is_named(value, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as lmms-eval does
    with pytest.raises(UnreadableImage, match=r"\w"):
        decode(value)


def test_decompression_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UnreadableImage, match="DecompressionBomb"):
        decode(stored(png((0, 0, 0), (40, 40))))


@pytest.mark.parametrize("mode", ["CMYK", "L", "P", "LA", "RGBA", "1"])
def test_any_mode_becomes_rgb(mode):
    kind = "JPEG" if mode == "CMYK" else "PNG"
    image = decode(stored(encoded(Image.new(mode, (5, 4)), kind)))
    assert image.convert("RGB").size == (5, 4)


def test_gray_that_is_multiplied_by_its_opacity_becomes_rgb():
    """A TIFF's associated alpha, which Pillow opens as a mode of its own."""
    file = io.BytesIO()
    Image.new("LA", (5, 4), (100, 255)).save(file, "TIFF")
    data = bytearray(file.getvalue())
    image = Image.open(io.BytesIO(bytes(data)))
    assert image.tag_v2[338] == (2,)  # extra sample: unassociated alpha
    at = data.index((338).to_bytes(2, "little"))
    data[at + 8] = 1
    assert Image.open(io.BytesIO(bytes(data))).mode == "La"
    assert decode(stored(bytes(data))).convert("RGB").getpixel((0, 0)) == (100, 100, 100)


def test_sixteen_bits_are_scaled_not_clipped():
    deep = Image.new("I;16", (2, 1))
    deep.putpixel((0, 0), 65535)
    deep.putpixel((1, 0), 257 * 100)
    image = decode(stored(encoded(deep, "PNG"))).convert("RGB")
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (100, 100, 100)]


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(stored(data)).convert("RGB").getpixel((0, 0)) == (255, 0, 0)
