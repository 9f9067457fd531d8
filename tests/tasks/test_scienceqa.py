"""ScienceQA against LLaVA's own evaluation (stored cases) and lmms-eval's functions (called)."""

import math
from statistics import fmean

import pytest
from lmms_eval.tasks.scienceqa import utils as official_lmms

from tasks.common import OPTION_LETTER
from tasks.scienceqa import lmms_accuracy_all, lmms_process_results, scorer, task


def row(**changes):
    doc = {"question": "Is it?", "choices": ["no", "yes"], "answer": 1, "hint": "", "image": "x"}
    return doc | changes


def test_paper_equals_the_official_script(official_cases):
    official_cases("scienceqa").check(task)


def test_lmms_equals_lmms_eval(official_cases):
    docs, answers = official_cases("scienceqa").docs, official_cases("scienceqa").predictions
    report = task.evaluate(docs, answers, "lmms")
    expected = [
        official_lmms.sqa_process_results(doc, [text])["exact_match"]
        for doc, text in zip(docs, answers, strict=True)
    ]
    images = [score for score, doc in zip(expected, docs, strict=True) if doc["has_image"]]
    assert [case.score for case in report.cases] == expected
    assert report.metrics["accuracy_all"] == pytest.approx(fmean(expected), abs=1e-9)
    assert report.metrics["accuracy"] == pytest.approx(fmean(images), abs=1e-9)


@pytest.mark.parametrize("hint", ["", "A food web.", " Two\nlines. "])
@pytest.mark.parametrize("choices", [["no", "yes"], ["a", "b", "c", "d", "e "]])
def test_lmms_prompt_equals_lmms_eval(hint, choices, lmms_kwargs):
    doc = row(hint=hint, choices=choices)
    expected = official_lmms.sqa_doc_to_text(doc, lmms_kwargs("scienceqa"))
    assert task.prompt(doc, "lmms") == expected


def test_paper_prompt():
    doc = row(hint="A food web.")
    assert task.prompt(doc, "paper") == (
        f"Context: A food web.\nIs it?\nA. no\nB. yes\n{OPTION_LETTER}"
    )
    assert task.prompt(row(), "paper") == f"Is it?\nA. no\nB. yes\n{OPTION_LETTER}"


@pytest.mark.parametrize(
    ("answer", "paper", "lmms"),
    [
        ("B", "B", "B"),
        ("b", None, "B"),
        ("B.", None, "B"),
        ("B. yes", "B", "B"),
        ("B\n", None, "B"),
        ("(B)", None, None),
        ("The answer is B.", "B", None),
        ("The answer is B", None, None),
        ("The answer is A. The answer is B.", None, None),
        ("yes", None, None),
        ("", None, None),
    ],
)
def test_readings(answer, paper, lmms):
    assert scorer.read_paper(answer) == paper
    assert scorer.read_lmms(answer) == lmms


def test_image_subset_is_told_by_the_image_column_and_survives_without_it():
    docs = [row(), row(image=None), row()]
    answers = ["B", "A", "A"]
    metrics = {"accuracy": 0.5, "accuracy_all": pytest.approx(1 / 3)}
    assert task.evaluate(docs, answers, "paper").metrics == metrics
    stored = [task.without_image(doc) for doc in docs]
    assert all("image" not in doc for doc in stored)
    assert task.evaluate(stored, answers, "paper").metrics == metrics
    items = [
        lmms_process_results(doc, [answer])["accuracy_all"]
        for doc, answer in zip(docs, answers, strict=True)
    ]
    assert lmms_accuracy_all(items) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("doc", "told"),
    [
        ({"image": {"bytes": b"x", "path": None}}, True),
        ({"image": "1/image.png"}, True),
        ({"image": None}, False),
        ({"image": ""}, False),
        ({"image": math.nan}, False),
        ({"has_image": True}, True),
        ({"has_image": 0}, False),
        ({"has_image": "True"}, True),
        ({"has_image": "False"}, False),
        ({"has_image": "0"}, False),
        ({"has_image": "", "image": None}, False),
        ({"has_image": None, "image": "x"}, True),
        ({"has_image": True, "image": None}, True),
        ({"has_image": None}, None),
        ({}, None),
    ],
)
def test_what_tells_that_a_question_has_an_image(doc, told):
    assert task.has_image(doc) is told
    assert task.has_image(task.without_image(doc)) is told


def test_rows_that_do_not_tell_give_no_image_subset_and_say_so():
    untold = row()
    del untold["image"]
    report = task.evaluate([untold, row()], ["B", "A"], "paper")
    assert report.metrics == {"accuracy_all": 0.5}
    assert report.notes[0].startswith("1 of 2 rows do not tell whether they have an image")


def test_only_images_and_no_image_at_all_are_said():
    assert "accuracy_all covers the image subset alone" in task.notes([row()], "paper")[0]
    report = task.evaluate([row(image=None)], ["B"], "paper")
    assert report.metrics == {"accuracy_all": 1}
    assert "no question has an image" in report.notes[0]


@pytest.mark.parametrize("answer", [None, -1, 2, "B", 1.0])
def test_rows_without_truth_are_left_out_and_counted(answer):
    report = task.evaluate([row(answer=answer), row()], ["B", "B"], "paper")
    assert report.n == 1
    assert report.excluded == {"no reference: answer is not the index of a choice": 1}
