"""Safe by default: no pickles, no code of others, no network unasked, no key told, no open page."""

from __future__ import annotations

import ast
import html
import json
import os
import re
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness_world import pope_rows, write_parquet
from test_harness_compare import write_run
from test_harness_plots import write_profile

from harness import report, run, score
from harness.scoring.judge import Judge
from vlmamba_core.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [
    p for top in ("vlmamba", "harness", "tasks", "tools") for p in (ROOT / top).rglob("*.py")
]
# Calls that run what they read, by the end of their dotted name.
NEVER = ("eval", "exec", "os.system", "os.popen", "read_pickle", "yaml.load", "marshal.loads")
MODULES = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
KEY = "sk-secret-0123456789"


def calls(path: Path) -> Iterator[tuple[str, dict[str, ast.expr], int]]:
    """(dotted name, keyword arguments, line) of every call in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            yield name, {k.arg: k.value for k in node.keywords if k.arg}, node.lineno


def is_constant(value: ast.expr | None, wanted: object) -> bool:
    return isinstance(value, ast.Constant) and value.value is wanted


def test_nothing_in_the_sources_runs_what_it_reads():
    assert len(SOURCES) > 100
    found = []
    for path in SOURCES:
        for name, given, line in calls(path):
            wrong = name in NEVER or name.endswith(tuple(f".{n}" for n in NEVER if "." not in n))
            wrong = wrong and not name.endswith(".eval")  # a module's inference mode
            wrong |= name.split(".")[0] in MODULES
            wrong |= name == "torch.load" and not is_constant(given.get("weights_only"), True)
            wrong |= name in ("np.load", "numpy.load") and "allow_pickle" in given
            wrong |= "shell" in given and not is_constant(given["shell"], False)
            trusted = given.get("trust_remote_code")
            wrong |= trusted is not None and not is_constant(trusted, False)
            found += [f"{path.relative_to(ROOT)}:{line} {name}"] * wrong
    assert not found, "\n".join(found)


def test_no_checkpoint_and_no_answer_ships_as_a_pickle():
    suffixes = {".pkl", ".pickle", ".pt", ".pth", ".bin", ".npy", ".joblib"}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    assert [name for name in listed.stdout.split("\n") if Path(name).suffix in suffixes] == []


# In a process of its own: the imports are watched too.
WATCH = """
import ipaddress, json, socket, sys
tried = []
def watched(method):
    def call(self, address, *rest):
        inside = self.family == socket.AF_UNIX
        if not inside:
            inside = address[0] == "localhost" or ipaddress.ip_address(address[0]).is_loopback
        if not inside:
            tried.append(repr(address))
            raise OSError("the network is watched")
        return method(self, address, *rest)
    return call
def resolve(host, *rest, **options):
    if host not in (None, "", "localhost", "127.0.0.1", "::1", socket.gethostname()):
        tried.append(repr(host))
        raise socket.gaierror("the network is watched")
    return looked_up(host, *rest, **options)
looked_up, socket.getaddrinfo = socket.getaddrinfo, resolve
for name in ("connect", "connect_ex"):
    setattr(socket.socket, name, watched(getattr(socket.socket, name)))
socket.socket.sendto = watched(socket.socket.sendto)
import importlib
codes = []
for command in json.loads(sys.argv[1]):
    module, *arguments = command
    codes.append(importlib.import_module(module).main(arguments))
print(json.dumps({"codes": codes, "tried": tried}))
"""


def watched(commands: list[list[str]], **environment: str | None) -> tuple[dict, str]:
    """Exit codes and attempts to leave this machine; and what was said on stderr."""
    given = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", WATCH, json.dumps(commands)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={name: value for name, value in given.items() if value is not None},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_the_demo_is_evaluated_scored_and_reported_without_a_network(tmp_path):
    """No variable has to be set for it."""
    row = {"question": "Is it?", "answer": "yes", "category": "random", "prediction": "Yes"}
    (tmp_path / "p.jsonl").write_text(json.dumps(row))
    out = str(tmp_path / "out")
    commands = [
        ["harness.run", "--tasks", "pope", "--limit", "2", "--backend", "torch", "--out", out],
        ["harness.score", "pope", str(tmp_path / "p.jsonl"), "--compare"],
        ["harness.report", out, "--out", str(tmp_path / "report.html")],
        ["harness.tables", "--from", out, "--out", str(tmp_path / "tables")],
    ]
    free = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"))
    found, _ = watched(commands, **free)
    assert found == {"codes": [0, 0, 0, 0], "tried": []}


def test_offline_the_hub_is_not_even_tried(tmp_path):
    start = ["harness.run", "--tasks", "pope", "--out", str(tmp_path / "out")]
    commands = [[*start, "--data", "hub"], [*start, "--model", "nobody/vl-mamba"]]
    found, said = watched(commands, HF_HUB_OFFLINE="1", HF_DATASETS_CACHE=str(tmp_path / "empty"))
    assert found == {"codes": [2, 2], "tried": []}
    assert len([line for line in said.splitlines() if line.startswith("error: ")]) == 2
    assert "Traceback" not in said


@pytest.fixture
def echo(monkeypatch) -> Iterator[str]:
    """A server that sends back what it gets: as status line first, then as its answer."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JUDGE_KEY", KEY)
    listener = socket.create_server(("127.0.0.1", 0))
    asked: list[bytes] = []

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                asked.append(connection.recv(65536))
                told = re.search(rb"(?i)authorization: ([^\r]*)", asked[-1])[1].decode()
                reply = json.dumps({"choices": [{"message": {"content": f"{told} 0.5"}}]})
                head = (
                    f"HTTP/1.1 200 {told}\r\nX-Key: {told}\r\nContent-Length: {len(reply)}\r\n\r\n"
                )
                connection.sendall((told if len(asked) == 1 else head + reply).encode())

    threading.Thread(target=serve, daemon=True).start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    listener.close()


def test_a_judges_key_is_told_to_nobody(echo, tmp_path, monkeypatch, capsys):
    """Not even where the judge sends it back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("harness.models.endpoint.WAITS_S", (0.0,))
    row = {"question_id": "v1_0", "question": "Who?", "answer": "a dog", "capability": "rec"}
    Path("p.jsonl").write_text(json.dumps(row | {"prediction": "a dog"}))
    judge = ["--judge", echo, "--judge-model", "m", "--judge-key-env", "JUDGE_KEY"]
    assert score.main(["mmvet", "p.jsonl", "--json", "s.json", "--per-case", *judge]) == 0
    printed = capsys.readouterr()
    assert KEY not in printed.out + printed.err
    assert KEY not in Path("s.json").read_text()


def test_a_judges_key_is_in_no_error(echo, monkeypatch):
    monkeypatch.setattr("harness.models.endpoint.WAITS_S", ())
    judge = Judge(echo, "m", "JUDGE_KEY")
    with pytest.raises(UserError) as caught:
        judge.ask("?")
    text = "".join(traceback.format_exception(caught.value))
    # the connection may be closed before or after the odd status line is read
    reasons = "RemoteProtocolError|ReadError|.*reset by peer"
    assert re.search(rf"is out of reach \(({reasons})\)", str(caught.value))
    assert KEY not in text + repr(judge)


def test_a_judges_key_is_in_no_file_of_a_run(echo, tmp_path, model, processor, capsys, monkeypatch):
    monkeypatch.setattr("harness.models.endpoint.WAITS_S", (0.0,))
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    image = pope_rows()[0]["image"]
    row = {"question_id": "v1_0", "question": "Who?", "answer": "a dog", "image": image}
    (tmp_path / "data").mkdir()
    write_parquet([row], tmp_path / "data" / "mmvet.parquet")
    arguments = ["--tasks", "mmvet", "--backend", "torch", "--judge", echo]
    arguments += ["--judge-key-env", "JUDGE_KEY", "--verbose"]
    for name in ("model", "data", "out"):
        arguments += [f"--{name}", str(tmp_path / name)]
    monkeypatch.setattr("tasks.mmvet.MMVet.max_new_tokens", lambda *_: 2)
    assert run.main(arguments) == 0
    assert report.main([str(tmp_path / "out"), "--out", str(tmp_path / "report.html")]) == 0
    printed = capsys.readouterr()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 8
    assert KEY not in printed.out + printed.err
    assert not [path for path in files if KEY.encode() in path.read_bytes()]
    assert json.loads((tmp_path / "out" / "record.json").read_text())["kind"] == "evaluation"


EVIL = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)> ' \" & {}"
FOLDER = "a'\"><img src=x onerror=alert(1)>&"


def escaped(text: str) -> str:
    """As a page writes it: quotation marks by number."""
    return html.escape(text).replace("&#x27;", "&#39;").replace("&quot;", "&#34;")


def evil_run(folder: Path) -> Path:
    """A run in which everything that may be text is an attack."""
    write_run(
        folder,
        [1, 0, None],
        question=EVIL,
        prediction=EVIL,
        parsed=EVIL,
        reference=[EVIL, EVIL, "x"],
        image=EVIL,
        excluded=EVIL,
    )
    record = json.loads((folder / "record.json").read_text())
    entry = record["tasks"]["pope"]
    metrics = {EVIL: {"value": 0.5}, f"{EVIL}/x": {"value": 0.5}}
    entry |= {"metrics": metrics, "excluded": {EVIL: 3}, "notes": [EVIL]}
    record |= {"label": EVIL, "protocol": EVIL, "finished": EVIL}
    record["tasks"]["counting"] = entry  # no benchmark of ours: its metrics are shown as they come
    record["arguments"] = {"model": EVIL, "data": EVIL, "tasks": EVIL, "limit": 3, "blind": True}
    parts = ("language_model_id", "vision_model_id", "connector", "scan")
    record["model"] = {"sha256": EVIL, "parameters": 9, "config": dict.fromkeys(parts, EVIL)}
    record["model"]["template"] = {"name": EVIL}  # parameters: a record's are a number, checked
    record["cost"] = {"device": EVIL}
    names = ("commit", "device", "device_name", "dtype", "backend", "python", "platform")
    record["settings"] = dict.fromkeys(names, EVIL) | {
        "packages": {EVIL: EVIL},
        "seeds": {EVIL: EVIL},
    }
    (folder / "record.json").write_text(json.dumps(record))
    return folder


def evil_profile(folder: Path) -> Path:
    record = json.loads((write_profile(folder) / "record.json").read_text())
    for point in record["points"]:
        point["model"] += EVIL
    record["points"].append(record["points"][0] | {"status": EVIL, "detail": EVIL, "result": None})
    record |= {"label": EVIL, "machine": record["machine"] | {"processor": EVIL, "dtype": EVIL}}
    (folder / "record.json").write_text(json.dumps(record))
    return folder


def evil_ablation(folder: Path) -> Path:
    test = {"variant": EVIL, "task": EVIL, "method": EVIL, "difference": 0.1, "p_value": 0.5}
    test |= {"low": 0.0, "high": 0.2, "n": 9, "clusters": 9, "better": 1, "worse": 0}
    folder.mkdir()
    record = {
        "kind": "ablation",
        "label": EVIL,
        "axis": EVIL,
        "final": EVIL,
        "arguments": {"seeds": [0, 1]},
        "cells": [{"variant": EVIL, "seed": s, "metrics": {EVIL: 1.0}} for s in (0, 1)],
        "tests": [test | {"seed_differences": [0.1], "seeds_alike": 1}],
        "settings": {"commit": EVIL},
    }
    (folder / "record.json").write_text(json.dumps(record))
    return folder


def test_everything_in_a_report_is_text(tmp_path):
    (tmp_path / FOLDER).mkdir()
    runs = [evil_run(tmp_path / FOLDER / name) for name in (FOLDER, f"2{FOLDER}")]
    runs += [evil_profile(tmp_path / f"p{FOLDER}"), evil_ablation(tmp_path / f"x{FOLDER}")]
    out = tmp_path / "report.html"
    assert report.main([*map(str, runs), "--out", str(out), "--title", EVIL]) == 0
    page = out.read_text(encoding="utf-8")
    assert page.count("<script") == page.count("</script>") == 2  # data and the page's own
    assert "<img src=x" not in page
    assert "onerror=alert(1)>" not in page
    assert page.count(escaped(EVIL)) > 30
    assert set(re.findall(r"<(\w+)", page.split("<script")[0])) <= {
        *("html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "h3", "p", "nav"),
        *("a", "div", "table", "tr", "th", "td", "span", "img", "br", "label", "select", "option"),
        *("input", "button", "header", "section", "caption", "thead", "tbody", "figure", "dialog"),
        *("figcaption", "ul", "li", "svg", "g", "path", "line", "rect", "text"),
    }
    held = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert held["tasks"][0]["questions"][0]["answers"][0]["prediction"] == EVIL
