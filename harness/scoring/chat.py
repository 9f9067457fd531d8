"""The client of a judge model behind an OpenAI-compatible endpoint.

    judge = Judge("https://api.openai.com/v1", model="gpt-4-0613", key_variable="OPENAI_API_KEY")
    reply = judge.ask("How good is it?", max_tokens=8)

The key is read from an environment variable named by the caller, sent in the Authorization header
and kept nowhere else: not in records, messages, logs or `repr`. What a server sends back may hold
it too. Replies are kept as they come (`Judge.kept`): whatever ends a run, the next one asks only
for what is missing. httpx is imported when the first message is sent.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tasks.judged import RefusedItem
from vlmamba_core.errors import UserError
from vlmamba_core.folder import Journal, digest

if TYPE_CHECKING:
    import httpx
    import tenacity

REFUSED_ITEM = (400, 413, 422)  # about this one message: a content filter, its length
RETRIED = (408, 429, 500, 502, 503, 504)  # HTTP status codes worth another try
WAITS_S = (1.0, 2.0, 4.0, 8.0)  # before each further try
LONGEST_WAIT_S = 60.0
LONGEST_REASON = 2**14  # bytes of a refusal that are read
REASONING_TOKENS = 1024  # newer models think within the limit, before their grade
VARIABLE = re.compile("[A-Z_][A-Z0-9_]*")  # a key in its place would end up in messages


class _Failure(Exception):
    """A message that got no reply; the text says why.

    passing: it may get one later. retry_after: when, as the server says.
    """

    def __init__(self, why: str, passing: bool, retry_after: str | None = None) -> None:
        super().__init__(why)
        self.passing, self.retry_after = passing, retry_after


@dataclass
class Judge:
    """A chat model at `url` (the part before /chat/completions).

    kept: the replies so far, on disk; a message that is in it is not sent again.
    """

    url: str
    model: str
    key_variable: str | None = None  # name of the environment variable that holds the key
    timeout_s: float = 60.0
    sleep: Callable[[float], None] = time.sleep
    kept: Journal[str] | None = field(default=None, repr=False)
    _renamed: bool = field(default=False, init=False, repr=False)  # max_completion_tokens
    _own_temperature: bool = field(default=False, init=False, repr=False)  # none can be asked for

    def __post_init__(self) -> None:
        parts = urlsplit("" if _unsendable(self.url) else self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(
                "--judge is not a web address; expected one such as https://api.openai.com/v1"
            )
        if parts.username or parts.password or parts.query:
            raise UserError(
                "--judge holds credentials or a query; give the plain address, put the key in an "
                "environment variable and name that with --judge-key-env"
            )
        if self.key_variable is not None and not VARIABLE.fullmatch(self.key_variable):
            raise UserError(
                "--judge-key-env takes the name of an environment variable (capitals, digits, _), "
                "not the key itself"
            )

    def settings(self) -> dict[str, str]:
        """What a record of the scores says about their judge."""
        return {"judge_url": self.url, "judge_model": self.model}

    def ask(
        self, prompt: str, *, temperature: float = 0.0, max_tokens: int = 128, system: str = ""
    ) -> str:
        """The model's reply to one message, from those kept where it has been given before.

        Tries again when the service is busy or out of reach. Raises RefusedItem where the server
        refuses this message, and UserError where it refuses all.
        """
        told = [system] if system else []  # replies of before there was one are found again
        key = digest([self.url, self.model, prompt, temperature, max_tokens, *told])
        reply = self.kept.get(key) if self.kept is not None else None
        if reply is None:
            reply = self._ask(prompt, temperature, max_tokens, system)
            if self.kept is not None:
                self.kept.add(key, reply)
        return reply

    def _ask(self, prompt: str, temperature: float, max_tokens: int, system: str = "") -> str:
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": prompt})
        while True:
            body: dict[str, Any] = {"model": self.model, "messages": messages}
            if self._renamed:
                body["max_completion_tokens"] = max(max_tokens, REASONING_TOKENS)
            else:
                body["max_tokens"] = max_tokens
            if not self._own_temperature:
                body["temperature"] = temperature
            try:
                return self._without_key(self._reply(self._send(body)))
            except RefusedItem as error:
                if not self._take_hint(str(error)):
                    raise

    def _take_hint(self, reason: str) -> bool:
        """Whether the refusal was of a parameter's name that newer models have changed."""
        unknown_limit = "max_tokens" in reason and "support" in reason.lower()
        if ("max_completion_tokens" in reason or unknown_limit) and not self._renamed:
            self._renamed = True
        elif "temperature" in reason.lower() and not self._own_temperature:
            self._own_temperature = True
        else:
            return False
        return True

    def authorization(self) -> dict[str, str]:
        """The header that carries the key. Raises UserError if its variable holds none."""
        if self.key_variable is None:
            return {}
        key = os.environ.get(self.key_variable, "").strip()
        if not key.isascii() or not key.isprintable() or not key:
            state = "is not set" if not key else "holds characters that no key has"
            raise UserError(f"the judge's key: environment variable {self.key_variable} {state}")
        return {"Authorization": f"Bearer {key}"}

    @functools.cached_property
    def _client(self) -> httpx.Client:
        """Follows no redirect, which would carry the key to another host."""
        import httpx

        for name in ("httpx", "httpcore"):  # they log headers, and what servers answer to them
            logging.getLogger(name).setLevel(logging.WARNING)
        return httpx.Client(timeout=self.timeout_s, follow_redirects=False)

    def _send(self, body: dict[str, Any]) -> bytes:
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
        kept = ""
        if self.kept is not None and len(self.kept):
            kept = "; the replies so far are kept, the same command asks only for the rest"
        raise UserError(f"the judge at {self.url} {problem}{kept}")

    def _post(self, body: dict[str, Any]) -> bytes:
        """One request. Raises RefusedItem for a refused message, _Failure for anything else.

        Neither has httpx's own error as its cause: that may quote what the server sent.
        """
        import httpx

        address = f"{self.url.rstrip('/').removesuffix('/chat/completions')}/chat/completions"
        try:
            with self._client.stream(
                "POST", address, json=body, headers=self.authorization()
            ) as response:
                if response.is_success:
                    return response.read()
                told = self._reason(response)
        except (httpx.NetworkError, httpx.TimeoutException) as error:  # our own system's words
            problem = str(error) or type(error).__name__
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            problem = type(error).__name__
        else:
            code = response.status_code
            if code in REFUSED_ITEM:
                raise RefusedItem(f"HTTP {code}{told}")
            why, passing = self._refusal(code) + told, code in RETRIED
            raise _Failure(why, passing, response.headers.get("Retry-After"))
        raise _Failure(f"is out of reach ({problem})", passing=True)

    def _reason(self, response: httpx.Response) -> str:
        """What the server says of its refusal, ": ..."; without the key, which it may repeat."""
        try:
            content = json.loads(_first_bytes(response.iter_bytes(), LONGEST_REASON))
            told = content.get("error", content)
        except (ValueError, AttributeError):
            return ""
        text = told.get("message", told) if isinstance(told, dict) else told
        return f": {' '.join(self._without_key(str(text)).split())}"[:300]

    def _without_key(self, text: str) -> str:
        """What a server sends may hold what it got; it goes into messages and files."""
        key = os.environ.get(self.key_variable or "", "").strip()
        return text.replace(key, "***") if key else text

    def _refusal(self, code: int) -> str:
        if code not in (401, 403):
            return f"answered HTTP {code}"
        where = self.key_variable or "a variable named with --judge-key-env"
        return f"answered HTTP {code}: check the key in {where}"

    def _reply(self, content: bytes) -> str:
        try:
            text = json.loads(content)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            text = content
        if text is None:
            return ""
        if isinstance(text, list):  # in parts, of which those of text count
            text = "".join(str(part.get("text", "")) for part in text if isinstance(part, dict))
        if not isinstance(text, str):
            raise UserError(
                f"the judge at {self.url} sent no chat completion; is it an OpenAI-compatible "
                "endpoint, with the address given up to /v1?"
            )
        return text


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
    return otherwise if math.isnan(asked_s) else min(max(asked_s, 0.0), LONGEST_WAIT_S)
