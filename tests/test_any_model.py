"""Every kind of model through harness.run: journal, record and report are the same for all."""

from __future__ import annotations

import json
import sys
import types

import pytest
import tiny_vlms
from test_api_models import Server, question, said

from harness import report, run
from harness.models.registry import eval_models

TASKS = ("pope", "mme", "mmbench")
TEMPLATE = "{% for turn in messages %}USER: {{ turn.content }} ASSISTANT:{% endfor %}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("vlms")
    names = ("llava", "qwen2_vl", "idefics3")
    return {name: str(tiny_vlms.save(name, root / name)) for name in names}


def evaluate(out, model: str, *more: str) -> dict:
    command = ["--tasks", ",".join(TASKS), "--limit", "8", "--model", model, "--out", str(out)]
    assert run.main([*command, *more]) == 0
    return json.loads((out / "record.json").read_text())


@pytest.fixture
def server():
    found = Server()
    yield found
    found.http.shutdown()
    found.http.server_close()


def test_all_kinds_of_models_in_one_report(folders, server, tmp_path, monkeypatch):
    server.reply = lambda body, number: said("yes" if "there" in question(body) else "A")
    unused = types.SimpleNamespace(VideoReader=None, cpu=None)
    monkeypatch.setitem(sys.modules, "decord", unused)
    models = {name: f"hf:{folder}" for name, folder in folders.items()}
    models["lmms"] = (
        f"lmms:llava_hf,pretrained={folders['llava']},dtype=float32,device_map=cpu,"
        f"chat_template={TEMPLATE}"
    )
    models["api"] = f"api:{server.url},model=m"
    records = {
        name: evaluate(tmp_path / name, model, "--batch-size", "4")
        for name, model in models.items()
    }
    for name, record in records.items():
        assert set(record["tasks"]) == set(TASKS)
        assert record["timing"]["questions"] == 24
        assert record["model"]["template"]["name"], name
    assert records["llava"]["model"]["batching"]["of_these_answered_differently"] == 0
    assert len(server.bodies) == 24
    # lmms-eval's class and ours read the same weights, prompts and pictures
    for task in TASKS:
        ours, lmms = (
            (tmp_path / name / f"samples_{task}.jsonl").read_text() for name in ("llava", "lmms")
        )
        assert ours == lmms
    page = tmp_path / "report.html"
    assert report.main([*(str(tmp_path / name) for name in models), "--out", str(page)]) == 0
    assert all(model.partition(",")[0] in page.read_text() for model in models.values())


def test_continued_after_a_kill_nothing_is_asked_twice(folders, server, tmp_path, monkeypatch):
    def reply(body: dict, number: int):
        if number == 10:
            return 401, {"error": "the key has run out"}, {}
        return said(f"answer {number}")

    server.reply = reply
    command = ["--tasks", "pope", "--limit", "20", "--out", str(tmp_path / "api")]
    command += ["--model", f"api:{server.url},model=m,concurrency=3"]
    assert run.main(command) == 2
    assert run.main(command) == 0
    assert len(server.bodies) == 21  # twenty, and the one that failed
    record = json.loads((tmp_path / "api" / "record.json").read_text())
    assert record["timing"]["resumed_answers"] >= 8


def test_a_template_is_named_in_the_record(folders, tmp_path):
    record = evaluate(tmp_path / "a", f"hf:{folders['llava']}", "--template", "vicuna_v1")
    assert record["arguments"]["template"] == "vicuna_v1"
    assert record["model"]["template"]["name"] == "vicuna_v1"
    again = ["--from-record", str(tmp_path / "a" / "record.json"), "--out", str(tmp_path / "b")]
    assert run.main(again) == 0
    names = [f"samples_{task}.jsonl" for task in TASKS]
    for name in names:
        assert (tmp_path / "a" / name).read_text() == (tmp_path / "b" / name).read_text()


@pytest.mark.parametrize(
    ("model", "more", "problem"),
    [
        ("hf:nowhere/at-all-here", (), "cannot load 'nowhere/at-all-here'"),
        ("hf:tests", (), "cannot load 'tests'"),
        ("hf:tests", ("--blind",), "--blind has no meaning for hf: models"),
        ("api:http://localhost:1/v1,model=m", ("--dtype", "float32"), "no meaning for api: models"),
        ("nano", ("--template", "plain"), "--template is for hf: models"),
    ],
)
def test_what_cannot_be_run_is_one_line(model, more, problem, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    command = ["--tasks", "pope", "--model", model, "--out", str(tmp_path / "out"), *more]
    assert run.main(command) == 2
    told = capsys.readouterr().err
    assert problem in told and told.count("\n") == 1


def test_all_kinds_are_in_the_help(capsys):
    with pytest.raises(SystemExit):
        run.main(["--help"])
    assert {"hf", "lmms", "api"} <= set(eval_models)
    assert all(f"{kind}:NAME" in capsys.readouterr().out for kind in ("hf",))
