"""The pictures of a report: small ones inside the page, large ones inside or in a folder beside it.

    pictures = Pictures(Path("report_pictures"))
    pictures.add(key, stored_image)
    pictures.shown()      # key -> Picture, for the page

Large pictures are inside while all of them together stay below LARGE_BYTES; beyond that they are
files in the folder. Small ones are inside up to SMALL_BYTES; the page then shows the files instead.
So the pictures keep a page below some 30 MB however many there are.
"""

from __future__ import annotations

import base64
import hashlib
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image

from harness.data.images import UnreadableImage, decode
from vlmamba_core.errors import UserError

SMALL_PX, LARGE_PX = 264, 896  # longest side; small: twice the size shown
JPEG_QUALITY = 72
SMALL_BYTES, LARGE_BYTES = 11_000_000, 9_000_000  # as base64 a third more


@dataclass(frozen=True)
class Picture:
    """Addresses of a picture, and the small one's size in pixels.

    small: None where only the file is there.  large: None where the small one is all there is.
    """

    small: str | None
    large: str | None
    width: int
    height: int

    def to_json(self) -> dict[str, Any]:
        """For the page's script."""
        source = self.small or self.large
        return {"src": source, "width": self.width, "height": self.height, "large": self.large}


@dataclass
class _Encoded:
    small: bytes | None
    large: bytes | None  # None: it is a file, or no larger than the small one
    width: int
    height: int


@dataclass
class Pictures:
    """Collects pictures by content key.

    folder: where large pictures go that do not fit into the page; None: they are left out.
    """

    folder: Path | None = None
    files: set[str] = field(default_factory=set)  # keys whose large picture is a file
    _held: dict[str, _Encoded] = field(default_factory=dict)
    _small_bytes: int = 0
    _large_bytes: int = 0
    _spilled: bool = False

    def __contains__(self, key: str) -> bool:
        return key in self._held

    def __len__(self) -> int:
        return len(self._held)

    def add(self, key: str, value: Any) -> None:
        """Keep a stored image. Raises UnreadableImage; UserError where a file cannot be written."""
        try:
            image = decode(value).convert("RGB")
        except (OSError, ValueError) as error:
            raise UnreadableImage(str(error)) from error
        large = _jpeg(image, LARGE_PX) if max(image.size) > SMALL_PX else None
        image.thumbnail((SMALL_PX, SMALL_PX))
        small: bytes | None = _jpeg(image, SMALL_PX)
        assert small is not None
        if self._small_bytes + len(small) > SMALL_BYTES and self.folder is not None:
            large, small = large or small, None
        self._small_bytes += len(small or b"")
        self._large_bytes += len(large or b"")
        self._held[key] = _Encoded(small, large, *image.size)
        if self._spilled:
            self._spill(key)
        elif self._large_bytes > LARGE_BYTES or small is None:
            self._spilled = True
            self._spill(*self._held)

    def shown(self) -> dict[str, Picture]:
        """Key -> what the page shows."""
        found = {}
        for key, held in self._held.items():
            inside = None if held.large is None else _address(held.large)
            large = self._file(key) if key in self.files else inside
            small = None if held.small is None else _address(held.small)
            found[key] = Picture(small, large, held.width, held.height)
        return found

    def _spill(self, *keys: str) -> None:
        """The large pictures of these leave the page."""
        for key in keys:
            held = self._held[key]
            if held.large is not None:
                if self.folder is not None:
                    self._write(key, held.large)
                held.large = None

    def _write(self, key: str, content: bytes) -> None:
        assert self.folder is not None
        try:
            self.folder.mkdir(exist_ok=True)
            (self.folder / _name(key)).write_bytes(content)
        except OSError as error:
            raise UserError(
                f"cannot write pictures to {self.folder}: {error.strerror}; give another --out"
            ) from error
        self.files.add(key)

    def _file(self, key: str) -> str:
        assert self.folder is not None
        return f"{quote(self.folder.name)}/{_name(key)}"


def _jpeg(image: Image.Image, side: int) -> bytes:
    copy = image.copy()
    copy.thumbnail((side, side))
    file = io.BytesIO()
    copy.save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()


def _name(key: str) -> str:
    """A file name whatever the key is."""
    return f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.jpg"


def _address(content: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"
