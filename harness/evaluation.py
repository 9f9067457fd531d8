"""From a model's answers to scores, files and the table on the terminal.

`finish` scores every task, checks the scores against lmms-eval's own aggregates, and writes
record.json, samples_TASK.jsonl and table.md into the run's folder.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from harness import records, tables
from harness.data_sources import Source
from harness.engine import Answers
from harness.lmms_model import UNREADABLE, VLMamba, model_sha256
from harness.records import Sample, TaskResult
from harness.rundir import AnswerJournal, RunFolder, digest

Arguments = Mapping[str, Any]


def load_model(args: argparse.Namespace, journal: AnswerJournal) -> VLMamba:
    """The model behind lmms-eval's interface, with everything its answers depend on noted."""
    model = VLMamba(
        pretrained=args.model,
        revision=args.revision,
        batch_size=args.batch_size,
        device=args.device,
        dtype=args.dtype,
        backend=args.backend,
        blind=args.blind,
        journal=journal,
    )
    model.terms = {
        "model_sha256": model_sha256(model.model),
        "code_sha256": records.code_sha256(),
        "device": model.device.type,
        "dtype": str(model.dtype),
        "backend": model.backend,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return model


def finish(
    arguments: Arguments,
    source: Source,
    model: VLMamba,
    answers: Sequence[Answers],
    folder: RunFolder,
    started: float,
) -> None:
    """Score, check against lmms-eval's own aggregates, write the files and print the table.

    arguments: the command line's, as the record keeps them; started: perf_counter() at the start.
    """
    results: list[TaskResult] = []
    checks: dict[str, str] = {}
    data: dict[str, dict[str, Any]] = {}
    for answer in answers:
        result, samples = score(answer, arguments["protocol"], arguments["seed"])
        results.append(result)
        asked = [[sample.question, sample.truth, sample.image] for sample in samples]
        data[result.task] = source.describe(answer.task) | {"rows_digest": digest(asked)}
        checks[result.task] = compare(result, answer.engine)
        folder.write(f"samples_{result.task}.jsonl", records.samples_text(samples))
    title = title_line(arguments, source)
    record = {
        "schema": records.SCHEMA,
        "kind": "evaluation",
        "label": source.label,
        "arguments": dict(arguments),
        "model": {"name": arguments["model"], **describe(model)},
        "data": data,
        "protocol": arguments["protocol"],
        "tasks": {result.task: records.result_entry(result) for result in results},
        "lmms_eval_check": checks,
        "terms": terms(arguments, model) | records.environment(),
        "events": model.events,
        "timing": {**model.timing, "total_s": time.perf_counter() - started},
        "finished": records.now(),
    }
    folder.write("record.json", records.record_text(record))
    folder.write("table.md", tables.report(results, title, markdown=True))
    report_to_terminal(model, checks, folder.path, tables.report(results, title))


def score(answer: Answers, protocol: str, seed: int) -> tuple[TaskResult, list[Sample]]:
    """A task's scores and per-question lines."""
    return records.score_task(
        answer.task,
        answer.docs,
        [None if p == UNREADABLE else p for p in answer.predictions],
        protocol,
        doc_ids=answer.doc_ids,
        image_keys=answer.image_keys,
        seed=seed,
    )


def compare(result: TaskResult, engine: dict[str, float]) -> str:
    """ "equal", or which of our metrics differ from lmms-eval's own aggregates."""
    different = [
        f"{name}: {result.metrics.get(name, math.nan)} here, {value} in lmms-eval"
        for name, value in engine.items()
        if math.isfinite(value) != (name in result.metrics)
        or (name in result.metrics and not math.isclose(value, result.metrics[name], abs_tol=1e-9))
    ]
    return "; ".join(different) or "equal"


def describe(model: VLMamba) -> dict[str, Any]:
    """The model's part of the record."""
    return {
        "sha256": model.terms["model_sha256"],
        "parameters": model.parameters,
        "config": model.config_dict,
    }


def terms(arguments: Arguments, model: VLMamba) -> dict[str, Any]:
    """Under which terms the answers were made."""
    gpu = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else None
    return {
        **{name: value for name, value in model.terms.items() if name != "model_sha256"},
        "device_name": gpu,
        "batch_size": arguments["batch_size"],
        "processes": model.world_size,
        "threads": torch.get_num_threads(),
        "seeds": dict.fromkeys(("bootstrap", "python", "numpy", "torch"), arguments["seed"]),
    }


def title_line(arguments: Arguments, source: Source) -> str:
    """What the table is about, and what its numbers may not be compared with."""
    parts = [f"model {arguments['model']}", f"data {source.name}"]
    parts += [f"protocol {arguments['protocol']}"]
    parts += ["blind (image features replaced by their mean)"] if arguments["blind"] else []
    parts += [f"first {arguments['limit']} questions only"] if arguments["limit"] else []
    line = ", ".join(parts)
    return f"{line}\n{source.label}" if source.label else line


def report_to_terminal(model: VLMamba, checks: dict[str, str], out: Path, table: str) -> None:
    """The table on stdout; what went wrong on stderr."""
    for event in model.events[:5]:
        print(f"note: {event}", file=sys.stderr)
    if len(model.events) > 5:
        print(f"note: and {len(model.events) - 5} more, see record.json", file=sys.stderr)
    for task, check in checks.items():
        if check != "equal":
            print(f"warning: {task}: lmms-eval's aggregate differs: {check}", file=sys.stderr)
    print(table)
    resumed = model.timing["resumed_answers"]
    kept = f" ({resumed} answers were already there)" if resumed else ""
    print(f"written to {out}: record.json, table.md, samples_*.jsonl{kept}")
