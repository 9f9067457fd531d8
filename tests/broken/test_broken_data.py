"""Broken data files under `harness.run --data`: one line, code 2, before any model is loaded."""

from __future__ import annotations

import base64
import datetime
import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness_world import mme_rows, png, pope_rows, write_parquet
from refusal import refused

import tasks
from harness import run
from harness.data.sources import Source
from harness.runs.schema import score_task

Builder = Callable[[Path], None]  # writes the files of one task into a folder
ROWS = [{**row, "image": "dog.png"} for row in pope_rows(images=1)]
TSV_COLUMNS = ("index", "question", "A", "B", "answer", "image")
TSV_ROW = ("1", "What?", "cat", "dog", "A", base64.b64encode(png((9, 9, 9))).decode())


def raw(content: bytes, name: str = "pope.jsonl") -> Builder:
    """One file of given bytes, beside a picture."""

    def build(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        (folder / "dog.png").write_bytes(png((9, 9, 9)))

    return build


def text(rows: list[dict]) -> bytes:
    """JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def changed(**cells: object) -> Builder:
    """JSON lines whose third row has other cells."""
    return raw(text([*ROWS[:2], {**ROWS[2], **cells}, *ROWS[3:]]))


def without(column: str) -> Builder:
    """JSON lines whose third row lacks a column."""
    cut = {name: cell for name, cell in ROWS[2].items() if name != column}
    return raw(text([*ROWS[:2], cut, *ROWS[3:]]))


def tsv(*lines: tuple[str, ...], name: str = "mmbench.tsv") -> Builder:
    """A table of separated text."""
    return raw("\n".join("\t".join(line) for line in lines).encode(), name)


def parquet(**columns: object) -> Builder:
    """A whole Parquet file in which columns are replaced; None takes one away."""

    def build(folder: Path) -> None:
        rows = pope_rows(images=1)
        table = pa.table({name: [row[name] for row in rows] for name in rows[0]})
        for name, values in columns.items():
            table = table.drop_columns([name])
            if values is not None:
                table = table.append_column(name, values)
        pq.write_table(table, folder / "pope.parquet")

    return build


def cut_parquet(keep: Callable[[bytes], bytes]) -> Builder:
    """A Parquet file of which only some bytes are left."""

    def build(folder: Path) -> None:
        path = write_parquet(pope_rows(images=20), folder / "pope.parquet")
        path.write_bytes(keep(path.read_bytes()))

    return build


def images(*paths: str) -> Builder:
    """Rows that name image files, beside a secret outside of the folder and a link to it."""

    def build(folder: Path) -> None:
        (folder.parent / "secret.png").write_bytes(png((1, 1, 1)))
        (folder / "link").symlink_to(folder.parent)
        rows = [{**row, "image": path} for row, path in zip(ROWS, paths * 6, strict=False)]
        (folder / "pope.jsonl").write_bytes(text(rows))

    return build


def gqa(questions: list[dict], table: list[dict] | None) -> Builder:
    """GQA's two tables."""

    def build(folder: Path) -> None:
        for name, rows in (("instructions", questions), ("images", table)):
            if rows is not None:
                place = folder / "GQA" / f"testdev_balanced_{name}"
                place.mkdir(parents=True)
                file = place / "testdev-00000-of-00001.parquet"
                datasets.Dataset.from_list(rows).to_parquet(file)

    return build


def several(*builders: Builder) -> Builder:
    """All of them."""

    def build(folder: Path) -> None:
        for builder in builders:
            builder(folder)

    return build


QUESTION = {"question": "What?", "answer": "dog", "imageId": "n0"}
IMAGE = {"id": "n0", "image": {"bytes": png((1, 1, 1)), "path": None}}
BAD_TEXT = pa.StringArray.from_buffers(
    6, pa.py_buffer(b"".join(i.to_bytes(4, "little") for i in range(7))), pa.py_buffer(b"\xff" * 6)
)

# name -> (task, what is wrong, what the one line says)
REFUSED: dict[str, tuple[str, Builder, str]] = {
    "an empty folder": ("pope", lambda folder: None, "no data for task 'pope'"),
    "an empty file": ("pope", raw(b""), "is empty"),
    "blank lines": ("pope", raw(b"\n \n\n"), "is empty"),
    "a BOM and nothing": ("pope", raw(b"\xef\xbb\xbf"), "is empty"),
    "an empty array": ("pope", raw(b"[]", "pope.json"), "has no rows"),
    "null": ("pope", raw(b"null"), "entry 1 is null"),
    "a number": ("pope", raw(b"7"), "entry 1 is a number"),
    "a list of numbers": ("pope", raw(b"[1, 2]"), "entry 1 is a number"),
    "nested nulls": ("pope", raw(b"[[null], null]"), "entry 1 is a list"),
    "a bare word": ("pope", raw(b"yes\n"), "line 1 is not JSON"),
    "a cut last line": ("pope", raw(text(ROWS)[:-20]), "line 6 is not JSON"),
    "a cut array": ("pope", raw(json.dumps(ROWS).encode()[:-9], "pope.json"), "is not JSON"),
    "Latin-1": ("pope", raw(text(ROWS).replace(b"dog", b"d\xf6g")), "as UTF-8 text"),
    "UTF-16": ("pope", raw(text(ROWS).decode().encode("utf-16")), "as UTF-8 text"),
    "a hundred thousand brackets": ("pope", raw(b"[" * 100_000), "is not JSON"),
    "a number of 5,000 digits": ("pope", raw(b'{"a": ' + b"9" * 5000 + b"}"), "is not JSON"),
    "an error page as JSON": ("pope", raw(b"<html>404</html>", "pope.json"), "is not JSON"),
    "a folder called pope.jsonl": ("pope", lambda f: (f / "pope.jsonl").mkdir(), "no data for"),
    "no answer": ("pope", without("answer"), "row 3: no column 'answer'"),
    "no image": ("pope", without("image"), "row 3: no column 'image'"),
    "no category": ("pope", without("category"), "row 3: no column 'category'"),
    "other columns": ("pope", raw(b'{"text": "a"}'), "no column 'question'.*it has: text"),
    "a question that is a number": ("pope", changed(question=5), "'question' mixes types"),
    "all questions numbers": (
        "pope",
        raw(text([{**row, "question": 5} for row in ROWS])),
        "row 1 cannot be used: column 'question' is 5",
    ),
    "all questions null": (
        "pope",
        raw(text([{**row, "question": None} for row in ROWS])),
        "row 1 cannot be used: column 'question' is None",
    ),
    "a question that is a list": ("pope", changed(question=["a"]), "'question' mixes types"),
    "an answer that is an object": ("pope", changed(answer={"a": None}), "'answer' mixes types"),
    "an image that is a number": ("pope", changed(image=5), "'image' mixes types"),
    "all images numbers": (
        "pope",
        raw(text([{**row, "image": 5} for row in ROWS])),
        "'image' holds .*not images",
    ),
    "half a surrogate pair": ("pope", changed(question="\ud800"), "'question' .*cannot be stored"),
    "an image above the folder": ("pope", images("../secret.png"), "leads out of the data folder"),
    "an absolute image": ("pope", images("/etc/hostname"), "leads out of the data folder"),
    "an image above a link": ("pope", images("link/../../secret.png"), "leads out of the data"),
    "an image far above": ("pope", images("dog.png", "a/../../secret.png"), "leads out"),
    "no columns of a table": ("mmbench", raw(b"\n", "mmbench.tsv"), "has no rows"),
    "an empty table": ("mmbench", raw(b"", "mmbench.tsv"), "has no rows"),
    "a header alone": ("mmbench", tsv(TSV_COLUMNS), "has no rows"),
    "a row too short": ("mmbench", tsv(TSV_COLUMNS, TSV_ROW, TSV_ROW[:4]), "line 3: 4 cells.*6"),
    "a row too long": ("mmbench", tsv(TSV_COLUMNS, (*TSV_ROW, "x")), "line 2: 7 cells"),
    "all rows too long": (
        "mmbench",
        tsv(TSV_COLUMNS, ("0", *TSV_ROW), ("1", *TSV_ROW)),
        "line 2: 7 cells",
    ),
    "a loose quote": ("mmbench", tsv(TSV_COLUMNS, ('"1', *TSV_ROW[1:])), "as a table"),
    "a column twice": ("mmbench", tsv((*TSV_COLUMNS[:-1], "A"), TSV_ROW), "'A' comes twice"),
    "a table without image": ("mmbench", tsv(TSV_COLUMNS[:5], TSV_ROW[:5]), "no column 'image'"),
    "a table in Latin-1": (
        "mmbench",
        raw("\t".join(TSV_COLUMNS).encode() + b"\n\xff\t\t\t\t\t", "mmbench.tsv"),
        "as a table",
    ),
    "an index that is no number": (
        "mmbench",
        tsv(TSV_COLUMNS, ("first", *TSV_ROW[1:])),
        "index 'first' is not a whole number",
    ),
    "several tables": (
        "mmbench",
        several(
            tsv(TSV_COLUMNS, TSV_ROW, name="MMBench_DEV_EN.tsv"),
            tsv(TSV_COLUMNS, TSV_ROW, name="mmbench_dev_20230712.tsv"),
        ),
        "several tables",
    ),
    "no bytes of Parquet": ("pope", cut_parquet(lambda data: b""), "not a readable parquet"),
    "half a Parquet": ("pope", cut_parquet(lambda data: data[: len(data) // 2]), "not a readable"),
    "a Parquet without its end": ("pope", cut_parquet(lambda data: data[:-8]), "not a readable"),
    "a Parquet of zeros": ("pope", cut_parquet(lambda data: b"\0" * 999), "not a readable"),
    "a Parquet with a hole": (
        "pope",
        cut_parquet(lambda data: data[:200] + b"\0" * 3000 + data[3200:]),
        "cannot read",
    ),
    "a Parquet that ends in a huge footer": (
        "pope",
        cut_parquet(lambda data: data[:-8] + b"\xff\xff\xff\x7fPAR1"),
        "not a readable",
    ),
    "JSON called Parquet": ("pope", raw(text(ROWS), "pope.parquet"), "not a readable parquet"),
    "Parquet without answers": ("pope", parquet(answer=None), "no column 'answer'"),
    "Parquet without images": ("pope", parquet(image=None), "no column 'image'"),
    "Parquet of numbers": ("pope", parquet(question=pa.array([5.0] * 6)), "'question' is 5.0"),
    "Parquet with images as numbers": ("pope", parquet(image=pa.array([5] * 6)), "not images"),
    "Parquet with images as lists": (
        "pope",
        parquet(image=pa.array([[{"a": 1}]] * 6)),
        "not images",
    ),
    "Parquet whose text is no UTF-8": ("pope", parquet(question=BAD_TEXT), "row 1 cannot be read"),
    "Parquet without rows": (
        "pope",
        lambda folder: pq.write_table(
            pq.read_table(write_parquet(pope_rows(1), folder / "x")).slice(0, 0),
            folder / "pope.parquet",
        ),
        "has no rows",
    ),
    "one of two shards": (
        "pope",
        lambda folder: write_parquet(pope_rows(1), folder / "pope-00000-of-00002.parquet"),
        "1 of 2 parquet shards",
    ),
    "another split": (
        "pope",
        lambda folder: ((folder / "pope").mkdir(), raw(text(ROWS), "pope/train.jsonl")(folder)),
        "has files of split train, not of test",
    ),
    "GQA without image ids": ("gqa", gqa([{"question": "a", "answer": "b"}], [IMAGE]), "'imageId'"),
    "GQA without its images": ("gqa", gqa([QUESTION], None), "no testdev_balanced_images/ folder"),
    "GQA with another image": ("gqa", gqa([{**QUESTION, "imageId": "n9"}], [IMAGE]), "'n9'"),
    "GQA with an image twice": ("gqa", gqa([QUESTION], [IMAGE, IMAGE]), "comes twice"),
    "GQA's table without images": ("gqa", gqa([QUESTION], [{"id": "n0"}]), "no column 'image'"),
    "GQA's table without ids": ("gqa", gqa([QUESTION], [{"image": IMAGE["image"]}]), "column 'id'"),
    "choices that are a number": (
        "scienceqa",
        raw(
            text([{"question": "a", "choices": 5, "answer": 0, "hint": "", "image": "dog.png"}]),
            "scienceqa.jsonl",
        ),
        "column 'choices' is 5",
    ),
    "a capability that is a number": (
        "mmvet",
        raw(
            text([{"question_id": 1, "question": ["a"], "capability": 5, "image": "dog.png"}]),
            "mmvet.jsonl",
        ),
        "column 'question' is",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, tmp_path, capsys, whole_checkpoint):
    task, build, message = REFUSED[name]
    folder = tmp_path / "data"
    folder.mkdir()
    build(folder)
    arguments = ["--tasks", task, "--data", folder, "--model", whole_checkpoint]
    refused(run.main, [*arguments, "--out", tmp_path / "out"], message, capsys)
    assert not (tmp_path / "out").exists()


def at_noon(row: dict) -> dict:
    """A row with a column that no benchmark reads."""
    return {**row, "when": datetime.date(2024, 1, 1).isoformat(), "extra": {"a": [None, {"b": 1}]}}


# name -> (task, what is odd, rows read)
READ: dict[str, tuple[str, Builder, int]] = {
    "a BOM": ("pope", raw(b"\xef\xbb\xbf" + text(ROWS)), 6),
    "carriage returns": ("pope", raw(text(ROWS).replace(b"\n", b"\r\n")), 6),
    "blank lines between": ("pope", raw(text(ROWS).replace(b"\n", b"\n\n \n")), 6),
    "a JSON array": ("pope", raw(json.dumps(ROWS).encode(), "pope.json"), 6),
    "one JSON object": ("pope", raw(json.dumps(ROWS[0]).encode(), "pope.json"), 1),
    "NaN in a column that is not read": ("pope", changed(other=float("nan")), 6),
    "nested nulls in a column that is not read": ("pope", raw(text(list(map(at_noon, ROWS)))), 6),
    "an image path with a NUL": ("pope", images("a\0b.png"), 6),
    "an image path of 5,000 letters": ("pope", images("x" * 5000), 6),
    "an image that is missing": ("pope", images("gone.png"), 6),
    "an image that is a folder": ("pope", images("."), 6),
    "a null image": ("pope", changed(image=None), 6),
    "an image behind the user's link": ("pope", images("link/secret.png"), 6),
    "large strings in Parquet": (
        "pope",
        parquet(question=pa.array(["Is it?"] * 6, pa.large_string())),
        6,
    ),
    "a dictionary column in Parquet": (
        "pope",
        parquet(answer=pa.array(["yes", "no"] * 3).dictionary_encode()),
        6,
    ),
    "a table with a BOM": (
        "mmbench",
        raw(
            "\ufeff".encode()
            + "\t".join(TSV_COLUMNS).encode()
            + b"\n"
            + "\t".join(TSV_ROW).encode(),
            "mmbench.tsv",
        ),
        1,
    ),
    "a table with line breaks in cells": (
        "mmbench",
        tsv(TSV_COLUMNS, ("1", '"What\nis ""it""?"', *TSV_ROW[2:])),
        1,
    ),
}


@pytest.mark.parametrize("name", READ)
def test_read(name, tmp_path):
    task, build, count = READ[name]
    folder = tmp_path / "data"  # what stands beside it is the test's own
    folder.mkdir()
    build(folder)
    rows = Source.parse(str(folder)).load(tasks.load(task), "paper")
    assert len(rows) == count
    assert None not in [row["image"] for row in rows]


def answers_of(rows: list[dict]) -> dict[str, int]:
    """Reason -> rows left out, with the right answer everywhere."""
    task = tasks.load("pope")
    report = task.evaluate(rows, [str(row["answer"]) for row in rows], "paper")
    assert report.n + sum(report.excluded.values()) == len(rows)
    assert not report.n or report.metrics["accuracy"] == 1
    return report.excluded


# name -> (what is odd in one of six rows, why it is left out)
LEFT_OUT = {
    "an answer of null": ({"answer": None}, "no reference: answer is neither yes nor no"),
    "an answer of NaN": ({"answer": float("nan")}, "no reference: answer is neither yes nor no"),
    "an answer that is a number": ({"answer": 1}, "no reference: answer is neither yes nor no"),
    "an empty answer": ({"answer": ""}, "no reference: answer is neither yes nor no"),
    "a category of null": ({"category": None}, "no category"),
    "a category that is a list": ({"category": []}, "no category"),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_left_out_and_counted(name):
    cells, reason = LEFT_OUT[name]
    assert answers_of([{**ROWS[0], **cells}, *ROWS[1:]]) == {reason: 1}


def test_a_question_without_its_image_is_left_out(tmp_path, whole_checkpoint, capsys):
    rows = mme_rows(images=2)
    rows[1] |= {"image": None}
    write_parquet(rows, tmp_path / "mme.parquet")
    arguments = ["--tasks", "mme", "--data", str(tmp_path), "--model", str(whole_checkpoint)]
    assert run.main([*arguments, "--out", str(tmp_path / "out"), "--backend", "torch"]) == 0
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    excluded = record["tasks"]["mme"]["excluded"]
    assert excluded["unreadable image"] == 1
    assert sum(excluded.values()) == 2  # its twin too: MME counts pairs
    assert record["tasks"]["mme"]["n"] == 6


def test_rows_that_come_twice_are_named():
    rows = [{name: cell for name, cell in row.items() if name != "image"} for row in ROWS]
    twice = [*rows, rows[0]]
    for keys, notes in ((["a"] * 7, 1), ([*"abcdefg"], 0)):  # the same picture, or another one
        answers = ["yes"] * 7
        result, _ = score_task(tasks.load("pope"), twice, answers, "paper", image_keys=keys)
        assert sum("1 row repeats an earlier one" in note for note in result.notes) == notes
        assert result.n == 7
