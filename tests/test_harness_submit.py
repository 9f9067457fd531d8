"""Submission files are whole: an entry for each question that the server asks, and no other."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
from harness_world import png

import tasks
from harness import score
from harness.data.sources import Source
from harness.scoring import submit
from vlmamba_core.errors import UserError

VQAV2, TEXTVQA, MMVET = (tasks.load(name) for name in ("vqav2", "textvqa", "mmvet"))
TEST = [0, 1, 1000, 1001, 2000]
TESTDEV = [1001, 0]  # a subset of test, in an order of its own


def question(number: int) -> dict:
    """A row of lmms-lab/VQAv2's test splits: no truth, and types that say nothing."""
    return {
        "question_type": "none",
        "multiple_choice_answer": None,
        "answers": None,
        "image_id": number // 1000,
        "answer_type": None,
        "question_id": number,
        "question": f"What is {number}?",
        "image": {"bytes": png((number % 255, 9, 9)), "path": None},
    }


def write_split(root: Path, split: str, numbers: list[int]) -> None:
    folder = root / "VQAv2" / "data"
    folder.mkdir(parents=True, exist_ok=True)
    rows = datasets.Dataset.from_list([question(number) for number in numbers])
    rows = rows.cast_column("image", datasets.Image())
    rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")


@pytest.fixture
def vqa(tmp_path) -> Path:
    """A folder as a copy of the hub's repository is, both test splits in it."""
    write_split(tmp_path, "test", TEST)
    write_split(tmp_path, "testdev", TESTDEV)
    return tmp_path


def wanted(root: Path, split: str) -> submit.Wanted:
    source = Source.parse(str(root), split=split)
    return submit.wanted(VQAV2, source, source.load(VQAV2, "paper"))


def sent(path: Path) -> dict:
    return {entry["question_id"]: entry["answer"] for entry in json.loads(path.read_text())}


def test_a_testdev_file_has_every_question_of_test(vqa):
    docs = [question(number) for number in TESTDEV]
    whole = wanted(vqa, "testdev")
    n, notes = submit.write(VQAV2, docs, ["Two dogs.", "a Cat"], vqa / "v.json", whole)
    assert n == 5
    assert sent(vqa / "v.json") == {0: "cat", 1: "", 1000: "", 1001: "2 dogs", 2000: ""}
    assert list(sent(vqa / "v.json")) == TEST  # the server's order, each once
    assert len(notes) == 1
    assert "3 answers in it are empty: the server wants every question of split 'test'" in notes[0]


def test_what_a_limit_leaves_out_is_counted_and_named(vqa):
    whole = wanted(vqa, "testdev")
    _, notes = submit.write(VQAV2, [question(0)], ["cat"], vqa / "v.json", whole)
    assert sent(vqa / "v.json")[1001] == ""
    assert (
        "1 answers in it are empty and count as wrong: not asked (first question_id: 1001)"
        in (notes[1])
    )


def test_a_test_file_needs_no_other_split(vqa):
    whole = wanted(vqa, "test")
    docs = [question(number) for number in TEST]
    n, notes = submit.write(VQAV2, docs, ["cat"] * 5, vqa / "v.json", whole)
    assert (n, notes) == (5, [])


def test_without_the_test_split_the_file_is_said_to_be_refused(tmp_path):
    write_split(tmp_path, "testdev", TESTDEV)
    whole = wanted(tmp_path, "testdev")
    docs = [question(number) for number in TESTDEV]
    n, notes = submit.write(VQAV2, docs, ["cat"] * 2, tmp_path / "v.json", whole)
    assert n == 2
    assert notes[0].startswith("the test server refuses this file as it stands: it wants an entry")
    assert "every question of split 'test'" in notes[0]


def test_answers_to_questions_that_the_server_does_not_ask_are_refused(vqa):
    write_split(vqa, "validation", [7, 0])
    with pytest.raises(UserError, match=r"1 of 2 answers, the first to question_id 7, are to no q"):
        wanted(vqa, "validation")


def test_the_published_test_split_is_read_without_its_images(monkeypatch):
    asked = {}

    def load_dataset(path, name, **options):
        asked.update(options, path=path)
        return iter([{"question_id": number} for number in TEST])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = Source.parse("hub", split="testdev").questions(VQAV2, "test")
    assert [row["question_id"] for row in found] == TEST
    assert asked["path"] == "lmms-lab/VQAv2"
    assert (asked["split"], asked["streaming"], asked["columns"]) == ("test", True, ["question_id"])


def test_streaming_one_column_is_what_the_library_does(vqa):
    """The same call on a local file: the builder takes `columns`, and gives no other."""
    rows = datasets.load_dataset(
        "parquet",
        None,
        data_files=[str(next(vqa.rglob("test-*.parquet")))],
        split="train",
        revision=None,
        streaming=True,
        columns=["question_id"],
    )
    assert list(rows) == [{"question_id": number} for number in TEST]


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ([1, 2, 1], "rows 1 and 3 have one question_id, 1; the test server takes one answer"),
        ([1, None], "a row has no question_id, which the test server needs"),
    ],
)
def test_ids_that_a_server_cannot_use(numbers, message, tmp_path):
    docs = [{"question_id": number} for number in numbers]
    with pytest.raises(UserError, match=message):
        submit.write(VQAV2, docs, ["x"] * len(docs), tmp_path / "v.json")


def test_textvqas_file_is_the_one_its_server_takes(tmp_path):
    """Keys as mmf's `format_for_evalai` writes them; the answer as it came, stripped."""
    docs = [
        {"question_id": 34602, "image_id": "0054c"},
        {"question_id": 34603, "image_id": "0054c"},
    ]
    submit.write(TEXTVQA, docs, ["The Times\n", " 2,000"], tmp_path / "t.json")
    assert json.loads((tmp_path / "t.json").read_text()) == [
        {"question_id": 34602, "answer": "The Times"},
        {"question_id": 34603, "answer": "2,000"},
    ]


def test_a_prediction_file_is_completed_from_the_questions(vqa, capsys):
    answers = vqa / "answers.jsonl"
    rows = [{k: v for k, v in question(0).items() if k != "image"} | {"prediction": "A cat."}]
    answers.write_text("\n".join(map(json.dumps, rows)))
    truth = str(next(vqa.rglob("test-*.parquet")))
    assert score.main(["vqav2", str(answers), "--submit", str(vqa / "v.json")]) == 0
    said = capsys.readouterr().out
    assert "not checked for completeness; the server wants every question of split test" in said
    command = ["vqav2", str(answers), "--submit", str(vqa / "v.json"), "--truth", truth]
    assert score.main(command) == 0
    assert sent(vqa / "v.json") == {0: "cat", 1: "", 1000: "", 1001: "", 2000: ""}
    assert "4 answers in it are empty" in capsys.readouterr().out


def test_ids_of_mm_vet_are_compared_as_the_server_has_them(tmp_path):
    """The hub's rows have v1_0, LLaVA's question file 0."""
    whole = submit.Wanted([{"question_id": f"v1_{i}"} for i in range(3)])
    submit.write(MMVET, [{"question_id": 1}], ["one"], tmp_path / "m.json", whole)
    assert json.loads((tmp_path / "m.json").read_text()) == {"v1_0": "", "v1_1": "one", "v1_2": ""}
