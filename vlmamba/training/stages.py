"""The training stages as data: which part trains, from which template, on top of what.

The paper trains in two stages (its section on training, LLaVA-1.5's recipe): `pretrain` aligns
the connector, `finetune` instructs connector and language model.  `text` and `dialogue` come
before them only where no pretrained language model exists (the demo): plain text, then
conversations without pictures.  `adaptors` stands in place of `finetune` where the language model
stays as it is but for inner adaptors.  The vision encoder never learns.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from vlmamba_core.errors import UserError
from vlmamba_core.names import choose


@dataclass(frozen=True)
class Stage:
    """trainable: submodules whose parameters train; template: how a conversation becomes tokens
    (None: packed plain text); init_from: submodules taken from --init, the others are new."""

    name: str
    trainable: tuple[str, ...]
    template: str | None
    init_from: tuple[str, ...]


STAGES = {
    stage.name: stage
    for stage in (
        Stage("text", ("language_model",), None, ("language_model",)),
        Stage("dialogue", ("language_model",), "vicuna_v1", ("language_model",)),
        Stage("pretrain", ("connector",), "plain", ("language_model",)),
        Stage(
            "finetune",
            ("connector", "language_model"),
            "vicuna_v1",
            ("connector", "language_model"),
        ),
        Stage(
            "adaptors",
            ("connector", "language_model.adaptors"),
            "vicuna_v1",
            ("connector", "language_model"),
        ),
    )
}


def get_stage(name: str) -> Stage:
    """The stage called `name`; raises UserError listing the known ones."""
    return STAGES[choose("stage", name, STAGES)]


def freeze(model: nn.Module, stage: Stage) -> None:
    """Let only the stage's submodules learn; the encoder's buffers (batch statistics) stay too.

    Raises UserError for a model without one of them.
    """
    model.requires_grad_(False)
    for name in stage.trainable:
        try:
            model.get_submodule(name).requires_grad_(True)
        except AttributeError as error:
            raise UserError(
                f"--stage {stage.name}: the model has no {name.rpartition('.')[2]}; choose a "
                "preset that has, such as nano-iaa, or give --set adaptors=[1,3,5]"
            ) from error
    model.train()  # gradient checkpointing asks for it, of frozen layers too
    model.get_submodule("vision_encoder").eval()
