"""Runs that earlier versions left are read in today's words."""

from __future__ import annotations

import json

import pytest
from harness_world import pope_rows

from harness.runs import older, rerun
from harness.runs.schema import ROOT
from harness.runs.store import EvaluationRun, read_record

OLD_ANSWER = {
    "doc_id": 0,
    "question": pope_rows()[0]["question"],
    "prediction": "yes",
    "parsed": "yes",
    "truth": "yes",
    "score": 1.0,
    "image": "ab",
    "excluded": None,
}
OLD_RESULT = {
    "n": 1,
    "n_unparsed": 0,
    "excluded": {},
    "points": True,
    "notes": [],
    "metrics": {"perception": {"value": 200.0, "no_interval": "too few"}},
}


@pytest.fixture
def folder(tmp_path):
    """A run of before, with the entries that readers want."""
    new = json.loads((ROOT / "results/runs/demo/record.json").read_text())
    settings = new.pop("settings", None) or new.pop("terms")
    record = {**new, "terms": settings, "tasks": {"mme": OLD_RESULT}}
    (tmp_path / "record.json").write_text(json.dumps(record))
    (tmp_path / "samples_mme.jsonl").write_text(json.dumps(OLD_ANSWER) + "\n")
    return tmp_path


def test_an_older_run_is_read(folder):
    run = EvaluationRun.read(folder)
    record = read_record(folder)
    assert "terms" not in record and record["settings"]["dtype"] == "torch.float32"
    assert record["tasks"]["mme"]["unit"] == "points" and "points" not in record["tasks"]["mme"]
    assert run.results()[0].unit == "points"
    (sample,) = run.samples("mme")
    assert sample.reference == "yes"


def test_an_older_run_is_repeated_and_not_replaced(folder):
    assert "settings" in rerun.read(folder / "record.json")
    assert "settings" in rerun.finished(folder)


def test_what_is_no_record_is_left_to_its_reader():
    assert older.record(["terms"]) == ["terms"]
    assert older.record({"kind": "evaluation", "tasks": None}) == {
        "kind": "evaluation",
        "tasks": None,
    }
