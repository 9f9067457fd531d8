"""What an encoder's features tell of a picture's small signs: linear probes, one an encoder.

    python tools/probe_encoder.py                      # the demo's encoders, two minutes
    python tools/probe_encoder.py --encoders efficientnet-lite0 --scenes 400

Scenes of 1 to 16 things, each above a sign (`vlmamba.demo.labeled`).  A linear layer learns to name
the color and the word of a sign from the features of the patch that its middle is in, and is asked
on scenes that it has not seen.  What no linear layer finds there, a connector hardly passes on.
"""

from __future__ import annotations

import argparse
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.reporting.render import text_table
from vlmamba.config import VLMambaConfig
from vlmamba.configs.presets import VISION_ENCODERS
from vlmamba.demo.labeled import labeled_scene
from vlmamba.demo.render import render
from vlmamba.demo.vocabulary import COLORS, TRAINING_STYLES, WORDS
from vlmamba.demo.world import SIDE, Scene
from vlmamba.models.vision import build_vision_encoder
from vlmamba_core.cli import cli

ENCODERS = [name for name in VISION_ENCODERS if name.startswith("efficientnet")]
THINGS = (1, 2, 4, 8, 16)
HELD_OUT = 5  # of so many scenes one is not learned from
BATCH, UPDATES, RATE, DECAY = 512, 400, 2e-3, 0.1


@torch.inference_mode()
def features(encoder: str, scenes: list[Scene]) -> Tensor:
    """(signs, Dv): of each sign the patch that its middle is in."""
    config = VLMambaConfig.preset(f"nano+{encoder}+mlp")
    model = build_vision_encoder(config)
    model.load_pretrained()
    transform, found = model.transform(config.vision_config), []
    for start in range(0, len(scenes), 50):
        some = scenes[start : start + 50]
        patches = model(transform(list(map(render, some)), return_tensors="pt")["pixel_values"])
        side = round(patches.shape[1] ** 0.5)
        for scene, of_one in zip(some, patches, strict=True):
            for sign in scene.labels:
                place = side * (sign.y * side // SIDE) + sign.x * side // SIDE
                found.append(of_one[place])
    return torch.stack(found).clone()


def probe(x: Tensor, y: Tensor, learned: Tensor) -> float:
    """The share of the other rows whose class a linear layer finds, taught by those `learned`."""
    torch.manual_seed(0)
    x = (x - x[learned].mean(0)) / (x[learned].std(0) + 1e-4)
    layer = torch.nn.Linear(x.shape[1], int(y.max()) + 1)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=RATE, weight_decay=DECAY)
    rows = learned.nonzero()[:, 0]
    for _ in range(UPDATES):
        some = rows[torch.randint(len(rows), (BATCH,))]
        F.cross_entropy(layer(x[some]), y[some]).backward()
        optimizer.step()
        optimizer.zero_grad()
    right = layer(x[~learned]).argmax(1) == y[~learned]
    return float(right.float().mean())


@cli
def main() -> int:
    """Print a row an encoder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--encoders", default=",".join(ENCODERS), help="names of presets")
    parser.add_argument("--scenes", type=int, default=1000)
    args = parser.parse_args()
    scenes = [
        labeled_scene(f"probe/{n}", THINGS[n % len(THINGS)], TRAINING_STYLES, variants=True)
        for n in range(args.scenes)
    ]
    signs = [(n, sign) for n, scene in enumerate(scenes) for sign in scene.labels]
    learned = torch.tensor([n // len(THINGS) % HELD_OUT != 0 for n, _ in signs])
    colors = torch.tensor([list(COLORS).index(sign.color) for _, sign in signs])
    words = torch.tensor([list(WORDS).index(sign.text) for _, sign in signs])
    rows = []
    for encoder in args.encoders.split(","):
        x = features(encoder, scenes)
        found = [f"{100 * probe(x, y, learned):.1f}" for y in (colors, words)]
        rows.append([encoder, str(x.shape[1]), *found])
    rows.append(["a guess", "", f"{100 / len(COLORS):.1f}", f"{100 / len(WORDS):.1f}"])
    print(text_table(("encoder", "width", "color, %", "word, %"), rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
