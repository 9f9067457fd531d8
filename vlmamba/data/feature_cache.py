"""Cache of the frozen vision encoder's output: images are encoded once, not once an epoch.

A folder per encoder (named by a hash of its configuration and weights) holds
    features.f16   float16 (tiles, P, D_v), appended to, read by memory map
    keys.u64       one 64-bit key per row: relative path, size and modification time of the image;
                   of an image of several tiles the last has it, the others say that it goes on
    sums.u32       one checksum (CRC-32) per row
    meta.json      what the encoder is, P and D_v
Rows and sums are written before keys, and an image's last tile after the others, so a killed run
leaves a shorter but correct cache.  Before images are used their rows are checked; an image with a
damaged one loses its key and is encoded anew.

safetensors, tried in its place, reads and writes a row as fast and is as large, but cannot be
appended to: a file a batch is 17,000 files for LLaVA's 558,000 images. It has no checksums either.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from vlmamba.data.images import open_image
from vlmamba.data.llava import SampleError
from vlmamba.image_layouts import WHOLE
from vlmamba_core.chunks import chunks
from vlmamba_core.errors import UserError
from vlmamba_core.folder import lock_folder

USUAL_LAYER = -2  # LLaVA's; not in the names of caches of that layer
NOBODY = 0  # key of a row that counts no more
GOES_ON = 1  # key of a tile that is not the last of its image


class FeatureCache:
    """Encoder features by image path: an `ImageSource` for `image_features`."""

    argument = "image_features"

    def __init__(self, folder: Path, images: Path, patches: int, width: int):
        """Open or create the cache in `folder` for images under `images`."""
        self.folder, self.images = Path(folder), Path(images)
        self.shape = (patches, width)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in ("keys.u64", "sums.u32", "features.f16"):
                (self.folder / name).touch()
        except OSError as error:
            raise UserError(f"cannot write {self.folder}: {error.strerror}") from error
        self.reload()

    def reload(self) -> None:
        """Read the keys anew; rows are mapped when the first one is asked for."""
        keys = np.fromfile(self.folder / "keys.u64", dtype=np.uint64)
        self._sums = np.fromfile(self.folder / "sums.u32", dtype=np.uint32)
        keys = keys[: min(len(self._sums), self._whole_rows())]  # cut by hand or a full disk
        while len(keys) and keys[-1] == GOES_ON:  # of an image whose last tile was not written
            keys = keys[:-1]
        self._keys = keys
        self._rows = np.argsort(keys, kind="stable")
        self._sorted = keys[self._rows]
        self._features: np.memmap | None = None

    @contextmanager
    def writing(self) -> Iterator[None]:
        """One writer at a time; begins by cutting what a killed one left behind the last row."""
        with lock_folder(self.folder, wait=True):
            self._adopt_rows_without_sums()
            self.reload()
            os.truncate(self.folder / "keys.u64", 8 * len(self))
            os.truncate(self.folder / "sums.u32", 4 * len(self))
            os.truncate(self.folder / "features.f16", self._row_bytes * len(self))
            yield
            self.reload()

    def _adopt_rows_without_sums(self) -> None:
        """A cache written before there were sums gets them: its rows count as they are."""
        rows = min((self.folder / "keys.u64").stat().st_size // 8, self._whole_rows())
        if rows and not (self.folder / "sums.u32").stat().st_size:
            path = self.folder / "features.f16"
            features = np.memmap(path, np.float16, "r", shape=(rows, *self.shape))
            _append(self.folder / "sums.u32", _sums(features))

    @property
    def _row_bytes(self) -> int:
        return 2 * self.shape[0] * self.shape[1]

    def _whole_rows(self) -> int:
        return (self.folder / "features.f16").stat().st_size // self._row_bytes

    def __len__(self) -> int:
        return len(self._sorted)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_features": None}

    def row(self, image: str) -> int | None:
        """Row of an image's features, its last tile's, or None if it is not in the cache."""
        key = image_key(self.images, image)
        place = int(np.searchsorted(self._sorted, key))
        found = place < len(self._sorted) and self._sorted[place] == key
        return int(self._rows[place]) if found else None

    def _tiles(self, last: int) -> range:
        """Rows of the image whose last tile has the row `last`."""
        first = last
        while first and self._keys[first - 1] == GOES_ON:
            first -= 1
        return range(first, last + 1)

    def load(self, images: tuple[str, ...]) -> list[torch.Tensor]:
        """float32 (tiles, P, D_v) each; SampleError for an image that could not be encoded."""
        rows = [row for image in images if (row := self.row(image)) is not None]
        if len(rows) < len(images):
            raise SampleError("broken image file")
        tiles = [self._mapped()[self._tiles(row)] for row in rows]
        # NumPy takes ten times as long for the cast
        return [torch.from_numpy(half).float() for half in tiles]

    def _mapped(self) -> np.memmap:
        if self._features is None:
            path = self.folder / "features.f16"
            self._features = np.memmap(path, np.float16, "r", shape=(len(self), *self.shape))
        return self._features

    def drop_damaged(self, images: Iterable[str]) -> int:
        """Take the key of every image with a row whose checksum does not fit; inside `writing()`.

        Returns how many there were.
        """
        rows = sorted({row for image in images if (row := self.row(image)) is not None})
        damaged = [row for row in rows if not all(map(self._is_sound, self._tiles(row)))]
        with open(self.folder / "keys.u64", "r+b") as keys:
            for row in damaged:
                keys.seek(8 * row)
                keys.write(np.uint64(NOBODY).tobytes())
        self.reload()
        return len(damaged)

    def _is_sound(self, row: int) -> bool:
        return zlib.crc32(self._mapped()[row]) == self._sums[row]

    def append(self, images: list[str], features: torch.Tensor, tiles: list[int]) -> None:
        """Write the features (tiles, P, D_v) of new images; only inside `writing()`.

        tiles: how many each has.
        """
        keys = np.full(sum(tiles), GOES_ON, dtype=np.uint64)
        keys[np.cumsum(tiles) - 1] = [image_key(self.images, image) for image in images]
        rows = features.half().cpu().numpy()
        _append(self.folder / "features.f16", rows.tobytes())
        _append(self.folder / "sums.u32", _sums(rows))
        _append(self.folder / "keys.u64", keys.tobytes())


def _sums(rows: np.ndarray) -> bytes:
    return np.array([zlib.crc32(row.tobytes()) for row in rows], dtype=np.uint32).tobytes()


def _append(path: Path, data: bytes) -> None:
    with open(path, "ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def image_key(folder: Path, image: str) -> np.uint64:
    """64-bit key of one state of an image file; SampleError if the file is missing."""
    try:
        status = os.stat(os.path.join(folder, image))
    except OSError as error:
        raise SampleError("missing image file") from error
    text = f"{image}\0{status.st_size}\0{status.st_mtime_ns}"
    name = text.encode("utf-8", "surrogateescape")  # a file's name need not be text
    return np.frombuffer(hashlib.blake2b(name, digest_size=8).digest(), np.uint64)[0]


def weights_fingerprint(module: nn.Module, description: dict[str, Any]) -> str:
    """Hex digest of a description and a module's weights: what its cached output depends on."""
    digest = hashlib.blake2b(
        json.dumps(description, sort_keys=True, default=str).encode(), digest_size=8
    )
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def open_cache(root: Path, images: Path, model: Any, processor: Any) -> FeatureCache:
    """The cache of `model`'s encoder and the processor's image transform, under `root`."""
    vision = model.config.vision_config
    how_saved = ("dtype", "transformers_version")  # of a checkpoint; says nothing of its output
    description = {
        "vision": {k: v for k, v in vision.to_dict().items() if k not in how_saved},
        "transform": processor.image_processor.to_dict(),
        "image_aspect_ratio": processor.image_aspect_ratio,
    }
    if processor.image_layout != WHOLE:  # the name of a cache of whole pictures stays what it was
        description["image_layout"] = processor.image_layout
    if (layer := model.config.vision_feature_layer) != USUAL_LAYER:  # likewise
        description["vision_feature_layer"] = layer
    name = f"{vision.model_type}-{weights_fingerprint(model.vision_encoder, description)}"
    cache = FeatureCache(
        Path(root) / name, images, model.config.num_patches, model.config.vision_width
    )
    (cache.folder / "meta.json").write_text(json.dumps(description, indent=2, default=str) + "\n")
    return cache


@torch.inference_mode()
def fill_cache(
    cache: FeatureCache,
    images: Iterable[str],
    model: Any,
    processor: Any,
    batch_size: int = 32,
) -> int:
    """Encode every image that the cache lacks; returns how many were broken and left out.

    A missing file is neither: whoever loads it gets SampleError, as without a cache.
    """
    names = [name for name in dict.fromkeys(images) if _is_there(cache, name)]
    with cache.writing():
        if damaged := cache.drop_damaged(names):
            tqdm.write(f"{damaged} damaged entries of {cache.folder} are encoded anew")
    wanted = list(_missing(cache, names))
    if not wanted:
        return 0
    with cache.writing(), tqdm(total=len(wanted), desc="encoding images", unit="img") as progress:
        device, broken = next(model.vision_encoder.parameters()).device, 0
        wanted = list(_missing(cache, wanted))  # another run may have written meanwhile
        for names in chunks(wanted, batch_size):
            decoded = {name: image for name in names if (image := _try_open(cache, name))}
            broken += len(names) - len(decoded)
            if decoded:
                pixels, tiles = processor.tiled(list(decoded.values()))
                some = pixels.to(device).split(batch_size)
                features = torch.cat([model.encode_images(pixels) for pixels in some])
                cache.append(list(decoded), features, tiles)
            progress.update(len(names))
    return broken


def _missing(cache: FeatureCache, images: Iterable[str]) -> Iterator[str]:
    """Each image once that the cache lacks."""
    seen: set[int] = set()
    for image in images:
        if cache.row(image) is None and (key := int(image_key(cache.images, image))) not in seen:
            seen.add(key)
            yield image


def _is_there(cache: FeatureCache, image: str) -> bool:
    try:
        image_key(cache.images, image)
    except SampleError:
        return False
    return True


def _try_open(cache: FeatureCache, image: str) -> Any:
    try:
        return open_image(cache.images / image)
    except SampleError:
        return None
