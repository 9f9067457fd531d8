"""How MM-Vet's judge model is asked for a grade, and how its reply is read.

The rubric, with its seven worked examples, is a part of the benchmark. It is read from the
installed lmms-eval, not copied; the official evaluator's differs from that one by a header line.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from tasks.common import Benchmark, Case, Doc, Report
from tasks.judged import JudgeModel, RefusedItem
from vlmamba_core.errors import UserError

LMMS_HEADER, OFFICIAL_HEADER = "\ngpt_query_prompt |", "\n\nQuestion |"

Prompt = Callable[[Doc, str, str], str]  # document, answer, protocol -> what the judge is asked
# Temperature of each attempt to get a readable grade; after the last one the grade is 0.
TEMPERATURES = {"paper": (0.0, 0.0, 0.5, 1.0, 1.5), "lmms": (0.0, 0.5, 1.0, 1.5)}
MAX_TOKENS = {"paper": 3, "lmms": 128}
REFUSALS_TO_GIVE_UP = 10  # answers; a server that takes none of so many takes none at all
REMINDER = {"paper": "\nPredict the correctness of the answer (digit): ", "lmms": ""}


@lru_cache
def rubric(protocol: str) -> str:
    """The text before the row to grade. Raises UserError when lmms-eval does not hold it."""
    text = _lmms_eval_rubric()
    return text.replace(LMMS_HEADER, OFFICIAL_HEADER, 1) if protocol == "paper" else text


def _lmms_eval_rubric() -> str:
    # Parsed, not imported: importing that module demands an API key.
    spec = find_spec("lmms_eval")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for path in (Path(folder) / "tasks/mmvet/utils.py" for folder in folders):
        if path.is_file():
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MM_VET_PROMPT":
                    return ast.literal_eval(node.value)
    raise UserError("mmvet: the judge's rubric comes with lmms-eval: pip install lmms-eval==0.7.3")


def read_grade(reply: str, protocol: str) -> float | None:
    """The number in 0..1 that a reply starts with; None if there is none.

    A space before it hides it from the official evaluator, which then asks again; lmms-eval has
    stripped the reply.
    """
    text = reply if protocol == "paper" else reply.strip()
    try:
        grade = float(text.split(" ")[0])
    except ValueError:
        return None
    return grade if 0.0 <= grade <= 1.0 else None


def grade_answers(
    task: Benchmark,
    docs: Sequence[Doc],
    predictions: Sequence[str],
    protocol: str,
    judge: JudgeModel,
    prompt: Prompt,
) -> Report:
    """A grade in 0..1 for every answer whose reference is known; `prompt` asks for one.

    An answer that the judge's server refuses has no grade; raises UserError if it refuses all.
    """
    report = task.evaluate(docs, predictions, protocol)
    refusals: list[str] = []
    cases: list[Case | None] = []
    for doc, prediction in zip(docs, predictions, strict=True):
        case = None
        if task.reference(doc) is not None:
            try:
                question = prompt(doc, prediction.strip(), protocol)
                case = _graded(question, prediction, protocol, judge)
            except RefusedItem as error:
                refusals.append(str(error))
        cases.append(case)
        if len(refusals) == REFUSALS_TO_GIVE_UP and not any(cases):
            break
    if refusals and not any(cases):
        raise UserError(
            f"the judge at {judge.url} refused every answer ({len(refusals)}): {refusals[0]}"
        )
    kept = [(doc, case) for doc, case in zip(docs, cases, strict=True) if case is not None]
    return replace(
        report,
        metrics=task.aggregate([d for d, _ in kept], [c for _, c in kept], protocol),
        cases=cases,
        n=len(kept),
        n_unparsed=sum(case.parsed is None for _, case in kept),
        excluded=_left_out(len(docs) - len(kept) - len(refusals), len(refusals)),
        notes=_notes(judge.model, [case for _, case in kept], refusals),
    )


def _left_out(without_reference: int, refused: int) -> dict[str, int]:
    counts = {
        "no reference answer": without_reference,
        "not graded: the judge refused": refused,
    }
    return {reason: count for reason, count in counts.items() if count}


def _notes(model: str, cases: Sequence[Case], refusals: Sequence[str]) -> list[str]:
    without_grade = sum(case.detail["grade"] is None for case in cases)
    notes = [f"graded by {model}"]
    if without_grade:
        notes.append(f"{without_grade} answers got no readable grade and count as 0")
    if refusals:
        notes.append(f"the judge refused {len(refusals)} answers ({refusals[0]})")
    return notes


def _graded(prompt: str, prediction: str, protocol: str, judge: JudgeModel) -> Case:
    reply, grade = "", None
    for attempt, temperature in enumerate(TEMPERATURES[protocol]):
        reminder = REMINDER[protocol] if attempt else ""
        tokens = MAX_TOKENS[protocol]
        reply = judge.ask(prompt + reminder, temperature=temperature, max_tokens=tokens)
        grade = read_grade(reply, protocol)
        if grade is not None:
            break
    return Case(grade or 0.0, prediction.strip() or None, {"reply": reply, "grade": grade})
