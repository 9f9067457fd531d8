"""Turn a finished training run into a bundled model: half-precision weights, no encoder.

    python tools/bundle_model.py runs/demo-model/finetune/final vlmamba/assets/nano
    python tools/bundle_model.py runs/study/cells/attention+mlp+s0/finetune/final \\
        vlmamba/assets/nano-attention

The encoder's weights come from their own package.  The configuration keeps float32: tensors are
stored in 16 bits to be small, and computed with in 32.  What a folder on the hub has for those
without the package, its card and its loader, stays behind.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from vlmamba.checkpoints import load
from vlmamba_core.cli import cli


@cli
def main() -> None:
    """Load, halve, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", help="`final` folder of a training run")
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    model, processor = load(args.source, dtype=torch.float32)
    model.half().save_pretrained(args.target)
    processor.save_pretrained(args.target)
    path = args.target / "config.json"
    fields = json.loads(path.read_text()) | {"dtype": "float32"}
    for name in {value.split(".")[0] for value in fields.pop("auto_map", {}).values()}:
        (args.target / f"{name}.py").unlink()
    (args.target / "README.md").unlink(missing_ok=True)
    path.write_text(json.dumps(fields, indent=2) + "\n")
    size = sum(file.stat().st_size for file in args.target.iterdir())
    print(f"{args.target}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    sys.exit(main())
