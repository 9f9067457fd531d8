"""How the encoder is shown a picture: whole, or as several tiles.

    @registry.image_layouts.add("quarters")
    class Quarters(ImageLayout):
        most = 5

        def tiles(self, picture, resolution): ...   # four quarters and a thumbnail

A tile is encoded as a picture of its own, and its tokens follow those of the tile before it.  A
processor names its layout (`image_layout`), and so does `vlmamba.train --image-layout`.
"""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from vlmamba import registry
from vlmamba_core.errors import UserError

WHOLE = "whole"


@registry.image_layouts.add(WHOLE)
class ImageLayout:
    """The picture itself is the one tile.

    most: tiles that a picture has at most; what `--estimate` counts on.
    """

    most = 1

    def tiles(self, picture: Image.Image, resolution: tuple[int, int]) -> Sequence[Image.Image]:
        """A picture in RGB -> its tiles, of any size and shape.

        resolution: (H, W) to which the encoder's transform brings a tile.
        """
        return [picture]


def most_tiles(name: str) -> int:
    """How many tiles the layout called `name` makes of a picture at most. Raises UserError."""
    return registry.image_layouts[name].most


def tiles(name: str, picture: Image.Image, resolution: tuple[int, int]) -> list[Image.Image]:
    """The picture's tiles in the layout called `name`; UserError unless there are 1 to `most`."""
    layout = registry.image_layouts[name]()
    made = list(layout.tiles(picture, resolution))
    if not 1 <= len(made) <= layout.most:
        raise UserError(
            f"image layout {name!r} made {len(made)} tiles of a picture of {picture.size}; "
            f"expected 1 to {layout.most}, which it says of itself"
        )
    return made
