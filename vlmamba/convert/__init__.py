"""Published Mamba VLMs -> VL-Mamba checkpoints: `python -m vlmamba.convert`.

rules        one mechanism: our tensor's name -> theirs, every one of both accounted for
languages    Mamba, Mamba-2 and GPT-NeoX language models: sizes from the tensors, and their rules
encoders     timm's DINOv2, SigLIP and EVA-02
prismatic    the file layout of Cobra and ML-Mamba
shaking_up   what Mamba-VL and Pythia-VL share
cobra, ml_mamba, mamba_vl, pythia_vl    one system each: configuration, rules, prompt
system       what a system is, and the conversion

A converted folder is an ordinary checkpoint: `harness.run --model`, `vlmamba.ask`, `vlmamba.serve`
and `vlmamba.train --init` load it.
"""

from vlmamba.convert import cobra, mamba_vl, ml_mamba, pythia_vl
from vlmamba.convert.system import System, convert

__all__ = ["SYSTEMS", "convert"]

SYSTEMS: dict[str, System] = {
    module.SYSTEM.name: module.SYSTEM for module in (cobra, ml_mamba, mamba_vl, pythia_vl)
}
