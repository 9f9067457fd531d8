"""Images and text -> model inputs: the image transform, the conversation template, the labels.

The conversation template is LLaVA-1.5's `vicuna_v1` (the paper trains with LLaVA-1.5's recipe):

    SYSTEM USER: <image>\\nquestion ASSISTANT: answer<eos>USER: next question ASSISTANT: ...

Every piece between image tokens and answers is tokenised by itself, so that a prompt's tokens up
to its last `<image>` never depend on the question (one prefill serves all questions of an image).
"""

from __future__ import annotations

import math
from typing import Any

from PIL import Image
from transformers import AutoProcessor, PretrainedConfig, ProcessorMixin

from vlmamba.config import VLMambaConfig
from vlmamba.errors import UserError, unknown

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
IMAGE = "<image>"
EOS = "<|endoftext|>"
TEMPLATES = ("plain", "vicuna_v1")
IGNORED = -100

CHAT_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] if messages[0]['content'] "
    "is string else messages[0]['content'][0]['text'] }}{% set turns = messages[1:] %}"
    "{% else %}" + SYSTEM + "{% set turns = messages %}{% endif %}{{ ' ' }}"
    "{% for message in turns %}"
    "{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}"
    "{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}"
    "{{ ' ' if message['role'] == 'user' else '" + EOS + "' }}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


class VLMambaProcessor(ProcessorMixin):
    """Tokenizer and image processor in one; expands each `<image>` to its patches' tokens.

    num_image_tokens: P, tokens an image takes.  image_aspect_ratio: "pad" (to a square with the
    mean colour, as LLaVA-1.5 does) or "resize" (stretch).
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        num_image_tokens: int = 49,
        image_aspect_ratio: str = "pad",
        **kwargs: Any,
    ):
        self.num_image_tokens = num_image_tokens
        self.image_aspect_ratio = image_aspect_ratio
        self.image_token = IMAGE
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE)
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)

    @classmethod
    def from_config(cls, config: VLMambaConfig, tokenizer: Any) -> VLMambaProcessor:
        """The processor that fits a model; sets config.image_token_id from the tokenizer.

        Adds `<image>` to the tokenizer where it is missing.  Raises UserError if the tokenizer
        then has more tokens than the model's vocabulary.
        """
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if len(tokenizer) > config.vocab_size:
            raise UserError(
                f"the tokenizer has {len(tokenizer)} tokens but the model's vocabulary is "
                f"{config.vocab_size}; resize the model or use its own tokenizer"
            )
        config.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE)
        return cls(
            image_processor=build_image_processor(config.vision_config),
            tokenizer=tokenizer,
            num_image_tokens=config.num_image_tokens,
        )

    def prepare_inputs_layout(
        self, images: Any = None, text: Any = None, *args: Any, **kwargs: Any
    ) -> tuple:
        """transformers' hook: pads images to squares before they are resized."""
        images, text, *rest = super().prepare_inputs_layout(images, text, *args, **kwargs)
        if images is not None and self.image_aspect_ratio == "pad":
            images = self._padded(images)
        return images, text, *rest

    def _padded(self, images: Any) -> Any:
        if isinstance(images, list | tuple):
            return [self._padded(image) for image in images]
        return self.pad_to_square(images) if isinstance(images, Image.Image) else images

    def pad_to_square(self, image: Image.Image) -> Image.Image:
        """Centre the image on a square of the encoder's mean colour."""
        width, height = image.size
        if width == height:
            return image
        side = max(width, height)
        most = math.isqrt(Image.MAX_IMAGE_PIXELS or side**2)
        if side > most:  # a strip, whose square would be what Pillow calls a decompression bomb
            image = image.convert("RGB")
            image.thumbnail((most, most))
            return self.pad_to_square(image)
        mean = tuple(int(255 * channel) for channel in self.image_processor.image_mean)
        square = Image.new("RGB", (side, side), mean)
        square.paste(image.convert("RGB"), ((side - width) // 2, (side - height) // 2))
        return square

    def pixel_values(self, images: list[Image.Image]) -> Any:
        """PIL images -> (n, 3, H, W) normalised pixels."""
        if self.image_aspect_ratio == "pad":
            images = [self.pad_to_square(image) for image in images]
        images = [image.convert("RGB") for image in images]
        return self.image_processor(images, return_tensors="pt")["pixel_values"]

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """transformers' hook: what stands for one `<image>` in the text."""
        return IMAGE * self.num_image_tokens

    @property
    def model_input_names(self) -> list[str]:
        """What the model's forward takes from here."""
        return ["input_ids", "attention_mask", "pixel_values"]

    def conversation_prompt(self, question: str, images: int = 1) -> str:
        """The `vicuna_v1` prompt of one question, images first."""
        return f"{SYSTEM} USER: {(IMAGE + chr(10)) * images}{question} ASSISTANT:"

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, every `<image>` as num_image_tokens copies."""
        pieces = text.split(IMAGE)
        ids = self._tokens(pieces[0])
        for piece in pieces[1:]:
            ids += [self.image_token_id] * self.num_image_tokens + self._tokens(piece)
        return ids

    def split_prompt(self, prompt: str) -> tuple[list[int], list[int]]:
        """Token ids up to and with the last image, and the rest; together `encode(prompt)`."""
        head, image, tail = prompt.rpartition(IMAGE)
        return self.encode(head + image), self._tokens(tail)

    def training_example(
        self, conversations: list[dict[str, str]], images: int, template: str = "vicuna_v1"
    ) -> tuple[list[int], list[int]]:
        """Token ids and labels of one LLaVA sample; labels are -100 except on the answers.

        conversations: LLaVA's [{"from": "human"|"gpt", "value": ...}, ...].  `plain` (stage 1):
        image, caption, newline.  `vicuna_v1` (stage 2): see the module's text.
        """
        if template not in TEMPLATES:
            raise unknown("template", template, TEMPLATES)
        segments = _plain(conversations) if template == "plain" else _vicuna(conversations, images)
        ids: list[int] = []
        labels: list[int] = []
        for text, supervised in segments:
            tokens = self.encode(text)
            ids += tokens
            labels += tokens if supervised else [IGNORED] * len(tokens)
        return ids, labels

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


def _plain(conversations: list[dict[str, str]]) -> list[tuple[str, bool]]:
    return [(IMAGE, False), (conversations[1]["value"].replace(IMAGE, "").strip() + "\n", True)]


def _vicuna(conversations: list[dict[str, str]], images: int) -> list[tuple[str, bool]]:
    """(text, supervised) pieces; images move to the front of the first question, as in LLaVA."""
    turns = [(turn["from"], turn["value"].replace(IMAGE, "").strip()) for turn in conversations]
    if turns and turns[0][0] != "human":
        turns = turns[1:]
    lead = f"{SYSTEM} USER: {(IMAGE + chr(10)) * images}"
    segments: list[tuple[str, bool]] = []
    for (_, question), (_, answer) in zip(turns[::2], turns[1::2], strict=False):
        segments += [(f"{lead}{question} ASSISTANT:", False), (f" {answer}{EOS}", True)]
        lead = "USER: "
    return segments


def conversation_text(conversations: list[dict[str, str]]) -> str:
    """A conversation in the `vicuna_v1` template as one text, without images."""
    return "".join(text for text, _ in _vicuna(conversations, images=0)).replace(EOS, "\n")


def build_image_processor(vision_config: PretrainedConfig) -> Any:
    """The encoder's published image transform, as a transformers image processor."""
    from transformers import CLIPImageProcessor, SiglipImageProcessor

    kind, side = vision_config.model_type, vision_config.image_size
    square = {"height": side, "width": side}
    if kind == "siglip_vision_model":
        return SiglipImageProcessor(size=square)
    if kind == "efficientnet_lite0":
        return CLIPImageProcessor(
            size=square,
            do_center_crop=False,
            image_mean=[127 / 255] * 3,
            image_std=[128 / 255] * 3,
        )
    return CLIPImageProcessor(size={"shortest_edge": side}, crop_size=square)


AutoProcessor.register(VLMambaConfig, VLMambaProcessor, exist_ok=True)
