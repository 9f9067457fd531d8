"""Broken prediction and truth files under `harness.score`: one line, code 2, no score."""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from refusal import refused
from sample_documents import DOCUMENTS

from harness import score

POPE = DOCUMENTS["pope"]
ROWS = [{**doc, "prediction": "Yes"} for doc in POPE]
ANSWERS = [
    {"question_id": 1, "prompt": "Is there a dog?", "text": "Yes"},
    {"question_id": 2, "prompt": "Is there a cat?", "text": "No"},
]
QUESTIONS = [
    {"question_id": 1, "image": "a.jpg", "text": "Is there a dog?", "category": "random"},
    {"question_id": 2, "image": "a.jpg", "text": "Is there a cat?", "category": "random"},
]
LABELS = [{"text": row["text"], "label": "yes"} for row in QUESTIONS]
MME = [
    {"question_id": "OCR/1.jpg", "category": "OCR", "question": "Is it?", "answer": "Yes"},
    {"question_id": "OCR/1.jpg", "category": "OCR", "question": "Or not?", "answer": "No"},
]
SAMPLE = {"doc_id": 0, "filtered_resps": ["Yes"], "doc": POPE[0]}
KIT = [{"index": "1", "question": "Is it?", "answer": "yes", "category": "random"}]


def lines(rows: list) -> bytes:
    """JSON lines."""
    return "\n".join(map(json.dumps, rows)).encode()


def sheet(rows: list[dict]) -> bytes:
    """An Excel file."""
    file = io.BytesIO()
    pd.DataFrame(rows).to_excel(file, index=False)
    return file.getvalue()


def table(rows: list[dict]) -> bytes:
    """A Parquet file."""
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


def zipped(name: str, content: bytes) -> bytes:
    """A Zip file with one member."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, content)
    return file.getvalue()


def holed(data: bytes) -> bytes:
    """The same with zeros in its middle."""
    third = len(data) // 3
    return data[:third] + b"\0" * third + data[2 * third :]


def edited(rows: list[dict], place: int, **cells: object) -> bytes:
    """JSON lines with other cells in one row."""
    return lines([row | cells if i == place else row for i, row in enumerate(rows)])


Files = dict[str, bytes]
# name -> (files, arguments, what the one line says)
REFUSED: dict[str, tuple[Files, str, str]] = {
    "empty": ({"p.jsonl": b""}, "pope p.jsonl", "is empty"),
    "a BOM": ({"p.jsonl": b"\xef\xbb\xbf"}, "pope p.jsonl", "is empty"),
    "an empty array": ({"p.json": b"[]"}, "pope p.json", "has no rows"),
    "null": ({"p.json": b"null"}, "pope p.json", "entry 1 is null"),
    "a cut last line": ({"p.jsonl": lines(ROWS)[:-5]}, "pope p.jsonl", "line 2 is not JSON"),
    "bad UTF-8": ({"p.jsonl": lines(ROWS) + b"\xff"}, "pope p.jsonl", "as UTF-8 text"),
    "UTF-16": ({"p.jsonl": lines(ROWS).decode().encode("utf-16")}, "pope p.jsonl", "as UTF-8"),
    "binary": ({"p.jsonl": bytes(range(256))}, "pope p.jsonl", "as UTF-8 text"),
    "deep brackets": ({"p.jsonl": b"[" * 99_999}, "pope p.jsonl", "is not JSON"),
    "no prediction": ({"p.jsonl": lines(POPE)}, "pope p.jsonl", "row 1: prediction is None"),
    "a null prediction": ({"p.jsonl": edited(ROWS, 1, prediction=None)}, "pope p.jsonl", "row 2"),
    "NaN": ({"p.jsonl": edited(ROWS, 1, prediction=math.nan)}, "pope p.jsonl", "prediction is nan"),
    "a number": ({"p.jsonl": edited(ROWS, 0, prediction=1)}, "pope p.jsonl", "prediction is 1"),
    "a list": ({"p.jsonl": edited(ROWS, 0, prediction=["Yes"])}, "pope p.jsonl", "prediction is"),
    "true": ({"p.jsonl": edited(ROWS, 0, prediction=True)}, "pope p.jsonl", "prediction is True"),
    "an id twice": (
        {"p.jsonl": lines([row | {"case_id": 7} for row in ROWS])},
        "pope p.jsonl",
        "case_id '7' comes twice",
    ),
    "another task": ({"p.jsonl": lines(ROWS)}, "mme p.jsonl", "has no column 'question_id'"),
    "hidden truth": (
        {"p.jsonl": edited(ROWS[:1], 0, answer=None)},
        "pope p.jsonl",
        "none of 1 rows",
    ),
    "an index of words": (
        {"p.jsonl": lines([DOCUMENTS["mmbench"][0] | {"index": "x", "prediction": "A"}])},
        "mmbench p.jsonl",
        "index 'x' is not a whole number",
    ),
    "a folder": ({"p.jsonl/x": b""}, "pope p.jsonl", "no file"),
    "no file": ({}, "pope p.jsonl", "no file"),
    "a name of 5,000 letters": ({}, "pope " + "x" * 5000, "no file"),
    "half a Parquet": (
        {"p.parquet": table(ROWS)[:-99]},
        "pope p.parquet",
        "not a readable parquet",
    ),
    "a Parquet with holes": (
        {"p.parquet": holed(table(ROWS * 99))},
        "pope p.parquet",
        "not a readable parquet",
    ),
    "a Parquet without rows": (
        {"p.parquet": table([])},
        "pope p.parquet",
        "has no rows",
    ),
    "text called Excel": ({"p.xlsx": b"a,b"}, "pope p.xlsx", "as a table"),
    "Zip called Excel": ({"p.xlsx": zipped("x", b"y")}, "pope p.xlsx", "as a table"),
    "half an Excel": ({"p.xlsx": sheet(ROWS)[:3000]}, "pope p.xlsx", "as a table"),
    "an Excel with holes": ({"p.xlsx": holed(sheet(ROWS))}, "pope p.xlsx", "as a table"),
    "an Excel without rows": ({"p.xlsx": sheet([])}, "pope p.xlsx", "has no rows"),
    "a ragged CSV": ({"p.csv": b"question,answer\na,b,c\n"}, "pope p.csv", "line 2: 3 cells"),
    "a cut CSV": ({"p.csv": b'question,answer\na,"b\n'}, "pope p.csv", "as a table"),
    "a CSV with a column twice": ({"p.csv": b"a,a\n1,2\n"}, "pope p.csv", "'a' comes twice"),
    "LLaVA without truth": (
        {"p.jsonl": lines(ANSWERS)},
        "pope p.jsonl --import llava",
        "need --truth",
    ),
    "LLaVA without text": (
        {"p.jsonl": edited(ANSWERS, 1, text=None), "q": lines(QUESTIONS), "random": lines(LABELS)},
        "pope p.jsonl --import llava --truth q random",
        "answer 2 has no text",
    ),
    "LLaVA with an answer twice": (
        {
            "p.jsonl": lines([*ANSWERS, ANSWERS[0]]),
            "q": lines(QUESTIONS),
            "random": lines(LABELS),
        },
        "pope p.jsonl --import llava --truth q random",
        "second answer to one question",
    ),
    "LLaVA with an answer to nothing": (
        {
            "p.jsonl": edited(ANSWERS, 0, question_id=9),
            "q": lines(QUESTIONS),
            "random": lines(LABELS),
        },
        "pope p.jsonl --import llava --truth q random",
        "to no question",
    ),
    "LLaVA with other labels": (
        {"p.jsonl": lines(ANSWERS), "q": lines(QUESTIONS), "random": lines(LABELS[::-1])},
        "pope p.jsonl --import llava --truth q random",
        "no label in its place",
    ),
    "LLaVA with labels twice": (
        {
            "p.jsonl": lines(ANSWERS),
            "q": lines(QUESTIONS),
            "random": lines(LABELS),
            "random2": lines(LABELS),
        },
        "pope p.jsonl --import llava --truth q random random2",
        "two label files",
    ),
    "LLaVA with a question id twice": (
        {
            "p.jsonl": lines(ANSWERS),
            "q": edited(QUESTIONS, 1, question_id=1),
            "random": lines(LABELS),
        },
        "pope p.jsonl --import llava --truth q random",
        "two documents for question '1'",
    ),
    "LLaVA with a question that is a number": (
        {"p.jsonl": lines(ANSWERS), "q": edited(QUESTIONS, 0, text=5), "random": lines(LABELS)},
        "pope p.jsonl --import llava --truth q random",
        "--truth is not",
    ),
    "LLaVA with empty labels": (
        {"p.jsonl": lines(ANSWERS), "q": lines(QUESTIONS), "random": b"[]"},
        "pope p.jsonl --import llava --truth q random",
        "has no rows",
    ),
    "LLaVA's MME with a number as id": (
        {"p.jsonl": lines(ANSWERS), "t.jsonl": lines(MME)},
        "mme p.jsonl --import llava --truth t.jsonl",
        "to no question",
    ),
    "LLaVA's MME with a null question": (
        {"p.jsonl": lines(ANSWERS), "t.jsonl": edited(MME, 0, question=None)},
        "mme p.jsonl --import llava --truth t.jsonl",
        "--truth is not",
    ),
    "LLaVA's MME with two truths": (
        {
            "p.jsonl": lines(ANSWERS),
            "t.jsonl": lines([MME[0], MME[0] | {"answer": "No"}]),
        },
        "mme p.jsonl --import llava --truth t.jsonl",
        "two documents",
    ),
    "LLaVA's ScienceQA of numbers": (
        {"p.json": json.dumps({"correct": 5, "incorrect": []}).encode(), "t.json": b"[]"},
        "scienceqa p.json --import llava --truth t.json",
        "has no lists of answers|has no rows|is empty",
    ),
    "LLaVA's ScienceQA without conversations": (
        {"p.json": lines(ANSWERS), "t.json": json.dumps([{"id": 1}, {"id": 2}]).encode()},
        "scienceqa p.json --import llava --truth t.json",
        "--truth is not",
    ),
    "LLaVA's ScienceQA with thirty choices": (
        {
            "p.json": lines(ANSWERS),
            "t.json": json.dumps(
                [
                    {
                        "id": i,
                        "conversations": [
                            {
                                "value": "Q\n"
                                + "\n".join(f"{c}. x" for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ")
                            },
                            {"value": i},
                        ],
                    }
                    for i in (1, 2)
                ]
            ).encode(),
        },
        "scienceqa p.json --import llava --truth t.json",
        "--truth is not",
    ),
    "VLMEvalKit without prediction": (
        {"p.tsv": b"index\tquestion\n1\ta\n"},
        "pope p.tsv --import vlmevalkit",
        "no column 'prediction'",
    ),
    "VLMEvalKit, header alone": (
        {"p.tsv": b"index\tprediction\n"},
        "pope p.tsv --import vlmevalkit",
        "has no rows",
    ),
    "VLMEvalKit, a row too short": (
        {"p.tsv": b"index\tquestion\tprediction\n1\ta\n"},
        "pope p.tsv --import vlmevalkit",
        "line 2: 2 cells",
    ),
    "VLMEvalKit with a number as prediction": (
        {"p.json": lines([KIT[0] | {"prediction": 5}])},
        "pope p.json --import vlmevalkit",
        "prediction is 5",
    ),
    "VLMEvalKit without category": (
        {"p.json": lines([{"index": "1", "prediction": "Yes"}])},
        "pope p.json --import vlmevalkit",
        "is not a pope row",
    ),
    "VLMEvalKit with a list as category": (
        {"p.json": lines([KIT[0] | {"prediction": "Yes", "category": ["random"]}])},
        "pope p.json --import vlmevalkit",
        "is not a pope row",
    ),
    "VLMEvalKit with code as answers": (
        {"p.json": lines([{"index": "1", "question": "a", "prediction": "b", "answer": "exit()"}])},
        "textvqa p.json --import vlmevalkit",
        "is not a textvqa row",
    ),
    "VLMEvalKit with deep answers": (
        {
            "p.json": lines(
                [{"index": "1", "question": "a", "prediction": "b", "answer": "[" * 9999}]
            )
        },
        "textvqa p.json --import vlmevalkit",
        "is not a textvqa row",
    ),
    "lmms-eval without doc_id": (
        {"p.jsonl": lines([{"filtered_resps": ["a"]}])},
        "pope p.jsonl --import lmms-eval",
        "no doc_id or filtered_resps",
    ),
    "lmms-eval with true as doc_id": (
        {"p.jsonl": lines([SAMPLE | {"doc_id": True}])},
        "pope p.jsonl --import lmms-eval",
        "no doc_id or filtered_resps",
    ),
    "lmms-eval with empty answers": (
        {"p.jsonl": lines([SAMPLE | {"filtered_resps": [[]]}])},
        "pope p.jsonl --import lmms-eval",
        "no doc_id or filtered_resps",
    ),
    "lmms-eval with a document too far": (
        {"p.jsonl": lines([{"doc_id": 2, "filtered_resps": ["a"]}]), "t.jsonl": lines(POPE)},
        "pope p.jsonl --import lmms-eval --truth t.jsonl",
        "no document 2",
    ),
    "lmms-eval with a document below zero": (
        {"p.jsonl": lines([{"doc_id": -1, "filtered_resps": ["a"]}]), "t.jsonl": lines(POPE)},
        "pope p.jsonl --import lmms-eval --truth t.jsonl",
        "no document -1",
    ),
    "lmms-eval with a document twice": (
        {"p.jsonl": lines([SAMPLE, SAMPLE])},
        "pope p.jsonl --import lmms-eval",
        "'0' comes twice",
    ),
    "lmms-eval with another task's document": (
        {"p.jsonl": lines([SAMPLE | {"doc": {"a": 1}}])},
        "pope p.jsonl --import lmms-eval",
        "has no column",
    ),
}


def put(folder: Path, files: Files) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, tmp_path, capsys, monkeypatch):
    files, arguments, message = REFUSED[name]
    monkeypatch.chdir(tmp_path)
    put(tmp_path, files)
    refused(score.main, [*arguments.split(), "--json", "scores.json"], message, capsys)
    assert not (tmp_path / "scores.json").exists()


EXPECTED = 0.5  # accuracy of ROWS
ODD: dict[str, Callable[[], bytes]] = {
    "BOM": lambda: b"\xef\xbb\xbf" + lines(ROWS),
    "carriage returns": lambda: lines(ROWS).replace(b"\n", b"\r\n"),
    "blank lines": lambda: b"\n\n" + lines(ROWS).replace(b"\n", b"\n\n") + b"\n\n",
    "an array": lambda: json.dumps(ROWS).encode(),
    "keys twice": lambda: lines(ROWS).replace(b'"question"', b'"question": "old", "question"'),
    "half a surrogate pair": lambda: edited(ROWS, 0, prediction="Yes \ud83d"),
    "control characters": lambda: edited(ROWS, 0, prediction="Yes \x1b[31m\0\x07"),
    "NaN elsewhere": lambda: edited(ROWS, 0, other=math.nan),
    "nested nulls elsewhere": lambda: edited(ROWS, 0, other=[None, {"a": None}]),
    "a long answer": lambda: edited(ROWS, 0, prediction="Yes " + "very " * 200_000),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_files_score_as_the_plain_one(name, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_bytes(ODD[name]())
    out = tmp_path / "out.json"
    arguments = ["pope", str(tmp_path / "p.jsonl"), "--json", str(out), "--per-case"]
    assert score.main(arguments) == 0
    content = json.loads(out.read_text(encoding="utf-8"))
    assert (content["metrics"]["accuracy"], content["n"]) == (EXPECTED, 2)
    assert "\x1b" not in capsys.readouterr().out  # a file does not steer the terminal


@pytest.mark.parametrize("kind", ["csv", "tsv", "xlsx", "parquet"])
def test_every_kind_of_table_scores_alike(kind, tmp_path, capsys):
    path = tmp_path / f"p.{kind}"
    if kind in ("csv", "tsv"):
        pd.DataFrame(ROWS).to_csv(path, index=False, sep="\t" if kind == "tsv" else ",")
    else:
        path.write_bytes(sheet(ROWS) if kind == "xlsx" else table(ROWS))
    assert score.main(["pope", str(path)]) == 0
    assert "accuracy 50.0% too few: 2 clusters 2" in " ".join(capsys.readouterr().out.split())


def test_rows_that_come_twice_are_named(tmp_path, capsys):
    rows = [row | {"question_id": str(number)} for number, row in enumerate(ROWS)]
    (tmp_path / "p.jsonl").write_bytes(lines([*rows, rows[0]]))
    assert score.main(["pope", str(tmp_path / "p.jsonl")]) == 0
    assert "note: 1 row repeats an earlier one in every column" in capsys.readouterr().out


def test_a_submission_holds_what_json_can_hold(tmp_path):
    rows = [doc | {"prediction": "cat \ud83d"} for doc in DOCUMENTS["vqav2"]]
    (tmp_path / "p.jsonl").write_bytes(lines(rows))
    arguments = ["vqav2", str(tmp_path / "p.jsonl"), "--submit", str(tmp_path / "sent.json")]
    assert score.main(arguments) == 0
    assert json.loads((tmp_path / "sent.json").read_text())[0]["answer"].startswith("cat")
    rows = [doc | {"prediction": "A \ud83d\x00"} for doc in DOCUMENTS["mmbench"]]
    (tmp_path / "p.jsonl").write_bytes(json.dumps(rows).replace("NaN", "null").encode())
    arguments = ["mmbench", str(tmp_path / "p.jsonl"), "--submit", str(tmp_path / "sent.xlsx")]
    assert score.main(arguments) == 0
