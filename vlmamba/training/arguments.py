"""What the command line of `vlmamba.train` says, typed; a flag is one field here.

Hyperparameters are fields of `recipe.Hyperparameters`, an objective's settings of its own options
(`objectives/`); both become flags in the same way.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from vlmamba import image_layouts
from vlmamba.training.evaluation import split_command
from vlmamba.training.flags import OnResume, add_flags, flag, given
from vlmamba.training.objectives import declared, objectives_with
from vlmamba.training.recipe import Hyperparameters
from vlmamba_core.cli import Parser
from vlmamba_core.errors import UserError

COMMAND, FREE = OnResume.COMMAND, OnResume.FREE


@dataclass(frozen=True)
class RunArguments:
    """One command: which model, which data, and what to do.  What says nothing must stay the same
    when a run is resumed (see `flags.OnResume`)."""

    stage: str = flag(help="text, dialogue, pretrain, finetune or adaptors")
    preset: str | None = flag(
        None,
        help="e.g. nano+vss_l2+bsm, 2.8b-slimpj+siglip-so400m-384 (default: the model of --init)",
    )
    data: tuple[Path, ...] = flag((), help="LLaVA JSON (text: .txt too)")
    tokenizer_data: tuple[Path, ...] = flag(
        (),
        on_resume=COMMAND,
        help="what a new tokenizer is trained on (default: --data)",
    )
    images: Path | None = flag(
        None, on_resume=FREE, help="folder that the image paths are relative to"
    )
    out: Path | None = flag(
        None, on_resume=COMMAND, help="folder for logs, checkpoints and the final model"
    )
    init: str | None = flag(None, help="result of the stage before: folder or hub id[@revision]")
    set: tuple[str, ...] = flag(
        (),
        metavar="FIELD=VALUE",
        help="change the preset, e.g. scan_shared=false, scan_merge=mean, "
        "language_model_id=state-spaces/mamba-130m@REVISION (so vision_model_id, tokenizer_id)",
    )
    image_aspect_ratio: Literal["pad", "resize"] = flag(
        "pad", help="pad to a square, as LLaVA-1.5 does (default), or stretch"
    )
    image_layout: str = flag(
        image_layouts.WHOLE, help="how a picture becomes tiles (default whole: it is the one tile)"
    )
    image_place: Literal["first", "last"] = flag(
        "first", help="a question's pictures stand before it (default) or behind it"
    )
    drop_repetitive: bool = flag(
        False, help="leave out samples with an answer that repeats itself, and count them"
    )
    jpeg_augmentation: bool = flag(
        False, help="pictures go through JPEG at a quality of 75 to 100, by --seed and name"
    )
    recipe: str | None = flag(
        None, on_resume=FREE, help="recipe name or .toml file (default: by preset)"
    )
    features_cache: Path | None = flag(
        None, on_resume=COMMAND, help="keep the encoder's output here"
    )
    resume: Literal["auto", "longer", "never"] = flag(
        "never",
        on_resume=COMMAND,
        help="auto: go on where --out stopped; longer: with more --steps or --epochs than it had",
    )
    strict: bool = flag(False, on_resume=COMMAND, help="stop at the first unusable sample")
    eval_data: tuple[Path, ...] = flag((), on_resume=COMMAND, help="held-out samples")
    eval_images: Path | None = flag(
        None, on_resume=COMMAND, help="their image folder (default: --images)"
    )
    eval_other_pictures: bool = flag(
        False,
        on_resume=COMMAND,
        help="also their loss with each other's pictures: whether the model uses what it is shown",
    )
    eval_command: str | None = flag(
        None,
        on_resume=COMMAND,
        metavar="COMMAND",
        help="a benchmark, run with --model and --out added, e.g. "
        '"python -m harness.run --tasks pope --limit 100"',
    )
    eval_every: int | None = flag(
        None, on_resume=COMMAND, help="steps between (default: --save-every)"
    )
    workers: int = flag(0, on_resume=COMMAND, help="data processes (default 0: none)")
    cpu: bool = flag(False, on_resume=COMMAND, help="do not use a GPU")
    tensorboard: bool = flag(False, on_resume=COMMAND)
    wandb: str | None = flag(
        None, on_resume=COMMAND, metavar="PROJECT", help="also log to Weights & Biases"
    )
    dry_run: bool = flag(False, on_resume=COMMAND, help="one micro-batch, nothing written")
    estimate: bool = flag(False, on_resume=COMMAND, help="print the cost, run nothing")
    devices: int = flag(1, on_resume=COMMAND, help="for --estimate (default 1)")
    tiny: bool = flag(False, on_resume=COMMAND, help="shrink every dimension, for tests")

    @classmethod
    def parser(cls, description: str | None) -> Parser:
        """The command line; hyperparameters left out take the recipe's value."""
        p = Parser(
            prog="python -m vlmamba.train",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_flags(p, cls)
        hyper = p.add_argument_group("hyperparameters (default: the recipe's)")
        add_flags(hyper, Hyperparameters, overriding=True)
        _add_objectives(p)
        return p

    @classmethod
    def parse(
        cls, argv: Sequence[str] | None, description: str | None
    ) -> tuple[Self, dict[str, Any]]:
        """The arguments, and each hyperparameter's flag (None: left to the recipe)."""
        parsed = cls.parser(description).parse_args(argv)
        options = {name: getattr(parsed, name) for name in declared()}
        return cls(**given(cls, parsed)), given(Hyperparameters, parsed) | options

    @property
    def folder(self) -> Path:
        """--out, of a run that has one (see `check_paths`)."""
        assert self.out is not None
        return self.out

    def check_paths(self) -> None:
        """Raise UserError for missing or contradictory folders, before anything is loaded."""
        if self.workers < 0:
            raise UserError(f"--workers is {self.workers}; expected 0 or more")
        if self.out is not None and self.out.exists() and not self.out.is_dir():
            raise UserError(f"--out {self.out} is a file; give a folder")
        if not self.data or (self.out is None and not self.dry_run):
            raise UserError(f"--stage {self.stage} needs --data and --out")
        for path in (*self.data, *self.tokenizer_data, *self.eval_data):
            if not path.is_file():
                raise UserError(f"no data file {str(path)!r}; expected --data FILE")
        for name, folder in (("--images", self.images), ("--eval-images", self.eval_images)):
            if folder is not None and not folder.is_dir():
                raise UserError(f"no image folder {str(folder)!r}; expected {name} DIR")
        if self.jpeg_augmentation and self.features_cache is not None:
            raise UserError(
                "--jpeg-augmentation changes pictures, --features-cache keeps what the encoder made"
                " of them as they are; give one of the two"
            )
        self._check_evaluation()

    def _check_evaluation(self) -> None:
        if self.eval_other_pictures and not self.eval_data:
            raise UserError("--eval-other-pictures needs --eval-data FILE")
        if self.eval_every is not None and self.eval_every < 1:
            raise UserError(f"--eval-every is {self.eval_every}; expected at least 1")
        if self.eval_every and not (self.eval_data or self.eval_command):
            raise UserError("--eval-every needs --eval-data FILE or --eval-command COMMAND")
        if self.eval_command is not None:
            split_command(self.eval_command)


def _add_objectives(parser: argparse.ArgumentParser) -> None:
    """The flags that registered objectives declare. Raises UserError for one that is taken."""
    settings = declared()
    for owner in dict.fromkeys(settings.values()):
        own = [name for name, first in settings.items() if first is owner]
        of = ", ".join(objectives_with(own[0]))
        try:
            group = parser.add_argument_group(f"objective {of} (default: the recipe's)")
            add_flags(group, owner, overriding=True, only=own)
        except argparse.ArgumentError as error:
            raise UserError(f"objective {of} declares a flag that is taken: {error}") from error
