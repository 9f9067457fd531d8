"""Render the demo world's object pictures, once, from three emoji styles.

    python tools/render_sprites.py --noto NotoColorEmoji.ttf \\
        --fluent fluent-emoji/icons.json --twemoji twemoji/icons.json

Writes `vlmamba/assets/sprites/<style>/<class>[~<variant>].png`: trimmed, at most 96 px a side, with
a transparent ground.  The pictures are committed (their notices are in `vlmamba/assets/NOTICE.md`),
so a run of the demo needs neither fonts nor this file.  Needs the extra `tools`.

Sources: Debian package `fonts-noto-color-emoji`; npm packages `@iconify-json/fluent-emoji` and
`@iconify-json/twemoji`, which name the same emoji alike.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIDE = 96
COLORS = 128  # palette size of a written PNG
NOTO_SIZE = 109  # the only size the bitmap font has

# COCO class -> its emoji as (iconify name, code points).  The first is the class's own picture, in
# all three styles; the others add variety to the training styles only.
EMOJI: dict[str, tuple[tuple[str, str], ...]] = {
    "person": (("person-standing", "1f9cd"), ("person-walking", "1f6b6")),
    "bicycle": (("bicycle", "1f6b2"),),
    "car": (("automobile", "1f697"), ("sport-utility-vehicle", "1f699"), ("taxi", "1f695")),
    "motorcycle": (("motorcycle", "1f3cd"), ("motor-scooter", "1f6f5")),
    "airplane": (
        ("airplane", "2708"),
        ("small-airplane", "1f6e9"),
        ("airplane-departure", "1f6eb"),
    ),
    "bus": (("bus", "1f68c"), ("oncoming-bus", "1f68d"), ("trolleybus", "1f68e")),
    "train": (("train", "1f686"), ("locomotive", "1f682"), ("metro", "1f687")),
    "truck": (("delivery-truck", "1f69a"), ("articulated-lorry", "1f69b")),
    "boat": (("sailboat", "26f5"), ("speedboat", "1f6a4"), ("canoe", "1f6f6")),
    "traffic light": (("vertical-traffic-light", "1f6a6"),),
    "stop sign": (("stop-sign", "1f6d1"),),
    "bird": (("bird", "1f426"), ("duck", "1f986"), ("eagle", "1f985"), ("parrot", "1f99c")),
    "cat": (("cat", "1f408"), ("cat-face", "1f431")),
    "dog": (("dog", "1f415"), ("dog-face", "1f436"), ("poodle", "1f429")),
    "horse": (("horse", "1f40e"), ("horse-face", "1f434")),
    "sheep": (("ewe", "1f411"), ("ram", "1f40f")),
    "cow": (("cow", "1f404"), ("cow-face", "1f42e"), ("ox", "1f402")),
    "elephant": (("elephant", "1f418"),),
    "bear": (("bear", "1f43b"),),
    "zebra": (("zebra", "1f993"),),
    "giraffe": (("giraffe", "1f992"),),
    "backpack": (("backpack", "1f392"),),
    "umbrella": (("umbrella", "2602"), ("umbrella-with-rain-drops", "2614")),
    "handbag": (("handbag", "1f45c"), ("purse", "1f45b")),
    "tie": (("necktie", "1f454"),),
    "suitcase": (("luggage", "1f9f3"),),
    "frisbee": (("flying-disc", "1f94f"),),
    "skis": (("skis", "1f3bf"),),
    "snowboard": (("snowboarder", "1f3c2"),),
    "sports ball": (("soccer-ball", "26bd"), ("basketball", "1f3c0"), ("volleyball", "1f3d0")),
    "kite": (("kite", "1fa81"),),
    "skateboard": (("skateboard", "1f6f9"),),
    "surfboard": (("person-surfing", "1f3c4"),),
    "tennis racket": (("badminton", "1f3f8"),),
    "bottle": (("bottle-with-popping-cork", "1f37e"), ("baby-bottle", "1f37c")),
    "wine glass": (("wine-glass", "1f377"), ("cocktail-glass", "1f378")),
    "cup": (("hot-beverage", "2615"), ("teacup-without-handle", "1f375")),
    "fork": (("fork-and-knife", "1f374"),),
    "knife": (("kitchen-knife", "1f52a"),),
    "spoon": (("spoon", "1f944"),),
    "bowl": (("bowl-with-spoon", "1f963"), ("steaming-bowl", "1f35c")),
    "banana": (("banana", "1f34c"),),
    "apple": (("red-apple", "1f34e"), ("green-apple", "1f34f")),
    "sandwich": (("sandwich", "1f96a"),),
    "orange": (("tangerine", "1f34a"),),
    "broccoli": (("broccoli", "1f966"),),
    "carrot": (("carrot", "1f955"),),
    "hot dog": (("hot-dog", "1f32d"),),
    "pizza": (("pizza", "1f355"),),
    "donut": (("doughnut", "1f369"),),
    "cake": (("birthday-cake", "1f382"), ("shortcake", "1f370")),
    "chair": (("chair", "1fa91"),),
    "couch": (("couch-and-lamp", "1f6cb"),),
    "potted plant": (("potted-plant", "1fab4"),),
    "bed": (("bed", "1f6cf"),),
    "toilet": (("toilet", "1f6bd"),),
    "tv": (("television", "1f4fa"),),
    "laptop": (("laptop", "1f4bb"),),
    "mouse": (("computer-mouse", "1f5b1"),),
    "keyboard": (("keyboard", "2328"),),
    "cell phone": (("mobile-phone", "1f4f1"), ("mobile-phone-with-arrow", "1f4f2")),
    "book": (("open-book", "1f4d6"), ("closed-book", "1f4d5"), ("books", "1f4da")),
    "clock": (("mantelpiece-clock", "1f570"), ("alarm-clock", "23f0")),
    "vase": (("amphora", "1f3fa"),),
    "scissors": (("scissors", "2702"),),
    "teddy bear": (("teddy-bear", "1f9f8"),),
    "toothbrush": (("toothbrush", "1faa5"),),
}

Painter = Callable[[str, str], Image.Image]  # (iconify name, code point in hex) -> RGBA picture


def noto_painter(font_file: Path) -> Painter:
    """Style 1: the Noto bitmap font, drawn by PIL."""
    font = ImageFont.truetype(font_file, NOTO_SIZE, layout_engine=ImageFont.Layout.BASIC)

    def paint(name: str, code_point: str) -> Image.Image:
        picture = Image.new("RGBA", (2 * NOTO_SIZE, 2 * NOTO_SIZE))
        character = chr(int(code_point, 16))
        ImageDraw.Draw(picture).text((20, 20), character, font=font, embedded_color=True)
        return picture

    return paint


def iconify_painter(icons_file: Path) -> Painter:
    """Styles 2 and 3: SVG bodies of an iconify set, drawn by resvg."""
    try:
        import resvg_py
    except ImportError:
        raise SystemExit("error: drawing needs: pip install -e '.[tools]'") from None

    icon_set = json.loads(icons_file.read_text())

    def paint(name: str, code_point: str) -> Image.Image:
        icon = icon_set["icons"][name]
        width = icon.get("width", icon_set["width"])
        height = icon.get("height", icon_set["height"])
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" '
            'xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
        )
        png = resvg_py.svg_to_bytes(svg_string=svg, width=2 * SIDE, height=2 * SIDE)
        return Image.open(io.BytesIO(bytes(png))).convert("RGBA")

    return paint


def trimmed(picture: Image.Image) -> Image.Image:
    """The opaque part of an RGBA picture, its longer side SIDE pixels, palette-quantized."""
    box = picture.getchannel("A").point(lambda alpha: 255 * (alpha > 8)).getbbox()
    if box is None:
        raise ValueError("the picture is empty")
    picture = picture.crop(box)
    scale = SIDE / max(picture.size)
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    return picture.resize(size, Image.Resampling.LANCZOS).quantize(COLORS)


def render_style(out: Path, paint: Painter, variants: bool) -> int:
    """Write one style's pictures, the first of each class or all; returns the bytes written."""
    out.mkdir(parents=True, exist_ok=True)
    size = 0
    for name, emoji in EMOJI.items():
        for index, (icon, code_point) in enumerate(emoji if variants else emoji[:1]):
            suffix = f"~{index}" if index else ""
            path = out / f"{name.replace(' ', '_')}{suffix}.png"
            try:
                trimmed(paint(icon, code_point)).save(path, optimize=True)
            except (KeyError, ValueError) as error:
                raise SystemExit(
                    f"error: {path.parent.name}: no picture of {icon}: {error}"
                ) from error
            size += path.stat().st_size
    return size


def main() -> None:
    root = Path(__file__).resolve().parents[1] / "vlmamba" / "assets" / "sprites"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--noto", type=Path, required=True, help="NotoColorEmoji.ttf")
    parser.add_argument("--fluent", type=Path, required=True, help="icons.json of fluent-emoji")
    parser.add_argument("--twemoji", type=Path, required=True, help="icons.json of twemoji")
    parser.add_argument("--out", type=Path, default=root, help="folder of the style folders")
    args = parser.parse_args()
    styles = {
        "noto": noto_painter(args.noto),
        "fluent": iconify_painter(args.fluent),
        "twemoji": iconify_painter(args.twemoji),
    }
    for style, paint in styles.items():
        size = render_style(args.out / style, paint, variants=style != "twemoji")
        print(f"{style}: {size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
