"""Answer thousands of demo questions in one process and watch its memory and open files.

    python tools/soak.py                          # 5,000 questions, about a minute on 2 cores
    python tools/soak.py --questions 1000 --model CHECKPOINT

A round is 30 questions of every benchmark, answered by the code of `harness.run`; rounds repeat, so
a benchmark that needs more memory than others does not read as growth.  Private memory (RssAnon)
and open files are read after every 50 answers; the first 500 questions are for warming up.  The
last line is JSON; the exit code is 1 where memory grows (its slope's 95 % interval lies above 0 and
the growth exceeds the readings' own scatter) or files do.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import stdev

sys.path.insert(0, str(Path(__file__).parents[1]))

import tasks
from harness import run
from harness.data import questions
from harness.data.sources import Source
from harness.runs import evaluation
from harness.runs.evaluation import Asked
from harness.speed.sweep.fits import line
from vlmamba_core.cli import cli
from vlmamba_core.errors import UserError
from vlmamba_core.folder import AnswerJournal

TASKS = ("pope", "mme", "vqav2", "gqa", "scienceqa", "mmbench", "easy_vqa")
EACH = 30  # questions of every benchmark in a round
EVERY, WARM_UP = 50, 500


class Enough(Exception):
    """As many answers as were asked for."""


@dataclass
class Watch:
    """Readings of this process by number of answers."""

    most: int
    answers: list[int] = field(default_factory=list)
    memory_bytes: list[int] = field(default_factory=list)
    open_files: list[int] = field(default_factory=list)
    count: int = 0

    def answered(self) -> None:
        """Count an answer; read after every 50th; raise `Enough` after the last."""
        self.count += 1
        if self.count % EVERY == 0:
            self.answers.append(self.count)
            self.memory_bytes.append(private_bytes())
            self.open_files.append(len(os.listdir("/proc/self/fd")))
        if self.count >= self.most:
            raise Enough

    def summary(self) -> dict[str, object]:
        """Growth after the warm-up: slope in bytes a question with its interval, and in all."""
        kept = [i for i, answers in enumerate(self.answers) if answers > WARM_UP]
        x = [self.answers[i] for i in kept]
        memory = [self.memory_bytes[i] for i in kept]
        files = [self.open_files[i] for i in kept]
        fit = line(x, memory)
        growth = fit.value * (x[-1] - x[0])
        middle, mean = sum(x) / len(x), sum(memory) / len(memory)
        scatter = stdev(y - mean - fit.value * (n - middle) for n, y in zip(x, memory, strict=True))
        grows = (fit.low or -math.inf) > 0 and growth > 2 * scatter
        return {
            "questions": self.count,
            "slope_bytes_per_question": [round(v or 0) for v in (fit.value, fit.low, fit.high)],
            "growth_mib": round(growth / 2**20, 2),
            "scatter_mib": round(scatter / 2**20, 2),
            "memory_mib": [round(b / 2**20) for b in (memory[0], max(memory), memory[-1])],
            "open_files": [min(files), max(files), files[-1]],
            "flat": not grows and files[-1] <= files[0],
        }


class CountingJournal(AnswerJournal):
    """A run's answers on disk, counted."""

    def __init__(self, folder: Path, watch: Watch) -> None:
        super().__init__(folder)
        self._watch = watch

    def add(self, key: str, answer: str) -> None:
        """Keep an answer and count it."""
        super().add(key, answer)
        self._watch.answered()


def private_bytes() -> int:
    """Memory of this process that is no file's."""
    for text in Path("/proc/self/status").read_text().splitlines():
        if text.startswith("RssAnon:"):
            return 1024 * int(text.split()[1])
    raise SystemExit("this kernel does not tell RssAnon; Linux 4.5 or newer is needed")


@cli
def main(argv: list[str] | None = None) -> int:
    """Run, print the readings and their summary; 1 where something grew."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--questions", type=int, default=5000)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args(argv)
    if args.questions < 1:
        raise UserError("--questions must be at least 1")
    options = ["--tasks", "pope", "--model", args.model, "--batch-size", str(args.batch_size)]
    chosen = run.parse(options)
    source = Source.parse("demo", None)
    run.stay_offline(chosen, source)

    watch, started = Watch(args.questions), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, evaluation.quiet():
        model = run.load_model(chosen, CountingJournal(Path(folder), watch))
        chosen_tasks = [tasks.load(name) for name in TASKS]
        asked = [
            Asked(task, questions.read(task, source.rows(task), "paper", EACH))
            for task in chosen_tasks
        ]
        try:
            while True:
                evaluation.ask(model, asked, "paper")
                known = model.provenance
                known["round"] = known.get("round", 0) + 1  # asked anew, not kept
        except Enough:
            pass
    for answers, memory, files in zip(
        watch.answers, watch.memory_bytes, watch.open_files, strict=True
    ):
        print(f"{answers:6}  {memory / 2**20:8.1f} MiB  {files:4} files")
    found = watch.summary() | {"seconds": round(time.perf_counter() - started)}
    print(json.dumps(found))
    return 0 if found["flat"] else 1


if __name__ == "__main__":
    sys.exit(main())
