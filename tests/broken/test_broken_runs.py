"""Broken run folders under report, compare, tables, plots and --from-record: one line, code 2."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from refusal import refused
from test_harness_compare import write_run
from test_harness_plots import write_profile

from harness import compare as compare_command
from harness import plots as plots_command
from harness import report, run, tables
from harness.runs import checks, store
from harness.runs.points import Row

Damage = Callable[[Path], object]
RESULTS = Path(__file__).resolve().parents[2] / "results" / "runs"
RECORD, SAMPLES = "record.json", "samples_pope.jsonl"


def overwritten(name: str, content: bytes) -> Damage:
    """A file with other bytes."""
    return lambda folder: (folder / name).write_bytes(content)


def record(*path: str | int, to: object = None, gone: bool = False) -> Damage:
    """An entry of record.json replaced, or taken away."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / RECORD).read_text())
        inner = content
        for key in path[:-1]:
            inner = inner[key]
        if gone:
            del inner[path[-1]]
        else:
            inner[path[-1]] = to
        (folder / RECORD).write_text(json.dumps(content))

    return damage


def sample(**cells: object) -> Damage:
    """Other cells in the second answer."""

    def damage(folder: Path) -> None:
        lines = (folder / SAMPLES).read_text().splitlines()
        lines[1] = json.dumps(json.loads(lines[1]) | cells)
        (folder / SAMPLES).write_text("\n".join(lines))

    return damage


METRIC = ("tasks", "pope", "metrics", "accuracy")
EVALUATIONS: dict[str, tuple[Damage, str]] = {
    "no record": (lambda d: (d / RECORD).unlink(), "no record.json"),
    "an empty record": (overwritten(RECORD, b""), "is not a run's record"),
    "half a record": (overwritten(RECORD, b'{"kind": "evalu'), "is not a run's record"),
    "a record in Latin-1": (overwritten(RECORD, b'{"kind": "\xff"}'), "is not a run's record"),
    "a record of brackets": (overwritten(RECORD, b"[" * 99_999), "is not a run's record"),
    "a list": (overwritten(RECORD, b"[1]"), "is not a run's record"),
    "null": (overwritten(RECORD, b"null"), "is not a run's record"),
    "a record that is a folder": (
        lambda d: ((d / RECORD).unlink(), (d / RECORD).mkdir()),
        "is not a run's record",
    ),
    "another kind": (record("kind", to="novel"), "of kind 'novel'"),
    "a kind that is a list": (record("kind", to=["evaluation"]), "of kind"),
    "no arguments": (record("arguments", gone=True), "arguments is missing or wrong"),
    "arguments that are a list": (record("arguments", to=[]), "arguments is missing or wrong"),
    "a model that is a number": (record("arguments", "model", to=5), "arguments.model"),
    "no data": (record("arguments", "data", gone=True), "arguments.data"),
    "data that are a list": (record("arguments", "data", to=["a"]), "arguments.data"),
    "a style that is a number": (record("arguments", "style", to=1), "arguments.style"),
    "no protocol": (record("protocol", gone=True), "protocol is missing"),
    "a label that is a list": (record("label", to=["a"]), "label is missing or wrong"),
    "a config that is text": (record("model", to={"config": "x"}), "model.config"),
    "no tasks": (record("tasks", gone=True), "tasks is missing"),
    "tasks that are a list": (record("tasks", to=["pope"]), "tasks is missing or wrong"),
    "a task that is null": (record("tasks", "pope", to=None), "tasks.pope"),
    "a task's name above the folder": (
        record("tasks", to={"../../secret": {}}),
        "the task name '../../secret'",
    ),
    "a task's name with a slash": (record("tasks", to={"/etc/x": {}}), "the task name"),
    "an empty task's name": (record("tasks", to={"": {}}), "the task name"),
    "no n": (record("tasks", "pope", "n", gone=True), "tasks.pope.n"),
    "n of text": (record("tasks", "pope", "n", to="2"), "tasks.pope.n"),
    "n beyond any data": (record("tasks", "pope", "n", to=2**64), "tasks.pope.n"),
    "n below zero": (record("tasks", "pope", "n", to=-1), "tasks.pope.n"),
    "a unit unknown": (record("tasks", "pope", "unit", to="no"), "tasks.pope.unit"),
    "notes of numbers": (record("tasks", "pope", "notes", to=[1]), "tasks.pope.notes"),
    "excluded of text": (record("tasks", "pope", "excluded", to={"a": "b"}), "excluded"),
    "metrics that are null": (record("tasks", "pope", "metrics", to=None), "metrics"),
    "a metric that is a number": (record(*METRIC, to=0.5), "metrics.accuracy"),
    "a metric of text": (record(*METRIC, "value", to="good"), "metrics.accuracy"),
    "a metric of NaN": (record(*METRIC, "value", to=float("nan")), "metrics.accuracy"),
    "a metric of true": (record(*METRIC, "value", to=True), "metrics.accuracy"),
    "an interval of text": (record(*METRIC, "low", to="0"), "metrics.accuracy"),
    "half an interval": (record(*METRIC, "high", gone=True), "metrics.accuracy"),
}
ANSWERS: dict[str, tuple[Damage, str]] = {
    "no answers in the file": (overwritten(SAMPLES, b""), "is empty"),
    "a cut last answer": (
        lambda d: (d / SAMPLES).write_bytes((d / SAMPLES).read_bytes()[:-9]),
        "line 2 is not JSON",
    ),
    "answers in Latin-1": (overwritten(SAMPLES, b"\xff"), "as UTF-8 text"),
    "a list of numbers": (overwritten(SAMPLES, b"[1]"), "entry 1 is a number"),
    "other columns": (overwritten(SAMPLES, b'{"a": 1}'), "does not hold samples"),
    "a column too many": (sample(extra=1), "does not hold samples"),
    "a row of text": (sample(doc_id="1"), "line 2 is not an answer"),
    "a row below zero": (sample(doc_id=-1), "line 2 is not an answer"),
    "a row twice": (sample(doc_id=0), "row 1 comes twice"),
    "a question that is null": (sample(question=None), "line 2 is not an answer"),
    "a prediction that is a list": (sample(prediction=["a"]), "line 2 is not an answer"),
    "a score of text": (sample(score="1"), "line 2 is not an answer"),
    "a score of NaN": (sample(score=float("nan")), "line 2 is not an answer"),
    "an image that is a number": (sample(image=5), "line 2 is not an answer"),
}
POINT = ("points", 0)
RESULT = (*POINT, "result")
PROFILES: dict[str, tuple[Damage, str]] = {
    "no machine": (record("machine", gone=True), "machine is missing"),
    "a machine without speed": (record("machine", "gemm_flops_per_s", to=0), "gemm_flops"),
    "no settings": (record("settings", gone=True), "settings is missing"),
    "no points": (record("points", gone=True), "points is missing"),
    "an empty list of points": (record("points", to=[]), "points is missing or wrong"),
    "whole models of text": (record("whole", to=["a"]), r"whole\[0\]"),
    "a whole model without a status": (record("whole", to=[{"model": "nano"}]), r"whole\[0\]"),
    "no points and no whole model": (
        lambda path: (record("points", to=[])(path), record("whole", to=[])(path)),
        "points is missing or wrong",
    ),
    "points of text": (record("points", to=["a"]), r"points\[0\]"),
    "a point of other columns": (record(*POINT, "extra", to=1), r"points\[0\]"),
    "a length of text": (record(*POINT, "seq_len", to="256"), "seq_len"),
    "a length beyond any machine": (record(*POINT, "seq_len", to=2**64), "seq_len"),
    "memory beyond any machine": (record(*RESULT, "peak_mem_bytes", to=10**400), "peak_mem_bytes"),
    "a state beyond any machine": (record(*RESULT, "state_bytes", to=1e200), "state_bytes"),
    "a length of zero": (record(*POINT, "seq_len", to=0), "seq_len"),
    "a batch below zero": (record(*POINT, "batch_size", to=-1), "batch_size"),
    "a result that is a list": (record(*RESULT, to=[]), "result"),
    "no times": (record(*RESULT, "prefill_s", to=[]), "prefill_s"),
    "times of text": (record(*RESULT, "decode_s", to=["fast"]), "decode_s"),
    "a time of zero": (record(*RESULT, "ttft_s", to=[0]), "ttft_s"),
    "a time of NaN": (record(*RESULT, "ttft_s", to=[float("nan")]), "ttft_s"),
    "memory below zero": (record(*RESULT, "peak_mem_bytes", to=-5), "peak_mem_bytes"),
    "no memory": (record(*RESULT, "peak_mem_bytes", gone=True), "peak_mem_bytes"),
}
CELL = {"variant": "mlp", "seed": 0, "metrics": {"pope": 80.0}}
TEST = {
    "variant": "mlp",
    "task": "pope",
    "difference": 0.1,
    "low": 0.0,
    "high": 0.2,
    "p_value": 0.5,
    "n": 9,
    "clusters": 9,
    "better": 1,
    "worse": 0,
    "method": "t",
    "seed_differences": [0.1],
    "seeds_alike": 1,
}
STUDY = {
    "kind": "ablation",
    "label": None,
    "axis": "connector",
    "final": "mlp",
    "arguments": {"seeds": [0]},
    "cells": [CELL],
    "tests": [TEST],
}
ABLATIONS: dict[str, tuple[dict[str, object], str]] = {
    "no cells": ({"cells": None}, "cells is missing"),
    "an empty study": ({"cells": []}, "cells is missing or wrong"),
    "cells of text": ({"cells": ["a"]}, r"cells\[0\]"),
    "a score of text": ({"cells": [CELL | {"metrics": {"pope": "80"}}]}, r"cells\[0\].metrics"),
    "no seeds": ({"arguments": {}}, "arguments.seeds"),
    "no axis": ({"axis": None}, "axis is missing"),
    "tests of text": ({"tests": ["a"]}, r"tests\[0\]"),
    "a difference of text": ({"tests": [TEST | {"difference": "1"}]}, r"tests\[0\]"),
    "half an interval": ({"tests": [TEST | {"low": None}]}, r"tests\[0\]"),
    "a count of text": ({"tests": [TEST | {"clusters": "9"}]}, r"tests\[0\]"),
    "no seed differences": ({"tests": [TEST | {"seed_differences": None}]}, r"tests\[0\]"),
}


def readers(folder: Path, out: Path) -> dict[str, tuple[Callable[..., int], list[object]]]:
    """Every command that reads a run's record: its main and arguments."""
    return {
        "report": (report.main, [folder / "a", "--out", out / "report.html"]),
        "tables": (tables.main, ["--from", folder, "--out", out / "tables"]),
        "plots": (plots_command.main, ["--from", folder, "--out", out / "plots"]),
    }


@pytest.mark.parametrize("name", EVALUATIONS)
def test_a_broken_record_is_refused_everywhere(name, tmp_path, capsys):
    damage, message = EVALUATIONS[name]
    for folder in ("a", "b"):
        write_run(tmp_path / "runs" / folder, [1, 0])
    damage(tmp_path / "runs" / "a")
    commands = readers(tmp_path / "runs", tmp_path)
    if name in ("no record", "a record that is a folder"):
        commands = {"report": commands["report"]}  # the others look for what there is
    commands["compare"] = (compare_command.main, [tmp_path / "runs" / "a", tmp_path / "runs" / "b"])
    for main, arguments in commands.values():
        refused(main, arguments, message, capsys)
    assert not list(tmp_path.glob("*.html"))


@pytest.mark.parametrize("name", ANSWERS)
def test_broken_answers_are_refused(name, tmp_path, capsys):
    damage, message = ANSWERS[name]
    folders = [write_run(tmp_path / "runs" / folder, [1, 0]) for folder in "ab"]
    damage(folders[0])
    refused(report.main, [folders[0], "--out", tmp_path / "r.html"], message, capsys)
    capsys.readouterr()
    assert compare_command.main([str(folder) for folder in folders]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("name", PROFILES)
def test_a_broken_profile_is_refused(name, tmp_path, capsys):
    damage, message = PROFILES[name]
    damage(write_profile(tmp_path / "runs" / "a"))
    for main, arguments in readers(tmp_path / "runs", tmp_path).values():
        refused(main, arguments, message, capsys)


@pytest.mark.parametrize("name", ABLATIONS)
def test_a_broken_ablation_is_refused(name, tmp_path, capsys):
    content, message = ABLATIONS[name]
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / RECORD).write_text(json.dumps(STUDY | content))
    for main, arguments in readers(tmp_path / "runs", tmp_path).values():
        refused(main, arguments, message, capsys)


def test_the_model_of_a_point_has_the_columns_that_are_written():
    assert set(checks.Point.model_fields) == set(Row.__dataclass_fields__)


@pytest.mark.parametrize("folder", sorted(RESULTS.rglob(RECORD)), ids=lambda p: p.parent.name)
def test_the_committed_records_are_read(folder):
    assert store.read_record(folder.parent)["kind"] in checks.KINDS


ARGUMENTS: dict[str, tuple[object, str]] = {
    "tasks of numbers": ({"tasks": 5}, "argument tasks is 5"),
    "tasks of null": ({"tasks": None}, "argument tasks is None"),
    "a limit of text": ({"limit": "10"}, "argument limit is '10'"),
    "a limit of zero": ({"limit": 0}, "--limit is 0"),
    "half a batch": ({"batch_size": 4.5}, "argument batch_size is 4.5"),
    "a seed of null": ({"seed": None}, "argument seed is None"),
    "blind of text": ({"blind": "yes"}, "argument blind is 'yes'"),
    "a model of null": ({"model": None}, "argument model is None"),
    "data of numbers": ({"data": 5}, "argument data is 5"),
    "an unknown dtype": ({"dtype": "fp8"}, "unknown dtype 'fp8'"),
    "a key in a list": ({"judge_key_env": ["K"]}, "argument judge_key_env"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_broken_record_is_not_run_again(name, tmp_path, capsys):
    cells, message = ARGUMENTS[name]
    path = tmp_path / RECORD
    path.write_text(json.dumps({"arguments": {"tasks": "pope"} | dict(cells)}))
    refused(run.main, ["--from-record", path, "--out", tmp_path / "out"], message, capsys)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"null", b"\xff", b"[" * 99_999, b'{"a'])
def test_no_record_is_not_run_again(content, tmp_path, capsys):
    (tmp_path / RECORD).write_bytes(content)
    refused(run.main, ["--from-record", tmp_path / RECORD], "is not a record.json", capsys)


def test_a_name_with_dollars_is_no_formula(tmp_path):
    folder = write_profile(tmp_path / "runs" / "a")
    record("machine", "processor", to=r"CPU $\frac{")(folder)
    content = json.loads((folder / RECORD).read_text())
    for point in content["points"]:
        point["model"] = point["model"] + r" $\x$ <b>"
    (folder / RECORD).write_text(json.dumps(content))
    assert (
        plots_command.main(["--from", str(tmp_path / "runs"), "--out", str(tmp_path / "plots")])
        == 0
    )
    assert report.main([str(folder), "--out", str(tmp_path / "r.html")]) == 0
    assert "<b>" not in (tmp_path / "r.html").read_text()


def test_a_name_with_half_a_surrogate_pair_is_written_escaped(tmp_path):
    for folder in "ab":
        write_run(tmp_path / "runs" / folder, [1, 0])
    record("label", to="name \ud800")(tmp_path / "runs" / "a")
    folders = [str(tmp_path / "runs" / folder) for folder in "ab"]
    for main, arguments in readers(tmp_path / "runs", tmp_path).values():
        assert main([str(argument) for argument in arguments]) == 0
    assert compare_command.main(folders) == 0
    assert r"name \ud800" in (tmp_path / "report.html").read_text()
