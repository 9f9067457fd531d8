"""How long the study's jobs will take: from those that are done, or from a short measurement.

A step that another seed, connector or family has done takes as long as theirs did on average.
Where none has, its tokens are counted and `probe` measures what a token costs on this machine.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from harness.ablation.jobs import Job, Step, key_of
from harness.controlled.design import Scale
from harness.controlled.plan import Study, phase_jobs

START_S = 15.0  # of a command: imports, data, saving
SEQUENCE = {"text": 256, "dialogue": 220, "pretrain": 70, "finetune": 190}  # tokens, on average
ASKED = 100  # tokens of a question, its picture's among them
FORWARD = 1 / 3  # of an update


def expected(study: Study, phase: str, per_token: float | None) -> list[tuple[Job, float | None]]:
    """Each job of a phase with the seconds that are left of it; None where nobody can tell."""
    rates = dict.fromkeys((family.name for family in study.chosen_families), 1e-3)
    jobs = phase_jobs(study, phase, rates)
    known = seconds_known(jobs)
    return [(job, _left(job, known, study.scale, per_token)) for job in jobs]


def seconds_known(jobs: Sequence[Job]) -> dict[str, float]:
    """What a step leaves -> its mean seconds over the jobs that have done it."""
    found: dict[str, list[float]] = {}
    for job in jobs:
        for name, seconds in job.seconds().items():
            found.setdefault(name, []).append(seconds)
    return {name: fmean(values) for name, values in found.items()}


def _left(
    job: Job, known: Mapping[str, float], scale: Scale, per_token: float | None
) -> float | None:
    total = 0.0
    for step in job.steps:
        if step.done.exists():
            continue
        seconds = known.get(key_of(step, job.folder))
        if seconds is None and per_token is not None:
            seconds = START_S + per_token * tokens_of(step, scale)
        if seconds is None:
            return None
        total += seconds
    return total


def tokens_of(step: Step, scale: Scale) -> float:
    """About how many tokens a step learns from; those that are only read count a third."""
    given = dict(zip(step.arguments, step.arguments[1:], strict=False))
    if step.module == "harness.run":
        questions = int(given.get("--limit", 4000))
        return FORWARD * ASKED * questions * len(given["--tasks"].split(","))
    if "--steps" not in given:
        return 0.0
    learnt = int(given["--steps"]) * int(given["--batch-size"]) * SEQUENCE[given["--stage"]]
    looks = int(given["--steps"]) // int(given["--eval-every"]) if "--eval-every" in given else 0
    return learnt + 3 * FORWARD * looks * scale.held_out * SEQUENCE["finetune"]


def probe(preset: str = "nano+mlp", updates: int = 2) -> float:
    """Seconds of a core that a token of stage 2 costs here: updates of batch 8, 190 tokens each.

    Processor time: what other programs do now does not count.
    """
    import torch

    from vlmamba.config import VLMambaConfig
    from vlmamba.models.vlm import VLMambaForConditionalGeneration
    from vlmamba.training.precision import bfloat16_products
    from vlmamba.training.stages import STAGES, freeze

    config = VLMambaConfig.preset(preset)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = VLMambaForConditionalGeneration(config)
    model.to(device)
    freeze(model, STAGES["finetune"])
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    ids = torch.randint(2, 500, (8, SEQUENCE["finetune"]), device=device)
    began = 0.0
    for update in range(updates + 1):
        if update == 1:  # the first one is not counted
            began = time.process_time()
        with bfloat16_products(device):
            with torch.autocast(device.type, torch.bfloat16):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
    return (time.process_time() - began) / (updates * ids.numel())
