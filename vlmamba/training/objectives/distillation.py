"""Learning from a larger model's answers: cross-entropy, its distribution, its last hidden state.

    python -m vlmamba.train --stage finetune --objective distill --teacher nano ...

LLAVADI (arXiv 2407.19409) found what matters among the ways to distil a multimodal language model:
the teacher's distribution over answer tokens by plain KL, and the alignment of the last hidden
state.  For every supervised token

    loss = cross-entropy + a t^2 KL(teacher || student) + b (1 - cos(h_student, h_teacher))

with both distributions softened by the temperature t, h the last hidden state, a `distill_logits`
and b `distill_features`.  Without the restriction to supervised tokens the term over image tokens
would outweigh all others.

Other than published: no MLP stands between hidden states of different widths, so b needs equal
ones; a teacher of another tokenizer, or one that sees other images, is refused; the teacher's
logits are computed anew in each epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmamba import checkpoints, registry
from vlmamba.data.collate import Batch
from vlmamba.training.flags import flag
from vlmamba.training.objectives.base import Objective, Options
from vlmamba_core.errors import UserError
from vlmamba_core.tokens import IGNORE

if TYPE_CHECKING:
    from vlmamba.models.vlm import VLMambaForConditionalGeneration

LAST = [-1]  # the only hidden state that is wanted


@dataclass(frozen=True)
class DistillationOptions(Options):
    """teacher: the model that is learned from; distill_logits (a), distill_features (b),
    distill_temperature (t) of the equation above."""

    teacher: str | None = flag(None, help="a model's name, folder or hub id, of the same tokenizer")
    distill_logits: float = flag(1.0, at_least=0, help="weight of the teacher's distribution")
    distill_features: float = flag(1.0, at_least=0, help="weight of its last hidden state")
    distill_temperature: float = flag(1.0, above=0, help="what softens both distributions")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher is None:
            raise UserError("--objective distill and --teacher MODEL belong together")


@registry.objectives.add("distill")
class Distillation(Objective):
    """Cross-entropy and a teacher's view of the supervised tokens."""

    options_class = DistillationOptions
    options: DistillationOptions
    outputs = ("logits", "hidden_states")
    teacher: VLMambaForConditionalGeneration

    def prepare(
        self, model: VLMambaForConditionalGeneration, processor: Any, device: torch.device
    ) -> None:
        """Load the teacher. Raises UserError for one that cannot be compared token by token."""
        name = str(self.options.teacher)
        teacher, teachers = checkpoints.load(name, device=device)
        if teachers.tokenizer.get_vocab() != processor.tokenizer.get_vocab():
            raise UserError(
                f"--teacher {name} has another tokenizer than the student: token by token they "
                "cannot be compared; give one of the same tokenizer"
            )
        for what in ("vision_model_id", "num_image_tokens"):
            its, own = getattr(teacher.config, what), getattr(model.config, what)
            if its != own:
                raise UserError(
                    f"--teacher {name} has {what} {its!r}, the student {own!r}: both must see the "
                    "same images in as many tokens"
                )
        widths = [m.config.text_config.hidden_size for m in (teacher, model)]
        if self.options.distill_features and widths[0] != widths[1]:
            raise UserError(
                f"--teacher {name} has hidden states of width {widths[0]}, the student of "
                f"{widths[1]}; give --distill-features 0 to learn from its distribution alone"
            )
        self.teacher = teacher.eval().requires_grad_(False)

    def forward(self, model: nn.Module, inputs: dict[str, Tensor]) -> Any:
        """The student's output with logits (B, T, V) and the last hidden state (B, T, D)."""
        return model(**inputs, output_logits=True, output_hidden_states=LAST)

    def summed(self, model: nn.Module, inputs: dict[str, Tensor], batch: Batch) -> Tensor:
        """The three terms (scalar), summed over the supervised tokens."""
        chosen = self.options
        student = self.forward(model, inputs)
        logits, hidden = self._taught(inputs)
        scored = inputs["labels"][:, 1:] != IGNORE  # (B, T - 1): the token before predicts it
        loss = student.loss * batch.n_labels
        if chosen.distill_logits:
            divergence = softened_kl(
                student.logits[:, :-1][scored], logits[:, :-1][scored], chosen.distill_temperature
            )
            loss = loss + chosen.distill_logits * divergence.sum()
        if chosen.distill_features:
            own = student.hidden_states[-1][:, :-1][scored].float()
            cosine = F.cosine_similarity(own, hidden[:, :-1][scored].float(), dim=-1)
            loss = loss + chosen.distill_features * (1 - cosine).sum()
        return loss

    @torch.no_grad()
    def _taught(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The teacher's logits (B, T, V) and last hidden states (B, T, D)."""
        inputs = {name: tensor for name, tensor in inputs.items() if name != "labels"}
        mixed = self.dtype == "bf16"
        with torch.autocast(self.teacher.device.type, torch.bfloat16, enabled=mixed):
            output = self.teacher(**inputs, output_hidden_states=LAST, use_cache=False)
        return output.logits, output.hidden_states[-1]


def softened_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """t^2 KL(teacher || student) a token, of logits (N, V) -> (N,); t^2 keeps gradients' size."""
    log_student = F.log_softmax(student.float() / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher.float() / temperature, dim=-1)
    return temperature**2 * (log_teacher.exp() * (log_teacher - log_student)).sum(-1)
