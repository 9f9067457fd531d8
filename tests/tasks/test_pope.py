"""POPE against LLaVA's own evaluation (stored cases) and lmms-eval's own functions (called)."""

import pytest
from lmms_eval.tasks.pope import utils as official_lmms

from tasks.pope import scorer, task
from vlmamba_core.errors import UserError

LMMS_METRICS = {
    "accuracy": official_lmms.pope_aggregate_accuracy,
    "precision": official_lmms.pope_aggregate_precision,
    "recall": official_lmms.pope_aggregate_recall,
    "f1": official_lmms.pope_aggregate_f1_score,
    "yes_ratio": official_lmms.pope_aggregate_yes_ratio,
}


def row(answer="yes", category="random", question="Is there a dog in the image?"):
    return {"question": question, "answer": answer, "category": category}


def test_paper_equals_the_official_script(official_cases):
    official_cases("pope").check(task)


def test_lmms_equals_lmms_eval(official_cases):
    docs, answers = official_cases("pope").docs, official_cases("pope").predictions
    report = task.evaluate(docs, answers, "lmms")
    results = [
        official_lmms.pope_process_results(doc, [text])["pope_accuracy"]
        for doc, text in zip(docs, answers, strict=True)
    ]
    assert [case.score for case in report.cases] == [result["score"] for result in results]
    for name, aggregate in LMMS_METRICS.items():
        assert report.metrics[name] == pytest.approx(aggregate(results), abs=1e-9), name
        for category in ("random", "popular", "adversarial"):
            part = [r for r, doc in zip(results, docs, strict=True) if doc["category"] == category]
            assert report.metrics[f"{category}/{name}"] == pytest.approx(aggregate(part), abs=1e-9)


def test_prompt_equals_lmms_eval(lmms_kwargs):
    doc = row(question=" Is there a dog in the image? ")
    expected = official_lmms.pope_doc_to_text(doc, lmms_kwargs("pope"))
    assert task.prompt(doc, "lmms") == task.prompt(doc, "paper") == expected


@pytest.mark.parametrize(
    ("answer", "paper", "lmms"),
    [
        ("No.", "no", None),
        ("yes, there is", "yes", None),
        ("", "yes", None),
        ("NO", "yes", "no"),
        ("There isn't.", "yes", None),
        ("I do not see one", "no", None),
        ("Yes. No dog.", "yes", None),
        ("no\n", "yes", "no"),
    ],
)
def test_readings(answer, paper, lmms):
    assert scorer.read_paper(answer) == paper
    assert scorer.read_lmms(answer) == lmms


def test_absent_categories_are_named_and_not_scored():
    report = task.evaluate([row(), row("no")], ["Yes", "No"], "paper")
    assert report.metrics["f1"] == report.metrics["random/f1"] == 1
    assert not any(key.startswith("popular/") for key in report.metrics)
    assert report.notes == ["categories absent from the answered rows: popular, adversarial"]


def test_headline_is_the_mean_over_categories_under_paper_and_pooled_under_lmms():
    docs = [row(), row(), row("no", "popular"), row("yes", "popular")]
    answers = ["Yes", "Yes", "Yes", "No"]
    paper = task.evaluate(docs, answers, "paper").metrics
    lmms = task.evaluate(docs, answers, "lmms").metrics
    assert paper["f1"] == 0.5
    assert lmms["f1"] == pytest.approx(2 / 3)


def test_rows_without_truth_are_left_out_and_counted():
    report = task.evaluate([row(), row(None), row("maybe")], ["Yes"] * 3, "paper")
    assert report.n == 1
    assert report.excluded == {"no reference: answer is neither yes nor no": 2}
    assert report.cases[1:] == [None, None]


def test_a_missing_column_is_named():
    with pytest.raises(UserError, match="no column 'category'"):
        task.evaluate([{"question": "q", "answer": "yes"}], ["Yes"], "paper")
