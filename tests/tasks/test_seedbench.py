"""SEED-Bench against LLaVA's script (stored cases) and lmms-eval's functions."""

import json

import datasets
import pytest
from lmms_eval.tasks.seedbench import utils as official_lmms

from harness.scoring import imports
from tasks import load
from tasks.common import OPTION_LETTER
from vlmamba_core.errors import UserError

task = load("seedbench")
DOC = {"question_id": "1", "question": "What?", "answer": "B", "data_type": "image"}
DOC |= {f"choice_{letter}": f"option {letter}" for letter in "abcd"} | {"question_type_id": 5}


def test_paper_equals_the_official_code(official_cases):
    official_cases("seedbench").check(task)


def test_lmms_equals_lmms_eval(official_cases):
    docs, answers = official_cases("seedbench").docs, official_cases("seedbench").predictions
    results = [
        official_lmms.seed_process_result(doc, [text])["seed_image"]
        for doc, text in zip(docs, answers, strict=True)
    ]
    report = task.evaluate(docs, answers, "lmms")
    alone = [official_lmms.seed_aggregation_result([result]) for result in results]
    assert [case.score for case in report.cases] == alone
    overall = official_lmms.seed_aggregation_result(results)
    assert report.metrics["accuracy"] == pytest.approx(overall, abs=1e-12)


@pytest.mark.parametrize("protocol", ["paper", "lmms"])
def test_prompt(protocol):
    options = "A. option a\nB. option b\nC. option c\nD. option d"
    assert task.prompt(DOC, protocol) == f"What?\n{options}\n{OPTION_LETTER}"
    assert task.prompt(DOC, protocol) == official_lmms.seed_doc_to_text(DOC)


@pytest.mark.parametrize(
    ("answer", "paper", "lmms"),
    [("B", 1, 1), ("b", 0, 1), ("B.", 0, 1), ("(B)", 0, 0), ("Because", 0, 1), ("", 0, 0)],
)
def test_readings(answer, paper, lmms):
    assert task.score_case(DOC, answer, "paper").score == paper
    assert task.score_case(DOC, answer, "lmms").score == lmms


def test_what_is_no_image_question_is_left_out_and_counted():
    docs = [DOC, DOC | {"data_type": "video", "question_type_id": 10}, DOC | {"answer": None}]
    report = task.evaluate(docs, ["B"] * 3, "paper")
    assert report.metrics == {"accuracy": 1.0, "Instances Counting/accuracy": 1.0}
    reasons = {"not about an image": 1, "no reference: answer is not the letter of an option": 1}
    assert report.excluded == reasons
    unknown = task.evaluate([DOC | {"question_type_id": "x"}], ["B"], "paper")
    assert unknown.metrics == {"accuracy": 1.0}


def test_an_answer_is_looked_up_by_its_id_as_in_the_official_script(tmp_path):
    """convert_seed_for_submission.py: `results[row["question_id"]] = row`, then each question's."""
    rows = [DOC, DOC | {"question": "Why?", "question_type_id": 9}, DOC | {"question_id": "2"}]
    given = [("1", "A"), ("1", "B"), ("v7", "C"), ("2", "B")]
    truth, upload, answers = (tmp_path / name for name in ("t.json", "u.jsonl", "a.jsonl"))
    truth.write_text(json.dumps(rows))
    lines = [{"question_id": name, "prediction": text} for name, text in given]
    upload.write_text("\n".join(map(json.dumps, lines)))
    lines = [{"question_id": name, "prompt": "What?\nA.", "text": text} for name, text in given]
    answers.write_text("\n".join(map(json.dumps, lines)))
    for kind, file in (("upload", upload), ("llava", answers)):
        with pytest.warns(UserWarning, match="1 answers of .* are to no question in --truth"):
            joined, missing = imports.load(kind, task, file, [truth])
        assert [(one.case_id, one.prediction, one.row) for one in joined] == [
            ("1", "B", 0),
            ("1/2", "B", 1),
            ("2", "B", 2),
        ]
        assert missing == 0
    upload.write_text(json.dumps({"question_id": "v7", "prediction": "C"}))
    with pytest.raises(UserError, match="answers no question of --truth"):
        imports.load("upload", task, upload, [truth])


def test_questions_about_videos_are_not_asked():
    rows = datasets.Dataset.from_list([DOC, DOC | {"data_type": "video"}, DOC])
    assert task.process_docs(rows)["data_type"] == ["image", "image"]


def test_a_cell_holds_a_list_of_images():
    assert task.image_cells({"image": ["a", "b"]}, "paper") == ["a", "b"]
    assert task.image_cells({"image": None}, "paper") == []
    assert task.image_cells({"image": "a"}, "paper") == ["a"]
