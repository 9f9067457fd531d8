"""How the encoder is shown a picture: whole, or as several tiles.

    @registry.image_layouts.add("quarters")
    class Quarters(ImageLayout):
        most = 5

        def tiles(self, picture, resolution): ...   # four quarters and a thumbnail

A tile is encoded as a picture of its own, and its tokens follow those of the tile before it; `text`
says what else stands between a tile's tokens.  A processor names its layout (`image_layout`), and
so does `vlmamba.train --image-layout`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image

from vlmamba import registry
from vlmamba_core.errors import UserError
from vlmamba_core.tokens import IMAGE

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

    def text(self, tokens: int) -> str:
        """What stands in the prompt for one tile of so many tokens: `<image>` for each of them."""
        return IMAGE * tokens


@registry.image_layouts.add("row_separators")
class RowSeparators(ImageLayout):
    """The whole picture, its rows of patches parted: `### patches && patches ... ###`.

    "Shaking up VLMs" (2409.05395) marks rows so for a language model without positions.
    """

    edge, between = "###", "&&"

    def text(self, tokens: int) -> str:
        """Edge, rows of `<image>` with a separator between them, edge. UserError if not square."""
        side = math.isqrt(tokens)
        if side * side != tokens:
            raise UserError(f"image layout row_separators needs a square of tokens, not {tokens}")
        return self.edge + self.between.join([IMAGE * side] * side) + self.edge


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
