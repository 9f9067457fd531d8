"""LLaVA-Bench: prompts, judge requests, ratings and ratios against lmms-eval's functions."""

from __future__ import annotations

import random

import pytest

from tasks import load
from tasks.common import Case
from tasks.judged import RefusedItem
from tasks.llava_bench import judging
from vlmamba_core.errors import UserError

task = load("llava_bench")
DOC = {"question_id": 0, "question": "What is it?", "category": "conv", "caption": "A red bus."}
DOC |= {"gpt_answer": "It is a bus.", "image_id": "001.jpg"}


class Scripted:
    """A judge that replies what it is given, in turn."""

    url, model = "http://judge", "scripted"

    def __init__(self, *replies: str) -> None:
        self.replies, self.asked = list(replies), []

    def ask(self, prompt, **options) -> str:
        self.asked.append((prompt, options))
        reply = self.replies[len(self.asked) - 1]
        if reply == "refuse":
            raise RefusedItem("HTTP 400")
        return reply


def rated(docs, replies, protocol="paper"):
    judge = Scripted(*replies)
    return task.evaluate_judged(docs, ["a bus"] * len(docs), protocol, judge), judge


def official(monkeypatch):
    import importlib

    return importlib.import_module("lmms_eval.tasks.llava-in-the-wild.utils")


@pytest.mark.parametrize("category", ["conv", "detail", "complex"])
@pytest.mark.parametrize("caption", ["A red bus.", ["One.", "Two."]])
def test_judge_requests_are_lmms_evals(category, caption, monkeypatch):
    module = official(monkeypatch)
    doc, asked = DOC | {"category": category, "caption": caption}, []

    def pipeline(question, prediction, ground_truth, content):
        asked.append(content)
        return module._parse_comparative_scores("8 5")

    monkeypatch.setattr(module, "_get_pipeline", lambda: pipeline)
    found = module.llava_process_results(doc, ["a bus"])
    report, judge = rated([doc], ["8 5"], "lmms")
    assert [judge.asked[0][0]] == asked
    assert judge.asked[0][1] == {"temperature": 0.0, "max_tokens": 1024, "system": ""}
    assert report.cases[0].detail["ratings"] == found["gpt_eval_llava_all"]["scores"]
    assert task.prompt(doc, "lmms") == module.llava_doc_to_text(doc, {"pre_prompt": ""})


def test_the_paper_asks_as_llavas_script_does():
    _, judge = rated([DOC], ["8 5"])
    prompt, options = judge.asked[0]
    assert prompt.startswith("[Context]\nA red bus.\n\n[Question]\nWhat is it?\n\n[Assistant 1]\n")
    assert (
        "\n\n[End of Assistant 1]\n\n[Assistant 2]\na bus\n\n[End of Assistant 2]\n\n[Sys" in prompt
    )
    assert options["temperature"] == 0.2
    assert options["system"].startswith("You are a helpful and precise assistant")


REPLIES = ["8 5", "8, 5", "8,5", "8.5 9", "8 5\nBecause 3", "8", "", "eight five", "8  5", " 8 5"]
REPLIES += [
    "8 5 ",
    "Assistant 1: 8, Assistant 2: 5",
    "8/10 5/10",
    "10 10.0",
    "-1 5",
    "8;5",
    "\n8 5",
]


def parse_score(review):
    """What parse_score of llava/eval/eval_gpt_review_bench.py (c121f04) gave on these replies."""
    return {
        "8 5": (8, 5),
        "8,5": (8, 5),
        "8.5 9": (8.5, 9),
        "8 5\nBecause 3": (8, 5),
        "10 10.0": (10, 10),
        "-1 5": (-1, 5),
    }.get(review)


@pytest.mark.parametrize("reply", REPLIES)
def test_ratings(reply, monkeypatch):
    assert judging.read_paper(reply) == parse_score(reply)
    found = official(monkeypatch)._parse_comparative_scores(reply).metadata["scores"]
    assert (judging.read_lmms(reply) or (-1, -1)) == tuple(found)


def test_ratios_are_lmms_evals(monkeypatch):
    module, rng = official(monkeypatch), random.Random(0)
    docs = [DOC | {"category": rng.choice(["conv", "detail", "complex"])} for _ in range(60)]
    pairs = [[float(rng.randint(5, 10)), float(rng.randint(1, 10))] for _ in docs]
    cases = [Case(0.5, "x", {"ratings": pair}) for pair in pairs]
    metrics = task.aggregate(docs, cases, "lmms")
    for category in ("all", "conv", "detail", "complex"):
        own = [p for p, d in zip(pairs, docs, strict=True) if category in ("all", d["category"])]
        expected = module.llava_aggregation([{"scores": pair} for pair in own], category)
        name = "score" if category == "all" else f"{category}/score"
        assert round(100 * metrics[name], 1) == pytest.approx(expected, abs=0.1001)  # rounded twice


@pytest.mark.parametrize("reply", ["nan 5", "5 nan", "inf 5", "1e999 5"])
def test_a_rating_that_is_no_finite_number_is_none(reply):
    """LLaVA's script keeps it, and its means of all answers are then nan."""
    for protocol in ("paper", "lmms"):
        report, _ = rated([DOC, DOC], ["8 4", reply], protocol)
        assert report.metrics["score"] == report.metrics["score"]
    report, _ = rated([DOC, DOC], ["8 4", reply])
    assert report.metrics["score"] == (4 - 1) / (8 - 1)
    assert "1 replies hold no two ratings" in report.notes[1]


def test_a_reply_without_ratings_counts_as_published_and_is_told():
    report, _ = rated([DOC, DOC], ["8 4", "I cannot"])
    assert report.metrics["score"] == (4 - 1) / (8 - 1)
    assert "1 replies hold no two ratings" in report.notes[1]
    assert [case.score for case in report.cases] == [0.4, 0.0]


def test_refusals_and_missing_references_are_counted():
    report, _ = rated([DOC, DOC, DOC | {"gpt_answer": None}], ["8 4", "refuse"])
    assert report.metrics["score"] == 0.5
    assert report.excluded == {"no reference answer": 1, "not rated: the judge refused": 1}
    with pytest.raises(UserError, match="refused every answer"):
        rated([DOC], ["refuse"])


def test_without_a_judge_there_is_no_score():
    report = task.evaluate([DOC], ["a bus"], "paper")
    assert report.metrics == {}
    assert report.notes == ["answers are not rated: LLaVA-Bench needs a judge model (--judge URL)"]


def test_an_unknown_category_is_named():
    with pytest.raises(UserError, match="category 'x' of question 0 is none of conv, detail, comp"):
        rated([DOC | {"category": "x"}], ["8 4"])
