"""The client of an OpenAI-compatible endpoint: retries, refusals, and a key that is kept nowhere.

An evaluated model and a judge (`harness.scoring.judge.Judge`) are both asked through it.

    endpoint = Endpoint("https://api.openai.com/v1", "gpt-4o", key_variable="OPENAI_API_KEY")
    reply = endpoint.chat([{"role": "user", "content": "How many legs has a dog?"}], max_tokens=8)

The key is read from an environment variable named by the caller, sent in the Authorization header
and kept nowhere else: not in records, messages, logs or `repr`; what a server sends back may hold
it too. Several threads may ask at a time. httpx is imported when the first message is sent.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import urlsplit

from vlmamba_core.errors import UserError, one_line

if TYPE_CHECKING:
    import httpx
    import tenacity

RETRIED = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # HTTP status codes worth another try
ABOUT_THE_KEY = (401, 403)
# refusals of one request: all but those that are about the caller
REFUSED_ITEM = frozenset(range(400, 500)) - {401, 402, 407}
WAITS_S = (1.0, 2.0, 4.0, 8.0, 16.0)  # before each further try
LONGEST_WAIT_S = 120.0
LONGEST_REASON = 2**14  # bytes of a refusal that are read
REASONING_TOKENS = 1024  # newer models think within the limit, before their answer
# what is said of a parameter, and not of its value ("this model supports at most 4096 tokens")
NOT_TAKEN = re.compile(
    r"not support|unsupported|not permitted|not allowed|unknown|unrecogni[sz]ed|unexpected|instead",
    re.IGNORECASE,
)
STOP = re.compile(r"\bstop\b", re.IGNORECASE)
FAILED = ("error", "abort")  # why a reply may have ended within a success
WITHHELD = "content_filter"
VARIABLE = re.compile("[A-Z_][A-Z0-9_]*")  # a key in its place would end up in messages


class Refused(Exception):
    """The server will not answer this one message; the text is its reason."""


class Unusable(UserError):
    """The server answers nobody, or not this caller."""


class _Failure(Exception):
    """A message that got no reply; the text says why.

    passing: it may get one later.  retry_after: when, as the server says.
    """

    def __init__(self, why: str, passing: bool, retry_after: str | None = None) -> None:
        super().__init__(why)
        self.passing, self.retry_after = passing, retry_after


@dataclass(frozen=True)
class Reply:
    """A model's answer. tokens: how many it has, where the server counts them.

    cut_short: ended by the limit on tokens.
    """

    text: str
    tokens: int | None = None
    cut_short: bool = False


@dataclass
class Endpoint:
    """The chat model `model` at `url` (the part before /chat/completions).

    refused_item: the status codes that refuse one conversation, and not the caller.
    """

    noun: ClassVar[str] = "endpoint"
    url_option: ClassVar[str] = "the endpoint's address"  # what the user gave it as
    key_option: ClassVar[str] = "key_env"
    refused_item: ClassVar[Container[int]] = REFUSED_ITEM

    url: str
    model: str
    key_variable: str | None = None  # name of the environment variable that holds the key
    timeout_s: float = 120.0
    sleep: Callable[[float], None] = time.sleep
    _renamed: bool = field(default=False, init=False, repr=False)  # max_completion_tokens
    _own_temperature: bool = field(default=False, init=False, repr=False)  # none can be asked for
    _own_stop: bool = field(default=False, init=False, repr=False)  # nor stop strings
    _thinks: bool = field(default=False, init=False, repr=False)  # within the limit, first

    def __post_init__(self) -> None:
        parts = urlsplit("" if _unsendable(self.url) else self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(
                f"{self.url_option} is not a web address; expected one such as "
                "https://api.openai.com/v1 or http://localhost:8000/v1"
            )
        if parts.username or parts.password or parts.query:
            raise UserError(
                f"{self.url_option} holds credentials or a query; give the plain address, put the "
                f"key in an environment variable and name that with {self.key_option}"
            )
        if self.key_variable is not None and not VARIABLE.fullmatch(self.key_variable):
            raise UserError(
                f"{self.key_option} takes the name of an environment variable (capitals, digits, "
                "_), not the key itself"
            )

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        max_tokens: int,
        stop: Sequence[str] = (),
        temperature: float = 0.0,
    ) -> Reply:
        """The reply to a conversation; asked again while the service is busy or out of reach.

        Raises Refused where the server refuses this conversation, UserError where it is not usable.
        """
        while True:
            body: dict[str, Any] = {"model": self.model, "messages": list(messages)}
            thinks = self._thinks or self._renamed
            limit = max(max_tokens, REASONING_TOKENS) if thinks else max_tokens
            body["max_completion_tokens" if self._renamed else "max_tokens"] = limit
            if stop and not self._own_stop:  # callers cut the reply themselves
                body["stop"] = list(stop)
            if not self._own_temperature:
                body["temperature"] = temperature
            try:
                reply = self._reply(self._send(body))
                if reply.text or not reply.cut_short or limit >= REASONING_TOKENS:
                    return reply
                self._thinks = True  # it spent the limit on what is no part of its answer
            except Refused as error:
                if not self._take_hint(str(error), body):
                    raise

    def authorization(self) -> dict[str, str]:
        """The header that carries the key. Raises UserError if its variable holds none."""
        if self.key_variable is None:
            return {}
        key = os.environ.get(self.key_variable, "").strip()
        if not key.isascii() or not key.isprintable() or not key:
            state = "is not set" if not key else "holds characters that no key has"
            raise UserError(
                f"the {self.noun}'s key: environment variable {self.key_variable} {state}"
            )
        return {"Authorization": f"Bearer {key}"}

    def _take_hint(self, reason: str, body: Mapping[str, Any]) -> bool:
        """Whether a parameter that newer models have changed was refused, and can be changed."""
        about = "max_tokens" in reason or "max_completion_tokens" in reason
        if "max_tokens" in body and about and NOT_TAKEN.search(reason):
            self._renamed = True
        elif "temperature" in body and "temperature" in reason.lower():
            self._own_temperature = True
        elif "stop" in body and STOP.search(reason) and NOT_TAKEN.search(reason):
            self._own_stop = True
        else:
            return False
        return True

    @functools.cached_property
    def _client(self) -> httpx.Client:
        """Follows no redirect, which would carry the key to another host."""
        import httpx

        for name in ("httpx", "httpcore"):  # they log headers, and what servers answer to them
            logging.getLogger(name).setLevel(logging.WARNING)
        limits = httpx.Limits(max_connections=None)
        return httpx.Client(timeout=self.timeout_s, follow_redirects=False, limits=limits)

    def _send(self, body: Mapping[str, Any]) -> bytes:
        """The reply to a request, sent again while the server may take it."""
        from tenacity import Retrying, retry_if_exception, stop_after_attempt

        attempts = Retrying(
            retry=retry_if_exception(lambda error: isinstance(error, _Failure) and error.passing),
            stop=stop_after_attempt(1 + len(WAITS_S)),
            wait=_wait_s,
            sleep=self.sleep,
            reraise=True,
        )
        try:
            return attempts(self._post, body)
        except _Failure as error:
            problem = str(error)
        raise Unusable(f"the {self.noun} at {self.url} {problem}")

    def _post(self, body: Mapping[str, Any]) -> bytes:
        """One request. Raises Refused for a refused message, _Failure for anything else.

        Neither has httpx's own error as its cause: that may quote what the server sent.
        """
        import httpx

        address = f"{self.url.rstrip('/').removesuffix('/chat/completions')}/chat/completions"
        try:
            with self._client.stream(
                "POST", address, json=body, headers=self.authorization()
            ) as response:
                if response.is_success:
                    return self._whole(response.read())
                told = self._reason(response)
        except (httpx.NetworkError, httpx.TimeoutException) as error:  # our own system's words
            problem = str(error) or type(error).__name__
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            problem = type(error).__name__
        else:
            code = response.status_code
            if code in RETRIED:
                wait = response.headers.get("Retry-After")
                raise _Failure(f"answered HTTP {code}{told}", passing=True, retry_after=wait)
            if code in self.refused_item:
                raise Refused(f"HTTP {code}{told}")
            where = self.key_variable or f"a variable named with {self.key_option}"
            key = f": check the key in {where}" * (code in ABOUT_THE_KEY)
            raise _Failure(f"answered HTTP {code}{key}{told}", passing=False)
        raise _Failure(f"is out of reach ({problem})", passing=True)

    def _whole(self, content: bytes) -> bytes:
        """The content, if the model ended what it says.

        Routers answer 200 before a model has begun: what failed after that stands in the reply.
        Raises Refused for a withheld reply, _Failure for one that failed.
        """
        try:
            found = json.loads(content)
            choice = (found.get("choices") or [{}])[0]
            error, reason = found.get("error") or choice.get("error"), choice.get("finish_reason")
        except (ValueError, LookupError, TypeError, AttributeError):
            return content  # `_reply` says what is wrong with it
        if reason == WITHHELD:
            raise Refused("the reply was withheld by the server's content filter")
        if error or reason in FAILED:
            told = error if isinstance(error, dict) else {"message": error or f"ended by {reason}"}
            code = told.get("code")
            text = one_line(self._without_key(str(told.get("message", told))))[:300]
            if isinstance(code, int) and code in self.refused_item and code not in RETRIED:
                raise Refused(f"error {code}: {text}")
            passing = code in RETRIED or not isinstance(code, int)
            raise _Failure(f"answered with an error: {text}", passing=passing)
        return content

    def _reason(self, response: httpx.Response) -> str:
        """What the server says of its refusal, ": ..."; without the key, which it may repeat."""
        try:
            content = json.loads(_first_bytes(response.iter_bytes(), LONGEST_REASON))
            told = content.get("error", content)
        except (ValueError, AttributeError):
            return ""
        text = told.get("message", told) if isinstance(told, dict) else told
        return f": {one_line(self._without_key(str(text)))}"[:300]

    def _without_key(self, text: str) -> str:
        """What a server sends may hold what it got; it goes into messages and files."""
        key = os.environ.get(self.key_variable or "", "").strip()
        return text.replace(key, "***") if key else text

    def _reply(self, content: bytes) -> Reply:
        try:
            found = json.loads(content)
            # some leave it out where a model only reasoned
            choice = found["choices"][0]
            text, cut_short = choice["message"].get("content"), choice.get("finish_reason")
        except (ValueError, LookupError, TypeError, AttributeError):
            found, text, cut_short = None, 0, None
        if isinstance(text, list):  # in parts, of which those of text count
            text = "".join(str(part.get("text", "")) for part in text if isinstance(part, dict))
        if not isinstance(text, str | None):
            raise UserError(
                f"the {self.noun} at {self.url} sent no chat completion; is it OpenAI-compatible, "
                "with the address given up to /v1?"
            )
        usage = found.get("usage")
        tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
        counted = tokens if isinstance(tokens, int) else None
        return Reply(self._without_key(text or ""), counted, cut_short == "length")


def _first_bytes(chunks: Iterator[bytes], limit: int) -> bytes:
    """The beginning of a body, which need not end."""
    found = b""
    for chunk in chunks:
        found += chunk
        if len(found) >= limit:
            break
    return found[:limit]


def _unsendable(url: str) -> bool:
    """Whether an address cannot stand in a request: blanks, letters beyond ASCII, a broken host."""
    try:
        urlsplit(url).port  # noqa: B018 - it raises for a port that is no number
    except ValueError:
        return True
    return not url.isascii() or not url.isprintable() or " " in url


def _wait_s(state: tenacity.RetryCallState) -> float:
    """Seconds before the next try: what the server asks for, else longer each time."""
    usual_s = (*WAITS_S, 0.0)[state.attempt_number - 1]  # none follows the last try
    error = state.outcome.exception() if state.outcome else None
    return _seconds(getattr(error, "retry_after", None), usual_s)


def _seconds(retry_after: str | None, otherwise: float) -> float:
    """A Retry-After header in seconds, within reason; dates and nonsense do not count."""
    try:
        asked_s = float(retry_after or otherwise)
    except ValueError:
        return otherwise
    return min(asked_s, LONGEST_WAIT_S) if asked_s > 0 else otherwise  # nan, "at once": not
