"""The three connectors equal their equations, written out step by step."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny import TINY_CLIP, TINY_MIXERS, tiny_config

from vlmamba import registry
from vlmamba.config import MIXER_NAMES
from vlmamba.models.connector import build_connector
from vlmamba.models.mixers import MIXERS
from vlmamba.models.scan2d import SCANS, scan_orders

D_VISION = TINY_CLIP["hidden_size"]


def connector(**overrides):
    config = tiny_config(**overrides)
    built = build_connector(config)
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return config, built.eval()


def vss(config, scan, patches):
    """One direction at a time: permute, run its Mamba layer, permute back, merge."""
    outputs = []
    for s, order in enumerate(scan_orders(config.scan, *config.grid)[0]):
        layer = scan.layers[0 if len(scan.layers) == 1 else s]
        output = torch.empty_like(patches)
        output[:, order] = layer(patches[:, order])[0]
        outputs.append(output)
    total = torch.stack(outputs).sum(0)
    return total if config.scan_merge == "sum" else total / len(outputs)


def mlp(layers, x):
    return layers[2](F.gelu(layers[0](x)))


def test_names_agree():
    assert set(registry.connectors) >= {"mlp", "vss_mlp", "vss_l2"}
    assert set(MIXERS) == set(MIXER_NAMES)


def test_mlp():
    _, built = connector(connector="mlp")
    patches = torch.randn(2, 4, D_VISION)
    assert torch.allclose(built(patches), mlp(built.mlp, patches))


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("merge", ["sum", "mean"])
@torch.no_grad()
def test_vss_l2(scan, shared, merge):
    config, built = connector(connector="vss_l2", scan=scan, scan_shared=shared, scan_merge=merge)
    patches = torch.randn(2, 4, D_VISION)
    projected = built.linear_in(patches)
    scanned = vss(config, built.vss, F.gelu(projected))
    expected = built.linear_out(built.norm(scanned + projected))
    assert torch.allclose(built(patches), expected, atol=1e-5)


@pytest.mark.parametrize("mixer", TINY_MIXERS)
@torch.no_grad()
def test_vss_mlp(mixer):
    config, built = connector(connector="vss_mlp", scan="csm", **TINY_MIXERS[mixer])
    assert isinstance(built.vss.layers[0], MIXERS[mixer])
    patches = torch.randn(2, 4, D_VISION)
    expected = mlp(built.mlp, built.norm(vss(config, built.vss, patches) + patches))
    assert torch.allclose(built(patches), expected, atol=1e-5)
