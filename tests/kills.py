"""Commands run in processes that can be killed at a random moment, without paying for imports.

    folder = Workplace(tmp_path, "harness.run", arguments)
    folder.run()                     # to its end
    folder.killed_after(0.4)         # kill -9 after 0.4 s

Each process is a fork of a server that has loaded the libraries, so all of its life is work; the
children that a command starts are forks of it.  Its current folder is its own: the arguments name
OUT as "out", and records of different folders agree.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

SEED = 20240607
PRELOADED = [
    "harness.run",
    "harness.models.vlmamba",
    "harness.models.lmms",
    "harness.models.lmms_models",
    "harness.models.lmms_tasks",
    "harness.models.transformers",
    "harness.models.api",
    "harness.ablate",
    "harness.profile",
]
PRELOADED += [
    "harness.speed.sweep.measure",
    "harness.speed.sweep.worker",
    "harness.speed.machine",
    "vlmamba.train",
    "vlmamba.training.loop",
]
LONGEST_S = 300.0  # of one run


def _context():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _main(
    module: str, arguments: list[str], folder: str, environment: Mapping[str, str] | None = None
) -> None:
    os.chdir(folder)
    os.environ.update(environment or {})
    log = os.open("log.txt", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import torch

    from vlmamba_core import processes

    processes.run = _forked
    torch.set_num_threads(1)  # the same in every run that is compared, and safe after a fork
    sys.exit(import_module(module).main(arguments))


def _forked(command: list[str], **options: Any) -> subprocess.CompletedProcess:
    """`vlmamba_core.processes.run` of `python -m MODULE ...` without a new interpreter."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        files = (out.fileno(), err.fileno()) if options.get("capture_output") else None
        target = (command[2], command[3:], files, os.getpid())
        process = multiprocessing.get_context("fork").Process(target=_child, args=target)
        process.start()
        process.join(options.get("timeout"))
        texts = [(file.seek(0), file.read())[1] for file in (out, err)]
    return subprocess.CompletedProcess(command, process.exitcode or 0, *texts)


def _child(module: str, arguments: list[str], files: tuple[int, int] | None, parent: int) -> None:
    from vlmamba_core.processes import die_with

    die_with(parent, ctypes.CDLL(None))
    for number, file in enumerate(files or (), 1):
        os.dup2(file, number)
    code = 1
    try:
        code = import_module(module).main(arguments) or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # nothing that the parent's threads left behind is waited for


class Workplace:
    """A folder in which one command runs, with what it left there."""

    def __init__(self, folder: Path, module: str, arguments: Iterable[str]) -> None:
        folder.mkdir(parents=True)
        self.folder, self.out = folder, folder / "out"
        self.module, self.arguments = module, list(arguments)

    @property
    def log(self) -> str:
        """What all its runs printed."""
        file = self.folder / "log.txt"
        return file.read_text(errors="replace") if file.exists() else ""

    def start(self, **environment: str) -> BaseProcess:
        """A process that runs the command, with more in its environment."""
        command = (self.module, self.arguments, str(self.folder), environment)
        process = _context().Process(target=_main, args=command)
        process.start()
        return process

    def run(self) -> float:
        """Run to the end, which must be a good one; returns the seconds that it took."""
        began = time.perf_counter()
        process = self.start()
        process.join(LONGEST_S)
        seconds = time.perf_counter() - began
        if process.is_alive():
            process.kill()
        assert process.exitcode == 0, f"exit code {process.exitcode}\n{self.log[-3000:]}"
        return seconds

    def killed_after(self, seconds: float) -> bool:
        """Run and kill -9 after so long; whether it was still running.

        Its children must be gone soon after it.
        """
        process = self.start()
        assert process.pid is not None
        process.join(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGSTOP)  # so that it starts none after the count
        while _state(process.pid) not in "TZX":
            time.sleep(0.001)
        started = children(process.pid)
        process.kill()
        process.join()
        deadline = time.monotonic() + 10
        while any(map(_running, started)):
            assert time.monotonic() < deadline, f"children of a killed process live on: {started}"
            time.sleep(0.01)
        return process.exitcode == -signal.SIGKILL


def kill_and_finish(
    folder: Path,
    module: str,
    arguments: list[str],
    moments: range,
    check: Callable[[Workplace, Workplace], None],
    finished: Callable[[Path], dict[str, bytes | int]],
) -> None:
    """Kill a command at random moments, each in a new folder; the same command must then finish.

    moments: numbers of the moments, which seed them.
    check(killed, whole): compares the outcome with that of an uninterrupted run.  finished(out):
    finished pieces of work by name, with whatever would change if one were done again.
    """
    Workplace(folder / "first", module, arguments).run()  # files and libraries are warm after it
    whole = Workplace(folder / "whole", module, arguments)
    seconds = whole.run()
    for number in moments:
        draw = random.Random(f"{SEED} {module} {number}")
        moment = draw.uniform(0, seconds)
        place = Workplace(folder / f"killed-{number}", module, arguments)
        while not place.killed_after(moment):  # it was at its end already
            shutil.rmtree(place.folder)
            moment = draw.uniform(0, moment)
            place = Workplace(folder / f"killed-{number}", module, arguments)
        before = finished(place.out)
        took = place.run()
        after = finished(place.out)
        print(
            f"{module}, seed {SEED}, moment {number}: killed after {moment:.2f} of {seconds:.2f} s "
            f"with {len(before)} of {len(after)} pieces done; finished in {took:.2f} s"
        )
        assert before.items() <= after.items(), "finished work was done again"
        check(place, whole)


def children(pid: int | None) -> list[int]:
    """Processes that `pid` started."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    return found


def _state(pid: int) -> str:
    """Its letter in proc(5): T for stopped, Z for ended; X too where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def _running(pid: int) -> bool:
    """Whether any thread of it is left: the last one closes its files, locks among them."""
    with contextlib.suppress(OSError):
        return _state(pid) not in "ZX" or len(os.listdir(f"/proc/{pid}/task")) > 1
    return False
