"""Draw a scene: `render(scene)` -> 224 x 224 RGB picture, the same for the same scene.

Benchmarks are drawn plainly with mild variation.  Training pictures (`augment=True`) vary colors,
flatness, outlines and geometry strongly, so that a style of drawing that was never seen stays
recognizable.  Colors that questions ask about (cards, signs) keep their hue.
"""

from __future__ import annotations

import colorsys
import functools
import math
import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps

from vlmamba.demo.vocabulary import COLORS
from vlmamba.demo.world import SIDE, Scene, Sign, Thing

ASSETS = Path(__file__).resolve().parents[1] / "assets"
FLAT_COLORS = (4, 6, 9)  # palette sizes that imitate flat drawing
SIGN_MARGIN, LABEL_MARGIN = 9, 3  # pixels around the text of a sign, and of a thing's small one


def render(scene: Scene, augment: bool = False) -> Image.Image:
    """The scene's picture, (224, 224) RGB; deterministic in its arguments."""
    rng = random.Random(f"{scene.seed}/pixels")
    canvas = _background(scene.place, rng)
    placed = [_drawn(thing, rng, augment) for thing in scene.things]
    for thing, box, _ in placed:  # all cards first: none covers a neighbor's picture
        if thing.card:
            _draw_card(canvas, thing.card, box, rng)
    for _, box, picture in placed:
        canvas.paste(picture, box[:2], picture)
    if scene.sign:
        _draw_sign(canvas, scene.sign, rng)
    for label in scene.labels:
        _draw_sign(canvas, label, rng, LABEL_MARGIN)
    return _augment_whole(canvas, rng) if augment else canvas


@functools.cache
def _place(place: str) -> Image.Image:
    return Image.open(ASSETS / "backgrounds" / f"{place}.jpg").convert("RGB")


@functools.cache
def pictures(style: str, name: str) -> tuple[Image.Image, ...]:
    """The RGBA pictures of a class in a style, its own one first."""
    folder = ASSETS / "sprites" / style
    stem = name.replace(" ", "_")
    paths = [folder / f"{stem}.png", *sorted(folder.glob(f"{stem}~*.png"))]
    return tuple(Image.open(path).convert("RGBA") for path in paths)


@functools.lru_cache(maxsize=1024)
def _flat(style: str, name: str, variant: int, colors: int) -> Image.Image:
    """A picture reduced to few colors, as if drawn flat."""
    picture = pictures(style, name)[variant]
    flat = picture.convert("RGB").quantize(colors, dither=Image.Dither.NONE).convert("RGB")
    flat.putalpha(picture.getchannel("A"))
    return flat


def _background(place: str, rng: random.Random) -> Image.Image:
    ground = _place(place)
    side = rng.randint(170, ground.width)
    left, top = (rng.randint(0, ground.width - side) for _ in "xy")
    canvas = ground.resize((SIDE, SIDE), box=(left, top, left + side, top + side))
    if rng.random() < 0.5:
        canvas = ImageOps.mirror(canvas)
    return ImageEnhance.Brightness(canvas).enhance(rng.uniform(0.8, 1.15))


def _drawn(thing: Thing, rng: random.Random, augment: bool):
    """(thing, its box on the canvas, its RGBA picture of that size)."""
    choice = pictures(thing.style, thing.name)
    variant = thing.variant % len(choice)
    if augment and rng.random() < 0.3:
        picture = _flat(thing.style, thing.name, variant, rng.choice(FLAT_COLORS))
    else:
        picture = choice[variant]
    if augment:
        picture = _recolored(picture, rng)
    picture = _placed(picture, thing.size, rng, augment)
    if augment and rng.random() < 0.2:
        picture = _outlined(picture, rng)
    left, top = thing.x - picture.width // 2, thing.y - picture.height // 2
    return thing, (left, top, left + picture.width, top + picture.height), picture


def _placed(picture: Image.Image, size: int, rng: random.Random, augment: bool) -> Image.Image:
    """Scaled to `size`, slightly stretched and turned, sometimes mirrored."""
    stretch, turn = (0.15, 18) if augment else (0.04, 5)
    scale = size / max(picture.size)
    width, height = (
        max(8, round(side * scale * rng.uniform(1 - stretch, 1))) for side in picture.size
    )
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        picture = ImageOps.mirror(picture)
    if augment and rng.random() < 0.1:  # coarse: as if enlarged from a thumbnail
        picture = picture.reduce(2).resize((width, height))
    return picture.rotate(rng.uniform(-turn, turn), Image.Resampling.BILINEAR, expand=True)


def _recolored(picture: Image.Image, rng: random.Random) -> Image.Image:
    """Hue, saturation, brightness and tone steps changed at random; the alpha channel stays."""
    alpha = picture.getchannel("A")
    colors = picture.convert("RGB")
    if rng.random() < 0.8:
        hue = rng.uniform(-180, 180) if rng.random() < 0.25 else rng.gauss(0, 20)
        saturation = 0.0 if rng.random() < 0.1 else rng.uniform(0.4, 1.5)
        matrix = color_matrix(hue, saturation, rng.uniform(0.65, 1.3), rng.uniform(-25, 25))
        colors = colors.convert("RGB", matrix)
    if rng.random() < 0.15:
        colors = ImageOps.posterize(colors, rng.choice((2, 3)))
    colors.putalpha(alpha)
    return colors


def color_matrix(hue: float, saturation: float, gain: float, shift: float) -> tuple[float, ...]:
    """A 3 x 4 matrix for `Image.convert`: hue turned (degrees) about gray, then scaled, shifted."""
    cos, sin = math.cos(math.radians(hue)), math.sin(math.radians(hue))
    third, root = (1 - cos) / 3, sin / math.sqrt(3)
    turn = (
        (cos + third, third - root, third + root),
        (third + root, cos + third, third - root),
        (third - root, third + root, cos + third),
    )
    luma = (0.299, 0.587, 0.114)
    rows = []
    for row in turn:
        mixed = (
            gain * (saturation * value + (1 - saturation) * weight)
            for value, weight in zip(row, luma, strict=True)
        )
        rows += [*mixed, shift]
    return tuple(rows)


def _outlined(picture: Image.Image, rng: random.Random) -> Image.Image:
    """With a rim of one tone around it, as on a sticker."""
    rim = 3
    wide = ImageOps.expand(picture, rim)
    alpha = wide.getchannel("A").filter(ImageFilter.MaxFilter(2 * rim + 1))
    tone = rng.choice((0, 40, 255))
    ground = Image.new("RGBA", wide.size, (tone, tone, tone, 0))
    ground.putalpha(alpha)
    ground.alpha_composite(wide)
    return ground


def _shade(color: str, rng: random.Random) -> tuple[int, ...]:
    """A color slightly varied in tone, never in name."""
    hue, light, saturation = colorsys.rgb_to_hls(*(value / 255 for value in COLORS[color]))
    light = min(1.0, max(0.0, light + rng.uniform(-0.04, 0.04)))
    return tuple(round(255 * value) for value in colorsys.hls_to_rgb(hue, light, saturation))


def _draw_card(canvas: Image.Image, color: str, box, rng: random.Random) -> None:
    margin = 5
    left, top, right, bottom = box
    ImageDraw.Draw(canvas).rounded_rectangle(
        (left - margin, top - margin, right + margin, bottom + margin),
        radius=rng.randint(2, 16),
        fill=_shade(color, rng),
    )


@functools.lru_cache(maxsize=512)
def _font(text: str, width: int, height: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The largest size of Pillow's built-in font that fits the text into the box."""
    probe = ImageFont.load_default(40)
    left, top, right, bottom = probe.getbbox(text)
    return ImageFont.load_default(40 * min(width / (right - left), height / (bottom - top)))


def _draw_sign(
    canvas: Image.Image, sign: Sign, rng: random.Random, margin: int = SIGN_MARGIN
) -> None:
    draw = ImageDraw.Draw(canvas)
    fill = _shade(sign.color, rng)
    ink = "white" if sum(COLORS[sign.color]) < 420 else "black"
    box = (
        sign.x - sign.width // 2,
        sign.y - sign.height // 2,
        sign.x + sign.width // 2,
        sign.y + sign.height // 2,
    )
    line = 2 if margin == SIGN_MARGIN else 1
    draw.rounded_rectangle(box, radius=min(6, 2 * margin), fill=fill, outline=ink, width=line)
    text = sign.text.upper()
    font = _font(text, sign.width - 2 * margin, sign.height - 2 * margin)
    draw.text((sign.x, sign.y), text, font=font, fill=ink, anchor="mm")


def _augment_whole(canvas: Image.Image, rng: random.Random) -> Image.Image:
    """Light, contrast, saturation and sharpness of the whole picture varied a little."""
    for change, spread in (
        (ImageEnhance.Brightness, 0.2),
        (ImageEnhance.Contrast, 0.25),
        (ImageEnhance.Color, 0.3),
    ):
        if rng.random() < 0.4:
            canvas = change(canvas).enhance(rng.uniform(1 - spread, 1 + spread))
    if rng.random() < 0.1:
        canvas = canvas.filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 1.0)))
    return canvas
