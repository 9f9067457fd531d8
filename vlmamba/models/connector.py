"""The multimodal connector: patches of the vision encoder -> tokens of the language model.

    mlp       V_out = MLP(V_img)
    mlp3      V_out = MLP3(V_img), three layers
    vss_mlp   V_scan = VSS(V_img);                         V_out = MLP(Norm(V_scan + V_img))
    vss_l2    V' = Linear(V_img); V_scan = VSS(GELU(V'));  V_out = Linear(Norm(V_scan + V'))
    msc       ML-Mamba's: GELU(Linear), two blocks of a Mamba-2 that reads both ways, MLP3
    msc_basic the same without the SwiGLU of each block

(VL-Mamba, section 3.2; `vss_l2` with `bsm` is its final model.)  VSS, the vision selective scan,
unfolds the patch grid into one sequence per scan direction, runs a Mamba layer over each
(config.connector_layer shapes it), puts every output back into the patch order and merges them.
The paper leaves open, and we chose: one Mamba layer shared by all directions (scan_shared),
merging by sum (scan_merge), LayerNorm and GELU.  With scan_shared "projections" the directions
share what comes before and after the scan, as in ML-Mamba, but not its dynamics.

Sizes: B batch, P patches, Dv encoder width, D width of the language model, S directions.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from vlmamba import registry
from vlmamba.config import VLMambaConfig
from vlmamba.configs.language import MambaConfig
from vlmamba.models.linear import Linear, use_fast_products
from vlmamba.models.mixers import MIXERS, Mixer
from vlmamba.models.mixers.bidirectional import BidirectionalMamba2
from vlmamba.models.scan2d import fold, scan_orders, unfold

SHARED = ("in_proj", "out_proj", "norm")  # under scan_shared "projections"


class VisionSelectiveScan(nn.Module):
    """VSS: a 2D scan mechanism around one Mamba layer (or one per direction)."""

    def __init__(self, config: VLMambaConfig, width: int):
        super().__init__()
        self.grid, self.scan, self.merge = config.grid, config.scan, config.scan_merge
        self.directions = len(scan_orders(self.scan, *self.grid)[0])
        layers = 1 if config.scan_shared is True else self.directions
        layer = config.connector_layer_config(width)
        self.layers = nn.ModuleList(MIXERS[layer.mixer](layer) for _ in range(layers))
        self.shared: list[str] = []
        if config.scan_shared == "projections":
            self.shared = [name for name in SHARED if hasattr(self.layers[0], name)]
            for other in self.layers[1:]:
                for name in self.shared:  # no part of `other`: saved, moved and counted once
                    delattr(other, name)
                    object.__setattr__(other, name, getattr(self.layers[0], name))

    def repeated(self) -> int:
        """Parameters beyond those it has that the directions use: a shared one counts for each."""
        one = self.layers[0]
        parts = [one] if len(self.layers) == 1 else [getattr(one, name) for name in self.shared]
        return (self.directions - 1) * sum(p.numel() for part in parts for p in part.parameters())

    def forward(self, patches: Tensor) -> Tensor:
        """(B, P, width) -> (B, P, width)."""
        orders, inverses = scan_orders(self.scan, *self.grid)
        sequences = unfold(patches, orders)  # (S, B, P, width)
        if len(self.layers) == 1:
            scanned = self.layers[0](sequences.flatten(0, 1))[0].view_as(sequences)
        else:
            pairs = zip(self.layers, sequences, strict=True)
            scanned = torch.stack([layer(sequence)[0] for layer, sequence in pairs])
        merged = fold(scanned, inverses)
        return merged.sum(0) if self.merge == "sum" else merged.mean(0)


class OutputLinear(Linear):
    """The layer that writes into the language model's embedding space.

    It starts at the scale of token embeddings (see VLMambaPreTrainedModel._init_weights): with
    the usual initialization image tokens would be tens of times larger than words, and what the
    language model's layers add to them would not count.
    """


def _mlp(d_in: int, d_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(d_in, d_out), nn.GELU(), OutputLinear(d_out, d_out))


def _three_layers(d_in: int, d_out: int) -> nn.Sequential:
    """Four times the input's width inside."""
    wide = [nn.Linear(d_in, 4 * d_in), nn.GELU(), nn.Linear(4 * d_in, d_out), nn.GELU()]
    return nn.Sequential(*wide, OutputLinear(d_out, d_out))


class Connector(nn.Module):
    """Patches (B, P, Dv) -> tokens (B, tokens(grid), D)."""

    def __init__(self, config: VLMambaConfig, d_vision: int):
        super().__init__()
        self.patches = config.grid[0] * config.grid[1]
        self.widths = d_vision, config.hidden_size

    def activation_bytes(self, element: int) -> int:
        """What a backward pass keeps of one image; element: bytes of a number in products."""
        return self.patches * 4 * (4 * self.widths[0] + 2 * self.widths[1])

    def flops(self) -> float:
        """A forward pass over one image; a multiply-add is two."""
        return 2 * self.patches * sum(p.numel() for p in self.parameters())

    @staticmethod
    def tokens(grid: tuple[int, int]) -> int:
        """How many tokens an image of grid[0] rows and grid[1] columns of patches becomes."""
        return grid[0] * grid[1]


class ScanningConnector(Connector):
    """One with a vision selective scan at `scan_width`, whose layer runs once per direction."""

    vss: VisionSelectiveScan
    scan_width: int

    def activation_bytes(self, element: int) -> int:
        """As above, and of each direction its order and what the layer keeps."""
        layer = cast(Mixer, self.vss.layers[0])
        scanned = 2 * 4 * self.scan_width + layer.activation_bytes(element)[0]
        rows = 4 * (4 * self.scan_width + 2 * self.widths[1])
        return self.patches * (rows + self.vss.directions * scanned)

    def flops(self) -> float:
        """A shared layer's parameters count once for each direction."""
        return super().flops() + 2 * self.patches * self.vss.repeated()


@registry.connectors.add("mlp")
class MLPConnector(Connector):
    """`mlp`: the two-layer MLP of LLaVA-1.5."""

    def __init__(self, config: VLMambaConfig, d_vision: int):
        super().__init__(config, d_vision)
        self.mlp = _mlp(d_vision, config.hidden_size)

    def forward(self, patches: Tensor) -> Tensor:
        """(B, P, Dv) -> (B, P, D)."""
        return self.mlp(patches)


@registry.connectors.add("mlp3")
class ThreeLayerConnector(Connector):
    """`mlp3`: Prismatic's three-layer MLP for fused encoders (2402.07865), which Cobra uses."""

    def __init__(self, config: VLMambaConfig, d_vision: int):
        super().__init__(config, d_vision)
        self.mlp = _three_layers(d_vision, config.hidden_size)

    def forward(self, patches: Tensor) -> Tensor:
        """(B, P, Dv) -> (B, P, D)."""
        return self.mlp(patches)


@registry.connectors.add("vss_mlp")
class VSSMLPConnector(ScanningConnector):
    """`vss_mlp`: scan at the encoder's width, then the MLP."""

    def __init__(self, config: VLMambaConfig, d_vision: int):
        super().__init__(config, d_vision)
        self.scan_width = d_vision
        self.vss = VisionSelectiveScan(config, d_vision)
        self.norm = nn.LayerNorm(d_vision)
        self.mlp = _mlp(d_vision, config.hidden_size)

    def forward(self, patches: Tensor) -> Tensor:
        """(B, P, Dv) -> (B, P, D)."""
        return self.mlp(self.norm(self.vss(patches) + patches))


@registry.connectors.add("vss_l2")
class VSSL2Connector(ScanningConnector):
    """`vss_l2`: scan between two linear layers, at the language model's width."""

    def __init__(self, config: VLMambaConfig, d_vision: int):
        super().__init__(config, d_vision)
        self.linear_in = nn.Linear(d_vision, config.hidden_size)
        self.act = nn.GELU()
        self.scan_width = config.hidden_size
        self.vss = VisionSelectiveScan(config, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.linear_out = OutputLinear(config.hidden_size, config.hidden_size)

    def forward(self, patches: Tensor) -> Tensor:
        """(B, P, Dv) -> (B, P, D)."""
        projected = self.linear_in(patches)
        return self.linear_out(self.norm(self.vss(self.act(projected)) + projected))


class SwiGLU(nn.Module):
    """w3(silu(w1 x) * w2 x), as wide inside as outside."""

    def __init__(self, width: int):
        super().__init__()
        self.w1, self.w2, self.w3 = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.w3(nn.functional.silu(self.w1(x)) * self.w2(x))


class ScanBlock(nn.Module):
    """x + BiMamba2(x); no norm stands before the scan."""

    inner_widths = 0  # rows of the block's width that a backward pass keeps besides the scan's

    def __init__(self, layer: MambaConfig):
        super().__init__()
        self.mixer = BidirectionalMamba2(layer)

    def forward(self, x: Tensor) -> Tensor:
        """(B, P, D) -> (B, P, D)."""
        return x + self.mixer.both_ways(x)


class GatedScanBlock(ScanBlock):
    """x + BiMamba2(x), then x + SwiGLU(LayerNorm(x))."""

    inner_widths = 6

    def __init__(self, layer: MambaConfig):
        super().__init__(layer)
        self.mlp = SwiGLU(layer.d_model)
        self.norm = nn.LayerNorm(layer.d_model)

    def forward(self, x: Tensor) -> Tensor:
        """(B, P, D) -> (B, P, D)."""
        x = super().forward(x)
        return x + self.mlp(self.norm(x))


@registry.connectors.add("msc")
class MSCConnector(Connector):
    """`msc`: ML-Mamba's Mamba-2 scan connector as its code has it (2407.19832, 3.2.3 "Advanced").

    The paper's equations have neither residual nor norm; its released code, followed here, has.
    It scans forward and backward over the raster of patches, whatever `scan` says, with Mamba-2 at
    the language model's width (connector_layer: d_state, d_conv, expand, head_dim, n_groups).
    """

    layers = 2
    block: type[ScanBlock] = GatedScanBlock

    def __init__(self, config: VLMambaConfig, d_vision: int):
        super().__init__(config, d_vision)
        width = config.hidden_size
        layer = config.connector_layer_config(width)
        self.linear_in = nn.Linear(d_vision, width)
        self.blocks = nn.ModuleList(self.block(layer) for _ in range(self.layers))
        self.norm = nn.LayerNorm(width)
        self.mlp = _three_layers(width, width)

    def activation_bytes(self, element: int) -> int:
        """As above, and of each block its SwiGLU and what its layer keeps, both ways."""
        width = self.widths[1]
        mixer = cast(ScanBlock, self.blocks[0]).mixer
        kept, at_work = mixer.activation_bytes(element)
        block = 4 * self.block.inner_widths * width + kept + 2 * at_work
        return self.patches * (4 * (self.widths[0] + 12 * width) + self.layers * block)

    def forward(self, patches: Tensor) -> Tensor:
        """(B, P, Dv) -> (B, P, D)."""
        x = nn.functional.gelu(self.linear_in(patches))
        for block in self.blocks:
            x = block(x)
        return self.mlp(self.norm(x))


@registry.connectors.add("msc_basic")
class MSCBasicConnector(MSCConnector):
    """`msc_basic`: `msc` without its SwiGLU, the paper's "Basic", which its code does not have."""

    block = ScanBlock


def build_connector(config: VLMambaConfig) -> Connector:
    """The connector that `config.connector` names."""
    connector = registry.connectors[config.connector](config, config.vision_width)
    use_fast_products(connector)
    return connector
