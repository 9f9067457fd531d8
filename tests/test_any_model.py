"""Every kind of model through harness.run: journal, record and report are the same for all."""

from __future__ import annotations

import csv
import functools
import html
import json
import sys
import types

import pytest
import tiny_vlms
from test_api_models import Server, question, said

from harness import compare, report, run, score, tables
from harness.models import cost
from harness.models.registry import eval_models
from harness.models.templates import choose
from harness.runs.schema import counted

TASKS = ("pope", "mme", "mmbench")
TEMPLATE = "{% for turn in messages %}USER: {{ turn.content }} ASSISTANT:{% endfor %}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("vlms")
    names = ("llava", "qwen2_vl", "idefics3")
    return {name: str(tiny_vlms.save(name, root / name)) for name in names}


def evaluate(out, model: str, *more: str, names: tuple[str, ...] = TASKS) -> dict:
    command = ["--tasks", ",".join(names), "--limit", "8", "--model", model, "--out", str(out)]
    assert run.main([*command, *more]) == 0
    return json.loads((out / "record.json").read_text())


@pytest.fixture
def server():
    found = Server()
    yield found
    found.http.shutdown()
    found.http.server_close()


def test_all_kinds_of_models_in_one_table_and_report(
    folders, server, tmp_path, monkeypatch, capsys
):
    def reply(body: dict, number: int) -> tuple:
        used = {"completion_tokens": body["max_tokens"]}
        return said("yes" if "there" in question(body) else "A", usage=used)

    server.reply = reply
    once = functools.partial(cost.measure, repeats=1)
    monkeypatch.setattr(cost, "measure", once)
    unused = types.SimpleNamespace(VideoReader=None, cpu=None)
    monkeypatch.setitem(sys.modules, "decord", unused)
    models = {"nano": "nano"} | {name: f"hf:{folder}" for name, folder in folders.items()}
    models["lmms"] = (
        f"lmms:llava_hf,pretrained={folders['llava']},dtype=float32,device_map=cpu,"
        f"chat_template={TEMPLATE}"
    )
    models["api"] = f"api:{server.url},model=m"
    records = {
        name: evaluate(tmp_path / "runs" / name, model, "--batch-size", "4", "--cost")
        for name, model in models.items()
    }
    templates = dict.fromkeys(folders, "chat_template") | {
        "nano": "vicuna_v1",
        "lmms": "lmms-eval's llava_hf",
        "api": "the server's",
    }
    for name, record in records.items():
        assert set(record["tasks"]) == set(TASKS)
        assert record["timing"]["questions"] == 24
        assert record["model"]["template"]["name"] == templates[name]
    assert records["llava"]["model"]["batching"]["of_these_answered_differently"] == 0
    assert len(server.bodies) == 24 + 3  # and those that the cost is measured of
    # lmms-eval's class and ours read the same weights, prompts and pictures
    for task in TASKS:
        ours, lmms = (
            (tmp_path / "runs" / name / f"samples_{task}.jsonl").read_text()
            for name in ("llava", "lmms")
        )
        assert ours == lmms
    out = tmp_path / "tables"
    assert tables.main(["--from", str(tmp_path / "runs"), "--out", str(out)]) == 0
    rows = list(csv.DictReader((out / "models_and_cost.csv").read_text().splitlines()))
    assert {row["run"].partition(" (")[0]: row["template"] for row in rows} == templates
    for row in rows:
        known = {name for name, cell in row.items() if cell != "-"}
        elsewhere = {"device", "parameters", "peak GiB"} if "api:" in row["model"] else set()
        assert set(row) - known == elsewhere, row
    main = (out / "paper_main.csv").read_text()
    assert all(f"template {name}" in main for name in templates.values())
    folders_of = [str(tmp_path / "runs" / name) for name in models]
    capsys.readouterr()
    assert compare.main(folders_of) == 0
    legend = capsys.readouterr().out
    page = tmp_path / "report.html"
    assert report.main([*folders_of, "--out", str(page)]) == 0
    text = html.unescape(page.read_text())
    assert all(f"template {name}" in legend for name in templates.values())
    assert all(f">template {name}<" in text for name in templates.values())
    assert all(model.partition(",")[0] in text for model in models.values())
    assert all(row["tokens/s"] in text for row in rows)


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


@pytest.mark.parametrize("name", ["cobra", "chat_template", "mine.jinja"])
def test_a_checkpoint_is_asked_with_another_template(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.jinja").write_text(
        "{% for part in messages[0]['content'] %}{{ '<image>' if part['type'] == 'image' else "
        "'What color is it?' }}{% endfor %}"
    )
    own = evaluate(tmp_path / "own", "nano", names=("pope",))
    other = evaluate(tmp_path / "other", "nano", "--template", name, names=("pope",))
    assert own["model"]["template"]["name"] == "vicuna_v1"
    assert other["model"]["template"]["name"] == name
    answers = [(tmp_path / run / "samples_pope.jsonl").read_text() for run in ("own", "other")]
    told = f"template {name}, first 8"
    assert told in (tmp_path / "other" / "table.md").read_text()
    # nano's own chat template has the words of vicuna_v1
    assert (answers[0] == answers[1]) == (name == "chat_template")


def test_cobras_template_is_its_authors():
    tokenizer = types.SimpleNamespace(chat_template=None)
    processor = types.SimpleNamespace(image_token="<image>", tokenizer=tokenizer)
    rendered = choose(processor, "cobra").render(processor, " Is there a dog?\n", images=1)
    # h-zhao1997/cobra, ZephyrChatPromptBuilder.wrap_human; patches stand before all text
    assert rendered == "<image><|user|>\nIs there a dog?<|endoftext|>\n<|assistant|>\n"


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
        ("nano", ("--template", "vicuna"), "unknown template 'vicuna'; known, nearest first: vic"),
        (
            "api:http://localhost:1/v1,model=m",
            ("--template", "plain"),
            "an api: server puts its own template around a question",
        ),
        ("lmms:llava_hf", ("--template", "plain"), "a class of lmms-eval has its own template"),
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


def test_a_refused_question_says_its_own_reason(server, tmp_path, capsys):
    """In the table, the samples, a score made again, and the report page."""

    def reply(body: dict, number: int) -> tuple:
        if number in (1, 4):
            return 400, {"error": {"message": "flagged by a filter"}}, {}
        return said("yes")

    server.reply = reply
    out = tmp_path / "run"
    model = f"api:{server.url},model=m,concurrency=1"
    record = evaluate(out, model, names=("pope",))
    why = "not answered: HTTP 400: flagged by a filter"
    assert record["tasks"]["pope"]["excluded"] == {why: 2}
    assert f"2 left out: {why}" in (out / "table.md").read_text()
    file = out / "samples_pope.jsonl"
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    assert [n for n, sample in enumerate(samples) if sample["prediction"] is None] == [1, 4]
    assert [sample["excluded"] for sample in samples if sample["prediction"] is None] == [why] * 2
    capsys.readouterr()
    again = tmp_path / "again"
    assert score.main(["pope", str(file), "--out", str(again)]) == 0
    assert f"left out: 2 rows: {why}" in capsys.readouterr().out
    assert (again / "samples_pope.jsonl").read_text() == file.read_text()
    page = tmp_path / "page.html"
    assert report.main([str(out), "--out", str(page)]) == 0
    assert why in page.read_text() and "unreadable" not in page.read_text()


def test_many_reasons_are_one_in_a_table():
    reasons = ["unreadable image", *(f"not answered: request {n}" for n in range(4))]
    assert counted(reasons[:4]) == dict.fromkeys(reasons[:4], 1)
    together = "not answered, for 4 reasons (see the samples)"
    assert counted(reasons) == {"unreadable image": 1, together: 4}
