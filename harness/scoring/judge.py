"""Scores that need a judge model behind an OpenAI-compatible endpoint.

    judge = Judge("https://api.openai.com/v1", model="gpt-4-0613", key_variable="OPENAI_API_KEY")
    report = evaluate(tasks.load("mmvet"), docs, predictions, "paper", judge)

What the judge is asked is the benchmark's own (`Benchmark.evaluate_judged`). The key is read from
an environment variable named by the caller, sent in the Authorization header and kept nowhere else:
not in records, messages or `repr`.

Replies are kept as they come (`Judge.kept`): whatever ends a run, the next one asks only for what
is missing. An answer that the server refuses to look at is counted as not graded.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import tasks
from tasks.common import Benchmark, Doc, Report
from tasks.judged import RefusedItem
from vlmamba_core.errors import UserError
from vlmamba_core.folder import Journal, digest

REFUSED_ITEM = (400, 413, 422)  # about this one message: a content filter, its length
RETRIED = (408, 429, 500, 502, 503, 504)  # HTTP status codes worth another try
WAITS_S = (1.0, 2.0, 4.0, 8.0)  # before each further try
LONGEST_WAIT_S = 60.0
LONGEST_REASON = 2**14  # bytes of a refusal that are read
REASONING_TOKENS = 1024  # newer models think within the limit, before their grade


VARIABLE = re.compile("[A-Z_][A-Z0-9_]*")  # a key in its place would end up in messages


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: urllib would carry the key to the other host."""

    def redirect_request(self, *_: Any) -> None:
        return None


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

    def terms(self) -> dict[str, str]:
        """What a record of the scores says about their judge."""
        return {"judge_url": self.url, "judge_model": self.model}

    def ask(self, prompt: str, *, temperature: float = 0.0, max_tokens: int = 128) -> str:
        """The model's reply to one message, from those kept where it has been given before.

        Tries again when the service is busy or out of reach. Raises RefusedItem where the server
        refuses this message, and UserError where it refuses all.
        """
        key = digest([self.url, self.model, prompt, temperature, max_tokens])
        reply = self.kept.get(key) if self.kept is not None else None
        if reply is None:
            reply = self._ask(prompt, temperature, max_tokens)
            if self.kept is not None:
                self.kept.add(key, reply)
        return reply

    def _ask(self, prompt: str, temperature: float, max_tokens: int) -> str:
        while True:
            body: dict[str, Any] = {
                "model": self.model,
                "messages": [{"role": "user", "content": prompt}],
            }
            if self._renamed:
                body["max_completion_tokens"] = max(max_tokens, REASONING_TOKENS)
            else:
                body["max_tokens"] = max_tokens
            if not self._own_temperature:
                body["temperature"] = temperature
            request = urllib.request.Request(
                f"{self.url.rstrip('/').removesuffix('/chat/completions')}/chat/completions",
                data=json.dumps(body).encode(),
                headers={"Content-Type": "application/json", **self.authorization()},
                method="POST",
            )
            try:
                return self._without_key(self._reply(self._send(request)))
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

    def _send(self, request: urllib.request.Request) -> bytes:
        opener = urllib.request.build_opener(_NoRedirect)
        waits_s = iter(WAITS_S)
        while True:
            retry_after = None
            try:
                with opener.open(request, timeout=self.timeout_s) as response:
                    return response.read()
            except urllib.error.HTTPError as error:
                told = self._reason(error)
                if error.code in REFUSED_ITEM:
                    raise RefusedItem(f"HTTP {error.code}{told}") from error
                problem, passing = self._refusal(error.code) + told, error.code in RETRIED
                retry_after = error.headers.get("Retry-After")
                error.close()
            except (OSError, http.client.HTTPException) as error:
                # our own system's reasons only: a server may send back what it got, the key too
                known = isinstance(error, OSError)
                reason = getattr(error, "reason", error) if known else type(error).__name__
                problem, passing = f"is out of reach ({reason})", True
            wait_s = next(waits_s, None) if passing else None
            if wait_s is None:
                kept = ""
                if self.kept is not None and len(self.kept):
                    kept = "; the replies so far are kept, the same command asks only for the rest"
                raise UserError(f"the judge at {self.url} {problem}{kept}")
            self.sleep(_seconds(retry_after, wait_s))

    def _reason(self, error: urllib.error.HTTPError) -> str:
        """What the server says of its refusal, ": ..."; without the key, which it may repeat."""
        try:
            content = json.loads(error.read(LONGEST_REASON))
            told = content.get("error", content)
            text = told.get("message", told) if isinstance(told, dict) else told
        except (OSError, ValueError, AttributeError, http.client.HTTPException):
            return ""
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


def _unsendable(url: str) -> bool:
    """Whether an address cannot stand in a request: blanks, letters beyond ASCII, a broken host."""
    try:
        urlsplit(url).port  # noqa: B018 - it raises for a port that is no number
    except ValueError:
        return True
    return not url.isascii() or not url.isprintable() or " " in url


def _seconds(retry_after: str | None, otherwise: float) -> float:
    """A Retry-After header in seconds, within reason; dates and nonsense do not count."""
    try:
        return min(max(float(retry_after or otherwise), 0.0), LONGEST_WAIT_S)
    except ValueError:
        return otherwise


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command-line options that `from_arguments` reads."""
    add = parser.add_argument
    add("--judge", metavar="URL", help="OpenAI-compatible endpoint of a judge model, up to /v1")
    add("--judge-model", metavar="NAME", default="gpt-4-0613", help="the judge (%(default)s)")
    add("--judge-key-env", metavar="VAR", help="environment variable that holds the judge's key")
    add(
        "--judge-replies",
        type=Path,
        metavar="FILE",
        help="where the judge's replies are kept (default: judge.replies.jsonl of the run's "
        "folder, or beside the predictions); a rerun asks only what is missing",
    )


def from_arguments(
    args: argparse.Namespace, chosen: Sequence[Benchmark], beside: Path | None = None
) -> Judge | None:
    """The judge that the options name; None without --judge.

    beside: where its replies are kept unless the options say.  Raises UserError when none of the
    tasks has a use for it, or its key is not there.
    """
    if args.judge is None:
        return None
    if not any(task.judged for task in chosen):
        names = ", ".join(repr(task.name) for task in chosen)
        judged = " and ".join(name for name in tasks.NAMES if tasks.load(name).judged)
        raise UserError(f"{names} needs no judge; --judge is for {judged}")
    judge = Judge(args.judge, args.judge_model, args.judge_key_env)
    judge.authorization()
    path = args.judge_replies or beside
    if path is not None:
        _check_writable(path)
        judge.kept = Journal(path)
    return judge


def _check_writable(path: Path) -> None:
    """Raise UserError, before anything is paid for, where replies cannot be kept at `path`.

    A folder that is not there yet is a run's own, made before its first question.
    """
    place = path if path.exists() else path.parent
    if place.exists() and (place.is_dir() == (place is path) or not os.access(place, os.W_OK)):
        raise UserError(
            f"the judge's replies cannot be kept in {path}; name a file with --judge-replies"
        )


def evaluate(
    task: Benchmark,
    docs: Sequence[Doc],
    predictions: Sequence[str],
    protocol: str,
    judge: Judge | None = None,
) -> Report:
    """`task.evaluate`, with the judge's help where there is a judge and the task has use for it."""
    if judge is None or not task.judged:
        return task.evaluate(docs, predictions, protocol)
    return task.evaluate_judged(docs, predictions, protocol, judge)
