"""Where a sample's image tensors come from: picture files, decoded when they are needed."""

from __future__ import annotations

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

    def __init__(self, folder: Path, processor: Any):
        self.folder, self.processor = Path(folder), processor

    def load(self, images: tuple[str, ...]) -> list[torch.Tensor]:
        opened = [open_image(self.folder / image) for image in images]
        pixels, tiles = self.processor.tiled(opened)
        return list(pixels.split(tiles))


def open_image(path: Path) -> Image.Image:
    """Decode an image file to RGB; raises SampleError if it is missing or broken."""
    try:
        return decode_picture(path.read_bytes()).convert("RGB")
    except FileNotFoundError as error:
        raise SampleError("missing image file") from error
    except (OSError, ValueError, BrokenPicture) as error:
        raise SampleError("broken image file") from error
