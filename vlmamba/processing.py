"""Images and text -> model inputs: the image transform, the conversation template, the labels.

The conversation template is LLaVA-1.5's `vicuna_v1` (the paper trains with LLaVA-1.5's recipe):

    SYSTEM USER: <image>\\nquestion ASSISTANT: answer<eos>USER: next question ASSISTANT: ...

<eos> is the tokenizer's own end token.  Where the tokenizer itself puts a token in front of a text
(Llama's BOS; Mamba's and GPT-NeoX's puts none), every sample and prompt opens with it, once.

A picture belongs to its turn: as many tags as a question has, they move to its front, in training,
chat template and prompts alike.  (LLaVA's train.py does so too, but makes one tag of several, for
its records have one picture; and it moves a tag in an answer, which is an error here.)  A processor
whose `image_place` is "last" has them behind the question.

Every piece between image tokens and answers is tokenized by itself, so that a prompt's tokens up
to its last `<image>` never depend on the question (one prefill serves all questions of an image).
A piece gets the tokens that it has in the whole text: Llama's tokenizers put a space in front of
what begins a text, which an answer does not.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

from PIL import Image
from transformers import AutoProcessor, BatchFeature, ProcessorMixin
from transformers.processing_utils import ProcessingKwargs

from vlmamba import hub_files, image_layouts, registry
from vlmamba.chat_template import CHAT_TEMPLATE, CHAT_TEMPLATES, SYSTEM
from vlmamba.config import VLMambaConfig
from vlmamba.data.decode import BrokenPicture, rgb_picture
from vlmamba_core.errors import UserError
from vlmamba_core.names import choose
from vlmamba_core.tokens import IGNORE, IMAGE, without_tags

TEMPLATES = ("plain", "vicuna_v1")


class VLMambaProcessorKwargs(ProcessingKwargs, total=False):
    """A prompt is cut only where that is asked for.

    A tokenizer that was saved while it cut texts, as a training script leaves it, remembers the
    length; transformers would cut every prompt there, in the middle of its image tokens.
    """

    _defaults = {"text_kwargs": {"truncation": False}}  # type: ignore[misc]  # noqa: RUF012


class VLMambaProcessor(ProcessorMixin):
    """Tokenizer and image processor in one; expands each `<image>` to its tiles' tokens.

    num_image_tokens: what the connector makes of a tile.  image_layout: how a picture becomes tiles
    (`vlmamba.image_layouts`; "whole": itself).  image_aspect_ratio: "pad" (a tile to a square with
    the encoder's mean color, as LLaVA-1.5 does) or "resize" (stretch).
    """

    valid_processor_kwargs = VLMambaProcessorKwargs

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        num_image_tokens: int = 49,
        image_aspect_ratio: str = "pad",
        image_layout: str = image_layouts.WHOLE,
        **kwargs: Any,
    ):
        image_layout = registry.image_layouts.choose(image_layout)
        self.num_image_tokens = num_image_tokens
        self.image_aspect_ratio = image_aspect_ratio
        self.image_layout = image_layout
        self.image_token = IMAGE
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE)
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """As in transformers, and the module that finds this package where it is not imported."""
        hub_files.write_code(save_directory)
        self.auto_map = dict(hub_files.PROCESSOR_MAP)
        try:
            return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        finally:
            del self.auto_map

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoProcessor") -> None:
        """Nothing: transformers would copy this package's modules into what is saved."""

    @classmethod
    def from_config(cls, config: VLMambaConfig, tokenizer: Any) -> VLMambaProcessor:
        """The processor that fits a model; sets config's special tokens from the tokenizer.

        Adds `<image>` to the tokenizer where it is missing.  Raises UserError if the tokenizer
        then has more tokens than the model's vocabulary, or if it has no end token.
        """
        if tokenizer.eos_token is None:
            raise UserError("the tokenizer has no eos_token, with which answers end; give it one")
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if len(tokenizer) > config.vocab_size:
            raise UserError(
                f"the tokenizer has {len(tokenizer)} tokens but the model's vocabulary is "
                f"{config.vocab_size}; resize the model or use its own tokenizer"
            )
        config.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE)
        _follow(config, tokenizer)
        return cls(
            image_processor=config.vision_encoder.transform(config.vision_config),
            tokenizer=tokenizer,
            num_image_tokens=config.num_image_tokens,
        )

    def prepare_inputs_layout(
        self, images: Any = None, text: Any = None, *args: Any, **kwargs: Any
    ) -> tuple:
        """transformers' hook: every form of a picture becomes the one that training shows."""
        images = None if images is None else self._prepared(images)
        images = images if _pictures(images) else None
        return super().prepare_inputs_layout(images, text, *args, **kwargs)

    def validate_inputs(
        self, images: Any = None, text: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        """transformers' hook: as many tags as pictures, in every row; and no row without text.

        Raises UserError.
        """
        for row, prompt in enumerate(text or ()):
            if not prompt:
                raise UserError(f"text {row + 1} of {len(text)} is empty; expected a prompt")
        if text is not None:
            rows = [(sum(prompt.count(IMAGE) for prompt in text), _pictures(images))]
            if isinstance(images, list) and isinstance(images[0], list):
                if len(images) != len(text):
                    raise UserError(f"{len(images)} lists of pictures for {len(text)} prompts")
                rows = [(t.count(IMAGE), len(i)) for t, i in zip(text, images, strict=True)]
            for tags, pictures in rows:
                check_tags(tags, pictures)
        super().validate_inputs(images, text, *args, **kwargs)

    def _prepared(self, images: Any) -> Any:
        """Pictures in the nesting they came in; arrays of four dimensions are lists of them."""
        if isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4:
            return [self._prepared(image) for image in images]
        return self.prepare(images)

    def prepare(self, image: Any) -> Image.Image:
        """One picture, in any form that `rgb_picture` takes. UserError for what is no whole one."""
        try:
            return rgb_picture(image)
        except BrokenPicture as error:
            raise UserError(f"a picture cannot be read: {error}") from error

    def tiles(self, image: Any) -> list[Image.Image]:
        """What the encoder is shown of one picture, as `prepare` takes it."""
        picture = self.prepare(image)
        return image_layouts.tiles(self.image_layout, picture, self._resolution)

    @property
    def most_tiles(self) -> int:
        """How many tiles a picture has at most."""
        return image_layouts.most_tiles(self.image_layout)

    @functools.cached_property
    def _resolution(self) -> tuple[int, int]:
        """(H, W) of what the image transform makes of a tile; of several, the largest."""
        parts = getattr(self.image_processor, "parts", [self.image_processor])
        tile = Image.new("RGB", (32, 32))
        shapes = [part(tile, return_tensors="pt")["pixel_values"].shape for part in parts]
        return max((shape[-2], shape[-1]) for shape in shapes)

    def pad_to_square(self, image: Image.Image, mean: Sequence[float] | None = None) -> Image.Image:
        """Center the image on a square of a mean color, the encoder's if none is given."""
        width, height = image.size
        if width == height:
            return image
        side = max(width, height)
        most = math.isqrt(Image.MAX_IMAGE_PIXELS or side**2)
        if side > most:  # a strip, whose square would be what Pillow calls a decompression bomb
            image = image.convert("RGB")
            image.thumbnail((most, most))
            return self.pad_to_square(image, mean)
        color = self.image_processor.image_mean if mean is None else mean
        square = Image.new("RGB", (side, side), tuple(int(255 * channel) for channel in color))
        square.paste(image.convert("RGB"), ((side - width) // 2, (side - height) // 2))
        return square

    def _transformed(self, tiles: Sequence[Image.Image], **kwargs: Any) -> BatchFeature:
        """`pixel_values` (tiles, ...): of fused encoders, each one pads with its own mean."""
        parts = getattr(self.image_processor, "parts", None)
        if parts is None:
            part = self.image_processor
            return part(self._squares(tiles, part), **self._stretching(part), **kwargs)
        kwargs |= {"return_tensors": "pt"}
        of_each = [
            part(self._squares(tiles, part), **self._stretching(part), **kwargs) for part in parts
        ]
        return self.image_processor.joined(of_each)

    def _squares(self, tiles: Sequence[Image.Image], transform: Any) -> list[Image.Image]:
        if self.image_aspect_ratio != "pad":
            return list(tiles)
        return [self.pad_to_square(tile, transform.image_mean) for tile in tiles]

    def _stretching(self, transform: Any) -> dict[str, Any]:
        """Options with which a transform stretches a tile to its square, and cuts no sides off."""
        if self.image_aspect_ratio != "resize" or not getattr(transform, "do_center_crop", False):
            return {}
        square = {side: transform.crop_size[side] for side in ("height", "width")}
        return {"size": square, "do_center_crop": False}

    def tiled(self, images: Sequence[Any]) -> tuple[Any, list[int]]:
        """Pictures, as `prepare` takes them -> pixels of all their tiles, and how many each has."""
        of_each = [self.tiles(image) for image in images]
        everything = [tile for tiles in of_each for tile in tiles]
        pixels = self._transformed(everything, return_tensors="pt")["pixel_values"]
        return pixels, [len(tiles) for tiles in of_each]

    def pixel_values(self, images: Sequence[Any]) -> Any:
        """Pictures, as `prepare` takes them -> (tiles, 3, H, W) normalized pixels."""
        return self.tiled(images)[0]

    def _process_images(self, images: Any, **kwargs: Any) -> tuple[BatchFeature, list[str]]:
        """transformers' hook: the pixels, and what stands for each `<image>` in the text."""
        of_each = [self.tiles(image) for image in _flat(images)]
        pixels = self._transformed([tile for tiles in of_each for tile in tiles], **kwargs)
        return pixels, [self._tile_text * len(tiles) for tiles in of_each]

    @property
    def model_input_names(self) -> list[str]:
        """What the model's forward takes from here."""
        return ["input_ids", "attention_mask", "pixel_values"]

    @property
    def image_place(self) -> str:
        """Where a turn's pictures stand: "first", or "last" (the chat template says which)."""
        return "last" if self.chat_template == CHAT_TEMPLATES["last"] else "first"

    @image_place.setter
    def image_place(self, place: str) -> None:
        self.chat_template = CHAT_TEMPLATES[choose("image place", place, CHAT_TEMPLATES)]

    def conversation_prompt(self, question: str, images: int = 1) -> str:
        """The prompt of one question: `vicuna_v1`, or the processor's own template.

        A question with tags of its own says itself how many images it has, which must be `images`.
        """
        if IMAGE in question:
            check_tags(question.count(IMAGE), images)
            question = without_tags(question).strip()
        if self.chat_template != CHAT_TEMPLATE:
            text = {"type": "text", "text": question}
            turn: Any = {"role": "user", "content": [*[{"type": "image"}] * images, text]}
            return self.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
        return f"{SYSTEM} USER: {(IMAGE + chr(10)) * images}{question} ASSISTANT:"

    def encode(self, text: str, tiles: Sequence[int] | None = None) -> list[int]:
        """Token ids of a prompt, every `<image>` as its layout writes each of its tiles.

        It opens with what the tokenizer puts in front of a text.  tiles: how many each picture has
        (None: one).
        """
        first, image, rest = text.partition(IMAGE)
        ids = self.opening(text) + tokens(self.tokenizer, first)
        return ids + self.continuation(image + rest, tiles)

    def opening(self, text: str) -> list[int]:
        """The BOS token that the tokenizer puts in front of a text that has not got it already."""
        bos = self.tokenizer.bos_token
        return [] if bos and text.startswith(bos) else list(self._opening)

    @functools.cached_property
    def _opening(self) -> tuple[int, ...]:
        first, bos = self.tokenizer("a")["input_ids"][0], self.tokenizer.bos_token_id
        return (bos,) if first == bos and tokens(self.tokenizer, "a")[0] != bos else ()

    def continuation(self, text: str, tiles: Sequence[int] | None = None) -> list[int]:
        """`encode` of a piece of a prompt behind a special token: an image, or an answer's end."""
        first, *pieces = text.split(IMAGE)
        ids = self._tokens(first)
        counts = [1] * len(pieces) if tiles is None else tiles
        for count, piece in zip(counts, pieces, strict=True):
            ids += self._tile_ids * count + self._tokens(piece)
        return ids

    @property
    def _tile_text(self) -> str:
        """What stands for a tile in the text that is tokenized."""
        return registry.image_layouts[self.image_layout]().text(self.num_image_tokens)

    @property
    def _tile_ids(self) -> list[int]:
        """The tokens of a tile: `<image>`s, and what its layout puts between them."""
        first, *pieces = self._tile_text.split(IMAGE)
        ids = self._tokens(first)
        for piece in pieces:
            ids += [self.image_token_id, *self._tokens(piece)]
        return ids

    def split_prompt(
        self, prompt: str, tiles: Sequence[int] | None = None
    ) -> tuple[list[int], list[int]]:
        """Token ids up to and with the last image, and the rest; together `encode(prompt)`."""
        head, tail = split_text(prompt)
        return (self.encode(head, tiles), self._tokens(tail)) if head else ([], self.encode(tail))

    def training_example(
        self,
        conversations: list[dict[str, str]],
        images: int | None = None,
        template: str = "vicuna_v1",
        tiles: Sequence[int] | None = None,
    ) -> tuple[list[int], list[int]]:
        """Token ids and labels of one LLaVA sample; labels are -100 except on the answers.

        conversations: LLaVA's [{"from": "human"|"gpt", "value": ...}, ...], whose `<image>` tags
        say where the images belong; images: how many there are, checked if given; tiles: how many
        each has (None: one).  `plain` (stage 1): images, caption, newline.  `vicuna_v1` (stage 2):
        see the module's text.
        Raises UserError where tags and images disagree, for a tag in an answer, and for what
        `plain` has no place for.
        """
        template = choose("template", template, TEMPLATES)
        if conversations and conversations[0]["from"] != "human":
            conversations = conversations[1:]
        if images is not None:
            check_tags(sum(turn["value"].count(IMAGE) for turn in conversations), images)
        if any(IMAGE in answer["value"] for answer in conversations[1::2]):
            raise UserError(f"{IMAGE} in an answer; images belong to the questions")
        segments = self._segments(conversations, template)
        ids = self.opening(segments[0].text) if segments else []
        labels = [IGNORE] * len(ids)
        counts = None if tiles is None else iter(tiles)
        before: Segment | None = None
        for segment in segments:
            text, supervised, ends = segment
            shown = None if counts is None else list(islice(counts, text.count(IMAGE)))
            if before is None:
                piece = self.encode(text, shown)[len(ids) :]
            elif before.ends or before.text.endswith(IMAGE):
                piece = self.continuation(text, shown)
            else:
                piece = tokens_behind(self.tokenizer, text)
            before = segment
            piece += [self.tokenizer.eos_token_id] * ends
            ids += piece
            labels += piece if supervised else [IGNORE] * len(piece)
        return ids, labels

    def text_lengths(
        self, conversations: Sequence[list[dict[str, str]]], template: str = "vicuna_v1"
    ) -> list[int]:
        """How many tokens `training_example` gives each sample, those of its pictures apart.

        All are tokenized at once, piece by piece: where the tokenizer adds a space to what begins
        a text, a token more for some pieces.
        """
        samples = [self._segments(turns, template) for turns in conversations]
        pieces = [
            list(filter(None, IMAGE.join(s.text for s in own).split(IMAGE))) for own in samples
        ]
        everything = [piece for own in pieces for piece in own]
        ids = iter(self.tokenizer(everything, add_special_tokens=False)["input_ids"])
        lengths = []
        for own, segments in zip(pieces, samples, strict=True):
            special = len(self.opening(segments[0].text)) + sum(s.ends for s in segments)
            lengths.append(special + sum(len(next(ids)) for _ in own))
        return lengths

    def _segments(self, conversations: list[dict[str, str]], template: str) -> list[Segment]:
        plain = template == "plain"
        return _plain(conversations) if plain else _vicuna(conversations, self.image_place)

    def _tokens(self, text: str) -> list[int]:
        """Those of a text behind a special token; a tokenizer may treat them as a text's first."""
        return tokens(self.tokenizer, IMAGE + text)[1:] if text else []


def tokens(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text by itself, without special ones."""
    return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


def tokens_behind(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text that goes on another one, without a space that the tokenizer adds."""
    if tokenizer.convert_ids_to_tokens(tokens(tokenizer, "a"))[0] == "a":
        return tokens(tokenizer, text)
    before = tokens(tokenizer, "\n")  # no token holds a line's end and what follows it
    both = tokens(tokenizer, "\n" + text)
    return both[len(before) :] if both[: len(before)] == before else tokens(tokenizer, text)


def with_tags(text: str, place: str) -> str:
    """A turn with its images before its text (LLaVA's rule for one), or behind it."""
    count = text.count(IMAGE)
    words = without_tags(text).strip() if count else text
    return words + f"\n{IMAGE}" * count if place == "last" else f"{IMAGE}\n" * count + words


def split_text(prompt: str) -> tuple[str, str]:
    """A prompt up to and with its last `<image>`, and the rest."""
    head, image, tail = prompt.rpartition(IMAGE)
    return head + image, tail


def _flat(images: Any) -> Iterator[Any]:
    """The pictures in lists of them, or one by itself."""
    if isinstance(images, list):
        for image in images:
            yield from _flat(image)
    elif images is not None:
        yield images


def _pictures(images: Any) -> int:
    return sum(1 for _ in _flat(images))


def check_tags(tags: int, images: int) -> None:
    """Raise UserError unless there is one tag for each image."""
    if tags != images:
        raise UserError(f"{tags} {IMAGE} tags for {images} images; give one tag for each")


def follow_tokenizer(model: Any, tokenizer: Any) -> None:
    """A model's answers end where its tokenizer says.

    A list of end tokens is kept, the tokenizer's added where it lacks it.
    """
    for settings in (model.config, model.generation_config):
        _follow(settings, tokenizer)


def _follow(settings: Any, tokenizer: Any) -> None:
    end, ends = tokenizer.eos_token_id, settings.eos_token_id
    if not isinstance(ends, list | tuple):
        settings.eos_token_id = end
    elif end not in ends:
        settings.eos_token_id = [end, *ends]
    settings.pad_token_id = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if tokenizer.bos_token_id is not None:
        settings.bos_token_id = tokenizer.bos_token_id


class Segment(NamedTuple):
    """A piece of a sample that is tokenized by itself, and whether the end token closes it."""

    text: str
    supervised: bool
    ends: bool = False


def _plain(conversations: list[dict[str, str]]) -> list[Segment]:
    """Images and their caption; the question is left out, as in LLaVA."""
    images = conversations[0]["value"].count(IMAGE) if conversations else 0
    if len(conversations) != 2 or not images:
        raise UserError("template plain learns captions: one question with an image, one answer")
    caption = conversations[1]["value"].strip() + "\n"
    return [Segment(IMAGE * images, False), Segment(caption, True)]


def _vicuna(conversations: list[dict[str, str]], place: str = "first") -> list[Segment]:
    """Two pieces a round: up to the answer, and the answer.  place: of a turn's images."""
    segments: list[Segment] = []
    lead = f"{SYSTEM} USER: "
    for asked, given in zip(conversations[::2], conversations[1::2], strict=False):
        question = with_tags(asked["value"].strip(), place)
        segments += [Segment(f"{lead}{question} ASSISTANT:", False)]
        segments += [Segment(f" {given['value'].strip()}", True, ends=True)]
        lead = "USER: "
    return segments


def without_images(conversations: list[dict[str, str]]) -> list[dict[str, str]]:
    """A conversation whose questions have lost their tags."""
    return [turn | {"value": without_tags(turn["value"]).strip()} for turn in conversations]


def conversation_text(conversations: list[dict[str, str]]) -> str:
    """A conversation in the `vicuna_v1` template as one text, without images."""
    pieces = _vicuna(without_images(conversations))
    return "".join(piece.text + "\n" * piece.ends for piece in pieces)


AutoProcessor.register(VLMambaConfig, VLMambaProcessor, exist_ok=True)
