"""GQA scores against LLaVA's and GQA's scripts (recorded) and lmms-eval's metric (called)."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lmms_eval.api.metrics import exact_match_hf_evaluate, mean
from lmms_eval.tasks.gqa import utils as lmms_gqa
from lmms_eval.utils import load_yaml_config
from PIL import Image

from tasks import load
from tasks.gqa import images
from vlmamba_core.errors import UserError

RECORDED = json.loads((Path(__file__).parent / "cases" / "gqa.json").read_text())
CASES = RECORDED["cases"]

task = load("gqa")


def document(answer: str | None, question_id: int = 1) -> dict:
    """A row of the hub's question table, as far as it is read."""
    return {
        "id": str(question_id),
        "imageId": f"n{question_id // 3}",
        "question": "What is it?",
        "answer": answer,
        "isBalanced": True,
    }


def recorded_documents() -> tuple[list[dict], list[str]]:
    docs = [document(c["answer"], i) for i, c in enumerate(CASES)]
    return docs, [c["prediction"] for c in CASES]


def lmms_eval_score(answer: str, prediction: str) -> float:
    """lmms-eval strips an answer, then applies the metric with the options of its gqa.yaml."""
    result = exact_match_hf_evaluate(
        predictions=[prediction.strip()],
        references=[answer],
        ignore_case=True,
        ignore_punctuation=True,
    )
    return float(result["exact_match"])


def test_paper_scores_are_the_official_ones():
    docs, predictions = recorded_documents()
    report = task.evaluate(docs, predictions, "paper")
    assert len(CASES) >= 100
    assert [case.score for case in report.cases] == [c["score"] for c in CASES]
    assert report.metrics == pytest.approx(RECORDED["metrics"], abs=1e-9)


def test_lmms_scores_are_lmms_evals():
    docs, predictions = recorded_documents()
    expected = [lmms_eval_score(c["answer"], c["prediction"]) for c in CASES]
    report = task.evaluate(docs, predictions, "lmms")
    assert [case.score for case in report.cases] == expected
    assert report.metrics["accuracy"] == pytest.approx(mean(expected), abs=1e-9)


def test_lmms_prompt_options_and_limits_are_lmms_evals():
    yaml = load_yaml_config(str(Path(lmms_gqa.__file__).with_name("gqa.yaml")))
    (metric,) = yaml["metric_list"]
    assert (metric["ignore_case"], metric["ignore_punctuation"]) == (True, True)
    doc = document("cat")
    theirs = lmms_gqa.gqa_doc_to_text(doc, yaml["lmms_eval_specific_kwargs"]["default"])
    assert task.prompt(doc, "lmms") == task.prompt(doc, "paper") == theirs
    assert task.max_new_tokens("lmms") == yaml["generation_kwargs"]["max_new_tokens"]


@pytest.mark.parametrize("answer", [None, float("nan"), "", " "])
@pytest.mark.parametrize("protocol", ["paper", "lmms"])
def test_missing_truth_is_counted(answer, protocol):
    docs = [document("cat"), document(answer)]
    report = task.evaluate(docs, ["cat", ""], protocol)
    assert report.excluded == {"no reference answer": 1}
    assert (report.n, report.metrics["accuracy"]) == (1, 1.0)
    assert task.score_case(docs[1], "", protocol).score is None


def test_unbalanced_questions_are_left_out_under_paper():
    docs = [document("cat"), {**document("cat"), "isBalanced": False}]
    report = task.evaluate(docs, ["cat", "dog"], "paper")
    assert (report.metrics["accuracy"], report.excluded) == (1.0, {"not in the balanced set": 1})
    assert task.evaluate(docs, ["cat", "dog"], "lmms").metrics["accuracy"] == 0.5


def test_image_comes_from_the_row_or_from_the_hubs_table(monkeypatch):
    gray = Image.new("L", (4, 4), 128)
    table = datasets.Dataset.from_dict(
        {"id": ["n0", "n1"], "image": [gray, Image.new("RGB", (5, 6))]},
        features=datasets.Features({"id": datasets.Value("string"), "image": datasets.Image()}),
    )
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return table

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    images._open.cache_clear()
    assert [i.mode for i in task.images({**document("cat"), "image": gray}, "paper")] == ["RGB"]
    assert asked == []
    assert [i.size for i in task.images(document("cat", 3), "paper")] == [(5, 6)]
    assert [i.mode for i in task.images(document("cat", 0), "paper")] == ["RGB"]
    options = {"split": "testdev", "revision": None}
    assert asked == [(("lmms-lab/GQA", "testdev_balanced_images"), options)]
    with pytest.raises(UserError, match="'n33' is not among the 2 images"):
        task.images(document("cat", 99), "paper")
    images._open.cache_clear()


@settings(max_examples=500, deadline=None)
@given(prediction=st.text(max_size=20), answer=st.text(min_size=1, max_size=20), same=st.booleans())
def test_any_text_scores_as_in_lmms_eval(prediction, answer, same):
    prediction = answer.upper() + "." if same else prediction
    if answer.strip():
        score = task.score_case(document(answer), prediction, "lmms").score
        assert score == lmms_eval_score(answer, prediction)
