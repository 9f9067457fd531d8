"""Score a prediction file without a model.

    python -m harness.score pope predictions.jsonl --json scores.json
    python -m harness.score mme predictions.jsonl --protocol lmms --per-case
    python -m harness.score pope answers.jsonl --import llava --truth questions.jsonl labels.*.jsonl
    python -m harness.score scienceqa samples.jsonl --import lmms-eval --compare
    python -m harness.score vqav2 up.json --import upload --truth questions.json annotations.json
    python -m harness.score mme eval_tool/Your_Results --import upload
    python -m harness.score pope runs/demo/samples_pope.jsonl --protocol lmms --out runs/demo-lmms

A line of predictions.jsonl is a ground-truth document in the column names of the hub data set,
without its image, plus `prediction` (the raw answer) and, if wanted, `case_id` (else the line's
number, from 0). Other people's files come in with --import; those for test servers and official
evaluators (what --submit writes, too) with --import upload, as they are: under `paper` without the
normalization that LLaVA applies before it uploads. A run's own samples_TASK.jsonl finds its
documents in the data that the record beside it names, or in --truth. Rows that cannot be scored are
left out, counted and named. With --out a run's folder is written, as harness.run does; several
tasks of one model may share it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import tasks
from harness.data.readers import is_file, read_documents, read_task_rows, repeat_note
from harness.reporting import render
from harness.runs import rescore, schema
from harness.runs.rescore import Answers
from harness.runs.schema import TaskResult
from harness.runs.store import marks
from harness.scoring import imports, submit
from harness.scoring import judge as judging
from harness.scoring.llava_answers import Joined
from tasks.common import PROTOCOLS, Benchmark, Case, Report, choose_protocol, is_blank
from vlmamba_core.cli import Parser, cli
from vlmamba_core.errors import UserError
from vlmamba_core.folder import write_atomically

SHOWN = 20  # changed rows that --compare prints without --per-case


def build_parser() -> argparse.ArgumentParser:
    """The command line of `harness.score`."""
    parser = Parser(
        prog="python -m harness.score",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("task", help=", ".join(tasks.NAMES))
    add("predictions", type=Path, help="JSON lines, or a file of the --import format")
    add("--protocol", default="paper", help="paper (official scripts) or lmms (lmms-eval's rules)")
    add("--json", type=Path, metavar="OUT", help="write metrics and per-case scores here")
    add("--per-case", action="store_true", help="print every row: id, score, reading, answer")
    add("--import", dest="format", help=f"another format: {', '.join(imports.formats())}")
    add(
        "--truth",
        type=Path,
        nargs="+",
        default=[],
        help="documents of an imported file, or all questions that --submit must answer",
    )
    add("--out", type=Path, metavar="DIR", help="a run's folder: record, samples, table")
    add("--model", metavar="NAME", help="whose answers these are, for --out (default: the file's)")
    add("--overwrite", action="store_true", help="replace another finished run in --out")
    add("--compare", action="store_true", help="score under both protocols, show changed rows")
    add("--submit", type=Path, metavar="OUT", help="write the official submission file instead")
    judging.add_arguments(parser)
    return parser


@cli
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = build_parser().parse_args(argv)
    args.protocol = choose_protocol(args.protocol)
    if args.task.startswith(("lmms:", "lmms-")):
        raise UserError(
            f"{args.task} is a task of lmms-eval's own, which harness.run scores; the same command "
            "again asks nothing that is already answered in its folder"
        )
    task = tasks.load(args.task)
    answers = read(task, args.predictions, args.format, args.truth, bool(args.submit))
    if answers.submitted:
        task = task.of_uploads()
    rows = answers.rows
    if args.submit:
        print(write_submission(task, rows, args.submit, args.truth))
        return 0
    place = args.predictions if args.predictions.name else args.predictions.resolve()  # "."
    beside = place.with_name(f"{place.name}.judge.jsonl")
    judge = judging.from_arguments(args, [task], beside)
    report = score(task, rows, args.protocol, judge)
    report.excluded.update(schema.counted(answers.reasons))
    if args.protocol == "paper" and answers.missing:
        report.notes.extend(unanswered_notes(task, report, answers.missing))
    if args.json:  # before a word is printed: the reader of a pipe may leave
        content = as_json(task, rows, report, args.protocol, answers.missing)
        write_json(args.json, content | (judge.settings() if judge else {}))
    if args.out:
        run = rescore.write_run(
            args.out,
            task,
            answers,
            report,
            args.protocol,
            path=place,
            name=args.model,
            format=args.format,
            truth=args.truth,
            overwrite=args.overwrite,
        )
        label = run.record["label"]
        title = f"{run.title}\n{label}" if label else run.title
        table = render.report(run.results(), title, markdown=True)
        write_atomically(args.out / "table.md", table)
    result = schema.result_of(task, [row.doc for row in rows], report, args.protocol)
    apart = marks((answers.record or {}).get("arguments", {}))
    print(summary(replace(result, marks=tuple(apart)), args.protocol, answers.missing))
    if args.compare:
        print(comparison(task, rows, None if args.per_case else SHOWN))
    elif args.per_case:
        print("\n".join(per_case_lines(rows, report)))
    if args.out:
        print(f"written to {args.out}: record.json, table.md, samples_{task.name}.jsonl")
    return 0


def write_submission(
    task: Benchmark, rows: Sequence[Joined], path: Path, truth: Sequence[Path]
) -> str:
    """Write the file for the test server, completed where `truth` has every question it wants.

    Returns what to say of it.
    """
    whole = submit.Wanted(read_documents(truth, task)) if truth else None
    docs, predictions = [row.doc for row in rows], [row.prediction for row in rows]
    n, notes = submit.write(task, docs, predictions, path, whole)
    split = f" of split {task.submission_split}" if task.submission_split else ""
    if whole is not None and split:
        notes.append(f"complete for --truth; the server wants every question{split}")
    if whole is None:
        notes.append(
            f"not checked for completeness; the server wants every question{split}: give them "
            "with --truth"
        )
    return "\n".join([f"written to {path}: {n} answers", *(f"note: {note}" for note in notes)])


def read(
    task: Benchmark,
    path: Path,
    format: str | None = None,
    truth: Sequence[Path] = (),
    submitted: bool = False,
) -> Answers:
    """Rows to score, and how many known documents have no answer.

    submitted: `truth` completes the rows for a test server, so it may come without a format.
    Raises UserError for a row without a text answer and for two rows with one case_id.
    """
    if format is None:
        answers = _own(task, path, () if submitted else truth)
    else:
        rows, missing = imports.load(format, task, path, truth)
        answers = Answers(rows, missing, submitted=imports.is_upload(format))
    seen: set[str] = set()
    for row in (*answers.rows, *answers.unanswered):
        if row.case_id in seen:
            raise UserError(f"{path}: case_id {row.case_id!r} comes twice")
        seen.add(row.case_id)
    return answers


def _own(task: Benchmark, path: Path, truth: Sequence[Path]) -> Answers:
    """Rows of a prediction file, or of the samples that a run wrote."""
    found = read_task_rows(path, task) if is_file(path) or not truth else []
    if found and rescore.is_samples(found):
        return rescore.read_samples(task, found, path, truth)
    if truth:
        raise UserError(
            "--truth belongs to --import, --submit or a run's samples; without them every row "
            "holds its own document"
        )
    rows = []
    for number, row in enumerate(found):
        prediction = row.pop("prediction", None)
        if not isinstance(prediction, str):
            other = imports.hint(task, path, None) if prediction is None else ""
            raise UserError(
                f"{path} row {number + 1}: prediction is {prediction!r}, expected the answer's text"
                f"{other}"
            )
        given = row.pop("case_id", None)
        case_id = number if is_blank(given) else given
        rows.append(Joined(str(case_id), row, prediction))
    return Answers(rows)


def score(
    task: Benchmark, rows: Sequence[Joined], protocol: str, judge: judging.Judge | None = None
) -> Report:
    """The report of all rows. Raises UserError if none of them can be scored."""
    docs, predictions = [row.doc for row in rows], [row.prediction for row in rows]
    report = judging.evaluate(task, docs, predictions, protocol, judge)
    if report.n == 0:
        reasons = "; ".join(f"{count}: {reason}" for reason, count in report.excluded.items())
        raise UserError(f"{task.name}: none of {len(rows)} rows can be scored ({reasons})")
    named = all(any(doc.get(column) for column in task.cluster_columns) for doc in docs)
    return replace(report, notes=[*report.notes, *(repeat_note(docs) if named else [])])


def summary(result: TaskResult, protocol: str, missing: int = 0) -> str:
    """The table of harness.run: units, intervals, n; then what was left out and what to know."""
    title = f"{result.task}, protocol {protocol}: {result.n} answers scored"
    # Reasons are sentences here, longer than a table's cell: they get lines of their own.
    bare = replace(result, n_unparsed=0, excluded={}, notes=[])
    lines = [f"not understood: {result.n_unparsed}"] if result.n_unparsed else []
    lines += [f"left out: {count} rows: {reason}" for reason, count in result.excluded.items()]
    lines += [f"left out: {missing} questions without an answer"] if missing else []
    lines += [f"note: {note}" for note in result.notes]
    return "\n".join([render.report([bare], title), *lines])


def per_case_lines(rows: Sequence[Joined], report: Report) -> Iterator[str]:
    """One tab-separated line per row: case_id, score, reading and answer as JSON strings."""
    for row, case in zip(rows, report.cases, strict=True):
        scored = ("left out", None) if case is None else (case.score, case.parsed)
        yield "\t".join([row.case_id, *map(_cell, scored), _cell(row.prediction)])


def _cell(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def comparison(task: Benchmark, rows: Sequence[Joined], limit: int | None = None) -> str:
    """Markdown: the metrics that the protocols disagree on, and the rows whose score changes."""
    reports = [score(task, rows, protocol) for protocol in PROTOCOLS]
    names = dict.fromkeys(name for report in reports for name in report.metrics)
    values = {name: [report.metrics.get(name) for report in reports] for name in names}
    lines = [f"| metric | {' | '.join(PROTOCOLS)} |", "|---" * 3 + "|"]
    for name, pair in values.items():
        if pair[0] != pair[1] or name == task.primary_metric:
            lines.append(f"| {name} | {' | '.join(map(_number, pair))} |")
    changed = [
        (row, *cases)
        for row, *cases in zip(rows, *(report.cases for report in reports), strict=True)
        if cases[0] and cases[1] and cases[0].score != cases[1].score
    ]
    lines += ["", f"{len(changed)} of {len(rows)} rows change their score" + ":" * bool(changed)]
    if changed:
        lines += ["", "| case_id | truth | answer | paper | paper reads | lmms | lmms reads |"]
        lines += ["|---" * 7 + "|", *(_changed_line(task, *entry) for entry in changed[:limit])]
    if limit is not None and len(changed) > limit:
        lines.append(f"\nand {len(changed) - limit} more; --per-case shows all")
    return "\n".join(lines)


def _changed_line(task: Benchmark, row: Joined, *cases: Case) -> str:
    cells = [row.case_id, task.reference(row.doc), row.prediction]
    cells += [cell for case in cases for cell in (case.score, case.parsed)]
    return f"| {' | '.join(_cell(cell).replace('|', chr(92) + '|') for cell in cells)} |"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if abs(value) > 1 else f"{value:.6f}"


def unanswered_notes(task: Benchmark, report: Report, missing: int) -> list[str]:
    """What the official script makes of questions without an answer, where not what is done here.

    They are left out here, so that a part can be scored on purpose.
    """
    said = f"{missing} questions have no answer; the official script"
    if task.unanswered_refused:
        return [f"{said} refuses a file without them"]
    metric = task.unanswered_wrong_in
    if metric not in report.metrics:
        return []
    n = report.metric_n.get(metric, report.n)
    value = report.metrics[metric] * n / (n + missing)
    return [f"{said} counts them as wrong: {metric} would be {value:.1%}"]


def as_json(
    task: Benchmark, rows: Sequence[Joined], report: Report, protocol: str, missing: int = 0
) -> dict[str, Any]:
    """What --json writes; rows that were left out have no entry in per_case."""
    excluded = report.excluded | ({rescore.NO_ANSWER: missing} if missing else {})
    return {
        "task": task.name,
        "protocol": protocol,
        "n": report.n,
        "n_unparsed": report.n_unparsed,
        "metrics": report.metrics,
        "per_case": {
            row.case_id: {"score": case.score, "parsed": case.parsed}
            for row, case in zip(rows, report.cases, strict=True)
            if case is not None
        },
    } | ({"excluded": excluded} if excluded else {})


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write one JSON file. Raises UserError if it cannot be written."""
    try:
        text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
        path.write_text(text, encoding="utf-8", errors="backslashreplace")  # half a surrogate pair
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(main())
