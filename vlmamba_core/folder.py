"""The folder of one run: locked by one process, answers kept as they come, files whole or absent.

    with RunFolder(path) as folder:      # a second process on the same path is refused
        folder.write("record.json", text)

`AnswerJournal` is an append-only file of finished answers. A killed run started again with the
same command finds its answers there by key; the key holds everything an answer depends on.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from vlmamba_core.errors import UserError


class RunFolder:
    """A folder that one process (or one group of ranks) writes to at a time."""

    def __init__(self, path: Path, shared: bool = False) -> None:
        """`shared`: the first rank of this run holds the lock, this process only joins."""
        self.path = path
        self._shared = shared
        self._lock: IO[str] | None = None

    def __enter__(self) -> RunFolder:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if self._shared:
                return self
            self._lock = (self.path / ".lock").open("a+", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"cannot write to {self.path}: {error.strerror}; give another --out"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.seek(0)
            owner = self._lock.read().strip() or "another process"
            self._lock.close()
            raise UserError(
                f"{self.path} is in use by {owner}; wait for it, or give another --out"
            ) from None
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._lock.flush()
        for part in self.path.glob(".*.part"):  # a killed process was writing them
            part.unlink(missing_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.truncate(0)
            self._lock.close()  # closing releases the lock, as does the end of the process

    def clear(self) -> None:
        """Remove a finished run's files, its record first: no half of it stays beside new ones."""
        found = [self.path / "record.json", self.path / "table.md"]
        for file in [*found, *self.path.glob("samples_*.jsonl")]:
            file.unlink(missing_ok=True)

    def write(self, name: str, text: str) -> Path:
        """Write a file so that a reader sees the old one or the whole new one."""
        return write_atomically(self.path / name, text)


def write_atomically(path: Path, text: str) -> Path:
    """Write `text` beside `path`, then move it there. Raises UserError when the disk refuses."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        # half a surrogate pair, as a cut emoji gives it, is written as JSON's own escape
        with part.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    return path


class Journal:
    """Texts on disk, one JSON line each, found again by key.

    A text outlives its process from `add` on; a power failure may cost up to `every` of them.  A
    torn or altered line is dropped: its text is made anew.
    """

    def __init__(self, path: Path, every: int = 1, also: Iterable[Path] = ()) -> None:
        """Append to `path`, and read it and the files in `also`.

        The disk is waited for after `every` new texts. Raises UserError for a file that cannot be
        read.
        """
        self._path = path
        self._every = every
        self._answers: dict[str, str] = {}
        self._unsynced = 0
        self.dropped = 0  # lines that could not be used
        for file in sorted({*also, path}):
            if file.exists():
                self._read(file)

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, key: str) -> str | None:
        """The answer kept under `key`, or None."""
        return self._answers.get(key)

    def add(self, key: str, answer: str) -> None:
        """Append an answer. Raises UserError when the disk refuses."""
        self._answers[key] = answer
        line = json.dumps({"key": key, "answer": answer, "sum": _checksum(key, answer)})
        self._unsynced += 1
        self._append(f"{line}\n".encode(), sync=self._unsynced >= self._every)

    def flush(self) -> None:
        """Wait until every answer is on the disk itself. Raises UserError when it refuses."""
        if self._unsynced:
            self._append(b"", sync=True)

    def _append(self, line: bytes, sync: bool) -> None:
        try:
            with self._path.open("ab+") as file:
                if line:
                    file.write(_line_break_if_torn(file) + line)
                if sync:
                    file.flush()
                    os.fsync(file.fileno())
        except OSError as error:
            self._unsynced = 0  # what is lost is made anew by the next run
            raise UserError(
                f"cannot write {self._path}: {error.strerror}; answers so far are kept, "
                "run the same command again to continue"
            ) from error
        if sync:
            self._unsynced = 0

    def _read(self, path: Path) -> None:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        for line in content.splitlines():
            entry = _parse_entry(line)
            if entry is None:
                self.dropped += bool(line.strip())
            else:
                self._answers[entry[0]] = entry[1]


class AnswerJournal(Journal):
    """A run's answers: every rank appends to a file of its own and reads all of them.

    So a run may be taken up again with another number of processes.
    """

    def __init__(self, folder: Path, rank: int = 0, every: int = 16) -> None:
        """Open the journal of `folder`."""
        path = folder / f"answers.rank{rank}.jsonl"
        super().__init__(path, every, folder.glob("answers.rank*.jsonl"))


def _line_break_if_torn(file: IO[bytes]) -> bytes:
    """A newline when the file ends inside a line that a killed process was writing."""
    if file.seek(0, os.SEEK_END) == 0:
        return b""
    file.seek(-1, os.SEEK_END)
    return b"" if file.read(1) == b"\n" else b"\n"


def _parse_entry(line: bytes) -> tuple[str, str] | None:
    try:
        entry = json.loads(line)
        key, answer, checksum = entry["key"], entry["answer"], entry["sum"]
    except (ValueError, TypeError, KeyError):
        return None
    if not (isinstance(key, str) and isinstance(answer, str)):
        return None
    return (key, answer) if checksum == _checksum(key, answer) else None


def _checksum(key: str, answer: str) -> str:
    return hashlib.sha256(f"{key}\n{answer}".encode("utf-8", "surrogatepass")).hexdigest()[:12]


def digest(parts: Iterable[object]) -> str:
    """A stable key of JSON-serialisable parts."""
    text = json.dumps(list(parts), sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
