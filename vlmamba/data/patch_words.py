"""What each patch of a picture shows, learned where the patch stands: dense labels for alignment.

A LLaVA record may say, beside its conversation, what is where in its picture: `"patch_words"`, a
square grid of words in raster order, null where nothing is to be said (a list of grids where the
record lists several images).  The logits of an image token are then trained to give the first
token of its word.  An answer says a word or two about a whole picture; with sixteen patches there
are sixteen such words, each of one patch, so that a connector finds out early what a patch shows
(results/LOG.md, 2026-11-27).  A grid is that of the picture as the encoder is shown it; nothing is
learned where a picture is shown in several tiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from vlmamba_core.tokens import IGNORE

PatchWords = tuple[str | None, ...]


def parse(value: object, images: int, listed: bool) -> tuple[PatchWords, ...]:
    """A record's grids, one an image; listed: whether it lists images. ValueError if they are none.

    Nothing is said of any image where `value` is None.
    """
    if value is None:
        return ()
    grids = value if listed else [value]
    if not isinstance(grids, list) or len(grids) != images:
        raise ValueError("patch_words is not a grid of words an image")
    for grid in grids:
        if not isinstance(grid, list) or math.isqrt(len(grid)) ** 2 != len(grid) or not grid:
            raise ValueError("patch_words is not a square grid")
        if any(word is not None and (not isinstance(word, str) or not word) for word in grid):
            raise ValueError("patch_words holds what is neither a word nor null")
    return tuple(map(tuple, grids))


def learn(
    labels: Tensor,
    image_tokens: Sequence[int],
    grids: Sequence[PatchWords],
    first_token: Callable[[str], int],
) -> None:
    """Set labels (T,) int64, in place: behind an image token, its word's first token.

    image_tokens: positions of all image tokens, those of each image form a square grid (otherwise
    nothing is set).  A token shows the word of the place where its middle is.  Labels that are
    there already stay.
    """
    tokens = len(image_tokens) // len(grids)
    side = math.isqrt(tokens)
    if side**2 * len(grids) != len(image_tokens):
        return
    for number, grid in enumerate(grids):
        across = math.isqrt(len(grid))
        for place in range(tokens):
            row, column = (int((n + 0.5) * across / side) for n in divmod(place, side))
            behind = image_tokens[number * tokens + place] + 1
            word = grid[row * across + column]
            if word and behind < len(labels) and labels[behind] == IGNORE:
                labels[behind] = first_token(word)


def answers(inputs: dict[str, Tensor]) -> Tensor:
    """(B, T) bool: the tokens of answers among those that are learned.

    An answer's label is the token that stands there; a patch's word stands nowhere.
    """
    return inputs["labels"] == inputs["input_ids"]
