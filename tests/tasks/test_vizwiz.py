"""VizWiz against its own evaluation of what LLaVA submits (recorded), and lmms-eval (called)."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from lmms_eval.tasks.vizwiz_vqa import utils as lmms_vizwiz

from tasks import load
from tasks.vizwiz import published

RECORDED = json.loads((Path(__file__).parent / "cases" / "vizwiz.json").read_text())
CASES = RECORDED["cases"]

task = load("vizwiz")


def document(answers: list[str] | None, number: int = 0, category: str = "other") -> dict:
    """A row as the hub has it, without the image."""
    name = f"VizWiz_val_{number:08d}"
    question = {"question": "What is THIS? Thank you."}
    return question | {"question_id": name, "answers": answers, "category": category}


def recorded() -> tuple[list[dict], list[str]]:
    docs = [document(c["answers"], i, c["category"]) for i, c in enumerate(CASES)]
    return docs, [c["prediction"] for c in CASES]


def test_paper_scores_are_the_official_ones():
    docs, predictions = recorded()
    report = task.evaluate(docs, predictions, "paper")
    assert len(CASES) >= 100
    found = [case.score for case in report.cases]
    assert found == pytest.approx([c["score"] for c in CASES], abs=1e-9)
    assert report.metrics == pytest.approx(RECORDED["metrics"], abs=1e-9)


def test_lmms_scores_are_lmms_evals():
    docs, predictions = recorded()
    expected = [
        lmms_vizwiz.vizwiz_vqa_process_results(copy.deepcopy(doc), [text])["exact_match"]
        for doc, text in zip(docs, predictions, strict=True)
    ]
    report = task.evaluate(docs, predictions, "lmms")
    assert [case.score for case in report.cases] == pytest.approx(expected, abs=1e-9)
    assert report.metrics["accuracy"] == pytest.approx(sum(expected) / len(expected))


def test_prompts(lmms_kwargs):
    doc = document(["x"] * 10)
    kwargs = lmms_kwargs("vizwiz_vqa", "_default_template_vqa_yaml")
    assert task.prompt(doc, "lmms") == lmms_vizwiz.vizwiz_vqa_doc_to_text(doc, kwargs)
    assert task.prompt(doc, "paper") == (
        "What is THIS? Thank you.\nWhen the provided information is insufficient, respond with "
        "'Unanswerable'.\nAnswer the question using a single word or phrase."
    )


def test_submission_is_llavas_and_lmms_evals():
    docs, predictions = recorded()
    sent = task.submission(docs, predictions)
    assert [row["answer"] for row in sent] == [c["submitted"] for c in CASES]
    lmms = lmms_vizwiz.vizwiz_vqa_process_results(document(None, 7), ["The Cat."])["submission"]
    assert task.submission([document(None, 7)], ["The Cat."]) == [lmms]
    assert lmms["image"] == "VizWiz_val_00000007.jpg"
    named = document(None) | {"question_id": "VizWiz_test_00000001.jpg"}
    assert task.submission([named], ["x"])[0]["image"] == "VizWiz_test_00000001.jpg"


def test_hidden_answers_are_left_out_and_counted():
    docs = [document(["cat"] * 10), document(None, 1), document([], 2), document(["cat"] * 9, 3)]
    report = task.evaluate(docs, ["cat"] * 4, "paper")
    assert report.metrics == {"accuracy": 1.0, "other/accuracy": 1.0}
    assert report.excluded == {"no reference answers": 2, "not 10 reference answers": 1}


def test_another_data_sets_val_json_is_not_taken(tmp_path):
    (tmp_path / "val.json").write_text(json.dumps([{"image": "a.jpg", "question": "x"}]))
    assert published.layout.find(tmp_path, "val") == []
    row = {"image": "VizWiz_val_00000000.jpg", "question": "x", "answer_type": "other"}
    row |= {"answers": [{"answer": "dog", "answer_confidence": "yes"}] * 10, "answerable": 1}
    own = tmp_path / "Annotations" / "val.json"
    own.parent.mkdir()
    own.write_text(json.dumps([row]))
    assert published.layout.find(tmp_path, "validation") == [own]
    (read,) = published.layout.read([own], "val")
    assert (read["question_id"], read["answers"]) == ("VizWiz_val_00000000", ["dog"] * 10)
    assert read["category"] == "other"
