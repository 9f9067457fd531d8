"""easy-VQA: the public package's questions, scored by GQA's scripts and lmms-eval's metric."""

from __future__ import annotations

import json
from pathlib import Path

import easy_vqa
import pytest
from lmms_eval.api.metrics import exact_match_hf_evaluate, mean

from tasks import load

RECORDED = json.loads((Path(__file__).parent / "cases" / "easy_vqa.json").read_text())
CASES = RECORDED["cases"]

task = load("easy_vqa")


def document(answer: str | None, image_id: int = 0) -> dict:
    return {"question": "what color is it?", "answer": answer, "image_id": image_id}


def recorded_documents() -> tuple[list[dict], list[str]]:
    docs = [document(c["answer"], i // 2) for i, c in enumerate(CASES)]
    return docs, [c["prediction"] for c in CASES]


def lmms_eval_score(answer: str, prediction: str) -> float:
    result = exact_match_hf_evaluate(
        predictions=[prediction.strip()],
        references=[answer],
        ignore_case=True,
        ignore_punctuation=True,
    )
    return float(result["exact_match"])


def test_paper_scores_are_those_of_gqas_scripts():
    docs, predictions = recorded_documents()
    report = task.evaluate(docs, predictions, "paper")
    assert len(CASES) >= 100
    assert [case.score for case in report.cases] == [c["score"] for c in CASES]
    assert report.metrics == pytest.approx(RECORDED["metrics"], abs=1e-9)


def test_lmms_scores_are_those_of_lmms_evals_metric():
    docs, predictions = recorded_documents()
    expected = [lmms_eval_score(c["answer"], c["prediction"]) for c in CASES]
    report = task.evaluate(docs, predictions, "lmms")
    assert [case.score for case in report.cases] == expected
    assert report.metrics["accuracy"] == pytest.approx(mean(expected), abs=1e-9)


def test_the_whole_public_test_split():
    questions, answers, image_ids = easy_vqa.get_test_questions()
    docs = [
        {"question": q, "answer": a, "image_id": i}
        for q, a, i in zip(questions, answers, image_ids, strict=True)
    ]
    right = task.evaluate(docs, [f"{answer.capitalize()}." for answer in answers], "paper")
    assert (right.n, right.metrics) == (9673, {"accuracy": 1.0})
    always_yes = task.evaluate(docs, ["yes"] * len(docs), "paper")
    assert always_yes.metrics["accuracy"] == answers.count("yes") / len(answers)
    assert len({task.cluster(doc) for doc in docs}) == 1000


@pytest.mark.parametrize("answer", [None, float("nan"), ""])
@pytest.mark.parametrize("protocol", ["paper", "lmms"])
def test_missing_truth_is_counted(answer, protocol):
    report = task.evaluate([document("red"), document(answer)], ["red", ""], protocol)
    assert report.excluded == {"no reference answer": 1}
    assert (report.n, report.metrics["accuracy"]) == (1, 1.0)
