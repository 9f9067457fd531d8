"""The axes of an ablation: what each variant changes, at the demo's and the paper's scale.

Four are the paper's; the others are what neighboring systems change, one part each, and exist at
the demo's scale: `objective` (LLAVADI, VLKD, InternVL 2.5), `mixer` (hybrids), `adaptation` (how
the language model learns), `quantization`, `tiles` and `votes` (InternVL 2.5).

The paper ablates language model and vision encoder with the `mlp` connector, connectors with `bsm`,
scans with `vss_l2`.  The demo has one encoder and one size of language model, so two axes stand for
something nearer by: `encoder` is the same encoder at several resolutions (fewer or more patches),
`llm` the same model after less or more of its own pretraining.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from vlmamba_core.names import choose


@dataclass(frozen=True)
class Variant:
    """One row: its name in the table, and the model it stands for.

    llm, encoder, connector, scan: parts of a preset.  lm: the demo's text stage that the language
    model comes from; None: it is a published one.  pretrain, finetune: more arguments of these
    stages; evaluate: of harness.run.  stage: what follows pretrain.
    """

    name: str
    connector: str = "vss_l2"
    scan: str = "bsm"
    encoder: str = "efficientnet-lite0"
    lm: str | None = "talk"
    llm: str = "nano"
    pretrain: tuple[str, ...] = ()
    finetune: tuple[str, ...] = ()
    evaluate: tuple[str, ...] = ()
    stage: str = "finetune"

    @property
    def preset(self) -> str:
        """What vlmamba.train takes."""
        return f"{self.llm}+{self.encoder}+{self.connector}+{self.scan}"

    @property
    def folder(self) -> str:
        """Named after the trained model alone: axes share their cells."""
        parts = [self.preset, *([self.lm] if self.lm else [])]
        parts += [self.stage] if self.stage != "finetune" else []
        parts += [slug(arguments) for arguments in (self.pretrain, self.finetune) if arguments]
        return "+".join(parts)

    @property
    def evaluation(self) -> str:
        """The folder of its evaluation inside that: one model may be asked in several ways."""
        return "-".join(["evaluation", *([slug(self.evaluate)] if self.evaluate else [])])

    def same_model(self, other: Variant) -> bool:
        """Whether both stand for the same model, asked in the same way."""
        return (self.folder, self.evaluation) == (other.folder, other.evaluation)


def slug(arguments: tuple[str, ...]) -> str:
    """Arguments as a part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", " ".join(arguments)).strip("-")


def _published(
    name: str,
    connector: str,
    scan: str = "bsm",
    encoder: str = "siglip-so400m-384",
    llm: str = "2.8b-slimpj",
) -> Variant:
    return Variant(name, connector, scan, encoder, lm=None, llm=llm)


Axes = dict[str, tuple[Variant, ...]]

TAUGHT = ("--objective", "distill", "--teacher", "nano")
TILES = ("--image-layout", "dynamic_4")

DEMO: Axes = {
    "connector": (
        Variant("mlp", connector="mlp"),
        Variant("vss_mlp", connector="vss_mlp"),
        Variant("vss_l2", connector="vss_l2"),
        Variant("msc", connector="msc"),
        Variant("msc_basic", connector="msc_basic"),
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
    "objective": (
        Variant("cross-entropy"),
        Variant("distill: distribution", finetune=(*TAUGHT, "--distill-features", "0")),
        Variant("distill: features", finetune=(*TAUGHT, "--distill-logits", "0")),
        Variant("distill: both", finetune=TAUGHT),
        Variant("square average", finetune=("--objective", "square_average")),
        Variant("contrastive", pretrain=("--objective", "contrastive")),
    ),
    "mixer": (
        Variant("mamba"),
        Variant("mamba and attention", llm="nano-plus-attention"),
        Variant("mamba and experts", llm="nano-plus-experts"),
    ),
    "adaptation": (
        Variant("all weights"),
        Variant("LoRA", finetune=("--lora", "16")),
        Variant("inner adaptors", llm="nano-iaa", stage="adaptors"),
    ),
    "quantization": (
        Variant("float32"),
        Variant("int8", evaluate=("--quantize", "int8")),
        Variant("int4", evaluate=("--quantize", "int4")),
    ),
    "tiles": (
        Variant("whole"),
        Variant("dynamic_4", pretrain=TILES, finetune=TILES),
    ),
    "votes": (
        Variant("greedy"),
        *(
            Variant(f"{k} votes", evaluate=("--votes", str(k), "--temperature", "0.7"))
            for k in (4, 16)
        ),
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
    """The axis's variants; the final model follows where it is none of them.

    Raises UserError for an axis that the scale does not have.
    """
    found, final = (
        list(SCALES[scale][choose(f"axis at --scale {scale}", axis, SCALES[scale])]),
        FINAL[scale],
    )
    return found if any(v.same_model(final) for v in found) else [*found, final]
