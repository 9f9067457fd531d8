"""MM-Vet: prompts, judge requests and means against lmms-eval's functions; submission file."""

from __future__ import annotations

import hashlib
import importlib
import random
from pathlib import Path

import pytest
from lmms_eval.utils import load_yaml_config

import tasks.mmvet.judging as judging
from tasks import load
from tasks.common import Case
from vlmamba_core.errors import UserError

# Of the prompt in mm-vet_evaluator.py of the benchmark's repository.
OFFICIAL_RUBRIC_SHA256 = "d1b3e0a5b4e72c888b77164489d705bba4dd149934fff564dfba6443d81afe3f"

task = load("mmvet")


@pytest.fixture
def lmms_mmvet(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "unused")  # the module builds a client when imported
    return importlib.import_module("lmms_eval.tasks.mmvet.utils")


def document(number: int = 0, answer: str | None = "a <AND>b", needs: str = "rec,ocr") -> dict:
    return {
        "question_id": f"v1_{number}",
        "question": "What is it?",
        "answer": answer,
        "capability": needs,
        "image_source": "photo",
    }


def test_prompts(lmms_mmvet):
    yaml = load_yaml_config(str(Path(lmms_mmvet.__file__).with_name("mmvet.yaml")))
    kwargs = yaml["lmms_eval_specific_kwargs"]["default"]
    assert task.prompt(document(), "paper") == "What is it?"
    assert task.prompt(document(), "lmms") == lmms_mmvet.doc_to_text(document(), kwargs)
    assert task.max_new_tokens("lmms") == yaml["generation_kwargs"]["max_new_tokens"]
    assert task.images({**document(), "image": None}, "paper") == []


def test_without_a_judge_there_is_no_score():
    report = task.evaluate([document(0), document(1, None)], ["a and b", " \n"], "paper")
    assert (report.metrics, report.n, report.n_unparsed) == ({}, 2, 1)
    assert report.notes == ["answers are not graded: MM-Vet needs a judge model (--judge URL)"]
    assert len({task.cluster(document(i)) for i in range(3)}) == 3


def test_submission_has_the_online_judges_format():
    docs = [document(0), {**document(), "question_id": 7}]
    assert task.submission(docs, ["one\n", ""]) == {"v1_0": "one", "v1_7": ""}


def test_official_rubric():
    text = judging.rubric("paper")
    assert hashlib.sha256(text.encode()).hexdigest() == OFFICIAL_RUBRIC_SHA256
    request = task.judge_prompt(document(), "b", "paper")
    assert request == f"{text}\nWhat is it? | a  <AND> b | b | "


def test_lmms_judge_requests_are_lmms_evals(lmms_mmvet, monkeypatch):
    asked = []

    def reply(prompt, **_):
        asked.append(prompt)
        return "0.5", "judge"

    monkeypatch.setattr(lmms_mmvet, "get_chat_response", reply)
    for answer in ("x", "a<AND>b<OR>c", ""):
        doc = document(answer=answer or "y")
        lmms_mmvet.mmvet_process_results(doc, ["it is | b"])
        assert asked[-1] == task.judge_prompt(doc, "it is | b", "lmms")


def test_means_are_lmms_evals(lmms_mmvet, caplog):
    rng = random.Random(0)
    needs = ["rec", "ocr,math", "rec,gen,know", "spat,ocr", "gen,rec,ocr,spat"]
    docs = [document(i, needs=rng.choice(needs)) for i in range(100)]
    grades = [rng.randrange(11) / 10 for _ in docs]
    results = [
        {"score": grade, "capabilities": doc["capability"]}
        for doc, grade in zip(docs, grades, strict=True)
    ]
    ours = task.aggregate(docs, [Case(grade, "x") for grade in grades], "lmms")
    expected = lmms_mmvet.mmvet_aggregate_results(results) / 100
    assert ours["score"] == pytest.approx(expected, abs=1e-9)
    ocr = [g for g, doc in zip(grades, docs, strict=True) if "ocr" in doc["capability"]]
    assert ours["ocr/score"] == pytest.approx(sum(ocr) / len(ocr))


@pytest.mark.parametrize(
    ("reply", "grade"),
    [
        ("0.7", 0.7),
        ("1.0 because", 1.0),
        ("\n0.5\n", 0.5),
        ("1.1", None),
        ("-0.5", None),
        ("nan", None),
        ("", None),
        ("good", None),
        ("0.5.", None),
    ],
)
def test_grades_are_read_from_the_start_of_a_reply(reply, grade):
    assert judging.read_grade(reply, "paper") == judging.read_grade(reply, "lmms") == grade


@pytest.mark.parametrize("reply", [" 0.5", "\n 0.5", " 1.0 because"])
def test_a_grade_behind_a_space_is_asked_for_again_by_the_official_evaluator_alone(reply):
    """mm-vet_evaluator.py reads reply.split(" ")[0]; lmms-eval has stripped the reply before."""
    assert judging.read_grade(reply, "paper") is None
    assert judging.read_grade(reply, "lmms") in (0.5, 1.0)


def test_a_missing_rubric_is_explained(monkeypatch):
    judging.rubric.cache_clear()
    monkeypatch.setattr(judging, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="rubric comes with lmms-eval"):
        judging.rubric("lmms")
    judging.rubric.cache_clear()


@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.fuzz)])
def test_any_reply_of_a_judge_is_a_grade_or_none(count):
    rng = random.Random(0)
    for _ in range(count):
        reply = "".join(rng.choices("0123456789.+-einfaN _,\n\u0661\u00bd", k=rng.randrange(6)))
        for protocol in ("paper", "lmms"):
            grade = judging.read_grade(reply, protocol)
            assert grade is None or 0.0 <= grade <= 1.0
