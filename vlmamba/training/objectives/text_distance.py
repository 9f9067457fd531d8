"""Answers' cross-entropy, and a language model whose captions lie where the encoder's text does.

    python -m vlmamba.train --stage finetune --objective text_distance \\
        --preset 2.8b+clip-l-336+mlp ...

VLKD (2203.06386) moves a language model towards a frozen dual encoder by the distance between the
two sides' embeddings of one text (TTDM).  Here, with a Mamba language model,

    loss = cross-entropy + w (1 - cos(Q e, u))                        for each supervised token

with e the encoder's embedding of the text of the row's answers (CLIP: the projected one, SigLIP:
its pooled output) and u the mean of the last hidden states of the same text, read by the language
model without the picture; both of length one, 1 - cos is half their squared distance.  The text
tower is that of `vision_model_id`, frozen, in float32; it cuts a text at its own length (CLIP 77,
SigLIP 64 tokens).

Other than published: Q is a fixed random map that keeps lengths and angles (from the narrower of
the two widths to the wider), where VLKD learns linear layers, so that only the language model can
close the distance and nothing but the model is saved; the mean of hidden states stands for BART's
sentence embedding.  The language model has to learn, as it does in stages finetune and dialogue:
in stage pretrain, where it does not, `contrastive` is VLKD's term for the connector.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmamba import registry
from vlmamba.config import VLMambaConfig, split_revision
from vlmamba.data import patch_words
from vlmamba.data.collate import Batch
from vlmamba.training.flags import flag
from vlmamba.training.objectives.base import Objective, Options
from vlmamba_core.errors import UserError, shortened
from vlmamba_core.tokens import IGNORE

if TYPE_CHECKING:
    from vlmamba.models.vlm import VLMambaForConditionalGeneration

LAST = [-1]  # the only hidden state that is wanted
MAP_SEED = 0  # of Q, the same in every process and run
# The vision tower's model_type -> the text tower of transformers, the output that is its embedding,
# how its texts are padded (SigLIP was trained with padding to its full length, which it reads)
TEXT_TOWERS: dict[str, tuple[str, str, str]] = {
    "clip_vision_model": ("CLIPTextModelWithProjection", "text_embeds", "longest"),
    "siglip_vision_model": ("SiglipTextModel", "pooler_output", "max_length"),
}


@dataclass(frozen=True)
class TextDistanceOptions(Options):
    """text_weight: w of the equation above."""

    text_weight: float = flag(1.0, at_least=0, help="weight of the distance of the two texts")


@registry.objectives.add("text_distance")
class TextDistance(Objective):
    """Cross-entropy of answers, and each one's embedding near the encoder's of the same text."""

    options_class = TextDistanceOptions
    options: TextDistanceOptions
    student: VLMambaForConditionalGeneration
    tower: TextTower
    projection: Tensor

    def prepare(
        self, model: VLMambaForConditionalGeneration, processor: Any, device: torch.device
    ) -> None:
        """Load the text tower. Raises UserError for an encoder that has none."""
        self.student, self.tokenizer = model, processor.tokenizer
        self.tower = TextTower(model.config, device)
        widths = self.tower.width, model.config.text_config.hidden_size
        self.projection = isometry(min(widths), max(widths)).to(device)

    def forward(self, model: nn.Module, inputs: dict[str, Tensor]) -> Any:
        """The model's output with the last hidden state (B + N, T, D), of `with_captions`."""
        return model(**inputs, output_hidden_states=LAST)

    def summed(self, model: nn.Module, inputs: dict[str, Tensor], batch: Batch) -> Tensor:
        """Both terms (scalar), summed over the supervised tokens.

        The captions are rows of the same forward pass, so that every parameter is used once a step.
        Raises UserError where the language model does not learn.
        """
        if not any(p.requires_grad for p in self.student.language_model.parameters()):
            raise UserError(
                "--objective text_distance moves the language model, which does not learn in this "
                "stage; give --stage finetune, or --objective contrastive for the connector"
            )
        supervised = patch_words.answers(inputs)
        told = supervised.any(dim=1)
        captions, lengths = captions_of(inputs["input_ids"][told], supervised[told])
        output = self.forward(model, with_captions(inputs, captions, lengths))
        states = output.hidden_states[-1][len(told) :].float()
        texts = self.tokenizer.batch_decode(
            [row[:length] for row, length in zip(captions, lengths.tolist(), strict=True)],
            skip_special_tokens=True,
        )
        distance = 1 - self._cosine(self.tower.embed(texts), mean_state(states, lengths))
        tokens = supervised[told, 1:].sum(dim=1)
        return output.loss * batch.n_labels + self.options.text_weight * (tokens * distance).sum()

    def _cosine(self, theirs: Tensor, own: Tensor) -> Tensor:
        """(N, De), (N, D) -> (N,), the narrower of the two mapped into the wider's space."""
        if theirs.shape[1] < own.shape[1]:
            theirs = theirs @ self.projection
        elif own.shape[1] < theirs.shape[1]:
            own = own @ self.projection
        return F.cosine_similarity(theirs, own, dim=-1)


class TextTower:
    """The text side of a dual encoder, frozen: texts -> embeddings (N, width) in float32."""

    def __init__(self, config: VLMambaConfig, device: torch.device) -> None:
        """That of the model's encoder, or of the first fused one that has a text tower.

        Raises UserError, one line, where none has, or its files have no text tower.
        """
        import transformers

        kind, name = _encoder_with_text(config)
        class_name, self.output, self.padding = TEXT_TOWERS[kind]
        source, revision = split_revision(name)
        options = {"revision": revision} if revision else {}
        try:
            published = transformers.AutoConfig.from_pretrained(source, **options)
            if getattr(published, "text_config", None) is None:
                raise UserError(
                    f"--objective text_distance: {name} holds no text tower, only "
                    f"{published.model_type}; give the whole model by --set vision_model_id=ID"
                )
            tower = getattr(transformers, class_name).from_pretrained(source, **options)
            self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(source, **options)
        except (OSError, ValueError) as error:
            raise UserError(
                f"--objective text_distance: cannot load the text tower of {name}: "
                f"{shortened(error)}"
            ) from error
        self.model = tower.float().to(device).eval().requires_grad_(False)
        self.most = tower.config.max_position_embeddings
        clip = self.output == "text_embeds"
        self.width = tower.config.projection_dim if clip else tower.config.projection_size

    @torch.no_grad()
    def embed(self, texts: list[str]) -> Tensor:
        """(N, width) float32, of N texts, each cut at the tower's length."""
        inputs = self.tokenizer(
            texts,
            padding=self.padding,
            padding_side="right",  # as the towers were trained, whatever the tokenizer did last
            truncation=True,
            max_length=self.most,
            return_tensors="pt",
        ).to(self.model.device)
        if self.padding == "max_length":
            inputs.pop("attention_mask", None)  # it reads the padding, as in training
        inputs.pop("token_type_ids", None)
        return cast(Tensor, self.model(**inputs)[self.output])


def _encoder_with_text(config: VLMambaConfig) -> tuple[str, str]:
    """(model_type, name) of the encoder that has a text tower. Raises UserError without one."""
    vision = config.vision_config
    parts = getattr(vision, "encoders", None) or [vision]
    kinds = [part.model_type for part in parts]
    found = next((at for at, kind in enumerate(kinds) if kind in TEXT_TOWERS), None)
    if found is None:
        raise UserError(
            f"--objective text_distance needs an encoder with a text tower, CLIP or SigLIP; "
            f"the model's is {' and '.join(kinds)}"
        )
    if not config.vision_model_id:
        raise UserError(
            f"--objective text_distance takes the text tower of vision_model_id, which the model's "
            f"{kinds[found]} does not have; give --set vision_model_id=ID"
        )
    return kinds[found], config.vision_model_id.split(",")[found]


def captions_of(input_ids: Tensor, supervised: Tensor) -> tuple[Tensor, Tensor]:
    """(N, T), (N, T) bool -> the supervised tokens at each row's start (N, T); their number (N,).

    Behind them stands the caption's first token, again and again: it reaches no state before,
    where an image token would ask for a picture.
    """
    order = (~supervised).int().argsort(dim=1, stable=True)
    captions, lengths = input_ids.gather(1, order), supervised.sum(dim=1)
    places = torch.arange(captions.shape[1], device=captions.device)
    return torch.where(places < lengths[:, None], captions, captions[:, :1]), lengths


def with_captions(
    inputs: dict[str, Tensor], captions: Tensor, lengths: Tensor
) -> dict[str, Tensor]:
    """A batch (B + N, T): captions (N, T) of `lengths` (N,) as further rows without labels."""
    silent = torch.full_like(captions, IGNORE)
    ids = torch.cat([inputs["input_ids"], captions])
    more = {"input_ids": ids, "labels": torch.cat([inputs["labels"], silent])}
    if "attention_mask" in inputs:  # of a model whose experts count what is padding
        mask = inputs["attention_mask"]
        real = torch.arange(mask.shape[1], device=mask.device) < lengths[:, None]
        more["attention_mask"] = torch.cat([mask, real.to(mask.dtype)])
    return inputs | more


def mean_state(states: Tensor, lengths: Tensor) -> Tensor:
    """(N, T, D), lengths (N,) above zero -> (N, D): the mean of each row's first states."""
    real = torch.arange(states.shape[1], device=states.device) < lengths[:, None]
    return (states * real.unsqueeze(-1)).sum(dim=1) / lengths[:, None]


def isometry(narrow: int, wide: int) -> Tensor:
    """(narrow, wide) float32 with orthonormal rows, random but always the same.

    x @ it keeps lengths and angles of x (N, narrow).
    """
    generator = torch.Generator().manual_seed(MAP_SEED)
    normal = torch.randn(wide, narrow, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(normal)[0].T.contiguous().float()
