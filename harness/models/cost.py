"""What a model under evaluation costs: size, speed and memory, measured the same way for each.

    cost = measure(model, request)       # a request with one picture
    cost.tokens_per_s                    # 256 new tokens / total time, encoder included, batch 1

The last is the figure that the published Mamba VLMs print (Cobra, ML-Mamba, mmMamba).  All times
start with a decoded picture and a question as text and end with the last token: the processor, the
encoder and the prefill are in them.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from harness.models.base import EvalModel, Request
from vlmamba_core import memory
from vlmamba_core.errors import UserError

NEW_TOKENS, REPEATS = 256, 3


@dataclass(frozen=True)
class Cost:
    """first_token_s, total_s: medians of `repeats` after one that is not counted.

    new_tokens: those that came (a model that cannot go past its end token stops earlier); None
    where the model does not say.  peak_mem_bytes: of the process or its GPU meanwhile, weights
    included; None where the model runs elsewhere.
    """

    parameters: int | None
    first_token_s: float
    new_tokens: int | None
    total_s: float
    total_s_spread: tuple[float, float]
    repeats: int
    peak_mem_bytes: int | None

    @property
    def tokens_per_s(self) -> float | None:
        """New tokens over the whole time, everything included."""
        return None if self.new_tokens is None else self.new_tokens / self.total_s

    def record(self) -> dict[str, Any]:
        """As a record keeps it."""
        return {**asdict(self), "tokens_per_s": self.tokens_per_s}


def measure(
    model: EvalModel, request: Request, new_tokens: int = NEW_TOKENS, repeats: int = REPEATS
) -> Cost:
    """The cost of answering `request` alone. Raises UserError for a model that offers no such way.

    Raises harness.data.images.UnreadableImage where its picture is broken.
    """
    for picture in request.pictures:
        _ = picture.image  # decoded before the clock starts

    def seconds(tokens: int) -> tuple[float, int | None]:
        _wait(model)
        began = time.perf_counter()
        made = model.generate_tokens(request, tokens)
        _wait(model)
        return time.perf_counter() - began, made

    try:
        seconds(2)
        peak = _peak(model)
        # in turn, so that a machine that slows down slows down both
        pairs = [(seconds(1), seconds(new_tokens)) for _ in range(repeats)]
    except NotImplementedError as error:
        raise UserError(f"the cost of {model.name} cannot be measured: {error}") from error
    times = sorted(spent for _, (spent, _) in pairs)
    return Cost(
        parameters=model.parameters,
        first_token_s=statistics.median(spent for (spent, _), _ in pairs),
        new_tokens=pairs[0][1][1],
        total_s=statistics.median(times),
        total_s_spread=(times[0], times[-1]),
        repeats=repeats,
        peak_mem_bytes=peak(),
    )


def _wait(model: EvalModel) -> None:
    """Until a GPU has done what it was told."""
    if getattr(model.device, "type", None) == "cuda":
        sys.modules["torch"].cuda.synchronize(model.device)


def _peak(model: EvalModel) -> Callable[[], int | None]:
    """Begin a new peak; what is returned gives it."""
    if model.device is None:
        return lambda: None
    if model.device.type == "cuda":
        cuda = sys.modules["torch"].cuda
        cuda.reset_peak_memory_stats(model.device)
        return lambda: cuda.max_memory_allocated(model.device)
    memory.reset_peak()
    return memory.peak_resident_bytes
