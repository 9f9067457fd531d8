"""A cell of an ablation: one variant with one seed, trained in two stages and evaluated.

OUT/cells/VARIANT/seed-N/{pretrain,finetune,evaluation...}, each left by a step of the cell's job.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from harness.ablation.jobs import Job, Step
from harness.ablation.variants import Variant
from harness.models import BUNDLED_MODELS
from harness.runs.store import EvaluationRun
from vlmamba_core.folder import digest
from vlmamba_core.paths import file_sha256

STAGES = ("pretrain", "finetune")


@dataclass(frozen=True)
class Budget:
    """What every cell of a study gets: data, updates (None: the recipe's), questions."""

    data: str
    lm: str
    pretrain_steps: int | None
    finetune_steps: int | None
    train_args: tuple[str, ...]
    tasks: str
    eval_data: str
    scale: str
    style: str | None
    limit: int | None


@dataclass(frozen=True)
class Cell:
    """One variant with one seed."""

    variant: Variant
    seed: int

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.variant.name}, seed {self.seed}"

    def folder(self, root: Path) -> Path:
        """Where everything of it lies."""
        return root / self.variant.folder / f"seed-{self.seed}"

    def evaluation(self, root: Path) -> EvaluationRun:
        """Its finished evaluation. Raises UserError where there is none."""
        return EvaluationRun.read(self.folder(root) / self.variant.evaluation)


def job(cell: Cell, budget: Budget, root: Path) -> Job:
    """All of a cell: two stages and the evaluation."""
    folder = cell.folder(root)
    stages = {stage: tuple(training(cell, stage, budget, folder)) for stage in STAGES}
    steps = [
        Step("vlmamba.train", arguments, folder / stage / "final")
        for stage, arguments in stages.items()
    ]
    asked = tuple(evaluating(budget, folder, cell))
    steps.append(Step("harness.run", asked, folder / cell.variant.evaluation / "record.json"))
    settings = asdict(budget) | {"variant": asdict(cell.variant)}
    for field in ("name", "evaluate"):  # axes may call the same model differently, and ask it so
        del settings["variant"][field]
    given = settings["variant"].items()  # as cells were begun before there were more fields
    settings["variant"] = {k: v for k, v in given if v != () and (k, v) != ("stage", "finetune")}
    settings |= contents(cell, budget)
    return Job(cell.name, folder, settings, tuple(steps))


def contents(cell: Cell, budget: Budget) -> dict[str, str]:
    """Digests of the training files and of the language model that a cell starts from.

    Under the same names there may be others later: cells of both are not to be compared.
    """
    files = {f"{stage}.json": Path(budget.data) / f"{stage}.json" for stage in STAGES}
    found = {f"content of {name}": file_sha256(f) for name, f in files.items() if f.is_file()}
    if cell.variant.lm is not None and budget.lm not in BUNDLED_MODELS:
        start = Path(budget.lm) / cell.variant.lm / "final"
        weights = sorted(start.glob("*.safetensors"))
        if weights:
            found["weights of the language model"] = digest([file_sha256(f) for f in weights])
    return found


def training(cell: Cell, stage: str, budget: Budget, folder: Path) -> list[str]:
    """The arguments of vlmamba.train for one stage."""
    steps = budget.pretrain_steps if stage == "pretrain" else budget.finetune_steps
    name = stage if stage == "pretrain" else cell.variant.stage
    arguments = ["--preset", cell.variant.preset, "--stage", name]
    arguments += ["--data", f"{budget.data}/{stage}.json", "--images", budget.data]
    arguments += ["--out", str(folder / stage)]
    if stage == "finetune":
        arguments += ["--init", str(folder / "pretrain" / "final")]
    elif cell.variant.lm is not None:
        stage_folder = Path(budget.lm) / cell.variant.lm / "final"
        arguments += ["--init", budget.lm if budget.lm in BUNDLED_MODELS else str(stage_folder)]
    if budget.scale == "demo":  # a few thousand small pictures; a real set's features are terabytes
        arguments += ["--features-cache", str(folder.parent.parent / "features")]
    arguments += ["--seed", str(cell.seed), "--resume", "auto"]
    arguments += ["--steps", str(steps)] if steps else []
    own = cell.variant.pretrain if stage == "pretrain" else cell.variant.finetune
    return [*arguments, *budget.train_args, *own]


def evaluating(budget: Budget, folder: Path, cell: Cell) -> list[str]:
    """The arguments of harness.run."""
    arguments = ["--tasks", budget.tasks, "--model", str(folder / "finetune" / "final")]
    arguments += ["--data", budget.eval_data, "--out", str(folder / cell.variant.evaluation)]
    arguments += ["--style", budget.style] if budget.style else []
    arguments += ["--limit", str(budget.limit)] if budget.limit else []
    return [*arguments, "--seed", str(cell.seed), *cell.variant.evaluate]
