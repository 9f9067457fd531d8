"""Where a sample's image tensors come from: picture files, decoded when they are needed."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from vlmamba.data.decode import BrokenPicture, decode_picture
from vlmamba.data.llava import SampleError


class ImageSource(Protocol):
    """Where a sample's image tensors come from, and the forward argument they are for."""

    argument: str  # "pixel_values" or "image_features"

    def load(self, images: tuple[str, ...]) -> list[torch.Tensor]:
        """A tensor for each image, a row for each of its tiles; SampleError for a broken one."""
        ...


class PixelImages:
    """Images decoded and transformed when they are needed: (tiles, 3, H, W) each."""

    argument = "pixel_values"

    def __init__(self, folder: Path, processor: Any, jpeg_seed: int | None = None):
        """jpeg_seed: each picture goes through JPEG first, at a quality that this decides."""
        self.folder, self.processor, self.jpeg_seed = Path(folder), processor, jpeg_seed

    def load(self, images: tuple[str, ...]) -> list[torch.Tensor]:
        opened = [open_image(self.folder / image) for image in images]
        if self.jpeg_seed is not None:
            pairs = zip(opened, images, strict=True)
            opened = [through_jpeg(one, f"{self.jpeg_seed}/{name}") for one, name in pairs]
        pixels, tiles = self.processor.tiled(opened)
        return list(pixels.split(tiles))


def through_jpeg(picture: Image.Image, seed: str) -> Image.Image:
    """A picture as JPEG leaves it, at a quality of 75 to 100 that the seed decides.

    InternVL 2.5's augmentation (2412.05271), there drawn anew each time; here a picture has one
    quality, so that a resumed run sees what it would have seen.
    """
    held = io.BytesIO()
    drawn = random.Random(seed.encode("utf-8", "surrogateescape"))  # of plain names as of text
    picture.convert("RGB").save(held, "JPEG", quality=drawn.randint(75, 100))
    return Image.open(held).convert("RGB")


def open_image(path: Path) -> Image.Image:
    """Decode an image file to RGB; raises SampleError if it is missing or broken."""
    try:
        return decode_picture(path.read_bytes()).convert("RGB")
    except FileNotFoundError as error:
        raise SampleError("missing image file") from error
    except (OSError, ValueError, BrokenPicture) as error:
        raise SampleError("broken image file") from error
