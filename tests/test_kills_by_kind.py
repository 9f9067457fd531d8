"""Killed in the middle and continued, for each kind of model: nothing lost, nothing asked twice.

Questions are counted where they arrive: at the model in its process, or at the server.
"""

from __future__ import annotations

import signal
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import tiny_vlms
from harness_world import mme_rows, pope_rows, write_parquet
from kills import LONGEST_S, Workplace
from test_api_models import Server, question, said
from test_kills import evaluation, lines, record  # noqa: F401

QUESTIONS, ALONE, CONCURRENCY = 20, 8, 3
TEMPLATE = "{% for turn in messages %}USER: {{ turn.content }} ASSISTANT:{% endfor %}"
KILLED_AFTER = (5, 14)  # kept answers: in the first task and in the second


@pytest.fixture
def server():
    found = Server()
    found.reply = lambda body, number: said(f"Yes, {question(body)}")
    yield found
    found.http.shutdown()
    found.http.server_close()


@pytest.fixture
def data(tmp_path) -> list[str]:
    """Arguments of 20 questions, each with a text of its own."""
    folder = tmp_path / "distinct"
    folder.mkdir()
    for name, rows in (("pope", pope_rows(images=2)), ("mme", mme_rows())):
        numbered = [row | {"question": f"{n}: {row['question']}"} for n, row in enumerate(rows)]
        write_parquet(numbered, folder / f"{name}.parquet")
    return ["--tasks", "pope,mme", "--data", str(folder), "--batch-size", "4", "--out", "out"]


def killed_and_continued(folder: Path, arguments: list[str], whole: Workplace, after: int):
    """(the folder, answers kept at the kill, lines of asked.txt by then); compared with `whole`."""
    place = Workplace(folder, "counted_run", arguments)
    process = place.start(DIE_AFTER=str(after))
    process.join(LONGEST_S)
    assert process.exitcode == -signal.SIGKILL, place.log[-3000:]
    kept = lines(place.out / "answers.rank0.jsonl")
    assert len(kept) == after and not (place.out / "record.json").exists()
    asked = len(lines(folder / "asked.txt"))
    place.run()
    for name in ("samples_pope.jsonl", "samples_mme.jsonl", "table.md"):
        assert (place.out / name).read_bytes() == (whole.out / name).read_bytes()
    assert record(place.out / "record.json") == record(whole.out / "record.json")
    assert lines(place.out / "answers.rank0.jsonl")[:after] == kept
    return place, kept, asked


@pytest.mark.parametrize("kind", ["vlmamba", "hf", "lmms"])
def test_a_model_in_this_process(kind, data, evaluation, tmp_path):  # noqa: F811
    llava = tiny_vlms.save("llava", tmp_path / "llava")
    model = {
        "vlmamba": evaluation[evaluation.index("--model") + 1],
        "hf": f"hf:{llava}",
        "lmms": f"lmms:llava_hf,pretrained={llava},dtype=float32,device_map=cpu,"
        f"chat_template={TEMPLATE}",
    }[kind]
    arguments = ["--model", model, *data]
    whole = Workplace(tmp_path / "whole", "counted_run", arguments)
    whole.run()
    answers = QUESTIONS + (ALONE if kind == "hf" else 0)  # those that are also asked alone
    moments = [*KILLED_AFTER, 24] if kind == "hf" else KILLED_AFTER
    for after in moments:
        folder = tmp_path / f"after-{after}"
        place, _, asked = killed_and_continued(folder, arguments, whole, after)
        again = lines(folder / "asked.txt")[asked:]
        assert len(set(lines(place.out / "answers.rank0.jsonl"))) == answers
        # a line "alone" says that the question before it was read for this
        alone = [line for line, then in pairwise(again) if then == b"alone"]
        in_batches = Counter(line for line in again if line != b"alone") - Counter(alone)
        # what has no answer is asked once, so nothing that has one
        assert len(in_batches) == max(0, QUESTIONS - after) and set(in_batches.values()) <= {1}
        assert len(alone) == min(answers - QUESTIONS, answers - after)
        assert len(set(alone)) == len(alone)
        if kind == "lmms":  # one at a time, as that class does: nothing is under way at the kill
            assert len(lines(folder / "asked.txt")) == QUESTIONS


def test_a_model_behind_a_server(server, data, tmp_path):
    model = f"api:{server.url},model=m,concurrency={CONCURRENCY},key_env=FOLDER_TOKEN"
    arguments = ["--model", model, *data]
    whole = Workplace(tmp_path / "whole", "counted_run", arguments)
    whole.run()
    for after in KILLED_AFTER:
        folder = tmp_path / f"after-{after}"
        _, kept, _ = killed_and_continued(folder, arguments, whole, after)
        token = f"Bearer {(folder / 'token.txt').read_text()}"
        asked = Counter(
            question(body)
            for body, headers in zip(server.bodies, server.headers, strict=True)
            if headers["Authorization"] == token
        )
        assert len(asked) == QUESTIONS
        twice = [text for text, count in asked.items() if count > 1]
        # only what was under way at the kill, whose answers had not come
        assert len(twice) <= CONCURRENCY and max(asked.values()) <= 2
        assert not [text for text in twice if any(text.encode() in line for line in kept)]
