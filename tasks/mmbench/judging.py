"""MMBench with a judge: it names the option that an answer means where the rules find none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from string import ascii_uppercase

from tasks.common import Benchmark, Doc, Report
from tasks.judged import JudgeModel, RefusedItem


def match_options(
    task: Benchmark,
    docs: Sequence[Doc],
    predictions: Sequence[str],
    protocol: str,
    judge: JudgeModel,
    options_of: Callable[[Doc], dict[str, str]],
) -> Report:
    """Rescored with the judge's letter in place of each answer the rules cannot read."""
    report = task.evaluate(docs, predictions, protocol)
    read = list(predictions)
    asked = found = 0
    refusals: list[str] = []
    for row, case in enumerate(report.cases):
        if case is not None and case.parsed is None and predictions[row].strip():
            options = options_of(docs[row])
            prompt = _which_option(docs[row]["question"], options, predictions[row].strip())
            try:
                letter = judge.ask(prompt, max_tokens=8).strip(" .()\n").upper()
            except RefusedItem as error:
                refusals.append(str(error))
                continue
            asked, found = asked + 1, found + (letter in options)
            read[row] = letter if letter in options else predictions[row]
    rescored = task.evaluate(docs, read, protocol)
    note = f"{judge.model} was asked about {asked} answers and named an option for {found}"
    note += f"; it refused {len(refusals)} more ({refusals[0]})" if refusals else ""
    return replace(rescored, notes=[*rescored.notes, note])


def _which_option(question: str, options: dict[str, str], answer: str) -> str:
    listed = "\n".join(f"{letter}. {text}" for letter, text in options.items())
    nothing = next(letter for letter in reversed(ascii_uppercase) if letter not in options)
    return (
        "Somebody answered a multiple-choice question in free text. Which option does the answer "
        f"mean? Reply with its letter alone, or with {nothing} if it means none of them or more "
        f"than one.\n\nQuestion: {question}\n{listed}\n\nAnswer: {answer}\n\nLetter:"
    )
