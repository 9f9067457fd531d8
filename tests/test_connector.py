"""The three connectors equal their equations, written out step by step."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny import TINY_CLIP, TINY_MIXERS, tiny_config

from vlmamba import registry
from vlmamba.configs.language import MIXER_NAMES
from vlmamba.models.connector import build_connector
from vlmamba.models.mixers import MIXERS
from vlmamba.models.mixers.bidirectional import BidirectionalMamba2
from vlmamba.models.scan2d import SCANS, scan_orders
from vlmamba.models.vlm import VLMambaForConditionalGeneration

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


@pytest.mark.parametrize("mixer", MIXERS)
@torch.no_grad()
def test_vss_mlp(mixer):
    config, built = connector(connector="vss_mlp", scan="csm", **TINY_MIXERS[mixer])
    assert isinstance(built.vss.layers[0], MIXERS[mixer])
    patches = torch.randn(2, 4, D_VISION)
    expected = mlp(built.mlp, built.norm(vss(config, built.vss, patches) + patches))
    assert torch.allclose(built(patches), expected, atol=1e-5)


@torch.no_grad()
def test_shared_projections_are_ml_mambas_two_ways():
    """bsm, averaged, with common projections: the layer that its converter is tested with."""
    fields = {"scan_shared": "projections", "scan_merge": "mean", "connector": "vss_l2"}
    config, built = connector(**fields, **TINY_MIXERS["mamba2"])
    reference = BidirectionalMamba2(config.connector_layer_config(32))
    reference.initialize(2)
    for name in ("A_log_b", "D_b", "dt_bias_b"):  # a start has both ways alike
        getattr(reference, name).uniform_(0.1, 1)
    ahead, back = built.vss.layers
    own = reference.state_dict()
    ahead.load_state_dict({k: v for k, v in own.items() if "_b" not in k or k == "dt_bias"})
    names = set(back.state_dict())
    back.load_state_dict(
        {k: own[k.replace("conv1d", "conv1d_b")] for k in names if "conv" in k}
        | {k: own[f"{k}_b"] for k in names if "conv" not in k}
    )
    patches = torch.randn(2, config.num_patches, 32)
    torch.testing.assert_close(built.vss(patches), reference.both_ways(patches))
    assert names == {"A_log", "D", "dt_bias", "conv1d.weight", "conv1d.bias"}
    shared = sum(
        p.numel() for n in ("in_proj", "out_proj", "norm") for p in getattr(ahead, n).parameters()
    )
    assert built.vss.repeated() == shared  # two directions


@pytest.mark.parametrize("mixer", MIXERS)
def test_shared_projections_are_saved_once_and_come_back(tmp_path, mixer):
    fields = {"scan": "csm", "scan_shared": "projections", **TINY_MIXERS[mixer]}
    model = VLMambaForConditionalGeneration(tiny_config(**fields)).eval()
    layers = model.connector.vss.layers
    assert len(layers) == 4 and all(layer.in_proj is layers[0].in_proj for layer in layers)
    model.save_pretrained(tmp_path)
    again = VLMambaForConditionalGeneration.from_pretrained(tmp_path).eval()
    patches = torch.randn(1, model.config.num_patches, model.config.vision_width)
    with torch.no_grad():
        assert torch.equal(again.connector(patches), model.connector(patches))
    again.train().connector(patches).square().sum().backward()
    assert again.connector.vss.layers[3].out_proj.weight.grad is not None


@torch.no_grad()
def test_msc_basic_is_msc_whose_swiglu_gives_nothing():
    config, whole = connector(connector="msc", connector_layer={"head_dim": 8})
    _, basic = connector(connector="msc_basic", connector_layer={"head_dim": 8})
    for block in whole.blocks:
        block.mlp.w3.weight.zero_()
        block.mlp.w3.bias.zero_()
    own = whole.state_dict()
    basic.load_state_dict({name: own[name] for name in basic.state_dict()})
    patches = torch.randn(2, config.num_patches, config.vision_width)
    assert torch.equal(basic(patches), whole(patches))
    assert set(own) - set(basic.state_dict()) == {
        n for n in own if "mlp.w" in n or "s.0.norm" in n or "s.1.norm" in n
    }
