"""The paper's four ablation axes at the demo's scale: what each variant changes.

The paper ablates language model and vision encoder with the `mlp` connector, connectors with `bsm`,
scans with `vss_l2`.  The demo has one encoder and one size of language model, so two axes stand for
something nearer by: `encoder` is the same encoder at several resolutions (fewer or more patches),
`llm` the same model after less or more of its own pretraining.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """One row: its name in the table, and the model it stands for.

    lm: the text stage that the language model comes from.
    """

    name: str
    connector: str = "vss_l2"
    scan: str = "bsm"
    encoder: str = "efficientnet-lite0"
    lm: str = "dialogue"

    @property
    def preset(self) -> str:
        """What vlmamba.train takes."""
        return f"nano+{self.encoder}+{self.connector}+{self.scan}"

    @property
    def folder(self) -> str:
        """Named after the model alone: axes share their cells."""
        return f"{self.preset}+{self.lm}"

    def same_model(self, other: Variant) -> bool:
        """Whether both stand for the same model."""
        return self.folder == other.folder


FINAL = Variant("final model")

AXES: dict[str, tuple[Variant, ...]] = {
    "connector": (
        Variant("mlp", connector="mlp"),
        Variant("vss_mlp", connector="vss_mlp"),
        Variant("vss_l2", connector="vss_l2"),
    ),
    "scan": (
        Variant("raster", scan="raster"),
        Variant("bsm", scan="bsm"),
        Variant("csm", scan="csm"),
        Variant("hilbert", scan="hilbert"),
    ),
    "encoder": (
        Variant("25 patches", connector="mlp", encoder="efficientnet-lite0-160"),
        Variant("49 patches", connector="mlp"),
        Variant("100 patches", connector="mlp", encoder="efficientnet-lite0-320"),
    ),
    "llm": (
        Variant("text only", connector="mlp", lm="text"),
        Variant("text and dialogue", connector="mlp"),
    ),
}


def variants(axis: str) -> list[Variant]:
    """The axis's variants; the final model follows where it is none of them."""
    found = list(AXES[axis])
    return found if any(v.same_model(FINAL) for v in found) else [*found, FINAL]
