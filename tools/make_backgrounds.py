"""Make the demo world's backgrounds, once: photo textures and a few painted grounds.

    python tools/make_backgrounds.py

Writes `vlmamba/assets/backgrounds/<place>.jpg`, SIDE pixels square.  Photos come from the data
folder of the PyPI package scikit-image (CC0 or public domain, see `vlmamba/assets/NOTICE.md`); it
is needed here only (extra `tools`): the results are committed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter, ImageOps

SIDE = 320


def photos(folder: Path) -> dict[str, Image.Image]:
    """Textures cut from photos; the gray ones are tinted in their natural color."""
    gray = {name: Image.open(folder / f"{name}.png") for name in ("grass", "gravel", "brick")}
    coffee = Image.open(folder / "coffee.png").convert("RGB")
    hubble = Image.open(folder / "hubble_deep_field.jpg").convert("RGB")
    return {
        "grass": ImageOps.colorize(gray["grass"].convert("L"), "#0c2408", "#c5e88a", mid="#4f8a2c"),
        "gravel": gray["gravel"].convert("RGB"),
        "bricks": ImageOps.colorize(
            gray["brick"].convert("L"), "#3a0f08", "#f0dccb", mid="#a5492f"
        ),
        "stars": hubble.crop((100, 100, 740, 740)),
        "wood": coffee.crop((480, 120, 600, 240)),
    }


def noise(rng: np.random.Generator, blur: float) -> np.ndarray:
    """Smooth noise in -1..1, shape (SIDE, SIDE); `blur` is its grain in pixels."""
    grain = Image.fromarray(rng.integers(0, 256, (SIDE, SIDE), dtype=np.uint8))
    field = np.asarray(grain.filter(ImageFilter.GaussianBlur(blur)), dtype=np.float64)
    field -= field.mean()
    return field / np.abs(field).max()


def painted(rng: np.random.Generator) -> dict[str, Image.Image]:
    """Grounds that no photo at hand shows: a vertical gradient plus noise of several grains."""
    down = np.linspace(0, 1, SIDE)[:, None]
    ripples = 0.5 * np.sin(90 * down + 4 * noise(rng, 12)) + 0.5 * noise(rng, 2)
    clouds = np.clip(2.2 * noise(rng, 14) + 0.8 * noise(rng, 5), 0, 1)
    dunes = 0.6 * np.sin(28 * down + 5 * noise(rng, 25)) + 0.6 * noise(rng, 0.7)
    drifts = 0.8 * noise(rng, 20) + 0.4 * noise(rng, 1)
    fields = {
        "sea": ((10, 70, 120), (40, 130, 170), down, ripples, 28),
        "sky": ((70, 140, 225), (175, 215, 250), down, clouds, 90),
        "sand": ((224, 190, 130), (236, 205, 150), down, dunes, 16),
        "snow": ((222, 232, 245), (246, 249, 255), down, drifts, 14),
    }
    return {name: _paint(*field) for name, field in fields.items()}


def _paint(top, bottom, down, relief, strength) -> Image.Image:
    gradient = (1 - down)[..., None] * np.array(top) + down[..., None] * np.array(bottom)
    pixels = np.broadcast_to(gradient, (SIDE, SIDE, 3)) + strength * relief[..., None]
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def main() -> None:
    out = Path(__file__).resolve().parents[1] / "vlmamba" / "assets" / "backgrounds"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, help="skimage/data (default: the installed one)")
    parser.add_argument("--out", type=Path, default=out)
    args = parser.parse_args()
    if args.photos is None:
        try:
            import skimage
        except ImportError:
            raise SystemExit("error: photos need: pip install -e '.[tools]', or --photos") from None

        args.photos = Path(skimage.__file__).parent / "data"
    args.out.mkdir(parents=True, exist_ok=True)
    for place, picture in (photos(args.photos) | painted(np.random.default_rng(0))).items():
        picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS).save(
            args.out / f"{place}.jpg", quality=80, optimize=True
        )


if __name__ == "__main__":
    main()
