"""The controlled study as data: language models x connectors x seeds, and orders of the prompt.

Everything that is compared is trained here from scratch, on the same text and pictures in the same
order (at the paper's scale: from published language models that were trained on the same text with
the same tokenizer).  The language models have equal parameters within 3 %; each learns with its own
rate, the best of three on held-out samples; one text pretraining of a family serves its seeds.
"""

from __future__ import annotations

from dataclasses import dataclass

from tasks import retrieval

SAME_CONNECTOR = 'connector_layer={"mixer":"mamba","d_state":16}'  # whatever the language model is


@dataclass(frozen=True)
class Family:
    """A language model's architecture, and the preset that builds it.

    pace: what the lessons' learning rates are multiplied by (results/LOG.md, 2026-11-27).
    """

    name: str
    preset: str
    pace: float = 1.0

    def arguments(self, connector: str, encoder: str) -> list[str]:
        """What vlmamba.train takes to build it with this connector and encoder."""
        arguments = ["--preset", "+".join(filter(None, (self.preset, encoder, connector)))]
        return [*arguments, *(["--set", SAME_CONNECTOR] if connector else [])]


@dataclass(frozen=True)
class Order:
    """How a prompt is laid out otherwise than usual; flags of vlmamba.train and harness.run.

    data: the variant of the training data (`harness.controlled.data.VARIANTS`).
    """

    name: str
    says: str
    train: tuple[str, ...] = ()
    ask: tuple[str, ...] = ()
    data: str = ""


ORDERS = (
    Order("question_first", "the question stands before the picture", ("--image-place", "last")),
    Order("ocr_first", "OCR tokens stand before the question", (), ("--ocr", "first"), "ocr_first"),
    Order(
        "row_separators",
        "a separator stands after each row of patches",
        ("--image-layout", "row_separators"),
    ),
)


def _drawn(images: int, captions: int, dialogues: int, labeled: int) -> tuple[str, ...]:
    """Flags of vlmamba.demo."""
    counts = {"images": images, "captions": captions, "dialogues": dialogues, "labeled": labeled}
    drawn = (x for name, n in counts.items() for x in (f"--{name}", str(n)))
    return (*drawn, "--no-easy-vqa", "--patch-words")


@dataclass(frozen=True)
class Stage:
    """Updates of one training stage (None: the recipe's), sequences of each, and further flags."""

    steps: int | None
    batch: int | None = None
    more: tuple[str, ...] = ()

    def arguments(self) -> list[str]:
        """For vlmamba.train."""
        found = [] if self.steps is None else ["--steps", str(self.steps)]
        if self.batch is not None:
            found += ["--batch-size", str(self.batch), "--micro-batch", str(min(self.batch, 16))]
        return [*found, *self.more]


@dataclass(frozen=True)
class Lesson:
    """A part of a language model's own pretraining: files of the training data, all of a stage,
    and its learning rate."""

    name: str
    files: tuple[str, ...]
    stage: Stage
    rate: float

    @property
    def kind(self) -> str:
        """vlmamba.train's name of the stage."""
        return "dialogue" if self.files[0].endswith(".json") else "text"

    def arguments(self, family: Family) -> list[str]:
        """For vlmamba.train."""
        return [*self.stage.arguments(), "--lr", f"{self.rate * family.pace:.3g}"]


@dataclass(frozen=True)
class Scale:
    """A size of the study.

    data: flags of vlmamba.demo (none: --data names a folder of one's own). lessons: what the
    language models learn before they see a picture; none where they are published ones. held_out:
    samples that rates are chosen on and picture use is measured with, every `look_every` updates.
    limit, retrieval: questions of each benchmark and of retrieval; blind: of its text-only control.
    """

    name: str
    families: tuple[Family, ...]
    connectors: tuple[str, ...]
    orders: tuple[Order, ...]
    order_families: tuple[str, ...]
    encoder: str
    rates: tuple[float, ...]
    lessons: tuple[Lesson, ...]
    pretrain: Stage
    finetune: Stage
    rate_pretrain: Stage
    rate_finetune: Stage
    look_every: int
    held_out: int
    seeds: int
    limit: int | None
    retrieval: int | None
    blind: int
    data: tuple[str, ...] = ()
    tasks: str = "all"
    eval_data: str = "demo"
    state_lengths: tuple[int, ...] = (64, 256, 1024, 4096)

    @property
    def prepares_data(self) -> bool:
        """Whether the study draws its own training data."""
        return bool(self.data)


NANO = (
    Family("mamba", "nano"),
    Family("mamba2", "nano-mamba2"),
    Family("attention", "nano-transformer", pace=1 / 3),
    Family("hybrid", "nano-hybrid"),
)
# Trained on the Pile with GPT-NeoX's tokenizer, each of them; no hybrid of that size is published
PUBLISHED = (
    Family("mamba", "2.8b"),
    Family("mamba2", "mamba2-2.7b"),
    Family("attention", "hf:EleutherAI/pythia-2.8b"),
)
SIGNS = retrieval.task.name  # the benchmark that is made to separate the models
# The last features alone do not tell what is on a sign (tools/probe_encoder.py)
READS_SIGNS = "efficientnet-lite0-cells"
# All of the demo's but easy-VQA, whose training split would be half of the training data
BENCHMARKS = "coco_cap,gqa,mmbench,mme,pope,scienceqa,textvqa,vqav2"
LITTLE = ("--max-length", "256", "--warmup-ratio", "0.1")

DEMO = Scale(
    name="demo",
    families=NANO,
    connectors=("mlp", "vss_l2", "msc"),
    orders=ORDERS,
    order_families=tuple(family.name for family in NANO),
    encoder=READS_SIGNS,
    rates=(3e-4, 1e-3, 3e-3),
    lessons=(
        Lesson("text", ("text.txt",), Stage(300, 16), 3e-3),
        Lesson("copies", ("recall-1.txt",), Stage(800, 4), 2e-3),
        Lesson("near", ("recall-2.txt",), Stage(600, 8), 2e-3),
        Lesson("far", ("recall-3.txt",), Stage(400, 8), 2e-3),
        Lesson("dialogue", ("dialogue.json",), Stage(400, 16), 1.5e-3),
    ),
    pretrain=Stage(120, 32),
    finetune=Stage(1600, 16),
    rate_pretrain=Stage(60, 32),
    rate_finetune=Stage(400, 8),
    look_every=100,
    held_out=96,
    seeds=3,
    limit=600,
    retrieval=2000,
    blind=400,
    data=_drawn(4000, 2560, 6000, 7000),
    tasks=BENCHMARKS,
)
QUICK = Scale(
    name="quick",
    families=(NANO[0], NANO[2]),
    connectors=("mlp", "vss_l2"),
    orders=ORDERS[:1],
    order_families=("mamba",),
    encoder=READS_SIGNS,
    rates=(1e-3, 3e-3),
    lessons=(
        Lesson("text", ("text.txt", "recall-1.txt"), Stage(8, 8, LITTLE), 3e-3),
        Lesson("dialogue", ("dialogue.json",), Stage(8, 8), 1.5e-3),
    ),
    pretrain=Stage(8, 8),
    finetune=Stage(40, 8),
    rate_pretrain=Stage(4, 8),
    rate_finetune=Stage(10, 8),
    look_every=10,
    held_out=12,
    seeds=1,
    limit=40,
    retrieval=100,
    blind=40,
    data=_drawn(60, 60, 60, 60),
    tasks="pope,textvqa",
    state_lengths=(64, 256),
)
PAPER = Scale(
    name="paper",
    families=PUBLISHED,
    connectors=("mlp", "vss_l2", "msc"),
    orders=ORDERS,
    order_families=tuple(family.name for family in PUBLISHED),
    encoder="siglip-so400m-384",
    rates=(1e-5, 2e-5, 4e-5),
    lessons=(),
    pretrain=Stage(None),
    finetune=Stage(None),
    rate_pretrain=Stage(200),
    rate_finetune=Stage(500),
    look_every=200,
    held_out=512,
    seeds=3,
    limit=None,
    retrieval=None,
    blind=4000,
    eval_data="hub",
    state_lengths=(1024, 4096, 16384),
)
SCALES = {scale.name: scale for scale in (DEMO, QUICK, PAPER)}
