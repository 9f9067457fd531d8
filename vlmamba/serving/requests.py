"""What a client may send to /v1/chat/completions, and what it becomes: a prompt and its pictures.

OpenAI's chat format, the part of it that this model has. Pictures come as data: URLs; a path or a
URL from a request is never opened. Settings that would change an answer and are not supported are
refused, others ignored.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, field_validator

from vlmamba.data.decode import BrokenPicture, decode_picture
from vlmamba.generation import Request, Tiles, prepared
from vlmamba_core.errors import first_line
from vlmamba_core.tokens import without_tags

DATA_URL = re.compile(
    r"data:image/[\w.+-]+(;[\w=.-]+)*;base64,(?P<data>.*)", re.DOTALL | re.IGNORECASE
)
MAX_PICTURES = 16
MAX_PIXELS = 50_000_000  # of a picture
MAX_SQUARES = 200_000_000  # pixels of a request's pictures, each padded to a square
LEAST_TEMPERATURE = 1e-4  # below it the likeliest token is certain, and logits overflow
CHARACTERS_A_TOKEN = 64  # of the longest words: more are refused before they are split
NEUTRAL: dict[str, tuple[Any, ...]] = {  # values of other settings that change nothing
    "n": (None, 1),
    "tools": (None, []),
    "functions": (None, []),
    "response_format": (None, {"type": "text"}),
    "logprobs": (None, False),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0, 0.0),
    "frequency_penalty": (None, 0, 0.0),
    # of vLLM and others
    "best_of": (None, 1),
    "repetition_penalty": (None, 1, 1.0),
    "length_penalty": (None, 1, 1.0),
    "min_tokens": (None, 0),
    "ignore_eos": (None, False),
    "min_p": (None, 0, 0.0),
    "top_k": (None, -1, 0),
    "stop_token_ids": (None, []),
    "bad_words": (None, []),
    "use_beam_search": (None, False),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None, []),
    "guided_grammar": (None,),
}


class BadRequest(Exception):
    """A request that cannot be answered; its message tells the client why.

    code: OpenAI's own word for the reason, where it has one.
    """

    def __init__(self, why: str, code: str | None = None) -> None:
        super().__init__(why)
        self.code = code


class ImageURL(BaseModel):
    """`{"url": "data:image/...;base64,..."}`."""

    url: str


class Part(BaseModel):
    """A text or a picture of a message."""

    type: Literal["text", "image_url"]
    text: str | None = None  # null in the parts of some data sets
    image_url: ImageURL | None = None


class Message(BaseModel):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]  # developer: OpenAI's newer "system"
    content: str | list[Part] | None = None  # null: an assistant that only called a tool


class StreamOptions(BaseModel):
    """What a stream tells besides the words."""

    include_usage: bool = False


class ChatRequest(BaseModel):
    """The body of a request."""

    model_config = ConfigDict(extra="allow")

    messages: list[Message] = Field(min_length=1, max_length=256)
    model: str | None = None
    max_tokens: int | None = Field(default=None, ge=1, le=4096)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=4096)
    temperature: float | None = Field(default=0.0, ge=0.0, le=2.0)
    top_p: float | None = Field(default=1.0, gt=0.0, le=1.0)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None

    @field_validator("stop")
    @classmethod
    def _few(cls, value: str | list[str] | None) -> str | list[str] | None:
        if isinstance(value, list) and len(value) > 4:
            raise ValueError("at most 4 stop strings")
        return value


@dataclass(frozen=True)
class Job:
    """A checked request: what the model is asked, and how it shall answer."""

    request: Request
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken each time."""
        return self.temperature == 0.0

    def cut(self, text: str) -> str:
        """The answer before the first stop string."""
        places = [place for stop in self.stop if (place := text.find(stop)) >= 0]
        return text[: min(places)].rstrip() if places else text

    def sure(self, text: str) -> str:
        """A growing answer without what may yet turn out to begin a stop string."""
        held = (
            size
            for stop in self.stop
            for size in range(1, min(len(stop), len(text) + 1))
            if text.endswith(stop[:size])
        )
        return text[: len(text) - max(held, default=0)]


def read(body: ChatRequest, processor: Any, default_tokens: int, most_tokens: int) -> Job:
    """A job for the model, its pictures as pixels. Raises BadRequest with a plain reason.

    default_tokens: of the answer, where the request does not say.  most_tokens: of the prompt.
    """
    for name, neutral in NEUTRAL.items():
        value = (body.model_extra or {}).get(name)
        if value not in neutral:
            raise BadRequest(f"{name} is not supported here; leave it out")
    if body.messages[-1].role != "user":
        raise BadRequest("the last message must be the user's")
    pictures: list[Image.Image] = []
    digests: list[str] = []
    messages = [_message(message, pictures, digests) for message in body.messages]
    try:
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    except Exception as error:  # jinja's, with the template's own words
        raise BadRequest(first_line(error)) from error
    _check_length(len(prompt) / CHARACTERS_A_TOKEN, most_tokens)
    request = prepared(Request(prompt, "+".join(digests) or None, pictures or None), processor, {})
    _check_length(len(processor.encode(prompt, tile_counts(request))), most_tokens)
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    temperature = body.temperature or 0.0
    return Job(
        request,
        body.max_completion_tokens or body.max_tokens or default_tokens,
        temperature if temperature >= LEAST_TEMPERATURE else 0.0,
        body.top_p or 1.0,
        body.seed,
        tuple(word for word in stop if word),
    )


def _check_length(tokens: float, most: int) -> None:
    """Refuse a prompt of more tokens than that. Raises BadRequest."""
    if tokens > most:
        raise BadRequest(f"a prompt of more than {most} tokens", "context_length_exceeded")


def tile_counts(request: Request) -> list[int]:
    """How many tiles each of a prepared request's pictures has."""
    return [len(picture.pixels) for picture in request.pictures if isinstance(picture, Tiles)]


def _message(
    message: Message, pictures: list[Image.Image], digests: list[str]
) -> dict[str, object]:
    """The message for the chat template; its pictures are added to the lists."""
    role = "system" if message.role == "developer" else message.role
    if message.content is None and role != "assistant":
        raise BadRequest(f"a message of the {role} without content")
    if message.content is None or isinstance(message.content, str):
        return {"role": role, "content": _text(message.content or "")}
    parts: list[dict[str, str]] = []
    for part in message.content:
        if part.type == "text":
            parts.append({"type": "text", "text": _text(part.text or "")})
            continue
        if part.image_url is None:
            raise BadRequest("a part of type image_url without image_url")
        if message.role != "user":
            raise BadRequest("pictures belong to the user's messages")
        if len(pictures) == MAX_PICTURES:
            raise BadRequest(f"more than {MAX_PICTURES} pictures")
        squares = sum(max(picture.size) ** 2 for picture in pictures)
        picture, digest = decode(part.image_url.url, MAX_SQUARES - squares)
        pictures.append(picture)
        digests.append(digest)
        parts.append({"type": "image"})
    if not any(part["type"] == "image" or part["text"] for part in parts):
        raise BadRequest("a message without text")
    return {"role": role, "content": parts}


def _text(text: str) -> str:
    """A client's text; it cannot bring image tokens along."""
    return without_tags(text).strip()


def decode(url: str, most_square: int = MAX_SQUARES) -> tuple[Image.Image, str]:
    """The picture of a data: URL and the digest of its bytes. Raises BadRequest.

    most_square: pixels that it may have when padded to a square; looked at before it is decoded.
    """

    def check(width: int, height: int) -> None:
        if width * height > MAX_PIXELS:
            raise BadRequest(f"a picture of more than {MAX_PIXELS} pixels")
        if max(width, height) ** 2 > most_square:
            raise BadRequest(f"pictures of more than {MAX_SQUARES} pixels, each padded to a square")

    found = DATA_URL.fullmatch(url)
    if found is None:
        raise BadRequest("pictures must be data:image/...;base64 URLs; others are not opened")
    try:
        data = base64.b64decode("".join(found["data"].split()), validate=True)
    except ValueError:  # binascii.Error is one
        raise BadRequest("a picture that is not base64") from None
    try:
        picture = decode_picture(data, check)
    except BrokenPicture as error:
        raise BadRequest(f"a picture that cannot be read: {error}") from None
    return picture, hashlib.sha256(data).hexdigest()


def first(reasons: Sequence[Any]) -> str:
    """The first of pydantic's reasons in one line; of a value that may be of several kinds, the
    reason that goes deepest."""
    reason = max(reasons, key=lambda one: len(one.get("loc", ())))
    where = ".".join(str(part) for part in reason.get("loc", ()) if part != "body")
    return f"{where}: {reason.get('msg', 'wrong')}" if where else str(reason.get("msg", "wrong"))
