"""MMBench against VLMEvalKit's exact matching (stored cases) and lmms-eval's static evaluation."""

import math
import random

import pytest
from lmms_eval.tasks.mmbench import en_utils as official_lmms

from tasks.common import OPTION_LETTER
from tasks.mmbench import ROTATION, scorer, task
from vlmamba_core.errors import UserError


def rotations(number=1, options=("cat", "dog"), answer=0, category="logic_reasoning"):
    """All rows of one question: rotation k moves each option k places on."""
    n = len(options)
    docs = []
    for k in range(n):
        moved = dict(zip("ABCD", [options[(i - k) % n] for i in range(n)], strict=False))
        doc = {"index": number + k * ROTATION, "question": "What is it?", "hint": "nan"}
        right = "ABCD"[(answer + k) % n]
        docs.append(doc | moved | {"answer": right, "L2-category": category, "category": "x"})
    return docs


def right_answers(docs):
    return [doc["answer"] for doc in docs]


def test_paper_equals_the_official_code(official_cases):
    official_cases("mmbench").check(task)


def official_static(docs, answers):
    """(overall, {L2 category: accuracy}) by lmms-eval's own functions."""
    results = [
        official_lmms.mmbench_process_results(doc | {"source": "", "split": "dev"}, [text])
        for doc, text in zip(docs, answers, strict=True)
    ]
    evaluator = official_lmms.mmbench_evaluator
    rows = [result["submission"] for result in results]
    overall, _, by_l2 = evaluator.eval_result(rows, eval_method="static")
    return overall, by_l2


def test_lmms_equals_lmms_eval(official_cases):
    docs, answers = official_cases("mmbench").docs, official_cases("mmbench").predictions
    metrics = task.evaluate(docs, answers, "lmms").metrics
    overall, by_category = official_static(docs, answers)
    assert metrics["accuracy"] == pytest.approx(overall, abs=1e-9)
    for category, accuracy in by_category.items():
        assert metrics[f"{category}/accuracy"] == pytest.approx(accuracy, abs=1e-9)


def test_lmms_equals_lmms_eval_case_by_case(official_cases):
    """One row alone is a question with one rotation: its accuracy is the row's score."""
    rows = random.Random(0).sample(official_cases("mmbench").rows, 110)
    for row in rows:
        doc = row["doc"] | {"index": 1}
        case = task.score_case(doc, row["prediction"], "lmms")
        assert case.score == official_static([doc], [row["prediction"]])[0], row


@pytest.mark.parametrize("hint", ["nan", None, math.nan, "Look well."])
@pytest.mark.parametrize("last", ["nan", None, math.nan, "cow", ""])
def test_lmms_prompt_equals_lmms_eval(hint, last, lmms_kwargs):
    doc = rotations(options=("cat", "dog", "cow"))[0] | {"hint": hint, "D": last}
    doc |= {"source": "", "split": "dev"}
    kwargs = lmms_kwargs("mmbench", "_default_template_mmbench_en_yaml")
    assert task.prompt(doc, "lmms") == official_lmms.mmbench_doc_to_text(doc, kwargs)


def test_paper_prompt_stops_at_the_first_empty_option():
    doc = rotations(options=("cat", "dog"))[0] | {"C": "nan", "D": "cow"}
    asked = "What is it?\nA. cat\nB. dog\n" + OPTION_LETTER
    assert task.prompt(doc, "paper") == asked
    assert task.prompt(doc | {"hint": "Look well."}, "paper") == f"Look well.\n{asked}"


OPTIONS = {"A": "cat", "B": "dog", "C": "nan bread"}


@pytest.mark.parametrize(
    ("answer", "paper", "lmms"),
    [
        ("B", "B", "B"),
        ("(B)", "B", "B"),
        ("The answer is B.", "B", "B"),
        ("b", None, None),
        ("It is a dog", "B", "B"),
        ("cat or dog", None, None),
        ("B is the one that I would pick", None, "B"),
        ("the answer is a pony", "A", None),
        ("Cannot determine the answer", "Z", "C"),
        ("D", None, "D"),
        ("", None, None),
    ],
)
def test_readings(answer, paper, lmms):
    assert scorer.read_paper(answer, OPTIONS) == paper
    assert scorer.read_lmms(answer, OPTIONS) == lmms


@pytest.mark.parametrize("empty", [None, math.nan, "nan", "NaN", ""])
def test_an_empty_option_is_no_option(empty):
    docs = [doc | {"C": empty, "D": empty} for doc in rotations(options=("banana", "kiwi"))]
    report = task.evaluate(docs, ["banana", "banana"], "paper")
    assert report.metrics["accuracy"] == 1


def test_circular_needs_every_rotation_right():
    docs = rotations(1) + rotations(2)
    answers = right_answers(docs)
    answers[1] = "wrong"
    metrics = task.evaluate(docs, answers, "paper").metrics
    assert metrics["accuracy"] == metrics["logic_reasoning/accuracy"] == 0.5
    assert metrics["vanilla_accuracy"] == 1


def fixed_last(number):
    """The published dev set's odd questions: the last of four options stays, so three rotations."""
    docs = rotations(number, options=("cat", "dog", "cow"), answer=1)
    return [doc | {"D": "All above are not right"} for doc in docs]


@pytest.mark.parametrize("protocol", ["paper", "lmms"])
def test_an_option_that_stays_in_place_leaves_its_question_complete(protocol):
    docs = fixed_last(1) + rotations(2, options=("cat", "dog", "cow", "ape")) + fixed_last(3)
    answers = right_answers(docs)
    answers[2] = "D"
    report = task.evaluate(docs, answers, protocol)
    assert (report.n, report.excluded, report.notes) == (10, {}, [])
    assert report.metrics["accuracy"] == pytest.approx(2 / 3)
    assert report.metrics["vanilla_accuracy"] == 1
    full = [doc | {"C": doc.get("C", "nan"), "D": doc.get("D", "nan")} for doc in docs]
    assert official_static(full, answers)[0] == pytest.approx(2 / 3)


def test_a_missing_rotation_is_reported_and_its_question_counts_by_the_others():
    docs = fixed_last(1) + rotations(2) + rotations(3, options=("cat", "dog", "cow", "ape"))
    del docs[1], docs[3], docs[4:6]  # one of three, one of two, two of four
    assert len(docs) == 5
    report = task.evaluate(docs, right_answers(docs), "paper")
    assert report.n == 5
    assert report.excluded == {}
    assert "3 questions lack 4 of their rotations" in report.notes[0]
    assert report.metrics["accuracy"] == official_static(docs, right_answers(docs))[0] == 1


def test_a_row_twice_counts_twice_as_in_the_official_code_and_is_reported():
    docs = [*rotations(1), *rotations(2), rotations(2)[0]]
    answers = [*right_answers(docs)[:-1], "wrong"]
    full = [doc | {"C": "nan", "D": "nan"} for doc in docs]
    report = task.evaluate(full, answers, "lmms")
    assert report.metrics["accuracy"] == pytest.approx(official_static(full, answers)[0])
    assert report.metrics["accuracy"] == pytest.approx(1 / 3)
    assert "1 rows have the index of an earlier row" in report.notes[0]


def test_rows_without_an_unrotated_one_are_left_out_and_counted():
    docs = rotations(1) + rotations(2)
    del docs[0]
    report = task.evaluate(docs, right_answers(docs), "paper")
    assert report.excluded == {"its question has no unrotated row": 1}
    assert report.metrics["accuracy"] == official_static(docs, right_answers(docs))[0] == 1


def test_a_row_without_truth_takes_its_question_along():
    docs = [*rotations(1), *rotations(2)]
    docs[0]["answer"] = "C"
    report = task.evaluate(docs, right_answers(docs), "paper")
    assert report.n == 2
    assert report.excluded == {
        "no reference: answer is not the letter of an option": 1,
        "another rotation of its question has no reference": 1,
    }


def test_without_rotations_only_vanilla_accuracy_is_reported():
    docs = [rotations(1)[0], rotations(2)[0]]
    report = task.evaluate(docs, right_answers(docs), "paper")
    assert report.metrics == {"vanilla_accuracy": 1}
    assert "circular accuracy is not reported" in report.notes[0]


def test_the_published_column_name_of_the_category_works():
    docs = rotations()
    for doc in docs:
        doc["l2-category"] = doc.pop("L2-category")
    assert "logic_reasoning/accuracy" in task.evaluate(docs, right_answers(docs), "paper").metrics


def test_an_index_that_is_no_number_is_refused():
    with pytest.raises(UserError, match="index 'x' is not a whole number"):
        task.evaluate([rotations()[0] | {"index": "x"}], ["A"], "paper")
