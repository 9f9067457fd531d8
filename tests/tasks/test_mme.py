"""MME against the official calculation.py (stored cases) and lmms-eval's functions (called)."""

import math

import pytest
from lmms_eval.tasks.mme import utils as official_lmms

import tasks.mme as mme
from tasks.mme import scorer, task


def pair(image="existence/1.jpg", category="existence"):
    question = "Is there a dog in this image? Please answer yes or no."
    doc = {"question_id": image, "question": question, "category": category}
    return [doc | {"answer": "Yes"}, doc | {"answer": "No"}]


def test_paper_equals_the_official_script(official_cases):
    official_cases("mme").check(task)


def test_lmms_equals_lmms_eval(official_cases):
    docs, answers = official_cases("mme").docs, official_cases("mme").predictions
    report = task.evaluate(docs, answers, "lmms")
    results = [
        official_lmms.mme_process_results(doc, [text])
        for doc, text in zip(docs, answers, strict=True)
    ]
    scores = [next(iter(result.values())) for result in results]
    assert [case.score for case in report.cases] == [score["score"] for score in scores]
    for total in ("perception", "cognition"):
        part = [r[f"mme_{total}_score"] for r in results if f"mme_{total}_score" in r]
        expected = official_lmms.mme_aggregate_results(part)
        assert report.metrics[total] == pytest.approx(expected, abs=1e-9)
    for category in {doc["category"] for doc in docs}:
        expected = official_lmms.mme_aggregate_results(
            [score for score in scores if score["category"] == category]
        )
        assert report.metrics[f"{category}/score"] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    "question",
    ["Is it a dog? Please answer yes or no.", "Is it a dog?  Please answer yes or no.", "A dog? "],
)
def test_lmms_prompt_equals_lmms_eval(question, lmms_kwargs):
    doc = pair()[0] | {"question": question}
    assert task.prompt(doc, "lmms") == official_lmms.mme_doc_to_text(doc, lmms_kwargs("mme"))


def test_paper_prompt_has_no_space_before_the_instruction():
    doc = pair()[0] | {"question": "Is it a dog?  Please answer yes or no."}
    prompt = "Is it a dog?\nAnswer the question using a single word or phrase."
    assert task.prompt(doc, "paper") == prompt


@pytest.mark.parametrize(
    ("answer", "paper", "lmms"),
    [
        ("Yes.", "yes", "yes"),
        ("No, there is not", "no", "no"),
        ("y", None, "yes"),
        ("n.", None, "no"),
        ("    no", None, "no"),
        ("y.e.s", None, "yes"),
        ("not sure", "no", "no"),
        ("Church", None, None),
        ("", None, None),
    ],
)
def test_readings(answer, paper, lmms):
    assert scorer.read_paper(answer) == paper
    assert scorer.read_lmms(answer) == lmms


def test_scores_of_one_subtask():
    docs = pair("existence/1.jpg") + pair("existence/2.jpg")
    metrics = task.evaluate(docs, ["Yes", "No", "Yes", "Yes"], "paper").metrics
    assert metrics["existence/acc"] == 0.75
    assert metrics["existence/acc_plus"] == 0.5
    assert metrics["existence/score"] == metrics["perception"] == 125


def test_absent_subtasks_are_named_and_a_total_without_any_is_left_out():
    report = task.evaluate(pair(), ["Yes", "No"], "paper")
    assert report.metrics["perception"] == 200
    assert "cognition" not in report.metrics
    assert report.notes[0].startswith("perception is the total of 1 of 10 subtasks; absent")
    assert math.isnan(mme.paper_cognition([{"doc": pair()[0], "prediction": "Yes"}] * 2))


def test_half_a_pair_is_left_out_and_counted():
    docs = [*pair("existence/1.jpg"), pair("existence/2.jpg")[0]]
    report = task.evaluate(docs, ["Yes", "No", "No"], "paper")
    assert report.n == 2
    assert report.metrics["existence/acc"] == 1
    assert report.excluded == {"image has 1 scorable question(s), MME needs 2": 1}


def test_a_missing_truth_takes_its_pair_along():
    docs = pair()
    docs[1]["answer"] = None
    assert sum(task.evaluate(docs, ["Yes", "No"], "paper").excluded.values()) == 2


def test_an_image_drawn_twice_counts_twice():
    docs = pair("existence/1.jpg") * 2 + pair("existence/2.jpg")
    cases = [task.score_case(doc, "Yes", "paper") for doc in docs]
    cases[:4] = [task.score_case(doc, doc["answer"], "paper") for doc in docs[:4]]
    metrics = task.aggregate(docs, cases, "paper")
    assert metrics["existence/acc_plus"] == pytest.approx(2 / 3)
