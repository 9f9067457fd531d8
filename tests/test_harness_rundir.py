"""The run folder: one writer, whole files, answers that survive."""

from __future__ import annotations

import errno
import subprocess
import sys
import threading
import time
from pathlib import Path

import filelock
import pytest

from vlmamba_core import folder
from vlmamba_core.errors import UserError
from vlmamba_core.folder import AnswerJournal, RunFolder, digest, lock_folder, write_atomically


def test_second_writer_is_refused_with_the_owner(tmp_path):
    with (
        RunFolder(tmp_path / "run"),
        pytest.raises(UserError, match=r"in use by process \d+ on .*--out"),
        RunFolder(tmp_path / "run"),
    ):
        pass
    with RunFolder(tmp_path / "run"):  # free again
        pass


def test_a_killed_process_leaves_no_lock(tmp_path):
    code = (
        "import os, pathlib, sys; from vlmamba_core.folder import RunFolder\n"
        f"RunFolder(pathlib.Path({str(tmp_path)!r})).__enter__(); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    with RunFolder(tmp_path):
        pass


def test_a_second_process_is_told_of_the_first_and_its_words_stay(tmp_path):
    code = (
        "import pathlib, sys; from vlmamba_core.folder import lock_folder\n"
        f"with lock_folder(pathlib.Path({str(tmp_path)!r})): print(flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as other:
        other.stdout.readline()
        for _ in range(2):  # to be refused does not change who is named
            with (
                pytest.raises(UserError, match=rf"in use by process {other.pid} on \S+; wait"),
                lock_folder(tmp_path),
            ):
                pass
        other.communicate()
    with lock_folder(tmp_path):
        pass


def test_a_process_that_waits_comes_after_the_one_at_work(tmp_path):
    order: list[str] = []

    def second() -> None:
        with lock_folder(tmp_path, wait=True):
            order.append("second")

    waiting = threading.Thread(target=second)
    with lock_folder(tmp_path):
        waiting.start()
        time.sleep(0.2)
        order.append("first")
    waiting.join(30)
    assert order == ["first", "second"]


def test_values_of_a_journal_need_not_be_texts(tmp_path):
    point = {"model": "a", "times": [1.5, 2], "detail": None}
    journal = folder.Journal(tmp_path / "points.jsonl")
    journal.add("x", point)
    assert folder.Journal(tmp_path / "points.jsonl").get("x") == point
    path = tmp_path / "points.jsonl"
    path.write_text(path.read_text().replace("1.5", "1.25"))
    assert folder.Journal(path).get("x") is None
    with pytest.raises(ValueError, match="JSON"):
        journal.add("y", float("nan"))


def test_what_a_killed_writer_left_is_cleared_away(tmp_path):
    (tmp_path / ".record.json.123.part").write_text("half")
    with RunFolder(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"), RunFolder(tmp_path / "file" / "run"):
        pass


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = write_atomically(tmp_path / "record.json", "old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folder.os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]


def test_an_answer_outlives_its_process_as_soon_as_it_is_added(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(folder.os, "fsync", synced.append)
    journal = AnswerJournal(tmp_path, every=2)
    journal.add("a", "yes")
    assert len(AnswerJournal(tmp_path)) == 1
    assert not synced  # the disk itself is waited for after every second answer
    journal.add("b", "two\nlines ☃ \udc80")
    assert len(synced) == 1
    again = AnswerJournal(tmp_path, rank=1)  # another rank reads it too
    assert (again.get("a"), again.get("b")) == ("yes", "two\nlines ☃ \udc80")
    assert again.get("c") is None


def test_torn_and_altered_lines_are_dropped(tmp_path):
    journal = AnswerJournal(tmp_path, every=1)
    for key in "abc":
        journal.add(key, f"answer {key}")
    path = tmp_path / "answers.rank0.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    altered = lines[1].replace(b"answer b", b"answer x")
    path.write_bytes(lines[0] + altered + b"\xff\x00\n[1]\n" + lines[2][:-9])
    journal = AnswerJournal(tmp_path, every=1)
    assert (len(journal), journal.dropped) == (1, 4)
    journal.add("d", "after the torn line")
    assert AnswerJournal(tmp_path).get("d") == "after the torn line"


def test_digest_depends_on_every_part():
    assert digest(["a", 1]) == digest(["a", 1])
    assert len({digest(p) for p in (["a", 1], ["a", 2], ["a", "1"], ["a1"], [{"a": 1}])}) == 5


def test_a_holder_that_ends_while_it_is_looked_up_is_still_one_line(tmp_path, monkeypatch):
    """Its name goes with its lock."""
    with lock_folder(tmp_path / "run"):
        (tmp_path / "run" / ".lock").unlink()
        real = Path.read_text

        def gone(self, *given, **more):
            if self.name == ".lock":
                raise FileNotFoundError(2, "No such file", str(self))
            return real(self, *given, **more)

        monkeypatch.setattr(Path, "read_text", gone)
        monkeypatch.setattr(filelock.FileLock, "acquire", timed_out)
        with (
            pytest.raises(UserError, match="is in use by another process; wait for it"),
            lock_folder(tmp_path / "run"),
        ):
            pass


def timed_out(self, *given, **more):
    raise filelock.Timeout(self.lock_file)
