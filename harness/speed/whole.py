"""Whole models, image encoder included: what one question costs, each in a process of its own.

    rows = run(["nano", "hf:FOLDER"], settings, Journal(path))

Takes what `harness.run --model` takes.  The question and its picture are the same for all; see
`harness.models.cost` for what is timed.  No torch here until a model is measured.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from harness.models.registry import OWN, eval_models
from harness.runs.points import FAILED, OK, TIME_LIMIT
from harness.runs.schema import code_sha256, packages
from harness.speed.sweep.points import Settings
from vlmamba_core import processes
from vlmamba_core.errors import UserError, first_line
from vlmamba_core.folder import Journal, digest
from vlmamba_core.names import match
from vlmamba_core.paths import file_sha256

QUESTION, SIZE = "Is there a dog in the image? Answer yes or no.", (640, 480)
HEADERS = (
    *("model", "template", "parameters", "first token s", "peak MiB"),
    *("new tokens", "total s", "spread s", "tokens/s", "note"),
)


Row = dict[str, Any]  # {"model", "template", "status", "detail", "cost"}
Start = Callable[[tuple[str, Settings]], Row]


def run(
    models: Sequence[str], settings: Settings, journal: Journal[Row], start: Start | None = None
) -> list[Row]:
    """A row a model, measured by `start` (`in_a_process`); finished ones are kept."""
    start = start or in_a_process
    rows = []
    for model in dict.fromkeys(models):
        terms = [model, content(model), asdict(settings)]
        key = digest(["whole", *terms, code_sha256(), packages(), psutil.cpu_count()])
        row = journal.get(key)
        if row is None:
            row = start((model, settings))
            if row["status"] != FAILED:
                journal.add(key, row)
        if row["status"] != OK:
            print(f"{model}: {row['status']} ({row['detail']})", file=sys.stderr)
        rows.append(row)
    return rows


def content(model: str) -> dict[str, str]:
    """SHA-256 of every file of the folders that `model` names, by path: another checkpoint may have
    taken the name of one that was measured.  Empty for an id on the hub and for an endpoint.
    """
    kind, name = eval_models.split(model)
    values = [name, *(part.partition("=")[2] for part in name.split(","))]
    folders = [Path(value) for value in values if value and Path(value).is_dir()]
    if kind == OWN and not folders:
        from vlmamba.checkpoints import BUNDLED, NAMES  # loads torch

        folders = [BUNDLED[NAMES[found]] for found in [match(name, NAMES)] if found]
    files = [file for folder in folders for file in sorted(folder.rglob("*")) if file.is_file()]
    return {str(file): file_sha256(file) for file in files}


def in_a_process(given: tuple[str, Settings]) -> Row:
    """The row of a model, measured in a process of its own."""
    model, settings = given
    command = [sys.executable, "-m", "harness.speed.whole", model, json.dumps(asdict(settings))]
    limit = settings.time_limit_s
    try:
        done = processes.run(command, capture_output=True, text=True, timeout=limit)
        return json.loads((done.stdout.strip().splitlines() or [""])[-1])
    except subprocess.TimeoutExpired:
        return _row(model, TIME_LIMIT, f"not finished after {limit:g} s")
    except ValueError:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return _row(model, FAILED, last[:300])


def _row(model: str, status: str, detail: str | None = None, **more: Any) -> Row:
    return {"model": model, "template": None, "status": status, "detail": detail} | more


def measure(model: str, settings: Settings) -> Row:
    """The row of a model, measured in this process."""
    import torch
    from PIL import Image

    from harness.models import cost
    from harness.models.base import Limits, Picture, Request
    from harness.models.registry import ModelOptions

    torch.set_num_threads(settings.threads)
    options = ModelOptions(batch_size=1, device=settings.device, dtype=settings.dtype)
    try:
        loaded = eval_models.load(model, options)
        image = Image.effect_mandelbrot(SIZE, (-2, -1.5, 1, 1.5), 50).convert("RGB")
        request = Request("cost", 0, QUESTION, (Picture("picture", lambda: image),), Limits(1))
        tokens = 32 if settings.tiny else cost.NEW_TOKENS
        found = cost.measure(loaded, request, tokens).record()
    except UserError as error:
        return _row(model, FAILED, first_line(error, 300))
    template = loaded.describe().get("template", {}).get("name")
    return _row(model, OK, cost=found) | {"template": template}


def table_rows(found: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Cells under HEADERS."""
    return [_cells(row) for row in found]


def _cells(row: Mapping[str, Any]) -> list[str]:
    cost = row.get("cost")
    if cost is None:
        dashes = ["-"] * (len(HEADERS) - 2)
        return [row["model"], *dashes, f"{row['status']}: {row['detail']}"]
    peak, (low, high) = cost["peak_mem_bytes"], cost["total_s_spread"]
    return [
        row["model"],
        row["template"] or "-",
        str(cost["parameters"] or "-"),
        f"{cost['first_token_s']:.4g}",
        "-" if peak is None else f"{peak / 2**20:.0f}",
        str(cost["new_tokens"] or "-"),
        f"{cost['total_s']:.4g}",
        f"{low:.4g} to {high:.4g}",
        "-" if cost["tokens_per_s"] is None else f"{cost['tokens_per_s']:.4g}",
        "",
    ]


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], Settings(**json.loads(sys.argv[2])))))
