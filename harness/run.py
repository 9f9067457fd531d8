"""Evaluate a model on benchmarks: answers, scores with intervals, one table, one record.

    python -m harness.run --tasks pope,mme                        # demo model on the demo world
    python -m harness.run --tasks pope --style heldout --blind    # text-only control, new styles
    python -m harness.run --tasks all --model ORG/NAME --data hub --dtype bfloat16
    python -m harness.run --tasks mme --data my_data --protocol lmms --limit 100
    python -m harness.run --tasks vqav2 --model ORG/NAME --data hub --split testdev --submit sent

    python -m harness.run --tasks pope --model hf:llava-hf/llava-1.5-7b-hf --template vicuna_v1
    python -m harness.run --tasks pope --model api:http://localhost:8000/v1,model=llava
    python -m harness.run --tasks pope --model lmms:llava_hf,pretrained=FOLDER,device_map=auto
    python -m harness.run --tasks pope --votes 16 --temperature 0.7   # majority, accuracy by votes
    python -m harness.run --tasks lmms:ai2d,lmms:mmmu_val --model CHECKPOINT     # lmms-eval's own
    python -m harness.run --list                                  # tasks, and what --model takes
    python -m harness.run --from-record runs/final/record.json --out runs/again
    accelerate launch --multi_gpu --num_processes 2 -m harness.run --tasks pope   # CPUs too

Writes record.json, table.md and samples_TASK.jsonl under --out. Interrupted, the same command
continues from the answers that are already there; another finished run in that folder is not
replaced without --overwrite. A rerun of a record warns of every term that is no longer the same. A
benchmark that gets no score here (its truth is hidden, or it needs a judge model) leaves the file
that its test server takes.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tasks
from harness import models
from harness.data import questions
from harness.data.sources import STYLES, Source, choose_tasks
from harness.models import BUNDLED_MODELS, ranks
from harness.models.registry import ABOUT, OWN, ModelOptions, eval_models
from harness.models.resumable import Resumable
from harness.reporting import render
from harness.runs import evaluation, older, rerun, schema, voting
from harness.runs.evaluation import Asked
from harness.scoring import judge as judging
from harness.scoring import submit
from tasks.common import Benchmark, choose_protocol
from vlmamba_core import hub
from vlmamba_core.cli import Parser, cli
from vlmamba_core.errors import UserError, unknown
from vlmamba_core.folder import AnswerJournal, RunFolder, digest, explain
from vlmamba_core.memory import keep_freed
from vlmamba_core.names import QUANTIZED, SCAN_BACKENDS, choose, choose_dtype, match

if TYPE_CHECKING:
    import datasets

DTYPES = ("auto", *models.DTYPES)
# arguments that a record keeps and `--from-record` takes up again
KEPT = (
    *("tasks", "model", "revision", "data", "style", "split", "data_id", "data_revision"),
    *("protocol", "limit", "batch_size", "blind", "dtype", "device", "backend", "seed"),
    "quantize",
    *("judge", "judge_model", "judge_key_env", "template", "votes", "temperature"),
    *tasks.PROMPT_OPTIONS,
)
HOTTEST = 100
LMMS = "lmms:"  # in front of the name of one of lmms-eval's own tasks
LONGEST_NAME = 100  # characters of a model's name in a folder's
NOT_TEXT = {"limit": int, "batch_size": int, "blind": bool, "seed": int, "votes": int}
NOT_TEXT["temperature"] = float
MAY_BE_ABSENT = {"revision", "style", "split", "data_id", "data_revision", "limit"} | {
    *("judge", "judge_key_env", "template", "quantize"),
    *tasks.PROMPT_OPTIONS,
}


def build_parser() -> argparse.ArgumentParser:
    """The command line of `harness.run`."""
    parser = Parser(
        prog="python -m harness.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--list", action="store_true", help="show the tasks and what --model takes, then stop")
    add(
        "--tasks",
        help=f"comma-separated, or all: {', '.join(tasks.NAMES)}; lmms:NAME for any of lmms-eval's",
    )
    kinds = ", ".join(f"{kind}:NAME" for kind in eval_models if kind != OWN)
    others = f", or another kind of model: {kinds}" if kinds else ""
    add(
        "--model",
        default="nano",
        help=f"nano (bundled demo), a checkpoint folder, or a hub id{others}",
    )
    add("--revision", help="revision of a hub model")
    add(
        "--template",
        metavar="NAME",
        help="hf: models and checkpoints: what stands around a question, chat_template (the "
        "model's own, the default), vicuna_v1, mistral_instruct, cobra, plain, or a file with a "
        "Jinja template",
    )
    add(
        "--data",
        help="demo (the default), hub (that of lmms: tasks), or a folder with files such as "
        "TASK.parquet",
    )
    add("--style", help=f"demo data only: {', '.join(STYLES)} (default: seen)")
    add("--split", help="another split than the task's, such as testdev for vqav2")
    add("--data-id", metavar="ORG/NAME", help="hub data only: another data set of one task")
    add("--data-revision", metavar="REV", help="hub data only: branch, tag or commit")
    add(
        "--protocol",
        help="paper (LLaVA-1.5's scripts, the default) or lmms (lmms-eval's, that of lmms: tasks)",
    )
    for name, option in tasks.PROMPT_OPTIONS.items():
        values = f"{', '.join(option.values)} (default: the protocol's)"
        add(f"--{name}", metavar="CHOICE", help=f"{option.help}: {values}")
    add("--limit", type=int, help="only the first N questions of each task")
    add("--batch-size", type=int, default=32, help="questions decoded together (default: 32)")
    add("--out", type=Path, help="output folder (default: runs/, named after the arguments)")
    add("--overwrite", action="store_true", help="replace another finished run in --out")
    add("--blind", action="store_true", help="replace every image's features by their mean")
    add(
        "--dtype",
        default="auto",
        help=f"{', '.join(DTYPES)} (auto: float32 on a CPU, where bfloat16 "
        "changes 4 %% of the demo's answers)",
    )
    add("--quantize", help=f"weights of the language model: {', '.join(QUANTIZED)} (default: none)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--backend", default="auto", help=f"selective scan: {', '.join(SCAN_BACKENDS)}")
    add("--seed", type=int, default=0, help="seed of all generators")
    add("--temperature", type=float, default=0.0, help="sample answers (default: 0, greedy)")
    add(
        "--votes",
        type=int,
        default=1,
        metavar="K",
        help="sample K answers to each question from one prefilled state; their majority counts",
    )
    add(
        "--cost",
        action="store_true",
        help="also measure seconds to the first token, and 256 new tokens over the whole time",
    )
    add(
        "--update-card",
        action="store_true",
        help="put the scores into README.md of the model's folder, the card that a hub shows",
    )
    add("--submit", type=Path, metavar="DIR", help="write the test servers' files here")
    judging.add_arguments(parser)
    add("--from-record", type=Path, metavar="FILE", help="repeat the run of a record.json")
    add("--verbose", action="store_true", help="show the libraries' logs and progress bars")
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Checked arguments; all that can be known wrong without loading a model is refused here."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.from_record:
        parser.set_defaults(**read_arguments(args.from_record))
        args = parser.parse_args(argv)
    if not args.tasks and not args.list:
        raise UserError(f"--tasks is missing; give some of {', '.join(tasks.NAMES)}, or all")
    only_lmms = bool(args.tasks) and not split_tasks(args.tasks)[0]
    args.protocol = choose_protocol(args.protocol or ("lmms" if only_lmms else "paper"))
    if args.data is None:
        args.data = "hub" if only_lmms else "demo"
    args.backend = choose("backend", args.backend, SCAN_BACKENDS)
    args.dtype = choose_dtype(args.dtype, DTYPES)
    args.quantize = args.quantize and choose("kind of quantized weights", args.quantize, QUANTIZED)
    args.style = args.style and choose("style", args.style, STYLES)
    args.model = match(args.model, BUNDLED_MODELS) or args.model
    if args.tasks:
        names = (name.strip() for name in args.tasks.split(","))
        args.tasks = ",".join(match(name, ("all", *tasks.NAMES)) or name for name in names)
    for name, option in tasks.PROMPT_OPTIONS.items():
        if value := getattr(args, name):
            setattr(args, name, choose(f"value of --{name}", value, option.values))
    for name in ("limit", "batch_size", "votes"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; expected at least 1")
    if not 0 <= args.temperature <= HOTTEST:
        raise UserError(f"--temperature is {args.temperature}; expected 0 (greedy) to {HOTTEST}")
    if args.votes > 1 and not args.temperature:
        raise UserError(
            f"--votes {args.votes} at temperature 0 would be one answer {args.votes} times; give "
            "--temperature, such as 0.7"
        )
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed is {args.seed}; expected 0 to {2**32 - 1}")
    check_model(args.model)
    return args


def split_tasks(names: str) -> tuple[list[str], list[str]]:
    """The names that `--tasks` has of benchmarks here, and of lmms-eval's own tasks."""
    given = [name.strip() for name in names.split(",") if name.strip()]
    of_lmms = [name for name in given if name.startswith(LMMS)]
    return [name for name in given if name not in of_lmms], [n.removeprefix(LMMS) for n in of_lmms]


def choose_benchmarks(args: argparse.Namespace, source: Source) -> list[Benchmark]:
    """What `--tasks` names, those of lmms-eval last. Raises UserError."""
    bundled, of_lmms = split_tasks(args.tasks)
    if not of_lmms:
        return choose_tasks(args.tasks, source)
    if source.kind == "demo":
        raise UserError(
            f"the demo has no rows of {LMMS}{of_lmms[0]}; "
            "give --data hub, or a folder that has them"
        )
    if source.dataset and len(bundled) + len(of_lmms) > 1:
        raise UserError(f"--data-id {source.dataset} is one data set; give one task in --tasks")
    from harness.models import lmms_tasks  # lmms-eval takes seconds to load

    kind, name = eval_models.split(args.model)
    whose = name.partition(",")[0] if kind == "lmms" else "vlmamba"
    chosen = choose_tasks(",".join(bundled), source) if bundled else []
    return [*chosen, *lmms_tasks.load(list(dict.fromkeys(of_lmms)), whose)]


def check_model(name: str) -> None:
    """Raise UserError for a name that is no bundled model, no folder and no hub id.

    The model package says the same, but only once torch is loaded.
    """
    kind, _ = eval_models.split(name)
    if kind != OWN:
        return  # its own function says what it cannot make
    hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if name not in BUNDLED_MODELS and not Path(name).is_dir() and not hub_id:
        raise UserError(
            f"{unknown('model', name, BUNDLED_MODELS)} (or an existing folder, or a hub id "
            "ORGANIZATION/NAME)"
        )


def card_folder(name: str) -> Path:
    """The model's own folder, whose card can be updated. Raises UserError where there is none."""
    kind, folder = eval_models.split(name)
    if kind not in (OWN, "hf") or name in BUNDLED_MODELS or not Path(folder).is_dir():
        raise UserError(f"--update-card writes into the model's own folder; {name!r} is none")
    from vlmamba import model_card

    model_card.check_card(Path(folder))
    return Path(folder)


def read_arguments(path: Path) -> dict[str, Any]:
    """The arguments that a record was made with. Raises UserError for any other file."""
    try:
        record = older.record(json.loads(path.read_text(encoding="utf-8")))
        kept = record["arguments"]
        found = {"tasks": kept["tasks"]} | {name: kept[name] for name in KEPT if name in kept}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is not a record.json of harness.run: {error!r}") from error
    if "scored_from" in record:
        raise UserError(f"{path} was scored from files by harness.score: there is no run to repeat")
    for name, value in found.items():
        kind = NOT_TEXT.get(name, str)
        if type(value) is not kind and not (value is None and name in MAY_BE_ABSENT):
            raise UserError(f"{path}: argument {name} is {value!r}, expected {kind.__name__}")
    return found


def with_prompts(chosen: Sequence[Benchmark], args: argparse.Namespace) -> list[Benchmark]:
    """The benchmarks under the prompt options given. Raises UserError for one without use."""
    options = {name: getattr(args, name) for name in tasks.PROMPT_OPTIONS}
    for name, value in options.items():
        if value is not None and not any(name in task.prompt_options for task in chosen):
            users = ", ".join(n for n in tasks.NAMES if name in tasks.load(n).prompt_options)
            raise UserError(f"--{name} is for {users}, which --tasks does not name")
    return [task.with_prompt(**options) for task in chosen]


def make_submit_folder(folder: Path, chosen: Sequence[Benchmark]) -> None:
    """Create the folder for submission files, before anything slow.

    Raises UserError where no chosen task has a test server, or the folder cannot be made.
    """
    if not any(map(submit.file_name, chosen)):
        with_server = ", ".join(n for n in tasks.NAMES if submit.file_name(tasks.load(n)))
        raise UserError(f"--submit: no chosen task has a test server; these do: {with_server}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error


def what_servers_want(
    args: argparse.Namespace,
    source: Source,
    chosen: Sequence[Benchmark],
    rows: Callable[[Benchmark], datasets.Dataset],
) -> dict[str, submit.Wanted]:
    """Task -> the questions its submission file must have; empty without --submit.

    Raises UserError where no file could be written that the server takes; warns of what it lacks.
    """
    found: dict[str, submit.Wanted] = {}
    for task in chosen if args.submit else ():
        if submit.file_name(task):
            table = rows(task)
            whole = found[task.name] = submit.wanted(task, source, table)
            left = len(table) - (args.limit or len(table))
            lacks = [f"the test server will refuse the file: {whole.why}"] * bool(whole.why)
            if left > 0:
                lacks.append(f"--limit {args.limit} leaves {left} of {len(table)} questions empty")
            for line in lacks:
                print(f"warning: --submit: {task.name}: {line}", file=sys.stderr)
    return found


def default_out(args: argparse.Namespace, source: Source, chosen: Sequence[Benchmark]) -> Path:
    """A folder named after what answers depend on: the same command finds its own answers."""
    names = "all" if args.tasks == "all" else "+".join(task.name for task in chosen)
    model = args.model.strip("/").replace("/", "--").replace(":", "-").lstrip(".") or "model"
    if len(model) > LONGEST_NAME:  # settings and all: no file system takes it as a name
        model = f"{model[:LONGEST_NAME]}-{digest([model])[:8]}"
    parts = [model, source.name, args.protocol, names]
    parts += ["blind"] if args.blind else []
    parts += [f"{n}-{getattr(args, n)}" for n in tasks.PROMPT_OPTIONS if getattr(args, n)]
    parts += [f"template-{Path(args.template).name}"] if args.template else []
    parts += [f"temperature-{args.temperature:g}"] if args.temperature else []
    parts += [f"votes-{args.votes}"] if args.votes > 1 else []
    parts += [f"first{args.limit}"] if args.limit else []
    return Path("runs") / "_".join(parts)


def stay_offline(args: argparse.Namespace, source: Source) -> None:
    """Keep the hub's libraries off the network unless data or model come from there.

    And where it does not answer, which they would find out by minutes of retries.
    """
    _, name = eval_models.split(args.model)
    hub_model = "/" in name and not Path(name).is_dir()
    if source.kind == "hub" or hub_model:
        hub.offline_unless_reachable()
    else:
        hub.stay_offline()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def listing(source: Source) -> str:
    """Every task with the size of its published data, and what `--model` takes."""
    chosen = [tasks.load(name) for name in tasks.NAMES]
    absent = {task.name for task in chosen if not source.has(task)}
    rows = [[t.name, t.size, "" if t.name in absent else "yes", t.description] for t in chosen]
    known = render.text_table(("task", "published", f"in {source.name}", "what it asks"), rows)
    models = render.text_table(("--model", "what it is"), [list(row) for row in ABOUT.items()])
    of_lmms = (
        f"{LMMS}NAME: any of lmms-eval's own tasks (generate_until, multiple_choice), such as "
        f"{LMMS}ai2d,{LMMS}mmmu_val; lmms-eval --tasks list shows their names"
    )
    return f"{known}\n\n{of_lmms}\n\n{models}"


@cli
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parse(argv)
    source = Source.parse(
        args.data,
        args.style,
        split=args.split,
        dataset=args.data_id,
        revision=args.data_revision,
    )
    if args.list:
        print(listing(source))
        return 0
    chosen = with_prompts(choose_benchmarks(args, source), args)
    if args.submit:
        make_submit_folder(args.submit, chosen)
    out = args.out or default_out(args, source, chosen)
    card = card_folder(args.model) if args.update_card else None
    judge = judging.from_arguments(args, chosen, out / "judge.replies.jsonl")
    arguments = {name: getattr(args, name) for name in KEPT}

    def finished() -> dict[str, Any] | None:
        """The record in `out`; raises UserError where it is another run's."""
        found = None if args.overwrite else rerun.finished(out)
        rerun.refuse_another(out, found, "evaluation", [t.name for t in chosen], arguments)
        return found

    finished()  # before anything is read
    stay_offline(args, source)
    keep_freed()
    started = time.perf_counter()
    before = rerun.read(args.from_record)
    rows = functools.cache(source.rows)
    asked = []
    for task in chosen:
        if isinstance(task, questions.OwnRows):
            asked.append(Asked(task, task.questions(source, args.limit)))
            continue
        table = source.demo_table(task)
        table = rows(task) if table is None else table
        asked.append(Asked(task, questions.read(task, table, args.protocol, args.limit)))
    rank = ranks.rank()
    wanted = what_servers_want(args, source, chosen, rows) if rank == 0 else {}
    with RunFolder(out, shared=rank > 0) as folder, ranks.together():
        there = finished()  # another process may have written one since
        run = evaluation.Run(
            arguments=arguments,
            source=source,
            folder=folder,
            rows=rows,
            submit_to=args.submit,
            wanted=wanted,
            judge=judge,
        )
        if rank == 0:
            explain(out, "harness.run", schema.ASKED_FILES, schema.NOTE)
        with evaluation.quiet(not args.verbose):
            ranks.join()
            model = load_model(args, AnswerJournal(out, rank, every=args.batch_size))
            if not args.from_record:  # a rerun warns of what is no longer the same
                rerun.refuse_other_weights(out, there, model.model.describe().get("sha256"))
            if rank == 0:
                rerun.warn(before, evaluation.terms_of(arguments, model))
            predictions = evaluation.ask(model, asked, args.protocol, args.votes)
            if args.cost and rank == 0:
                model.cost = evaluation.measure_cost(model, asked, args.protocol)
        if predictions is not None:  # every process but the first is done
            if args.overwrite:
                folder.clear()
            record = finish(run, model, asked, predictions, started)
            rerun.warn(before, {"data": record["data"]})
            if card is not None:
                from vlmamba import model_card

                print(f"scores added to {model_card.add_scores(card, record)}")
    return 0


def load_model(args: argparse.Namespace, journal: AnswerJournal) -> Resumable:
    """The model that `--model` names, its answers kept. Raises UserError."""
    names = ("revision", "batch_size", "device", "dtype", "backend", "blind", "seed", "template")
    chosen = (*names, "temperature", "quantize")
    options = ModelOptions(**{name: getattr(args, name) for name in chosen})
    evaluation.seed_everything(args.seed)
    return Resumable(eval_models.load(args.model, options), journal)


def finish(
    run: evaluation.Run,
    model: Resumable,
    asked: Sequence[Asked],
    predictions: Sequence[Sequence[str | None]],
    started: float,
) -> dict[str, Any]:
    """Score the answers, write all files, print the table, and check it; returns the record."""
    began = time.perf_counter()
    voted = None
    if (votes := run.arguments["votes"]) > 1:
        given = zip(asked, predictions, strict=True)
        voted = [voting.Voted.of(one, answers, votes) for one, answers in given]
        predictions = [one.chosen(run.protocol) for one in voted]
    pairs = zip(asked, predictions, strict=True)
    outcomes = [evaluation.score(run, task, answers, model.refused) for task, answers in pairs]
    model.timing["score_s"] = time.perf_counter() - began
    record = evaluation.write(run, model, asked, outcomes, started)
    said = voting.write(run.folder, record, model, voted) if voted else []
    title = evaluation.title_line(run.arguments, run.source, record["model"])
    results = [outcome.result for outcome in outcomes]
    run.folder.write("table.md", render.report(results, title, markdown=True))
    for event in model.events[:5]:
        print(f"note: {event}", file=sys.stderr)
    if len(model.events) > 5:
        print(f"note: and {len(model.events) - 5} more, see record.json", file=sys.stderr)
    print(render.report(results, title))
    resumed = model.timing["resumed_answers"]
    kept = f" ({resumed} answers were already there)" if resumed else ""
    print(f"written to {run.folder.path}: record.json, table.md, samples_*.jsonl{kept}")
    print(evaluation.say_where_the_time_went(record["timing"]))
    if line := evaluation.say_cost(record["cost"]):
        print(line)
    for line in said:
        print(line)
    for line in evaluation.check(run, record, asked, outcomes):
        print(f"warning: {line}", file=sys.stderr)
    return record


if __name__ == "__main__":
    sys.exit(main())
