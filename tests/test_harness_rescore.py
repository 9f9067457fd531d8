"""A run's own samples scored again, and answers from files that stand beside runs."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict
from pathlib import Path

import pytest
from harness_world import mme_rows, pope_rows, unexplained, write_parquet

from harness import compare as compare_command
from harness import report, score, tables
from harness.data.images import image_key
from harness.run import main as run_main
from harness.runs.schema import Sample, record_text, samples_text
from harness.runs.store import EvaluationRun

# one answer in four is wrong, one in eight is not read: by hand, in this order
PATTERN = ["Yes", "No", "Yes", "yes it is"] * 6


def finished_run(root: Path) -> Path:
    """The folder of a run of pope on `root`/data, its scores worked out here and not by a task."""
    data = root / "data"
    data.mkdir()
    rows = pope_rows()
    write_parquet(rows, data / "pope.parquet")
    samples = []
    for number, row in enumerate(rows):
        said = "Yes" if PATTERN[number].lower().startswith("yes") else "No"
        unread = number == 23
        samples.append(
            Sample(
                doc_id=number,
                question=f"{row['question']}\nAnswer the question using a single word or phrase.",
                prediction=None if unread else PATTERN[number],
                parsed=None if unread else said.lower(),
                reference=row["answer"],
                score=None if unread else float(said.lower() == row["answer"]),
                image=None if unread else image_key(row["image"]),
                excluded="unreadable image" if unread else None,
            )
        )
    record = {
        "schema": 1,
        "kind": "evaluation",
        "label": None,
        "arguments": {"tasks": "pope", "model": "demo", "data": str(data), "seed": 0},
        "data": {"pope": {"source": "data"}},
        "protocol": "paper",
        "tasks": {"pope": entry(23)},
        "model": {"sha256": "0" * 64},
        "finished": "2026-01-01T00:00:00+00:00",
    }
    folder = root / "run"
    folder.mkdir()
    (folder / "record.json").write_text(record_text(record))
    (folder / "samples_pope.jsonl").write_text(samples_text(samples))
    return folder


def entry(n: int) -> dict:
    return {
        "n": n,
        "n_unparsed": 0,
        "excluded": {},
        "unit": "fraction",
        "metrics": {},
        "notes": [],
    }


def record_of(folder: Path) -> dict:
    return json.loads((folder / "record.json").read_text())


def samples(folder: Path, task: str = "pope") -> list[Sample]:
    return EvaluationRun.read(folder).samples(task)


def test_a_runs_own_samples_are_scored_again_to_the_same_lines(tmp_path, capsys):
    run, again = finished_run(tmp_path), tmp_path / "again"
    command = ["pope", str(run / "samples_pope.jsonl"), "--out", str(again)]
    assert score.main(command) == 0
    assert unexplained(again) == []
    printed = capsys.readouterr().out
    assert "pope, protocol paper: 23 answers scored" in printed
    assert "left out: 1 rows: unreadable image" in printed
    first = (run / "samples_pope.jsonl").read_text().splitlines()
    second = (again / "samples_pope.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in second] == [json.loads(line) for line in first]
    record = record_of(again)
    found = record["tasks"]["pope"]
    assert (found["n"], found["excluded"]) == (23, {"unreadable image": 1})
    right = sum(sample.score for sample in samples(run) if sample.score is not None)
    assert found["metrics"]["accuracy"]["value"] == pytest.approx(right / 23)
    assert record["arguments"]["data"] == str(tmp_path / "data")
    assert record["scored_from"]["pope"]["file"] == "samples_pope.jsonl"
    assert record["model"] == {"sha256": "0" * 64}


def test_under_the_other_protocol_the_reading_changes(tmp_path):
    run, again = finished_run(tmp_path), tmp_path / "again"
    command = ["pope", str(run / "samples_pope.jsonl"), "--protocol", "lmms", "--out", str(again)]
    assert score.main(command) == 0
    assert record_of(again)["protocol"] == "lmms"
    assert [s.parsed for s in samples(again)][:4] == ["yes", "no", "yes", None]


def test_documents_may_come_as_truth(tmp_path, capsys):
    run = finished_run(tmp_path)
    alone = tmp_path / "samples_pope.jsonl"
    alone.write_bytes((run / "samples_pope.jsonl").read_bytes())
    assert score.main(["pope", str(alone)]) == 2
    assert "no record.json beside" in capsys.readouterr().err
    truth = str(tmp_path / "data" / "pope.parquet")
    assert score.main(["pope", str(alone), "--truth", truth]) == 0
    assert "23 answers scored" in capsys.readouterr().out


def test_answers_to_other_questions_are_refused_with_counts(tmp_path, capsys):
    run = finished_run(tmp_path)
    rows = pope_rows()
    rows[4]["answer"] = "no"
    rows[7]["question"] = "Is there a hat in the image?"
    write_parquet(rows[:20], tmp_path / "data" / "pope.parquet")
    assert score.main(["pope", str(run / "samples_pope.jsonl")]) == 2
    error = capsys.readouterr().err
    assert "6 of 24 answers are to other questions than the data (20 rows) has in their" in error
    assert "the first in row 5" in error


def test_a_task_that_the_run_does_not_have_is_refused(tmp_path, capsys):
    run = finished_run(tmp_path)
    assert score.main(["mme", str(run / "samples_pope.jsonl")]) == 2
    assert "is a run of pope, not of mme" in capsys.readouterr().err


def predictions(tmp_path: Path, name: str, answers: list[str], rows: list[dict]) -> str:
    path = tmp_path / name
    kept = [{k: v for k, v in row.items() if k != "image"} for row in rows]
    pairs = zip(kept, answers, strict=True)
    path.write_text("\n".join(json.dumps(row | {"prediction": text}) for row, text in pairs))
    return str(path)


def test_published_answers_stand_beside_runs(tmp_path, capsys):
    """compare, tables and report take a folder that harness.score wrote."""
    runs = tmp_path / "runs"
    file = predictions(tmp_path, "one.jsonl", PATTERN, pope_rows())
    options = ["--model", "Somebody-13B", "--out", str(runs / "theirs")]
    assert score.main(["pope", file, *options]) == 0
    mme = predictions(tmp_path, "two.jsonl", ["Yes"] * 8, mme_rows())
    assert score.main(["mme", mme, *options]) == 0
    record = record_of(runs / "theirs")
    assert list(record["tasks"]) == ["pope", "mme"]
    assert record["arguments"]["tasks"] == "pope,mme"
    table = (runs / "theirs" / "table.md").read_text()
    assert "answers of Somebody-13B, protocol paper" in table
    assert "| pope | f1 |" in table
    assert "| mme |" in table
    better = ["Yes", "No"] * 12
    file = predictions(tmp_path, "three.jsonl", better, pope_rows())
    assert score.main(["pope", file, "--model", "Else", "--out", str(runs / "else")]) == 0
    capsys.readouterr()

    assert compare_command.main([str(runs / "theirs"), str(runs / "else")]) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("pope"))
    # PATTERN is right at Yes, No, Yes and wrong at the fourth: 18 of 24; the other file has all
    assert line.split()[1:4] == ["75.0", "100.0", "-25.0"]
    assert line.split()[-3:] == ["24", "4", "0/6"]  # 24 questions on four pictures

    assert tables.main(["--from", str(runs), "--out", str(tmp_path / "tables")]) == 0
    with (tmp_path / "tables" / "paper_main.csv").open(newline="") as opened:
        row = next(x for x in csv.DictReader(opened) if x["model"] == "theirs")
    # yes is said to 18 of 24, 12 of them rightly, and to all 12 that are: 2 * 12 / (18 + 12)
    assert row["POPE"] == "80.0"
    assert row["source"].startswith("answers from files, scored by this harness, protocol paper")
    out = tmp_path / "report.html"
    assert report.main([str(runs / "theirs"), str(runs / "else"), "--out", str(out)]) == 0
    assert "Is there a dog in the image?" in out.read_text()


def test_a_row_of_a_run_and_of_a_file_are_compared_by_question_and_truth(tmp_path, capsys):
    run = finished_run(tmp_path)
    file = predictions(tmp_path, "one.jsonl", ["Yes", "No"] * 12, pope_rows())
    assert score.main(["pope", file, "--out", str(tmp_path / "file")]) == 0
    capsys.readouterr()
    assert compare_command.main([str(run), str(tmp_path / "file")]) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("pope"))
    assert line.split()[-3:] == ["23", "4", "0/5"]  # the unreadable row has no score
    moved = predictions(tmp_path, "two.jsonl", ["Yes"] * 24, pope_rows()[2:] + pope_rows()[:2])
    assert score.main(["pope", moved, "--out", str(tmp_path / "moved")]) == 0
    rows = [asdict(s) for s in samples(tmp_path / "moved")]
    assert rows[0]["image"] == "named image_1"
    assert compare_command.main([str(tmp_path / "file"), str(tmp_path / "moved")]) == 2
    assert "row 1 of file and moved is not the same question" in capsys.readouterr().err


def test_an_imported_answer_keeps_the_place_of_its_question(tmp_path):
    truth, answers = tmp_path / "truth.jsonl", tmp_path / "answers.jsonl"
    docs = [
        {"question_id": i, "question": f"{i}?", "answers": ["a"] * 10, "answer_type": "other"}
        for i in range(4)
    ]
    truth.write_text("\n".join(map(json.dumps, docs)))
    given = [{"question_id": i, "prompt": f"{i}?", "text": "a"} for i in (3, 1)]
    answers.write_text("\n".join(map(json.dumps, given)))
    command = ["vqav2", str(answers), "--import", "llava", "--truth", str(truth)]
    assert score.main([*command, "--out", str(tmp_path / "out")]) == 0
    assert [sample.doc_id for sample in samples(tmp_path / "out", "vqav2")] == [1, 3]
    assert record_of(tmp_path / "out")["tasks"]["vqav2"]["excluded"] == {"no answer in the file": 2}
    assert record_of(tmp_path / "out")["data"]["vqav2"]["files"] == ["truth.jsonl"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "Other"), "its model is 'one'"),
        (("--protocol", "lmms"), "its protocol is 'paper'"),
    ],
)
def test_another_run_in_the_folder_is_left_alone(tmp_path, capsys, options, message):
    file = predictions(tmp_path, "one.jsonl", PATTERN, pope_rows())
    out = tmp_path / "out"
    assert score.main(["pope", file, "--out", str(out)]) == 0
    before = (out / "record.json").read_bytes()
    assert score.main(["pope", file, "--out", str(out)]) == 0  # the same again
    capsys.readouterr()
    assert score.main(["pope", file, "--out", str(out), *options]) == 2
    assert message in capsys.readouterr().err
    mine = json.loads(before) | {"finished": ""}
    assert record_of(out) | {"finished": ""} == mine
    assert score.main(["pope", file, "--out", str(out), *options, "--overwrite"]) == 0


def test_a_runs_folder_is_not_taken_for_files(tmp_path, capsys):
    run = finished_run(tmp_path)
    command = ["pope", str(run / "samples_pope.jsonl"), "--out", str(run)]
    assert score.main(command) == 2
    assert "holds a finished run that was not scored from files" in capsys.readouterr().err


def test_another_files_answers_to_one_task_are_refused(tmp_path, capsys):
    out = ("--model", "m", "--out", str(tmp_path / "out"))
    assert score.main(["pope", predictions(tmp_path, "a", PATTERN, pope_rows()), *out]) == 0
    assert score.main(["pope", predictions(tmp_path, "b", PATTERN[::-1], pope_rows()), *out]) == 2
    assert "its pope is of another file, a;" in capsys.readouterr().err


def test_what_was_scored_from_files_is_no_run_to_repeat(tmp_path, capsys):
    file = predictions(tmp_path, "one.jsonl", PATTERN, pope_rows())
    assert score.main(["pope", file, "--out", str(tmp_path / "out")]) == 0
    assert run_main(["--from-record", str(tmp_path / "out" / "record.json")]) == 2
    assert "was scored from files by harness.score: there is no run to repeat" in (
        capsys.readouterr().err
    )


def test_a_question_without_a_picture_is_none_in_the_browser(tmp_path):
    docs = [
        {"question": "Is it?", "choices": ["no", "yes"], "answer": 1, "hint": "", "has_image": told}
        for told in (True, False)
    ]
    path = tmp_path / "s.jsonl"
    path.write_text("\n".join(json.dumps(doc | {"prediction": "B"}) for doc in docs))
    assert score.main(["scienceqa", str(path), "--out", str(tmp_path / "out")]) == 0
    assert [s.image for s in samples(tmp_path / "out", "scienceqa")] == [None, "none"]


def test_a_blind_runs_samples_keep_their_mark_when_scored_again(tmp_path, capsys):
    run, again = finished_run(tmp_path), tmp_path / "again"
    record = record_of(run)
    record["arguments"]["blind"] = True
    (run / "record.json").write_text(record_text(record))
    assert score.main(["pope", str(run / "samples_pope.jsonl"), "--out", str(again)]) == 0
    assert "pope (blind)  accuracy" in capsys.readouterr().out
    assert "| pope (blind) | accuracy |" in (again / "table.md").read_text()
