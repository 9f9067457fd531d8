"""What a benchmark asks of a judge model; `harness.scoring.judge` is the client that answers."""

from __future__ import annotations

from typing import Protocol


class RefusedItem(Exception):
    """The judge's server will not answer this one message; the text is its reason."""


class JudgeModel(Protocol):
    """A chat model at `url` that grades answers, or says what they mean."""

    url: str
    model: str

    def ask(
        self, prompt: str, *, temperature: float = 0.0, max_tokens: int = 128, system: str = ""
    ) -> str:
        """The reply to one message. Raises RefusedItem where the server refuses this message.

        system: what the model is told before it, if anything.
        """
