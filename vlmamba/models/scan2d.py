"""2D scan mechanisms: how a grid of patches becomes 1D sequences, and back.

A scan mechanism is a set of permutations of the H x W grid (raster numbering, row by row).
VL-Mamba (section 3.2) has two: bidirectional `bsm` and cross `csm`. The others cost one
function each:

    raster   row by row
    bsm      row by row, forward and backward (the paper's final model)
    csm      rows and columns, each forward and backward
    zigzag   rows in alternating direction, so that neighbors in sequence are neighbors in image
    diagonal anti-diagonals, forward and backward
    hilbert  a Hilbert curve, forward and backward
    window   2 x 2 windows, row by row inside and among them, forward and backward
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

Order = list[int]


def _raster(height: int, width: int) -> Order:
    return list(range(height * width))


def _columns(height: int, width: int) -> Order:
    return [row * width + column for column in range(width) for row in range(height)]


def _zigzag(height: int, width: int) -> Order:
    rows = [range(row * width, (row + 1) * width) for row in range(height)]
    return [i for n, row in enumerate(rows) for i in (row if n % 2 == 0 else reversed(row))]


def _diagonal(height: int, width: int) -> Order:
    cells = [(row, column) for row in range(height) for column in range(width)]
    return [r * width + c for r, c in sorted(cells, key=lambda rc: (rc[0] + rc[1], rc[0]))]


def _window(height: int, width: int, size: int = 2) -> Order:
    cells = [(row, column) for row in range(height) for column in range(width)]
    return [r * width + c for r, c in sorted(cells, key=lambda rc: (rc[0] // size, rc[1] // size))]


def _hilbert_position(order: int, row: int, column: int) -> int:
    """Position of a cell on the Hilbert curve over a 2^order square."""
    position, side = 0, 1 << order
    while side > 1:
        side //= 2
        right, lower = int(column >= side), int(row >= side)
        position += side * side * ((3 * right) ^ lower)
        row, column = row - lower * side, column - right * side
        if not lower:
            if right:
                row, column = side - 1 - row, side - 1 - column
            row, column = column, row
    return position


def _hilbert(height: int, width: int) -> Order:
    """The curve over the enclosing square, without the cells outside the grid."""
    order = max(height, width, 2).bit_length()
    cells = [(row, column) for row in range(height) for column in range(width)]
    return [r * width + c for r, c in sorted(cells, key=lambda rc: _hilbert_position(order, *rc))]


def _both_ways(*orders: Callable[[int, int], Order]) -> Callable[[int, int], list[Order]]:
    return lambda h, w: [o for order in orders for o in (order(h, w), order(h, w)[::-1])]


SCANS: dict[str, Callable[[int, int], list[Order]]] = {
    "raster": lambda h, w: [_raster(h, w)],
    "bsm": _both_ways(_raster),
    "csm": _both_ways(_raster, _columns),
    "zigzag": lambda h, w: [_zigzag(h, w)],
    "diagonal": _both_ways(_diagonal),
    "hilbert": _both_ways(_hilbert),
    "window": _both_ways(_window),
}


@lru_cache(maxsize=64)
def scan_orders(name: str, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The permutations of a scan and their inverses, each (S, P) int64 for S directions.

    `x[orders[s]]` is the sequence of direction s; `y[inverses[s]]` puts it back.
    """
    # Cached, so independent of who asks first: on the CPU although a model may be built on the
    # meta device, and usable in training although the first caller may be in inference mode.
    with torch.inference_mode(False):
        orders = torch.tensor(SCANS[name](height, width), dtype=torch.int64, device="cpu")
        return orders, orders.argsort(dim=1)


def unfold(x: Tensor, orders: Tensor) -> Tensor:
    """(B, P, D) patches -> (S, B, P, D) sequences, one per direction."""
    return torch.stack([x[:, order] for order in orders.to(x.device)])


def fold(sequences: Tensor, inverses: Tensor) -> Tensor:
    """(S, B, P, D) sequences -> the same, every one back in the original patch order."""
    pairs = zip(sequences, inverses.to(sequences.device), strict=True)
    return torch.stack([sequence[:, inverse] for sequence, inverse in pairs])
