"""VQAv2 scores against the official evaluation (recorded) and lmms-eval's functions (called)."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor
from lmms_eval.tasks.vqav2 import utils as lmms_vqav2
from lmms_eval.utils import load_yaml_config

from tasks import load, vqa_answers
from vlmamba_core.errors import UserError

RECORDED = json.loads((Path(__file__).parent / "cases" / "vqav2.json").read_text())
CASES = RECORDED["cases"]

task = load("vqav2")


def document(answers: list[str], answer_type: str = "other", question_id: int = 1) -> dict:
    """A row as the hub has it, without the image."""
    records = [
        {"answer": answer, "answer_confidence": "yes", "answer_id": i + 1}
        for i, answer in enumerate(answers)
    ]
    return {
        "question_id": question_id,
        "image_id": question_id // 3,
        "question": "What is it?",
        "question_type": "what is",
        "answer_type": answer_type,
        "multiple_choice_answer": answers[0],
        "answers": records,
    }


def recorded_documents() -> tuple[list[dict], list[str]]:
    docs = [document(c["answers"], c["answer_type"], i) for i, c in enumerate(CASES)]
    return docs, [c["prediction"] for c in CASES]


def lmms_eval_score(doc: dict, prediction: str) -> float:
    # lmms-eval strips an answer before any task sees it, and this function edits the document.
    result = lmms_vqav2.vqav2_process_results_val(copy.deepcopy(doc), [prediction.strip()])
    return result["exact_match"]


def test_paper_scores_are_the_official_ones():
    docs, predictions = recorded_documents()
    report = task.evaluate(docs, predictions, "paper")
    assert len(CASES) >= 100
    assert [case.score for case in report.cases] == pytest.approx(
        [c["score"] for c in CASES], abs=1e-9
    )
    assert report.metrics == pytest.approx(RECORDED["metrics"], abs=1e-9)
    assert set(report.metrics) == set(task.metrics)


def test_submission_is_the_one_llava_writes():
    docs, predictions = recorded_documents()
    expected = [{"question_id": i, "answer": c["submitted"]} for i, c in enumerate(CASES)]
    assert task.submission(docs, predictions) == expected


def test_lmms_scores_are_lmms_evals():
    docs, predictions = recorded_documents()
    expected = [lmms_eval_score(*pair) for pair in zip(docs, predictions, strict=True)]
    report = task.evaluate(docs, predictions, "lmms")
    assert [case.score for case in report.cases] == pytest.approx(expected, abs=1e-9)
    assert report.metrics["accuracy"] == pytest.approx(math.fsum(expected) / len(expected))


def test_protocols_differ_where_all_people_agree():
    doc = document(["2,000"] * 10)
    assert task.score_case(doc, "2,000", "paper").score == 0.0
    assert task.score_case(doc, "2,000", "lmms").score == 1.0


def test_contractions_equal_the_published_table():
    published = EvalAIAnswerProcessor.CONTRACTIONS
    effective = {k: v for k, v in published.items() if k == k.lower() and k != v}
    assert effective == vqa_answers.CONTRACTIONS


@pytest.mark.parametrize("matches", range(11))
def test_soft_accuracy_of_ten(matches):
    references = ["cat"] * matches + ["dog"] * (10 - matches)
    left_out = [
        min(1, sum(r == "cat" for j, r in enumerate(references) if j != i) / 3) for i in range(10)
    ]
    assert vqa_answers.soft_accuracy("cat", references) == pytest.approx(sum(left_out) / 10)


@pytest.mark.parametrize(
    "answers",
    [None, [], 7, "cat", float("nan"), [None] * 10, [{"answer": None}] * 10, [" "] * 10, {"a": 1}],
)
@pytest.mark.parametrize("protocol", ["paper", "lmms"])
def test_missing_truth_is_counted(answers, protocol):
    docs = [document(["cat"] * 10), {**document(["cat"] * 10), "answers": answers}]
    report = task.evaluate(docs, ["cat", "cat"], protocol)
    assert report.excluded == {"no reference answers": 1}
    assert (report.n, report.cases[1], report.metrics["accuracy"]) == (1, None, 1.0)
    assert task.reference(docs[1]) is None
    assert task.score_case(docs[1], "cat", protocol).score is None


def test_every_shape_of_ten_answers_is_read():
    texts = ["cat"] * 9 + ["dog"]
    shapes = [texts, tuple(texts), [{"answer": text} for text in texts], {"answer": texts}]
    docs = [{**document(texts), "answers": shape} for shape in shapes]
    assert task.evaluate(docs, ["cat"] * 4, "paper").metrics["accuracy"] == 1.0


def test_paper_needs_ten_answers():
    report = task.evaluate([document(["cat"] * 3)], ["cat"], "paper")
    assert (report.excluded, report.metrics) == ({"not 10 reference answers": 1}, {})


def test_missing_column_is_named():
    with pytest.raises(UserError, match="vqav2: row 1 has no column 'answers'"):
        task.evaluate([{"question": "?"}], ["cat"], "paper")


def test_empty_answers_are_counted_unparsed():
    report = task.evaluate([document(["cat"] * 10)] * 3, ["", " the\n", "cat"], "paper")
    assert report.n_unparsed == 2


def test_prompt_and_limits():
    doc = document(["cat"] * 10)
    prompt = "What is it?\nAnswer the question using a single word or phrase."
    yaml = load_yaml_config(str(Path(lmms_vqav2.__file__).with_name("vqav2_val.yaml")))
    theirs = lmms_vqav2.vqav2_doc_to_text(doc, yaml["lmms_eval_specific_kwargs"]["default"])
    assert task.prompt(doc, "paper") == task.prompt(doc, "lmms") == prompt == theirs
    assert task.max_new_tokens("lmms") == yaml["generation_kwargs"]["max_new_tokens"]


texts = st.text(max_size=30) | st.lists(
    st.sampled_from(["a", "the", "2", "0", ",", ".", " ", "'s", "-", "/", "\n", "dont", "ten"])
).map("".join)


@settings(max_examples=300, deadline=None)
@given(prediction=texts, answers=st.lists(texts, min_size=10, max_size=10))
def test_any_text_scores_as_in_lmms_eval(prediction, answers):
    doc = document(["cat", *answers[:8], prediction])
    case = task.score_case(doc, prediction, "lmms")
    assert case.score == pytest.approx(lmms_eval_score(doc, prediction), abs=1e-9)
    assert 0.0 <= task.score_case(doc, prediction, "paper").score <= 1.0
