"""TextVQA scores against the M4C evaluator (recorded) and lmms-eval's functions (called)."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lmms_eval.tasks.textvqa import utils as lmms_textvqa
from lmms_eval.utils import load_yaml_config

from tasks import load
from tasks.common import SHORT_ANSWER
from vlmamba_core.errors import UserError

RECORDED = json.loads((Path(__file__).parent / "cases" / "textvqa.json").read_text())
CASES = RECORDED["cases"]

task = load("textvqa")


def document(answers: list[str], question_id: int = 1) -> dict:
    """A row as the hub has it, as far as it is read, without the image."""
    return {
        "image_id": f"img{question_id // 2}",
        "question_id": question_id,
        "question": "what does the Sign say?",
        "answers": answers,
        "ocr_tokens": ["STOP", "ahead"],
    }


def recorded_documents() -> tuple[list[dict], list[str]]:
    docs = [document(c["answers"], i) for i, c in enumerate(CASES)]
    return docs, [c["prediction"] for c in CASES]


def lmms_eval_score(doc: dict, prediction: str) -> float:
    # lmms-eval strips an answer before any task sees it, and this function edits the document.
    result = lmms_textvqa.textvqa_process_results(copy.deepcopy(doc), [prediction.strip()])
    return result["exact_match"]


def test_paper_scores_are_the_official_ones():
    docs, predictions = recorded_documents()
    report = task.evaluate(docs, predictions, "paper")
    assert len(CASES) >= 100
    assert [case.score for case in report.cases] == pytest.approx(
        [c["score"] for c in CASES], abs=1e-9
    )
    assert report.metrics == pytest.approx(RECORDED["metrics"], abs=1e-9)


def test_lmms_scores_are_lmms_evals():
    docs, predictions = recorded_documents()
    expected = [lmms_eval_score(*pair) for pair in zip(docs, predictions, strict=True)]
    report = task.evaluate(docs, predictions, "lmms")
    assert [case.score for case in report.cases] == pytest.approx(expected, abs=1e-9)
    assert report.metrics["accuracy"] == pytest.approx(math.fsum(expected) / len(expected))


@pytest.mark.parametrize("answers", [None, [], float("nan"), [None] * 10, [""] * 10])
@pytest.mark.parametrize("protocol", ["paper", "lmms"])
def test_missing_truth_is_counted(answers, protocol):
    docs = [document(["stop"] * 10), document(answers)]
    report = task.evaluate(docs, ["stop", "stop"], protocol)
    assert report.excluded == {"no reference answers": 1}
    assert (report.n, report.metrics["accuracy"]) == (1, 1.0)
    assert task.score_case(docs[1], "", protocol).score is None


def test_paper_needs_ten_answers():
    report = task.evaluate([document(["stop"] * 9)], ["stop"], "paper")
    assert (report.excluded, report.metrics) == ({"not 10 reference answers": 1}, {})


def test_paper_prompt_shows_the_ocr_tokens():
    doc = document(["stop"] * 10)
    expected = (
        "What does the sign say?\nReference OCR token: STOP, ahead\n"
        "Answer the question using a single word or phrase."
    )
    assert task.prompt(doc, "paper") == expected
    assert "\nReference OCR token: \n" in task.prompt({**doc, "ocr_tokens": []}, "paper")
    with pytest.raises(UserError, match="no 'ocr_tokens'"):
        task.prompt({**doc, "ocr_tokens": None}, "paper")


def test_lmms_prompt_and_limits_are_lmms_evals():
    doc = document(["stop"] * 10)
    folder = Path(lmms_textvqa.__file__).parent
    yaml = load_yaml_config(str(folder / "textvqa_val.yaml"))
    theirs = lmms_textvqa.textvqa_doc_to_text(doc, yaml["lmms_eval_specific_kwargs"]["default"])
    assert task.prompt(doc, "lmms") == theirs
    assert "max_new_tokens" not in yaml["generation_kwargs"]
    assert list(task.stop("lmms")) == yaml["generation_kwargs"]["until"]


texts = st.text(max_size=30) | st.lists(
    st.sampled_from(["a", "the", "2", "0", ",", ".", " ", "'s", "-", "?", "\n", "dont", "ten"])
).map("".join)


@settings(max_examples=300, deadline=None)
@given(prediction=texts, answers=st.lists(texts, min_size=8, max_size=8))
def test_any_text_scores_as_in_lmms_eval(prediction, answers):
    doc = document(["stop", *answers, prediction])
    for protocol in ("paper", "lmms"):
        score = task.score_case(doc, prediction, protocol).score
        assert score == pytest.approx(lmms_eval_score(doc, prediction), abs=1e-9)


def test_where_the_ocr_tokens_stand():
    doc = {"question": "what Brand?", "answers": ["x"] * 10, "ocr_tokens": ["NOKIA", "5"]}
    tokens, rest = "Reference OCR token: NOKIA, 5", f"What brand?\n{SHORT_ANSWER}"
    expected = {
        "first": f"{tokens}\n{rest}",
        "last": rest.replace("?\n", f"?\n{tokens}\n"),
        "none": rest,
    }
    for value, prompt in expected.items():
        configured = task.with_prompt(ocr=value)
        assert {configured.prompt(doc, protocol) for protocol in ("paper", "lmms")} == {prompt}
        assert configured.prompt_choice("ocr", "paper") == value
    assert task.prompt(doc, "paper") == expected["last"]  # LLaVA-1.5's
    assert task.prompt(doc, "lmms") == expected["none"]
    with pytest.raises(UserError, match="unknown value of --ocr 'front'; known, nearest first"):
        task.with_prompt(ocr="front")
