"""Questions per second on work shaped like a benchmark: several questions on each image.

"VL-Mamba" is the harness's grouped path: an image is read once, its questions are answered in
batches. "one at a time" is what evaluators at batch size 1 do: generate() for each question, on
the same model, and on transformers' Mamba with the same weights.

Image features are given to all (729 patches of SigLIP's width): the encoder's time is left out,
which favors answering one at a time, where every question would encode its image again.
Weights are random, so no answer ends early: all have `answer_tokens`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from harness.speed.language_model import Models
from harness.speed.timing import VL_MAMBA, Comparison, Contender, Effort, side_by_side
from tasks.common import SHORT_ANSWER
from vlmamba.generation import GroupedGenerator, Request
from vlmamba.models.vision import VisionEncoder
from vlmamba.processing import SYSTEM, VLMambaProcessor
from vlmamba_core.tokens import EOS, IMAGE

ONE_AT_A_TIME = "VL-Mamba, one at a time"
TRANSFORMERS_ONE_AT_A_TIME = "transformers Mamba, one at a time"
OBJECTS = ("dog", "bicycle", "banana", "umbrella", "keyboard", "zebra", "kite", "clock", "sofa")
BATCH_SIZE = 32


@dataclass(frozen=True)
class Shape:
    """Work like a benchmark's. `images` of them make one run of the grouped path."""

    kind: str
    questions_per_image: int
    images: int
    answer_tokens: int

    @property
    def section(self) -> str:
        """Its name on the command line."""
        return self.kind.removesuffix("_shape")


SHAPES = (Shape("pope_shape", 18, 2, 2), Shape("mme_shape", 2, 16, 2))
SINGLE_QUESTIONS = 4  # in one run of VL-Mamba one at a time; transformers' Mamba answers one


def requests(shape: Shape, processor: VLMambaProcessor) -> list[Request]:
    """The questions, image by image."""
    blank = Image.new("RGB", (384, 384))
    return [
        Request(
            processor.conversation_prompt(question(OBJECTS[n % len(OBJECTS)])),
            f"image {image}",
            blank,
        )
        for image in range(shape.images)
        for n in range(shape.questions_per_image)
    ]


def question(thing: str) -> str:
    """A question of POPE."""
    return f"Is there a {thing} in the image?\n{SHORT_ANSWER}"


def word_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer that knows the pieces of words in `texts`; about as many as GPT-NeoX makes."""
    tokenizer = Tokenizer(models.WordLevel(unk_token=EOS))
    pieces = pre_tokenizers.Split(Regex(r"\w{1,8}|[^\w ]"), "removed", invert=True)
    tokenizer.pre_tokenizer = pieces
    trainer = trainers.WordLevelTrainer(special_tokens=[EOS, IMAGE], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS)


class GivenFeatures(VisionEncoder):
    """In the encoder's place: the same features for every picture."""

    weights_in_checkpoint = True

    def __init__(self, features: Tensor, vision: PretrainedConfig):
        super().__init__(vision, -1, None)
        self.features = features  # (1, P, Dv)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(n, 3, H, W) -> (n, P, Dv)."""
        return self.features.expand(len(pixel_values), -1, -1)


@torch.inference_mode()
def throughput(shape: Shape, models_: Models, effort: Effort) -> Comparison:
    """Seconds for a question, grouped and one at a time."""
    model = models_.vl_mamba
    baseline = cast(Any, models_.direct())  # a PreTrainedModel, and a GenerationMixin
    patches = model.config.num_patches, model.config.vision_width
    features = torch.randn(1, *patches).to(model.device, model.dtype)
    model.vision_encoder = GivenFeatures(features, model.config.vision_config)
    tokenizer = word_tokenizer([SYSTEM, question(" ".join(OBJECTS)), "USER: ASSISTANT:"])
    processor = VLMambaProcessor.from_config(model.config, tokenizer)
    work = requests(shape, processor)
    single = [_inputs(processor, request, model.device) for request in work[:SINGLE_QUESTIONS]]
    settings = {"max_new_tokens": shape.answer_tokens, "do_sample": False}

    def grouped() -> None:
        GroupedGenerator(model, processor).generate(work, shape.answer_tokens, BATCH_SIZE)

    def one_at_a_time() -> None:
        for inputs in single:
            model.generate(**inputs, **settings)

    def baseline_one_at_a_time() -> None:
        embeds, _ = model.embed(single[0]["input_ids"], image_features=features)
        baseline.generate(inputs_embeds=embeds, **settings)

    contenders = {
        VL_MAMBA: Contender(grouped, len(work)),
        ONE_AT_A_TIME: Contender(one_at_a_time, len(single)),
        TRANSFORMERS_ONE_AT_A_TIME: Contender(baseline_one_at_a_time),
    }
    timings = side_by_side(contenders, effort, models_.device)
    prefix, suffix = map(len, processor.split_prompt(work[0].prompt))
    description = (
        f"{shape.questions_per_image} questions an image, {prefix} tokens up to the image's end, "
        f"{suffix} of the question, {shape.answer_tokens} of the answer"
    )
    return Comparison(shape.kind, description, "question", timings)


def _inputs(processor: VLMambaProcessor, request: Request, device: torch.device) -> dict:
    """What generate() takes for one question."""
    inputs = processor(text=request.prompt, images=[request.image], return_tensors="pt")
    return {name: value.to(device) for name, value in inputs.items()}
