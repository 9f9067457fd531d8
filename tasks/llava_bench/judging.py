"""How LLaVA-Bench's judge model is asked to rate two answers, and how its reply is read.

What the judge is told of each category is a part of the benchmark. It is read from the installed
lmms-eval, not copied; LLaVA's own `llava/eval/table/rule.json` is the same file.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from tasks.common import Benchmark, Case, Doc, PerProtocol, Report
from tasks.judged import JudgeModel, RefusedItem
from vlmamba_core.errors import UserError

SYSTEM = PerProtocol(
    paper="You are a helpful and precise assistant for checking the quality of the answer.", lmms=""
)
TEMPERATURE = PerProtocol(paper=0.2, lmms=0.0)
MAX_TOKENS = 1024
UNRATED = (-1.0, -1.0)  # what both scripts put into their means for a reply without ratings
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
REFUSALS_TO_GIVE_UP = 10  # answers; a server that takes none of so many takes none at all


@lru_cache
def rules() -> dict[str, dict[str, str]]:
    """Category -> "role" and "prompt". Raises UserError when lmms-eval does not hold them."""
    spec = find_spec("lmms_eval")
    for folder in list(spec.submodule_search_locations or ()) if spec else []:
        path = Path(folder) / "tasks" / "llava-in-the-wild" / "rule.json"
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
    raise UserError(
        "llava_bench: the judge's rules come with lmms-eval: pip install lmms-eval==0.7.3"
    )


def request(doc: Doc, reference: str, answer: str) -> str:
    """What the judge is asked about one answer. Raises UserError for an unknown category."""
    category = f"llava_bench_{doc['category']}"
    if category not in rules():
        known = [name.removeprefix("llava_bench_") for name in rules() if "llava_bench_" in name]
        raise UserError(
            f"llava_bench: category {doc['category']!r} of question {doc['question_id']} is none "
            f"of {', '.join(known)}"
        )
    role, prompt = rules()[category]["role"], rules()[category]["prompt"]
    caption = doc.get("caption") or ""
    context = caption if isinstance(caption, str) else "\n".join(map(str, caption))
    parts = [f"[Context]\n{context}", f"[Question]\n{doc['question']}"]
    for number, text in enumerate((reference, answer), 1):
        parts += [f"[{role} {number}]\n{text}", f"[End of {role} {number}]"]
    return "\n\n".join([*parts, f"[System]\n{prompt}"]) + "\n\n"


def read_paper(reply: str) -> tuple[float, float] | None:
    """The two numbers that the first line is, parted by one space or comma; None if it is not."""
    words = reply.split("\n")[0].replace(",", " ").split(" ")
    try:
        first, second = map(float, words)
    except ValueError:
        return None
    return (first, second) if math.isfinite(first) and math.isfinite(second) else None


def read_lmms(reply: str) -> tuple[float, float] | None:
    """The first two numbers in the first line; None if there are fewer."""
    found = NUMBER.findall(reply.strip().split("\n")[0])[:2]
    return (float(found[0]), float(found[1])) if len(found) == 2 else None


READ: PerProtocol[Callable[[str], tuple[float, float] | None]] = PerProtocol(read_paper, read_lmms)


def review_answers(
    task: Benchmark,
    docs: Sequence[Doc],
    predictions: Sequence[str],
    protocol: str,
    judge: JudgeModel,
) -> Report:
    """Ratings for every answer whose reference is known.

    An answer that the judge's server refuses has none; raises UserError if it refuses all.
    """
    report = task.evaluate(docs, predictions, protocol)
    refusals: list[str] = []
    cases: list[Case | None] = []
    for doc, prediction in zip(docs, predictions, strict=True):
        case, reference = None, task.reference(doc)
        if reference is not None:
            try:
                question = request(doc, reference, prediction.strip())
                case = _reviewed(question, prediction, protocol, judge)
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
    left_out = {
        "no reference answer": len(docs) - len(kept) - len(refusals),
        "not rated: the judge refused": len(refusals),
    }
    return replace(
        report,
        metrics=task.aggregate([d for d, _ in kept], [c for _, c in kept], protocol),
        cases=cases,
        n=len(kept),
        n_unparsed=sum(case.parsed is None for _, case in kept),
        excluded={reason: count for reason, count in left_out.items() if count},
        notes=_notes(judge.model, [case for _, case in kept], refusals),
    )


def _reviewed(prompt: str, prediction: str, protocol: str, judge: JudgeModel) -> Case:
    reply = judge.ask(
        prompt,
        temperature=TEMPERATURE.under(protocol),
        max_tokens=MAX_TOKENS,
        system=SYSTEM.under(protocol),
    )
    ratings = READ.under(protocol)(reply)
    score = min(max(ratings[1] / 10, 0.0), 1.0) if ratings else 0.0
    detail = {"reply": reply, "ratings": list(ratings or UNRATED), "rated": ratings is not None}
    return Case(score, prediction.strip() or None, detail)


def _notes(model: str, cases: Sequence[Case], refusals: Sequence[str]) -> list[str]:
    unrated = sum(not case.detail["rated"] for case in cases)
    notes = [f"rated by {model}"]
    if unrated:
        notes.append(f"{unrated} replies hold no two ratings and count as -1 and -1, as published")
    if refusals:
        notes.append(f"the judge refused {len(refusals)} answers ({refusals[0]})")
    return notes
