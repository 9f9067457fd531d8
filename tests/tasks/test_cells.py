"""A list in a table's cell is text: it is read as the list, or refused; never taken for a text."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lmms_eval.utils import load_yaml_config
from sample_documents import DOCUMENTS

import tasks
from harness import score
from harness.data.readers import read_documents
from harness.data.sources import Source
from harness.scoring import imports
from harness.scoring.submit import write_spreadsheet
from tasks.cells import read_list
from tasks.common import PROTOCOLS
from vlmamba_core.errors import UserError

# Every column of the benchmarks that scoring or a prompt takes as a list, with such a list.
# Commas, quotes of both kinds, brackets and line breaks are what a naive split would break at.
LISTS = {
    ("scienceqa", "choices"): ["no, it's not", 'yes, "indeed"', "[both]"],
    ("vqav2", "answers"): [{"answer": text, "answer_id": i} for i, text in enumerate("ab" * 5)],
    ("textvqa", "answers"): ["it's 2,000", "a]", "\n", *["stop"] * 7],
    ("textvqa", "ocr_tokens"): ["STOP", "2,000", "it's"],
    ("vizwiz", "answers"): ["it's 2,000", "a]", "\n", *["stop"] * 7],
    ("coco_cap", "answer"): ["A dog, a cat.", "It's a dog."],
    ("mmvet", "capability"): ["rec", "ocr"],
}
EVERY_LIST = pytest.mark.parametrize(("name", "column"), LISTS)
FOLDER = Path(tasks.__file__).parent
TEXT_HAS_A_MEANING = {("coco_cap", "answer"), ("mmvet", "capability")}


def written(name, column, text):
    """A document of the task with `text` in the column."""
    return {k: v for k, v in DOCUMENTS[name][0].items() if k != "image"} | {column: text}


def write_table(path, row):
    """One row as a person's table has it: every cell text, lists as Python writes them."""
    cells = {name: cell if isinstance(cell, str) else str(cell) for name, cell in row.items()}
    if path.suffix == ".xlsx":
        write_spreadsheet([cells], path)
        return
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, "excel-tab" if path.suffix == ".tsv" else "excel")
        writer.writerows([cells, cells.values()])


def test_these_are_all_lists_that_the_tasks_have():
    declared = {(name, c) for name in tasks.NAMES for c in tasks.load(name).list_columns}
    assert declared == set(LISTS)


@EVERY_LIST
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".xlsx"])
@pytest.mark.parametrize("write", [str, json.dumps])
def test_a_list_in_a_tables_cell_is_read(name, column, suffix, write, tmp_path):
    value = LISTS[name, column]
    path = tmp_path / f"{name}{suffix}"
    write_table(path, written(name, column, write(value)) | {"prediction": "B"})
    task = tasks.load(name)
    assert read_documents([path], task)[0][column] == value
    rows = score.read(task, path).rows
    assert rows[0].doc[column] == value
    if suffix == ".tsv" and (name, column) != ("textvqa", "ocr_tokens"):
        write_table(path, written(name, column, write(value)) | {"image": ""})
        assert Source.parse(str(tmp_path)).load(task, "lmms")[0][column] == value


@EVERY_LIST
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".xlsx"])
def test_a_cell_that_writes_no_list_is_refused(name, column, suffix, tmp_path):
    printed = str(np.array(["cat", "dog"], dtype=object))
    assert printed == "['cat' 'dog']"  # Python takes this for ['catdog']
    broken = [printed, "['cat', dog]", "[nan]", "['cat', ]]"]
    broken += ["[{[]: 1}]"]  # a list as a key
    broken += [] if (name, column) in TEXT_HAS_A_MEANING else ["cat", "cat, dog", "{'a': 1}"]
    for text in broken:
        path = tmp_path / f"{name}{suffix}"
        write_table(path, written(name, column, text) | {"prediction": "B"})
        message = f"row 1: column '{column}' is .*; expected a list such as"
        with pytest.raises(UserError, match=message):
            score.read(tasks.load(name), path)
        if suffix == ".tsv":
            with pytest.raises(UserError, match=message):
                Source.parse(str(tmp_path)).load(tasks.load(name), "lmms")


@EVERY_LIST
def test_a_list_written_as_text_where_lists_can_stand_is_refused(name, column, tmp_path):
    """JSON lines, Parquet and lmms-eval's own command."""
    task = tasks.load(name)
    text = str(LISTS[name, column])
    doc = written(name, column, text)
    message = f"column '{column}' is .*expected a list, not text"
    (tmp_path / f"{name}.jsonl").write_text(json.dumps(doc | {"image": None}))
    rows = [score.Joined("0", doc, "B")]
    for protocol in PROTOCOLS:
        with pytest.raises(UserError, match=message):
            score.score(task, rows, protocol)
        with pytest.raises(UserError, match=message):
            file = FOLDER / name / f"vlmamba_{name}{'_lmms' * (protocol == 'lmms')}.yaml"
            load_yaml_config(str(file))["doc_to_text"](doc, None)
    with pytest.raises(
        UserError, match=f"row 1 cannot be used: column {column!r} is .*expected a list"
    ):
        Source.parse(str(tmp_path)).load(task, "lmms")
    (tmp_path / f"{name}.jsonl").unlink()
    pq.write_table(pa.Table.from_pylist([doc | {"image": None}]), tmp_path / f"{name}.parquet")
    with pytest.raises(UserError, match=message):
        Source.parse(str(tmp_path)).load(task, "lmms")


def test_a_text_alone_counts_where_it_has_a_meaning(tmp_path):
    path = tmp_path / "x.csv"
    write_table(path, {"question_id": "1.jpg", "answer": "a cat, and a dog"})
    assert read_documents([path], tasks.load("coco_cap"))[0]["answer"] == "a cat, and a dog"
    write_table(path, {"question_id": "v1_0", "question": "?", "capability": "rec,ocr"})
    assert read_documents([path], tasks.load("mmvet"))[0]["capability"] == "rec,ocr"


def test_a_text_in_place_of_peoples_answers_is_a_missing_truth():
    docs = [DOCUMENTS["textvqa"][0], written("textvqa", "answers", "stop")]
    report = tasks.load("textvqa").evaluate(docs, ["stop", "stop"], "lmms")
    assert (report.n, report.excluded) == (1, {"no reference answers": 1})


def test_an_empty_cell_is_a_hidden_list(tmp_path):
    path = tmp_path / "x.csv"
    write_table(path, written("textvqa", "answers", "") | {"prediction": "a"})
    rows = score.read(tasks.load("textvqa"), path).rows
    with pytest.raises(UserError, match="1: no reference answers"):
        score.score(tasks.load("textvqa"), rows, "lmms")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[]", []),
        (" ['a',\n 'b'] ", ["a", "b"]),
        ("[null, true]", [None, True]),
        ("[None, True]", [None, True]),
        ("['a'\n 'b']", None),
        ("['a' 'b', 'c']", None),
        ("[" * 5000 + "]" * 5000, None),
        ("('a', 'b')", ["a", "b"]),
        ("(a cat)", None),
        ("[x for x in 'ab']", None),
        ("__import__('os')", None),
        ("'a'", None),
        ("['a", None),
        ("", None),
    ],
)
def test_what_is_read_as_a_list(text, value):
    assert read_list(text) == value


def test_other_columns_of_a_table_are_text_too(tmp_path):
    path = tmp_path / "x.csv"
    doc = {"question": "Is it?", "choices": "['no', 'yes']", "answer": "1", "hint": ""}
    write_table(path, doc | {"has_image": "True", "prediction": "B"})
    rows = score.read(tasks.load("scienceqa"), path).rows
    assert score.score(tasks.load("scienceqa"), rows, "paper").metrics["accuracy"] == 1.0
    write_table(path, {"question": "?", "answer": "a", "isBalanced": "False", "prediction": "a"})
    rows = score.read(tasks.load("gqa"), path).rows
    with pytest.raises(UserError, match="not in the balanced set"):
        score.score(tasks.load("gqa"), rows, "paper")
    write_table(tmp_path / "scienceqa.tsv", doc | {"image": ""})
    loaded = Source.parse(str(tmp_path)).load(tasks.load("scienceqa"), "paper")
    assert "nan" not in tasks.load("scienceqa").prompt(loaded[0], "paper")


CAPTIONS = [["A child rides a horse.", "A kid's pony, by the sea."], ["Two cats.", "Cats asleep."]]


def test_vlmevalkit_captions_are_lists_in_cells(tmp_path):
    answers = ["A child rides a pony.", "Two cats asleep."]
    rows = [
        {"index": i, "question": "Describe.", "answer": str(c), "image_path": f"{i}.jpg"}
        | {"prediction": answers[i]}
        for i, c in enumerate(CAPTIONS)
    ]
    write_spreadsheet(rows, tmp_path / "m_COCO_VAL.xlsx")
    imported, _ = imports.load("vlmevalkit", tasks.load("coco_cap"), tmp_path / "m_COCO_VAL.xlsx")
    assert [row.doc for row in imported] == [
        {"question_id": f"{i}.jpg", "answer": captions} for i, captions in enumerate(CAPTIONS)
    ]
    assert [row.prediction for row in imported] == answers


def test_vlmevalkit_mmvet(tmp_path):
    row = {"index": 3, "question": "What?", "answer": "a<AND>b", "category": "rec,ocr"}
    write_spreadsheet([row | {"prediction": "a"}], tmp_path / "m_MMVet.xlsx")
    task = tasks.load("mmvet")
    (joined,), _ = imports.load("vlmevalkit", task, tmp_path / "m_MMVet.xlsx")
    assert joined.doc == {
        "question_id": "3",
        "question": "What?",
        "answer": "a<AND>b",
        "capability": "rec,ocr",
    }
    assert task.submission([joined.doc], ["a"]) == {"v1_3": "a"}
