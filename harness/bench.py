"""Measure the speed of the scan, the language model and evaluation against their alternatives.

    python -m harness.bench --quick                    # some minutes on 2 idle cores
    python -m harness.bench --only decode,pope --threads 2 --json bench.json
    python -m harness.bench --only train               # a quarter of an hour, 12 GiB of memory

Everything runs in this one process, in alternation, with the same threads on both sides; tables
show medians, the fastest and slowest run and by how much runs differ ("too noisy: repeat" where by
more than a quarter of the median). The last line printed is JSON. Leave the machine idle.
`train`, a step of instruction tuning, runs only where --only names it: what it compares with takes
much memory, each contender in a process of its own, and is not waited for longer than 5 minutes.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from tqdm import tqdm

import tasks
from harness.speed import (
    bench_report,
    invariance,
    language_model,
    machine,
    numbers,
    scan,
    throughput,
    training,
)
from harness.speed.bench_report import Results
from harness.speed.certainty import OtherLoad
from harness.speed.timing import FULL, QUICK, Comparison, Effort
from vlmamba.models.selective_scan import resolve_backend
from vlmamba_core.cli import Parser, cli
from vlmamba_core.errors import UserError
from vlmamba_core.memory import keep_freed
from vlmamba_core.names import choose

SECTIONS = ("scan", "prefill", "lengths", "decode", "rows", "pope", "mme", "invariance", "train")
ON_REQUEST = {"train"}

Step = tuple[str, Callable[[dict[str, Any]], Any]]


def build_parser() -> Parser:
    """The command line of `harness.bench`."""
    parser = Parser(
        prog="python -m harness.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer repeats and questions; the same measurements")
    add("--only", help=f"comma-separated: {', '.join(SECTIONS)} (default: all but train)")
    add("--threads", type=int, help="threads of every contender (default: PyTorch's choice)")
    add("--device", default="cpu", help="cpu (default) or cuda, of the models; scans: CPU")
    add("--json", type=Path, help="also write every measurement to this file")
    return parser


@cli
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    arguments = build_parser().parse_args(argv)
    only = _sections(arguments.only)
    if arguments.threads is not None:
        if arguments.threads < 1:
            raise UserError(f"--threads is {arguments.threads}; expected a positive number")
        torch.set_num_threads(arguments.threads)
    if arguments.json and not arguments.json.parent.is_dir():
        raise UserError(f"no folder {str(arguments.json.parent)!r} for --json")
    if arguments.json and arguments.json.is_dir():
        raise UserError(f"--json {arguments.json} is a folder; give a file")
    transformers.utils.logging.set_verbosity_error()
    device = _device(arguments.device)
    if device != "cpu" and "train" in only:
        raise UserError(
            "--device cuda: training is measured on the CPU alone; leave train out of --only"
        )
    results = run(only, arguments.quick, device)
    print(bench_report.tables(results))
    summary = bench_report.summary(results)
    if arguments.json:
        arguments.json.write_text(bench_report.details(results, summary), encoding="utf-8")
    print(json.dumps(summary, allow_nan=False))
    return 0


def _device(name: str) -> str:
    name = choose("device", name, ("cpu", "cuda"))
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no usable GPU; use --device cpu")
    return name


def _sections(only: str | None) -> set[str]:
    if not only:
        return {*SECTIONS} - ON_REQUEST
    return {choose("section", name, SECTIONS) for name in only.split(",")}


def run(only: set[str], quick: bool, device: str = "cpu") -> Results:
    """Measure the named sections under one progress bar."""
    keep_freed()
    backend = resolve_backend("auto", device)  # builds the kernels: nothing to be timed
    started, effort = time.perf_counter(), QUICK if quick else FULL
    load_before, others = psutil.getloadavg(), OtherLoad()
    models = language_model.Models(device=device)
    by_numbers = numbers.Numbers(models, language_model.Models(torch.bfloat16, device))
    with tqdm(_steps(only, effort, quick, by_numbers), file=sys.stderr, unit="step") as bar:
        found: dict[str, Any] = {}
        for name, measure in bar:
            bar.set_description(name)
            found[name] = measure(found)
    settings = {
        **machine.state(models.device, models.dtype),
        "load_average": [round(x, 2) for x in load_before],
        "other_load_cores": others.cores(),
        "scan_backend": backend,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "quick": quick,
        "seconds": round(time.perf_counter() - started, 1),
    }
    return Results(
        settings=settings,
        machine=found["machine"],
        comparisons=[x for x in found.values() if isinstance(x, Comparison)],
        scan_errors=found.get("scan errors"),
        logits_error=found.get("logits"),
        invariance=found.get("invariance"),
    )


def _steps(only: set[str], effort: Effort, quick: bool, by_numbers: numbers.Numbers) -> list[Step]:
    """(name, measurement) in order; a measurement gets what was found before it."""
    models = by_numbers.wide
    steps: list[Step] = [("machine", lambda _: machine.measure(effort, models.device))]
    if "scan" in only:
        steps += [(name, _alone(run)) for name, run in scan.cases(effort, quick)]
        steps.append(("scan errors", lambda _: scan.errors()))
    if "prefill" in only:
        prefill = functools.partial(language_model.prefill, models, effort)
        steps.append(("prefill", lambda found: prefill(found["machine"], by_numbers.narrow)))
    if "lengths" in only:
        for length in numbers.LENGTHS:
            for narrow in (False, True):
                measure = functools.partial(numbers.prefill, length, narrow, by_numbers, effort)
                steps.append((f"prefill {length}{numbers.NARROW * narrow}", _alone(measure)))
    if "decode" in only:
        steps.append(("decode", lambda _: language_model.decode(models, effort)))
    if "rows" in only:
        for rows in numbers.ROWS:
            measure = functools.partial(numbers.decode, rows, by_numbers, effort)
            steps.append((f"decode {rows}", _alone(measure)))
        measure = functools.partial(numbers.decode_products, by_numbers, effort)
        steps.append(("decode products", _alone(measure)))
    if "prefill" in only:
        steps.append(("logits", lambda _: language_model.logits_error(models)))
    for shape in throughput.SHAPES:
        if shape.section in only:
            measure = functools.partial(throughput.throughput, shape, models, effort)
            steps.append((shape.section, _alone(measure)))
            measure = functools.partial(numbers.narrow_throughput, shape, by_numbers, effort)
            steps.append((shape.section + numbers.NARROW, _alone(measure)))
    if "invariance" in only:
        every = [task.name for task in map(tasks.load, tasks.NAMES) if task.demo and task.published]
        names = invariance.QUICK_TASKS if quick else every
        count = invariance.QUICK_QUESTIONS if quick else invariance.QUESTIONS
        steps.append(("invariance", lambda _: invariance.measure(names, count)))
    if "train" in only:
        compared = {kind: functools.partial(training.compare, kind) for kind in training.KINDS}
        steps += [(kind, _alone(measure)) for kind, measure in compared.items()]
    return steps


def _alone(measure: Callable[[], Any]) -> Callable[[dict[str, Any]], Any]:
    """A measurement that needs nothing of what was found before."""
    return lambda _: measure()


if __name__ == "__main__":
    sys.exit(main())
