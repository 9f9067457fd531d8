"""Majority votes: counted by reading, one prefill a question, the same in every batch."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import whole_files
from harness_world import unexplained

import tasks
from harness import run
from harness.data.questions import OwnRows
from harness.runs.voting import accuracy, majority
from tasks.common import Case
from vlmamba.generation import GroupedGenerator

YES = {"question": "Is there a dog?", "answer": "yes", "category": "random"}
NO = YES | {"answer": "no"}


@pytest.fixture
def command(tmp_path, model, processor) -> list[str]:
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    for name in ("gqa", "easy_vqa"):
        whole_files.write(name, tmp_path / "data")
    options = ["--tasks", "easy_vqa", "--data", str(tmp_path / "data"), "--backend", "torch"]
    return [*options, "--model", str(tmp_path / "model"), "--protocol", "lmms"]


def read(folder, name="votes_easy_vqa.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.mark.parametrize(
    ("votes", "chosen"),
    [
        (["Red.", "blue", "red"], "Red."),
        (["blue", "red", "red."], "red"),
        (["a", "b"], "a"),  # named equally often: the first
        (["a", "b", "b", "a"], "a"),
        (["", "", "red"], ""),  # no reading, twice
        (["x"], "x"),
    ],
)
def test_the_most_frequent_reading_wins(votes, chosen):
    task = tasks.load("easy_vqa")
    doc = {"question": "what?", "answer": "red", "image_id": 1}
    assert majority(task, doc, votes, "paper") == chosen


def test_another_library_s_code_that_fails_on_a_vote_reads_it_as_itself():
    class Breaks(OwnRows):
        def score_case(self, doc, answer, protocol):
            if answer == "bad":
                raise ZeroDivisionError
            return Case(1.0, answer)

    Breaks.__abstractmethods__ = frozenset()
    task = Breaks.__new__(Breaks)
    assert majority(task, {}, ["bad", "red", "red"], "lmms") == "red"
    assert majority(task, {}, ["bad", "bad", "red"], "lmms") == "bad"


def test_accuracy_by_votes_by_hand():
    """Right after 1, 2 and 3 votes: the first question always; the second from the third vote on;
    the third, a tie of yes and no at two votes, never."""
    votes = [["Yes", "yes", "no"], ["Yes", "No", "no"], ["No", "Yes", "no"]]
    found = accuracy(tasks.load("pope"), [YES, NO, YES], votes, "paper")
    assert found["accuracy"] == pytest.approx([1 / 3, 1 / 3, 2 / 3])
    unread = accuracy(tasks.load("pope"), [YES, NO, YES, YES], [*votes, None], "paper")
    assert unread == found


def test_a_run_with_votes(command, tmp_path, capsys, monkeypatch):
    """Each question is read once; the same votes in every batch; what is chosen is their mode."""
    read_tokens = Counter()
    generate = GroupedGenerator.generate

    def counting(self, requests, *args, **kwargs):
        found = generate(self, requests, *args, **kwargs)
        read_tokens[len({request.seed for request in requests})] += self.tokens["prefill"]
        return found

    monkeypatch.setattr(GroupedGenerator, "generate", counting)
    sampled = [*command, "--votes", "4", "--temperature", "1.5"]
    assert run.main([*sampled, "--out", str(tmp_path / "a"), "--batch-size", "1"]) == 0
    shown = capsys.readouterr().out
    assert "majority of 4 votes at temperature 1.5" in shown
    assert "easy_vqa accuracy by votes: 1: " in shown and "each further vote" in shown
    assert run.main([*sampled, "--out", str(tmp_path / "b"), "--batch-size", "32"]) == 0
    assert unexplained(tmp_path / "a") == []
    votes = read(tmp_path / "a")
    assert votes == read(tmp_path / "b")
    assert any(len(set(line["votes"])) > 1 for line in votes)
    record = json.loads((tmp_path / "a" / "record.json").read_text())
    metrics = record["tasks"]["easy_vqa"]["metrics"]
    assert record["votes"]["easy_vqa"]["accuracy"][3] == metrics["accuracy"]["value"]
    assert len(record["votes"]["easy_vqa"]["accuracy"]) == 4
    assert record["cost"]["first_vote_s"] > record["cost"]["further_vote_s"] > 0
    assert record["settings"]["temperature"] == 1.5 and record["arguments"]["votes"] == 4
    assert record["timing"]["questions"] == len(votes) == metrics_n(record)
    assert run.main([*sampled[:-3], "1", "--temperature", "1.5", "--out", str(tmp_path / "c")]) == 0
    once = [line["prediction"] for line in read(tmp_path / "c", "samples_easy_vqa.jsonl")]
    assert once == [line["votes"][0] for line in votes]
    tokens = sum(read_tokens.values())
    assert tokens == 3 * read_tokens[len(votes)]  # as many read for four answers as for one


def metrics_n(record) -> int:
    return record["tasks"]["easy_vqa"]["n"]


def test_one_vote_at_temperature_0_is_greedy(command, tmp_path):
    options = ["--votes", "1", "--temperature", "0"]
    assert run.main([*command, "--out", str(tmp_path / "greedy")]) == 0
    assert run.main([*command, *options, "--out", str(tmp_path / "vote")]) == 0
    one, other = (read(tmp_path / name, "samples_easy_vqa.jsonl") for name in ("greedy", "vote"))
    assert one == other
    assert not (tmp_path / "vote" / "votes_easy_vqa.jsonl").exists()


def test_votes_that_are_there_already_are_not_asked_again(command, tmp_path, monkeypatch):
    sampled = [*command, "--votes", "3", "--temperature", "1", "--out", str(tmp_path / "run")]
    assert run.main(sampled) == 0
    before = read(tmp_path / "run")
    monkeypatch.setattr(GroupedGenerator, "generate", None)  # nobody is asked
    (tmp_path / "run" / "record.json").unlink()
    assert run.main(sampled) == 0
    assert read(tmp_path / "run") == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--votes", "4"], "--votes 4 at temperature 0 would be one answer 4 times"),
        (["--votes", "0"], "--votes is 0; expected at least 1"),
        (["--temperature", "-1"], "--temperature is -1.0; expected 0 (greedy) to 100"),
        (["--temperature", "nan"], "--temperature is nan"),
        (
            ["--votes", "2", "--temperature", "1", "--model", "api:http://localhost:1/v1,model=x"],
            "--temperature has no meaning for api: models",
        ),
    ],
)
def test_unusable_arguments_are_one_line(command, options, said, tmp_path, capsys):
    command = [option for option in command if option not in ("--backend", "torch")]
    assert run.main([*command, *options, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
