"""Scores that need a judge model: its options on the command line, and scoring with its help.

    judge = from_arguments(args, [task], Path("replies.jsonl"))
    report = evaluate(task, docs, predictions, "paper", judge)

What the judge is asked is the benchmark's own (`Benchmark.evaluate_judged`). An answer that the
server refuses to look at is counted as not graded. Replies are kept as they come (`Judge.kept`):
whatever ends a run, the next one asks only for what is missing.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import tasks
from harness.models.endpoint import Endpoint, Refused, Unusable
from tasks.common import Benchmark, Doc, Report
from tasks.judged import RefusedItem
from vlmamba_core.errors import UserError
from vlmamba_core.folder import Journal, digest


@dataclass
class Judge(Endpoint):
    """A chat model at `url` (the part before /chat/completions) that grades answers.

    kept: the replies so far, on disk; a message that is in it is not sent again.
    """

    noun: ClassVar[str] = "judge"
    url_option: ClassVar[str] = "--judge"
    key_option: ClassVar[str] = "--judge-key-env"
    # Only what can be about one message (a content filter, its length): a grade is not to be lost
    # because an address is wrong.
    refused_item: ClassVar[frozenset[int]] = frozenset({400, 413, 422})

    timeout_s: float = 60.0
    kept: Journal[str] | None = field(default=None, repr=False)

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
            messages = [{"role": "system", "content": system}] if system else []
            messages.append({"role": "user", "content": prompt})
            reply = self._ask(messages, temperature, max_tokens)
            if self.kept is not None:
                self.kept.add(key, reply)
        return reply

    def _ask(self, messages: list[dict[str, str]], temperature: float, max_tokens: int) -> str:
        try:
            return self.chat(messages, max_tokens, temperature=temperature).text
        except Refused as error:
            raise RefusedItem(str(error)) from None
        except Unusable as error:
            kept = "; the replies so far are kept, the same command asks only for the rest"
            raise UserError(f"{error}{kept if self.kept else ''}") from None


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
        judged = ", ".join(name for name in tasks.NAMES if tasks.load(name).judged)
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
