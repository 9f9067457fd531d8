"""Learning from a larger model's answers: cross-entropy, its distribution, its last hidden state.

    python -m vlmamba.train --stage finetune --objective distill --teacher nano ...

LLAVADI (arXiv 2407.19409) found what matters among the ways to distil a multimodal language model:
the teacher's distribution over answer tokens by plain KL, and the alignment of the last hidden
state.  For every supervised token

    loss = cross-entropy + a t^2 KL(teacher || student) + b (1 - cos(h_student, h_teacher))

with both distributions softened by the temperature t, h the last hidden state, a `distill_logits`
and b `distill_features`.  Without the restriction to supervised tokens the term over image tokens
would outweigh all others.

With --teacher-cache FOLDER what this takes of the teacher is kept, a file a sample: of supervised
tokens the log-probabilities at temperature t (float32) and the last hidden states (as the teacher
gives them).  A second epoch or run does not ask it again.  --distill-top K takes the K largest
probabilities and the sum of the others, and KL is then that of these K + 1 outcomes, cached or not:
at most the whole one.

Other than published: no MLP stands between hidden states of different widths, so b needs equal
ones; a teacher of another tokenizer, or one that sees other images, is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmamba import checkpoints, registry
from vlmamba.data.collate import Batch
from vlmamba.training.flags import OnResume, flag
from vlmamba.training.objectives.base import Objective, Options
from vlmamba.training.objectives.teacher_cache import (
    TeacherCache,
    Tensors,
    open_cache,
    row_keys,
    some_rows,
)
from vlmamba_core.errors import UserError
from vlmamba_core.tokens import IGNORE

if TYPE_CHECKING:
    from vlmamba.models.vlm import VLMambaForConditionalGeneration

LAST = [-1]  # the only hidden state that is wanted
MOST_KEPT = 8192  # log-probabilities a token that --teacher-cache keeps without being told


@dataclass(frozen=True)
class DistillationOptions(Options):
    """teacher: the model that is learned from; distill_logits (a), distill_features (b),
    distill_temperature (t) of the equation above; distill_top (K; None: all) and teacher_cache as
    described there."""

    teacher: str | None = flag(None, help="a model's name, folder or hub id, of the same tokenizer")
    distill_logits: float = flag(1.0, at_least=0, help="weight of the teacher's distribution")
    distill_features: float = flag(1.0, at_least=0, help="weight of its last hidden state")
    distill_temperature: float = flag(1.0, above=0, help="what softens both distributions")

    distill_top: int | None = flag(
        None, at_least=1, help="KL of the teacher's K likeliest tokens and the rest (default: all)"
    )
    teacher_cache: Path | None = flag(
        None, on_resume=OnResume.COMMAND, help="folder that keeps what the teacher says"
    )

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
    cache: TeacherCache | None = None
    vocabulary: int  # tokens that both have
    own_features: bool  # whether features cached for the student are the teacher's too

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
        # some families pad the vocabulary beyond the tokenizer's: those rows stand for no token
        self.vocabulary = min(m.config.text_config.vocab_size for m in (teacher, model))
        layers = {m.config.vision_feature_layer for m in (teacher, model)}
        self.own_features = len(layers) == 1
        self.teacher = teacher.eval().requires_grad_(False)
        if self.options.teacher_cache is not None:
            self.cache = self._open_cache(self.options.teacher_cache)

    def _open_cache(self, root: Path) -> TeacherCache:
        chosen, vocabulary = self.options, self.teacher.config.text_config.vocab_size
        if chosen.distill_logits and chosen.distill_top is None and vocabulary > MOST_KEPT:
            raise UserError(
                f"--teacher-cache would keep {vocabulary} numbers a token; give --distill-top K, "
                f"e.g. 256 (or {vocabulary}, to keep them all)"
            )
        asked = {
            "temperature": chosen.distill_temperature if chosen.distill_logits else None,
            "top": chosen.distill_top if chosen.distill_logits else None,
            "hidden": bool(chosen.distill_features),
            "dtype": self.dtype,
        }
        return open_cache(root, self.teacher, asked)

    def forward(self, model: nn.Module, inputs: dict[str, Tensor]) -> Any:
        """The student's output with logits (B, T, V) and the last hidden state (B, T, D)."""
        return model(**inputs, output_logits=True, output_hidden_states=LAST)

    def summed(self, model: nn.Module, inputs: dict[str, Tensor], batch: Batch) -> Tensor:
        """The three terms (scalar), summed over the supervised tokens."""
        chosen = self.options
        student = self.forward(model, inputs)
        taught = self._taught(inputs, batch)
        scored = _scored(inputs)
        loss = student.loss * batch.n_labels
        if chosen.distill_logits:
            logits = student.logits[:, :-1, : self.vocabulary][scored]
            divergence = softened_kl(logits, taught, chosen.distill_temperature)
            loss = loss + chosen.distill_logits * divergence.sum()
        if chosen.distill_features:
            own = student.hidden_states[-1][:, :-1][scored].float()
            cosine = F.cosine_similarity(own, taught["hidden"].float(), dim=-1)
            loss = loss + chosen.distill_features * (1 - cosine).sum()
        return loss

    def _taught(self, inputs: Tensors, batch: Batch) -> Tensors:
        """What the terms need of the teacher, (N, ...) for the N supervised tokens in order."""
        if self.cache is None:
            return self._ask({name: t for name, t in inputs.items() if name != "labels"}, inputs)
        keys = row_keys(self.teacher, batch.inputs)
        known = {key: self.cache.get(key) for key in keys if key is not None}
        first = {key: row for row, key in reversed([*enumerate(keys)])}
        if rows := sorted(first[key] for key, found in known.items() if found is None):
            some = some_rows(self.teacher, inputs, rows)
            labels = {"labels": inputs["labels"][rows]}
            counts = _scored(labels).sum(dim=1).tolist()
            answers = self._ask(some, labels)
            parts = {name: tensor.split(counts) for name, tensor in answers.items()}
            for number, row in enumerate(rows):
                key, answer = cast(str, keys[row]), {n: part[number] for n, part in parts.items()}
                self.cache.put(key, answer)
                known[key] = answer
        of_rows = [cast(Tensors, known[key]) for key in keys if key is not None]
        device = inputs["labels"].device
        return {n: torch.cat([one[n].to(device) for one in of_rows]) for n in of_rows[0]}

    @torch.no_grad()
    def _ask(self, inputs: Tensors, labels: Tensors) -> Tensors:
        """The teacher's log_probs (N, V or K), with K also tokens (N, K) and rest (N,); hidden
        (N, D): of the supervised tokens, as far as the weights of the terms ask for them."""
        if "image_features" in inputs and not self.own_features:
            raise UserError(
                f"--teacher {self.options.teacher} reads another layer of the encoder than the "
                "student: leave --features-cache out, or take one of the same vision_feature_layer"
            )
        chosen = self.options
        mixed = self.dtype == "bf16"
        with torch.autocast(self.teacher.device.type, torch.bfloat16, enabled=mixed):
            output = self.teacher(**inputs, output_hidden_states=LAST, use_cache=False)
        scored, found = _scored(labels), {}
        if chosen.distill_logits:
            logits = output.logits[:, :-1, : self.vocabulary][scored].float()
            log_probs = F.log_softmax(logits / chosen.distill_temperature, dim=-1)
            found = likeliest(log_probs, chosen.distill_top)
        if chosen.distill_features:
            found["hidden"] = output.hidden_states[-1][:, :-1][scored]
        return found


def _scored(inputs: Tensors) -> Tensor:
    """labels (B, T) -> (B, T - 1) bool: where the token before predicts a supervised one."""
    return inputs["labels"][:, 1:] != IGNORE


def likeliest(log_probs: Tensor, top: int | None) -> Tensors:
    """log_probs (N, V) whole, or of the `top` likeliest tokens (N, K) with `tokens` (N, K) int32
    and `rest` (N,): the logarithm of the others' sum."""
    if top is None or top >= log_probs.shape[-1]:
        return {"log_probs": log_probs}
    kept, tokens = log_probs.topk(top, dim=-1)
    return {"log_probs": kept, "tokens": tokens.int(), "rest": _rest(log_probs, tokens)}


def _rest(log_probs: Tensor, tokens: Tensor) -> Tensor:
    """(N, V), (N, K) -> (N,): the logarithm of the probability of all other tokens."""
    return log_probs.scatter(-1, tokens, -torch.inf).logsumexp(dim=-1)


def softened_kl(student: Tensor, taught: Tensors, temperature: float) -> Tensor:
    """t^2 KL(teacher || student) a token (N,), of the student's logits (N, V) and `likeliest`.

    The factor t^2 keeps the size of the gradients (Hinton et al., 2015).
    """
    own, its = F.log_softmax(student.float() / temperature, dim=-1), taught["log_probs"]
    if "tokens" in taught:
        tokens = taught["tokens"].long()
        own = torch.cat([own.gather(-1, tokens), _rest(own, tokens).unsqueeze(-1)], dim=-1)
        its = torch.cat([its, taught["rest"].unsqueeze(-1)], dim=-1)
    return temperature**2 * (its.exp() * (its - own)).sum(-1)
