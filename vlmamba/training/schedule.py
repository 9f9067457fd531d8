"""The learning rate as a pure function of the step: linear warm-up, then cosine to zero.

Having no state, it needs no place in a checkpoint.
"""

from __future__ import annotations

import math


def cosine_with_warmup(step: int, total_steps: int, warmup_ratio: float) -> float:
    """Factor of the peak learning rate for update number `step` (0-based), in 0..1.

    The first ceil(warmup_ratio * total_steps) updates rise linearly from 1/n to 1; the rest falls
    along half a cosine that would reach 0 at update `total_steps`.
    """
    warmup = math.ceil(warmup_ratio * total_steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def constant_with_warmup(step: int, total_steps: int, warmup_ratio: float) -> float:
    """As above without the decay."""
    warmup = math.ceil(warmup_ratio * total_steps)
    return min(1.0, (step + 1) / max(1, warmup))


SCHEDULES = {"cosine": cosine_with_warmup, "constant": constant_with_warmup}
