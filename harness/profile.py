"""Profile language models over sequence length: latency, throughput, memory, growth, crossovers.

    python -m harness.profile                        # 130M shapes to 16k tokens: under 20 minutes
    python -m harness.profile --models vl-mamba-130m,pythia-160m --seq-lens 256,512 --decode 16
    python -m harness.profile --dtype float32,bfloat16 --quantize int8,int4 --out runs/numbers
    python -m harness.profile --batch-sizes 1,4,16 --seq-lens 256,512,1024 --out runs/batches
    python -m harness.profile --whole nano,hf:FOLDER --out runs/whole    # whole VLMs alone
    python -m harness.profile --models vl-mamba-2.8b,pythia-2.8b,phi-2,mobilellama-2.7b \\
        --dtype bfloat16 --device cuda --out runs/profile-2.8b

All are the same VLM but for the language model, have random weights and get the same tokens, dtype
and compile setting. Several dtypes give a row each; --quantize gives VL-Mamba's models rows of
whole numbers as weights, multiplied in the first dtype. Every point has a process of its own: one
that runs out of memory or time is reported as such, and the sweep goes on. The same command
continues an interrupted sweep. Leave the machine idle: points whose repeats differ too much are
marked. OUT receives points.jsonl (as they finish) and record.json; the last line printed is JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from harness.models import DTYPES
from harness.models.registry import eval_models
from harness.reporting import render
from harness.runs import rerun, schema
from harness.runs.points import Row
from harness.speed import whole
from harness.speed.certainty import NOISY
from harness.speed.sweep import lengths as lengths_run
from harness.speed.sweep import summary, tables
from harness.speed.sweep.points import Journal, Settings, Weights, plan
from vlmamba_core import launcher
from vlmamba_core.cli import Parser, cli
from vlmamba_core.errors import UserError, unknown
from vlmamba_core.folder import Journal as Kept
from vlmamba_core.folder import RunFolder, explain
from vlmamba_core.memory import total_bytes
from vlmamba_core.names import QUANTIZED, choose, choose_dtype

MODELS = "vl-mamba-130m,pythia-160m,llama-160m"
SEQ_LENS = "256,512,1024,2048,4096,8192,16384"
NOTE = (
    "Weights are random (no layer skips work by value); image features are given, the encoder is "
    "left out. Floor: FLOPs at the rate measured of matrix products; weights and cache read once "
    "at the measured bandwidth. Exponents: least squares in logarithms, 95 % interval by Student's "
    "t, from three lengths on. Spread: slowest less fastest over the median, from eight runs on of "
    f"the middle half; above {NOISY * 100:.0f} % a point is too noisy. Other load: cores that "
    "other processes kept busy."
)
WHOLE_NOTE = (
    "Whole models: their own weights, from a decoded picture to the last token, processor and "
    "encoder included; medians of repeats and their range."
)
FILES = {
    "record.json": "every point with its times and memory, and the settings; written last",
    "points.jsonl": "kept points (a journal): the same command takes them from here and measures "
    "only the rest. Once record.json is there it may be deleted",
    "whole.jsonl": "kept measurements of --whole, likewise",
    "jobs": "with --launcher slurm: the cluster's logs",
}


def build_parser() -> Parser:
    """The command line of `harness.profile`."""
    parser = Parser(
        prog="python -m harness.profile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--models", help=f"comma-separated (default: {MODELS}; none with --whole)")
    add(
        "--whole",
        default="",
        metavar="MODELS",
        help="256 new tokens over the whole time, one image, encoder included, batch 1, of these: "
        "nano, a checkpoint's folder, hf:FOLDER",
    )
    add("--seq-lens", default=SEQ_LENS, help=f"tokens, image included (default: {SEQ_LENS})")
    add("--batch-sizes", default="1", help="comma-separated (default: 1)")
    add(
        "--image-tokens",
        type=int,
        default=729,
        help="how many of the tokens are an image's, a square number or 0 (default: 729); "
        "sequences too short to hold them are text only",
    )
    add("--decode", type=int, default=64, help="tokens generated after the prompt (default: 64)")
    add("--dtype", default="float32", help=f"one or several of {', '.join(DTYPES)}")
    add(
        "--quantize",
        default="",
        metavar="KINDS",
        help=f"measure these weights too, of models that can: {', '.join(QUANTIZED)}",
    )
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--compile", action="store_true", help="torch.compile prefill and step of every model")
    add("--threads", type=int, default=psutil.cpu_count(), help="CPU threads (default: all)")
    add("--seconds", type=float, default=5.0, help="repeat a prefill for so long (default: 5)")
    add("--time-limit", type=float, default=240.0, help="seconds for a point (default: 240)")
    add("--memory-limit-gib", type=float, help="for a point on CPU (default: 4/5 of the memory)")
    launcher.add_arguments(add)
    add("--out", type=Path, default=Path("runs/profile"), help="default: runs/profile")
    add("--tiny", action="store_true", help="shrink every model, for tests")
    return parser


@cli
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = build_parser().parse_args(argv)
    lengths = _numbers("--seq-lens", args.seq_lens)
    batches = _numbers("--batch-sizes", args.batch_sizes)
    where = launcher.Launcher.parse(args.launcher, args.slurm, args.out / "jobs")
    settings = _settings(args, where)
    whole_models = _names(args.whole)
    if args.models is None:
        args.models = "" if whole_models else MODELS
    models = _models(args.models) if args.models or not whole_models else []
    weights = _weights(args.dtype, args.quantize, models)
    for name in whole_models:
        eval_models.split(name)  # an unknown kind is told before anything is measured
    rerun.refuse_another(args.out, rerun.finished(args.out), "profile")
    started = time.perf_counter()
    points = plan(models, lengths, batches, settings, weights)
    if args.dry_run:
        names = [*(point.name for point in points), *whole_models]
        print(f"{len(names)} points, one after the other:\n" + "\n".join(names))
        print("" if where.here else f"\n{where.script(names[0])}")
        return 0
    with RunFolder(args.out) as folder:
        explain(args.out, "harness.profile", FILES, schema.NOTE)
        there = functools.partial(_place, where)
        launch, machine_of = there(lengths_run.launch), there(lengths_run.measure_machine)
        rows = lengths_run.run(points, Journal(args.out / "points.jsonl"), launch)
        machine = machine_of(settings)
        kept = Kept[whole.Row](args.out / "whole.jsonl")
        vlms = whole.run(whole_models, settings, kept, there(whole.in_a_process))
        record = _record(args, settings, machine, rows, vlms, time.perf_counter() - started)
        folder.write("record.json", schema.record_text(record))
    profile = summary.Profile.from_record(args.out.name, record)
    for title, headers, cells in tables.tables(profile):
        print(f"{title}\n{render.text_table(headers, cells)}\n")
    notes = [NOTE] * bool(rows) + [WHOLE_NOTE] * bool(vlms)
    print(
        "\n".join([*notes, f"written to {args.out}: record.json and journals of what is finished"])
    )
    print(json.dumps(record["summary"], allow_nan=False))
    return 0


def _place(where: launcher.Launcher, call: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`call`, done here or in a job."""
    return call if where.here else functools.partial(_in_job, where, call)


def _in_job(where: launcher.Launcher, call: Callable[[Any], Any], given: Any) -> Any:
    """What `call` gives in a job of its own, waited for: a shorter length decides on a longer."""
    (result,) = where.run(call, [given])
    return result


def _settings(args: argparse.Namespace, where: launcher.Launcher) -> Settings:
    """What all points share. Raises UserError for values that make no sense."""
    args.dtype = [choose_dtype(name, DTYPES) for name in _names(args.dtype)]
    kinds = [choose("kind of quantized weights", name, QUANTIZED) for name in _names(args.quantize)]
    args.quantize = list(dict.fromkeys(kinds))
    if not args.dtype:
        raise UserError(f"--dtype is empty; give one or several of {', '.join(DTYPES)}")
    if args.image_tokens < 0 or math.isqrt(max(args.image_tokens, 0)) ** 2 != args.image_tokens:
        raise UserError(f"--image-tokens is {args.image_tokens}; expected a square number or 0")
    for name in ("decode", "threads", "time_limit", "seconds"):
        value = getattr(args, name)
        if not 0 < value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} is {value}; expected a positive number")
    limit = args.memory_limit_gib
    if limit is not None and not 0 < limit < math.inf:
        raise UserError(f"--memory-limit-gib is {limit}; expected a positive number")
    return Settings(
        image_tokens=args.image_tokens,
        decode=args.decode,
        dtype=args.dtype[0],
        device=_device(args.device, where),
        compile=args.compile,
        threads=args.threads,
        seconds=args.seconds,
        time_limit_s=args.time_limit,
        memory_limit_bytes=_most_bytes() if limit is None else int(limit * 2**30),
        tiny=args.tiny,
    )


def _device(name: str, where: launcher.Launcher) -> str:
    """The device of every point. That of another machine cannot be looked for: it is believed."""
    name = name.casefold()
    if name == "cpu":
        return name
    if not where.here:
        gpus = any("gpu" in f"{key}={value}" for key, value in where.parameters.items())
        return name if name != "auto" else "cuda" if gpus else "cpu"
    import torch

    there = torch.cuda.is_available()
    if name == "auto":
        return "cuda" if there else "cpu"
    if not re.fullmatch(r"cuda(:\d+)?", name):
        raise unknown("device", name, ("auto", "cpu", "cuda"))
    if not there:
        raise UserError(f"--device {name}: this machine has no usable GPU; use --device cpu")
    if (torch.device(name).index or 0) >= (count := torch.cuda.device_count()):
        raise UserError(f"--device {name}: this machine's GPUs are cuda:0 to cuda:{count - 1}")
    return name


def _most_bytes() -> int:
    """Four fifths of the machine's memory, to the GiB.

    Not what is free now: the limit belongs to a point's settings, and a resumed sweep has the same.
    """
    return max(1, total_bytes() * 4 // 5 // 2**30) * 2**30


def _numbers(option: str, text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise UserError(f"{option} is {text!r}; expected positive numbers such as 256,512")
    return numbers


def _names(text: str) -> list[str]:
    """What stands between commas."""
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _weights(dtypes: Sequence[str], kinds: Sequence[str], models: Sequence[str]) -> Weights:
    """The numbers of every model; those that cannot have whole ones are named in one line.

    Raises UserError where no model can.
    """
    if not kinds:
        return Weights(dtypes)
    from harness.speed.models import quantizable  # loads torch

    can = [model for model in models if quantizable(model)]
    others = ", ".join(model for model in models if model not in can)
    asked = f"--quantize {','.join(kinds)}"
    if not can:
        raise UserError(
            f"{asked}: no model here has such weights ({others or 'none but whole ones'}); give "
            "one of VL-Mamba's to --models"
        )
    if others:
        print(f"{asked}: not of {others}, whose layers are transformers' own", file=sys.stderr)
    return Weights(dtypes, kinds, can)


def _models(names: str) -> list[str]:
    models = _names(names)
    if not models:
        raise UserError(f"--models is empty; give some such as {MODELS}")
    from harness.speed.models import choose_model  # loads torch

    return [choose_model(name) for name in models]


def _record(
    args: argparse.Namespace,
    settings: Settings,
    machine: dict[str, Any],
    rows: list[Row],
    vlms: list[dict[str, Any]],
    total_s: float,
) -> dict[str, Any]:
    record = {
        "schema": schema.SCHEMA,
        "kind": "profile",
        "label": "tiny models, for tests only" if settings.tiny else None,
        "arguments": {name: _as_given(v) for name, v in vars(args).items() if name != "out"},
        "settings": asdict(settings)
        | {"dtype": ", ".join(args.dtype)}
        | ({"quantize": ", ".join(args.quantize)} if args.quantize else {})
        | ({"weights": "random"} if rows else {})
        | schema.environment(),
        "machine": machine,
        "points": [asdict(row) for row in rows],
        **({"whole": vlms} if vlms else {}),
        "timing": {"total_s": total_s},
        "finished": schema.now(),
    }
    profile = summary.Profile.from_record("", record)
    return record | {"summary": summary.summarize(profile)}


def _as_given(value: Any) -> str:
    return ",".join(value) if isinstance(value, list) else str(value)


if __name__ == "__main__":
    sys.exit(main())
