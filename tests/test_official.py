"""The check against lmms-eval's own tasks: equal on sound scores, and it finds planted faults."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "tasks"))
from sample_documents import DOCUMENTS

import tasks
from harness.data.questions import NO_IMAGE
from harness.runs.schema import score_task
from harness.scoring import official
from tasks.common import PROTOCOLS

ANSWERS = {
    "pope": ["Yes", " no\n"],
    "mme": ["Yes", "yes"],
    "scienceqa": ["B", "B"],
    "mmbench": ["A", "B"],
    "mmbench_cn": ["答案是A", "B"],
    "vqav2": ["a cat", "2,000"],
    "textvqa": ["Stop", "the dog's"],
    "gqa": ["Cat", "a dog"],
    "easy_vqa": ["Red", "no"],
    "seedbench": ["A", "b"],
    "mmmu": ["I do not know", "it is 2"],
    "llava_bench": ["a", "b"],
    "vizwiz": ["a cat", "it's a dog"],
    "mmvet": ["a", "b"],
}


def rows_of(name):
    """The two documents, in the forms of the hub: people's answers of VQAv2 are records."""
    docs = [dict(doc) for doc in DOCUMENTS[name]]
    if name == "vqav2":
        for doc in docs:
            people = enumerate(doc["answers"], 1)
            doc["answers"] = [{"answer": text, "answer_id": i} for i, text in people]
    return docs


def checked(name, protocol, docs=None, answers=None):
    """(differences, against) of scores made as a run makes them, from documents without images."""
    task, docs = tasks.load(name), docs or rows_of(name)
    keys = [NO_IMAGE if doc.get("image", "x") is None else "abc" for doc in docs]
    bare = [task.without_image(doc) for doc in docs]
    result, samples = score_task(
        task, bare, answers or ANSWERS[name], protocol, image_keys=keys, seed=0
    )
    rows = [{k: v for k, v in doc.items() if k != "image"} for doc in docs]
    given = [
        official.Given(
            row,
            sample.prediction,
            sample.parsed,
            sample.reference,
            with_image=sample.image != NO_IMAGE,
            excluded=sample.excluded,
        )
        for row, sample in zip(rows, samples, strict=True)
    ]
    return official.check(task, result.metrics, given, protocol)


# captions: tests/test_whole_files.py, their programs take long to start; MM-Vet: needs a judge
@pytest.mark.parametrize(
    "name", [n for n in tasks.NAMES if tasks.load(n).official and n != "coco_cap"]
)
def test_sound_scores_equal_lmms_evals_own(name):
    differences, against = checked(name, "lmms")
    assert differences == []
    assert against.startswith(
        f"lmms-eval's own {Path(tasks.load(name).official.file).stem}: process"
    )


@pytest.mark.parametrize("name", ["pope", "mme", "scienceqa", "mmbench", "mmbench_cn", "seedbench"])
def test_under_paper_lmms_eval_counts_what_was_read_here(name):
    differences, against = checked(name, "paper")
    assert differences == []
    assert against.endswith(": aggregation, of what was read here")


@pytest.mark.parametrize(
    "name", ["vqav2", "textvqa", "gqa", "easy_vqa", "mmvet", "vizwiz", "mmmu", "llava_bench"]
)
def test_where_lmms_eval_cannot_be_asked_that_is_said(name):
    assert checked(name, "paper") == ([], official.NOTHING)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_text_only_questions_counted_as_image_questions_are_found(protocol, monkeypatch):
    monkeypatch.setattr(type(tasks.load("scienceqa")), "has_image", lambda self, doc: True)
    differences, _ = checked("scienceqa", protocol)
    assert differences == ["accuracy: 0.5 here, 1.0 by lmms-eval's own scienceqa"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_question_left_out_for_an_option_that_never_moves_is_found(protocol, monkeypatch):
    one = {"index": 1, "question": "What?", "hint": "nan", "C": "none of them", "D": "nan"}
    two = rows_of("mmbench")
    docs = [
        one | {"A": "cat", "B": "dog", "answer": "A"},
        one | {"A": "dog", "B": "cat", "answer": "B", "index": 1_000_001},
        *(doc | {"C": "nan", "D": "nan"} for doc in two),
    ]
    answers = ["A", "A", "A", "B"]
    assert checked("mmbench", protocol, docs, answers)[0] == []
    fewer = {0: "rows missing", 1: "rows missing"}
    monkeypatch.setattr(type(tasks.load("mmbench")), "exclude", lambda *_: fewer)
    differences, _ = checked("mmbench", protocol, docs, answers)
    assert differences[0] == "accuracy: 1.0 here, 0.5 by lmms-eval's own mmbench_en_dev_static"


def test_an_answer_read_by_another_rule_is_found_under_lmms(monkeypatch):
    from tasks.pope import scorer

    monkeypatch.setattr(scorer, "read_lmms", scorer.read_paper)
    assert checked("pope", "lmms", answers=["yes.", "no"])[0]


def test_pairs_counted_by_another_rule_are_found_under_paper(monkeypatch):
    from tasks.mme import scorer

    monkeypatch.setattr(scorer, "_score", lambda _: {"acc": 1.0, "acc_plus": 1.0, "score": 200.0})
    assert checked("mme", "paper")[0] == ["perception: 200.0 here, 50.0 by lmms-eval's own mme"]


def test_rows_that_lmms_eval_cannot_take_are_named():
    docs = [doc | {"answers": ["cat"] * 10} for doc in rows_of("vqav2")]
    differences, against = checked("vqav2", "lmms", docs)
    assert differences == []
    assert "vqav2_val cannot take these rows: TypeError" in against


def test_a_row_left_out_that_lmms_eval_would_stop_at_is_left_out_there_too():
    docs = [*rows_of("mme"), {**rows_of("mme")[0], "question_id": "OCR/2.jpg"}]
    differences, against = checked("mme", "lmms", docs, ["Yes", "yes", "Yes"])
    assert differences == []
    assert against.endswith("(rows scored here)")
