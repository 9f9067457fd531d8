"""The folder of one run: locked by one process, answers kept as they come, files whole or absent.

    with RunFolder(path) as folder:      # a second process on the same path is refused
        folder.write("record.json", text)

`AnswerJournal` is an append-only file of finished answers. A killed run started again with the
same command finds its answers there by key; the key holds everything an answer depends on.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

from vlmamba_core.errors import UserError

T = TypeVar("T")  # what a journal keeps
OWNER = ".lock"  # in the locked folder: who holds it
EXPLAINED = "README.md"
WRITTEN_BY = "# Written by `python -m "  # how such a file of ours begins


def make_folder(path: Path) -> None:
    """Make a folder for output, and those above it. Raises UserError where that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}; give another --out") from error


@contextmanager
def lock_folder(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Make the folder `path` and hold its lock: one process at a time.

    wait: until no other process holds it; without, UserError says which one does, as it says where
    the folder cannot be made. The kernel gives a lock back when its process ends, however it ends.
    """
    from filelock import FileLock, Timeout

    class FolderLock(FileLock):
        """Its own class: lmms-eval makes all `FileLock`s of a path one, which shuts nobody out."""

    file = path / OWNER
    make_folder(path)
    try:
        # where the file system has no locks an error is better than one that outlives its process
        lock = FolderLock(file, timeout=-1 if wait else 0, fallback_to_soft=False)
        lock.acquire()
        file.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
    except Timeout:
        owner = ""
        with suppress(OSError):  # it has ended since
            owner = file.read_text(encoding="utf-8").strip()
        raise UserError(
            f"{path} is in use by {owner or 'another process'}; wait for it, or give another --out"
        ) from None
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}; give another --out") from error
    try:
        yield
    finally:
        # gone while it is still held: filelock takes no lock on a file that has lost its name
        file.unlink(missing_ok=True)
        lock.release()


def explain(path: Path, command: str, files: Mapping[str, str], note: str) -> None:
    """Write README.md in an output folder: what each file there is, by its name or pattern.

    A README.md that somebody else wrote stays. Raises UserError when the disk refuses.
    """
    file = path / EXPLAINED
    if file.exists() and not file.read_text("utf-8", "replace").startswith(WRITTEN_BY):
        return
    rows = "".join(f"| `{name}` | {what} |\n" for name, what in files.items())
    text = f"{WRITTEN_BY}{command}`\n\n{note}\n\n| here | what it is |\n|---|---|\n{rows}"
    write_atomically(file, text)


class RunFolder:
    """A folder that one process (or one group of ranks) writes to at a time."""

    def __init__(self, path: Path, shared: bool = False) -> None:
        """`shared`: the first rank of this run holds the lock, this process only joins."""
        self.path = path
        self._shared = shared
        self._held = ExitStack()

    def __enter__(self) -> RunFolder:
        if self._shared:
            make_folder(self.path)
            return self
        self._held.enter_context(lock_folder(self.path))
        for part in self.path.glob(".*.part"):  # a killed process was writing them
            part.unlink(missing_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def clear(self) -> None:
        """Remove a finished run's files, its record first: no half of it stays beside new ones."""
        patterns = ("record.json", "table.md", "samples_*.jsonl", "votes_*.jsonl", "*_submission.*")
        for file in (file for pattern in patterns for file in self.path.glob(pattern)):
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


class Journal(Generic[T]):
    """JSON values on disk, one line each, found again by key: texts, or objects such as points.

    A value outlives its process from `add` on; a power failure may cost up to `every` of them.  A
    torn or altered line is dropped: its value is made anew.
    """

    def __init__(self, path: Path, every: int = 1, also: Iterable[Path] = ()) -> None:
        """Append to `path`, and read it and the files in `also`.

        The disk is waited for after `every` new values. Raises UserError for a file that cannot be
        read.
        """
        self._path = path
        self._every = every
        self._values: dict[str, T] = {}
        self._unsynced = 0
        self.dropped = 0  # lines that could not be used
        for file in sorted({*also, path}):
            if file.exists():
                self._read(file)

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: str) -> T | None:
        """The value kept under `key`, or None."""
        return self._values.get(key)

    def add(self, key: str, value: T) -> None:
        """Append a value. Raises UserError when the disk refuses."""
        entry = {"key": key, "answer": value, "sum": _checksum(key, value)}
        line = json.dumps(entry, allow_nan=False)
        self._values[key] = value
        self._unsynced += 1
        self._append(f"{line}\n".encode(), sync=self._unsynced >= self._every)

    def flush(self) -> None:
        """Wait until every value is on the disk itself. Raises UserError when it refuses."""
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
                self._values[entry[0]] = entry[1]


class AnswerJournal(Journal[str]):
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


def _parse_entry(line: bytes) -> tuple[str, Any] | None:
    try:
        entry = json.loads(line)
        key, value, checksum = entry["key"], entry["answer"], entry["sum"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return (key, value) if isinstance(key, str) and checksum == _checksum(key, value) else None


def _checksum(key: str, value: Any) -> str:
    """Of a text its own, of anything else that of its JSON."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return hashlib.sha256(f"{key}\n{text}".encode("utf-8", "surrogatepass")).hexdigest()[:12]


def digest(parts: Iterable[object]) -> str:
    """A stable key of JSON-serializable parts."""
    text = json.dumps(list(parts), sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
