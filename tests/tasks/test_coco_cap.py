"""Caption metrics against pycocoevalcap (recorded) and lmms-eval's functions (called)."""

from __future__ import annotations

import json
import math
import random
import shutil
import types
from pathlib import Path

import pytest
from lmms_eval.tasks.coco_cap import utils as lmms_coco
from lmms_eval.utils import load_yaml_config

from tasks import coco_cap, load
from tasks.coco_cap import java, scorer
from vlmamba_core.errors import UserError

RECORDED = json.loads((Path(__file__).parent / "cases" / "coco_cap.json").read_text())
CASES = RECORDED["cases"]

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="no java on the PATH")
task = load("coco_cap")


def document(references: list[str] | None, number: int = 1) -> dict:
    """A row as the hub has it, as far as it is read, without the image."""
    name = f"COCO_val2014_{number:012d}.jpg"
    return {"question_id": name, "id": number, "answer": references}


def recorded_documents() -> tuple[list[dict], list[str]]:
    docs = [document(c["references"], i) for i, c in enumerate(CASES)]
    return docs, [c["prediction"] for c in CASES]


@pytest.fixture(scope="module")
def report():
    return task.evaluate(*recorded_documents(), "paper")


@needs_java
def test_scores_are_the_official_ones(report):
    assert len(CASES) >= 100
    assert report.metrics == pytest.approx(RECORDED["metrics"], abs=1e-9)
    for case, recorded in zip(report.cases, CASES, strict=True):
        assert scorer.aggregate([case.detail]) == pytest.approx(recorded["scores"], abs=1e-9)


@needs_java
def test_selections_need_no_second_java_run(report, monkeypatch):
    docs, _ = recorded_documents()
    monkeypatch.setattr(java, "_run", None)
    rows = [3, 3, 60, 7, 119]  # as a bootstrap draws them
    some = task.aggregate([docs[i] for i in rows], [report.cases[i] for i in rows], "paper")
    assert set(some) == set(task.metrics)
    assert task.aggregate(docs, report.cases, "paper") == report.metrics
    assert json.loads(json.dumps(report.cases[3].detail)) == report.cases[3].detail


@needs_java
def test_empty_captions_are_unparsed_and_spice_is_said_not_to_run(report):
    assert report.n_unparsed == sum(not c["prediction"].strip() for c in CASES) > 0
    assert [note.split(":")[0] for note in report.notes] == ["SPICE not run"]


@needs_java
def test_lmms_scores_are_lmms_evals(tmp_path, monkeypatch):
    docs, predictions = recorded_documents()
    items = [
        lmms_coco.coco_process_result(doc, [prediction.strip()])["coco_CIDEr"]
        for doc, prediction in zip(docs, predictions, strict=True)
    ]
    args = types.SimpleNamespace(output_path=str(tmp_path))
    ours = task.evaluate(docs, predictions, "lmms").metrics
    names = {"METEOR": "METEOR", "CIDEr": "CIDEr", "BLEU-4": "Bleu_4", "ROUGE_L": "ROUGE_L"}
    for key, theirs in names.items():
        if key != "METEOR":  # the function starts every scorer; METEOR's start takes seconds
            monkeypatch.setattr(lmms_coco, "Meteor", object)
        expected = lmms_coco.coco_aggregation_result(items, theirs, args)
        assert ours[key] == pytest.approx(expected, abs=1e-9)


def test_prompt_and_limit_are_lmms_evals():
    yaml = load_yaml_config(str(Path(lmms_coco.__file__).with_name("coco2017_cap_val.yaml")))
    assert task.prompt(document([]), "lmms") == lmms_coco.coco_doc_to_text(document([]))
    assert task.prompt(document([]), "paper") == task.prompt(document([]), "lmms")
    assert task.max_new_tokens("lmms") == yaml["generation_kwargs"]["max_new_tokens"]
    assert yaml["test_split"] == task.hub.split


def test_without_java_nothing_is_scored_and_the_reason_is_given(monkeypatch):
    monkeypatch.setattr(java.shutil, "which", lambda _: None)
    scorer.measure.cache_clear()
    report = task.evaluate([document(["a cat"])], ["a cat"], "paper")
    assert (report.metrics, report.n) == ({}, 1)
    assert report.notes == [
        "BLEU-1..4, METEOR, ROUGE_L and CIDEr not run: it needs Java, and there is no `java` on "
        "the PATH"
    ]
    scorer.measure.cache_clear()


@needs_java
def test_a_failing_program_leaves_its_metric_out(monkeypatch):
    def fail(*_):
        raise UserError("`java meteor-1.5.jar` failed (exit code 1)")

    monkeypatch.setattr(java, "meteor_statistics", fail)
    monkeypatch.setattr(java, "why_no_spice", lambda: None)
    monkeypatch.setattr(java, "spice_scores", lambda references, captions: [0.25, 0.75])
    scorer.measure.cache_clear()
    report = task.evaluate([document(["a cat"]), document(["a dog"])], ["a cat", "a"], "paper")
    assert set(report.metrics) == {*task.metrics, "SPICE"} - {"METEOR"}
    assert report.metrics["SPICE"] == 0.5
    assert report.notes == ["METEOR not run: `java meteor-1.5.jar` failed (exit code 1)"]
    scorer.measure.cache_clear()


@pytest.mark.parametrize(
    "answer", [None, [], 7, float("nan"), [None], ["a", None], ["", " "], "", {"a": "b"}]
)
@pytest.mark.parametrize("protocol", ["paper", "lmms"])
def test_missing_truth_is_counted(answer, protocol):
    report = task.evaluate([document(answer)], ["a cat"], protocol)
    assert (report.excluded, report.metrics) == ({"no reference captions": 1}, {})


def test_submission_has_the_servers_format():
    docs = [document(None, 203564), {"question_id": "000000000139.jpg", "answer": None}]
    assert task.submission(docs, ["a cat\n", ""]) == [
        {"image_id": 203564, "caption": "a cat"},
        {"image_id": 139, "caption": ""},
    ]
    with pytest.raises(UserError, match="does not end in an image number"):
        task.submission([{"question_id": "left.jpg"}], [""])


@needs_java
@pytest.mark.parametrize("metric", task.metrics)
def test_task_files_aggregate_in_lmms_eval(metric, report):
    config = load_yaml_config(str(Path(coco_cap.__file__).with_name("vlmamba_coco_cap.yaml")))
    docs, predictions = recorded_documents()
    items = [config["process_results"](d, [p]) for d, p in zip(docs, predictions, strict=True)]
    (aggregation,) = [e["aggregation"] for e in config["metric_list"] if e["metric"] == metric]
    assert aggregation([item[metric] for item in items]) == report.metrics[metric]


@needs_java
@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.fuzz)])
def test_random_captions_score_and_stay_apart(count):
    """Line breaks of every kind, lone surrogates and control characters do not shift captions."""
    pieces = [*"ab .,'\"|\n\r\v\f\x00\x85\u2028\u2029\ud800é日🐶-()[]{}<>&$%", "|||", "cat", "n't"]
    rng = random.Random(0)
    captions = ["".join(rng.choices(pieces, k=rng.randrange(12))) for _ in range(count)]
    docs = [document(["a cat", "the cat é"], i) for i in range(count + 1)]
    report = task.evaluate(docs, [*captions, "a cat"], "paper")
    assert set(report.metrics) == set(task.metrics)
    assert all(math.isfinite(value) for value in report.metrics.values())
    assert scorer.aggregate([report.cases[-1].detail])["METEOR"] == 1.0
