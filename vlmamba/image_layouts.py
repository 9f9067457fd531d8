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


class DynamicTiles(ImageLayout):
    """Tiles of the grid whose shape is nearest to the picture's, then a thumbnail of all of it.

    InternVL 2.5's rule as its code has it (2412.05271, `dynamic_preprocess` in OpenGVLab/InternVL):
    of the grids of at most `grid_tiles` cells, fewest cells first, the one whose ratio of sides is
    nearest to the picture's; of two that are as near, the later where the picture has more than
    half of its pixels.  The picture is stretched to the grid and cut row by row.  One cell needs no
    thumbnail.
    """

    grid_tiles: int

    def tiles(self, picture: Image.Image, resolution: tuple[int, int]) -> Sequence[Image.Image]:
        """Of the encoder's resolution each: columns * rows, and the thumbnail."""
        height, width = resolution
        columns, rows = self.grid(picture.size, resolution)
        if columns * rows == 1:
            return [picture.resize((width, height))]
        stretched = picture.resize((columns * width, rows * height))
        corners = [(c * width, r * height) for r in range(rows) for c in range(columns)]
        cut = [stretched.crop((x, y, x + width, y + height)) for x, y in corners]
        return [*cut, picture.resize((width, height))]

    def grid(self, size: tuple[int, int], resolution: tuple[int, int]) -> tuple[int, int]:
        """Columns and rows for a picture of size (W, H)."""
        sides = range(1, self.grid_tiles + 1)
        grids = [(i, j) for i in sides for j in sides if i * j <= self.grid_tiles]
        best, nearest = (1, 1), math.inf
        for columns, rows in sorted(grids, key=lambda grid: grid[0] * grid[1]):
            distance = abs(size[0] / size[1] - columns / rows)
            half = 0.5 * resolution[0] * resolution[1] * columns * rows
            if distance < nearest or (distance == nearest and size[0] * size[1] > half):
                best, nearest = (columns, rows), distance
        return best


@registry.image_layouts.add("dynamic_12")
class TwelveTiles(DynamicTiles):
    """At most twelve tiles and a thumbnail, as published."""

    grid_tiles, most = 12, 13


@registry.image_layouts.add("dynamic_4")
class FourTiles(DynamicTiles):
    """At most four tiles and a thumbnail: enough for the demo's pictures."""

    grid_tiles, most = 4, 5


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
