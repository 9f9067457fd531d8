"""Scan orders are permutations, and putting a scanned sequence back is the identity."""

from __future__ import annotations

import pytest
import torch

from vlmamba.models.scan2d import SCANS, fold, scan_orders, unfold

GRIDS = [(1, 1), (1, 5), (7, 7), (3, 8), (24, 24), (5, 2)]


@pytest.mark.parametrize("name", SCANS)
@pytest.mark.parametrize("grid", GRIDS)
def test_scan_then_inverse_is_the_identity(name, grid):
    patches = torch.randn(2, grid[0] * grid[1], 3)
    orders, inverses = scan_orders(name, *grid)
    assert torch.equal(orders.sort(dim=1).values, torch.arange(orders.shape[1]).expand_as(orders))
    for back in fold(unfold(patches, orders), inverses):
        assert torch.equal(back, patches)


def test_the_papers_scans():
    bsm, _ = scan_orders("bsm", 2, 3)
    assert bsm.tolist() == [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]]
    csm, _ = scan_orders("csm", 2, 3)
    columns = [0, 3, 1, 4, 2, 5]
    assert csm.tolist() == [*bsm.tolist(), columns, columns[::-1]]


@pytest.mark.parametrize(("name", "side"), [("zigzag", 6), ("hilbert", 8)])
def test_continuous_scans_move_to_a_neighbor(name, side):
    order = scan_orders(name, side, side)[0][0]
    rows, columns = order // side, order % side
    assert ((rows.diff().abs() + columns.diff().abs()) == 1).all()


def test_diagonal_and_window_by_hand():
    assert scan_orders("diagonal", 2, 3)[0][0].tolist() == [0, 1, 3, 2, 4, 5]
    assert scan_orders("window", 4, 4)[0][0].tolist()[:8] == [0, 1, 4, 5, 2, 3, 6, 7]


def test_orders_first_asked_for_in_inference_mode_serve_training():
    scan_orders.cache_clear()
    with torch.inference_mode():
        scan_orders("bsm", 2, 2)
    patches = torch.randn(1, 4, 3, requires_grad=True)
    unfold(patches, scan_orders("bsm", 2, 2)[0]).sum().backward()
    assert torch.equal(patches.grad, torch.full_like(patches, 2))
