"""The paper's four ablation axes: what each variant changes, at the demo's and the paper's scale.

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

    llm, encoder, connector, scan: parts of a preset.  lm: the demo's text stage that the language
    model comes from; None: it is a published one.
    """

    name: str
    connector: str = "vss_l2"
    scan: str = "bsm"
    encoder: str = "efficientnet-lite0"
    lm: str | None = "talk"
    llm: str = "nano"

    @property
    def preset(self) -> str:
        """What vlmamba.train takes."""
        return f"{self.llm}+{self.encoder}+{self.connector}+{self.scan}"

    @property
    def folder(self) -> str:
        """Named after the model alone: axes share their cells."""
        return f"{self.preset}+{self.lm}" if self.lm else self.preset

    def same_model(self, other: Variant) -> bool:
        """Whether both stand for the same model."""
        return self.folder == other.folder


def _published(
    name: str,
    connector: str,
    scan: str = "bsm",
    encoder: str = "siglip-so400m-384",
    llm: str = "2.8b-slimpj",
) -> Variant:
    return Variant(name, connector, scan, encoder, lm=None, llm=llm)


Axes = dict[str, tuple[Variant, ...]]

DEMO: Axes = {
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
        Variant("text and questions", connector="mlp"),
    ),
}
PAPER: Axes = {
    "connector": tuple(_published(name, name) for name in ("mlp", "vss_mlp", "vss_l2")),
    "scan": tuple(_published(name, "vss_l2", name) for name in ("bsm", "csm")),
    "encoder": tuple(
        _published(name, "mlp", encoder=name) for name in ("clip-l-336", "siglip-so400m-384")
    ),
    "llm": tuple(
        _published(name, "mlp", encoder="clip-l-336", llm=name)
        for name in ("1.4b", "2.8b", "2.8b-slimpj")
    ),
}
SCALES = {"demo": DEMO, "paper": PAPER}
FINAL = {"demo": Variant("final model"), "paper": _published("final model", "vss_l2")}
AXES = tuple(DEMO)


def variants(axis: str, scale: str = "demo") -> list[Variant]:
    """The axis's variants; the final model follows where it is none of them."""
    found, final = list(SCALES[scale][axis]), FINAL[scale]
    return found if any(v.same_model(final) for v in found) else [*found, final]
