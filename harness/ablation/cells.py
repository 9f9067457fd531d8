"""A cell of an ablation: one variant with one seed, trained in two stages and evaluated.

OUT/cells/VARIANT/seed-N/{pretrain,finetune,evaluation...}.  Every step is a command of this project
in a process of its own; a finished one is not repeated, an interrupted one goes on.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from harness.ablation.variants import Variant
from harness.models import BUNDLED_MODELS
from harness.runs.store import EvaluationRun
from vlmamba_core import processes
from vlmamba_core.errors import UserError
from vlmamba_core.folder import write_atomically

Execute = Callable[[str, Sequence[str]], int]  # module, arguments -> exit code
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


def execute(module: str, arguments: Sequence[str], log: Path | None = None) -> int:
    """Run a command of this project; its progress goes to stderr or `log`, its tables nowhere."""
    command = [sys.executable, "-m", module, *arguments]
    if log is None:
        return processes.run(command, stdout=subprocess.DEVNULL).returncode
    with log.open("ab") as file:
        return processes.run(command, stdout=subprocess.DEVNULL, stderr=file).returncode


def run_cell(
    cell: Cell, budget: Budget, root: Path, start: Execute | None = None, quiet: bool = False
) -> None:
    """Do what is left of a cell; with `quiet`, its progress goes to log.txt in its folder.

    Raises UserError where a command fails or the settings changed.
    """
    log = cell.folder(root) / "log.txt" if quiet else None
    start = start or functools.partial(execute, log=log)
    folder = cell.folder(root)
    folder.mkdir(parents=True, exist_ok=True)
    _check_terms(folder / "cell.json", cell, budget)
    for stage in STAGES:
        if not (folder / stage / "final").is_dir():
            _do(start, "vlmamba.train", training(cell, stage, budget, folder), cell)
    if not (folder / cell.variant.evaluation / "record.json").exists():
        _do(start, "harness.run", evaluating(budget, folder, cell), cell)


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


def _check_terms(file: Path, cell: Cell, budget: Budget) -> None:
    """Keep the settings of a new cell; refuse to mix an old one with others."""
    settings = json.loads(json.dumps({"variant": asdict(cell.variant), **asdict(budget)}))
    for field in ("name", "evaluate"):  # axes may call the same model differently, and ask it so
        del settings["variant"][field]
    given = settings["variant"].items()  # as cells were begun before there were more fields
    settings["variant"] = {k: v for k, v in given if v != [] and (k, v) != ("stage", "finetune")}
    if not file.exists():
        write_atomically(file, json.dumps(settings, indent=2) + "\n")
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    for key in settings:
        if before.get(key) != settings[key]:
            raise UserError(
                f"{file.parent} was begun with {key} {before.get(key)!r}, now it is "
                f"{settings[key]!r}; give the same flags or another --out"
            )


def _do(start: Execute, module: str, arguments: Sequence[str], cell: Cell) -> None:
    if code := start(module, arguments):
        raise UserError(
            f"{cell.name}: `python -m {module} {' '.join(arguments)}` ended with code {code}; "
            "run the same command again to continue"
        )
