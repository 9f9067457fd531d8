"""Two processes under `accelerate launch`: the answers of one; a killed one ends the run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kills import LONGEST_S, Workplace, children
from test_kills import evaluation, lines  # noqa: F401
from test_train_cli import free_port

from harness.models import ranks
from harness.runs.schema import ROOT, without_timing
from vlmamba_core.errors import UserError


class Forks:
    """Two processes that find each other as a launcher's would, with nobody watching over them."""

    def __init__(self, place: Workplace) -> None:
        shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
        self._place, self._from = place, len(place.log)
        self.ranks = [place.start(RANK=r, LOCAL_RANK=r, **shared) for r in ("0", "1")]

    def pid(self, rank: int) -> int | None:
        """The process id of a rank."""
        return self.ranks[rank].pid

    def running(self) -> bool:
        """Whether the first rank is."""
        return self.ranks[0].is_alive()

    def end(self) -> tuple[int | None, str]:
        """Wait; exit code of the first rank and what was printed."""
        for process in self.ranks:
            process.join(LONGEST_S)
        return self.ranks[0].exitcode, self._place.log[self._from :]


class Launched:
    """`accelerate launch`: a launcher that starts two processes and watches over them.

    Without --multi_gpu accelerate starts a single process where there is no GPU.
    """

    def __init__(self, place: Workplace) -> None:
        two = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision=no"]
        two += ["--dynamo_backend", "no", "--main_process_port", str(free_port())]
        command = [sys.executable, "-m", "accelerate.commands.launch", *two]
        command += ["-m", place.module, *place.arguments]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        self._launcher = subprocess.Popen(
            command,
            cwd=place.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def pid(self, rank: int) -> int | None:
        """The launcher's child with this rank in its environment; None before there is one."""
        for child in children(self._launcher.pid):
            with contextlib.suppress(OSError):
                variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
                if f"RANK={rank}".encode() in variables:
                    return child
        return None

    def running(self) -> bool:
        """Whether the launcher is."""
        return self._launcher.poll() is None

    def end(self) -> tuple[int | None, str]:
        """Wait; exit code of the launcher and what was printed."""
        output = self._launcher.communicate(timeout=LONGEST_S)[0]
        return self._launcher.returncode, output


@pytest.mark.parametrize("way", [Forks, pytest.param(Launched, marks=pytest.mark.kill)])
def test_a_killed_rank_ends_the_run_and_both_then_give_the_answers_of_one(
    way,
    evaluation,  # noqa: F811
    tmp_path,
):
    arguments = [*evaluation, "--batch-size", "1", "--device", "cpu"]
    whole = Workplace(tmp_path / "one", "harness.run", arguments)
    whole.run()
    place = Workplace(tmp_path / "two", "harness.run", arguments)
    one, two = whole.out, place.out
    both = way(place)
    victim = None
    while both.running() and len(lines(two / "answers.rank1.jsonl")) < 2:
        victim = victim or both.pid(1)
        time.sleep(0.002)
    assert both.running(), both.end()
    os.kill(victim or 0, signal.SIGKILL)
    began = time.monotonic()
    code, output = both.end()
    print(f"the run ended {time.monotonic() - began:.1f} s after the kill")
    assert code not in (0, None)
    assert f"error: {ranks.LOST}" in output
    assert not (two / "record.json").exists()
    kept = sum(len(lines(file)) for file in two.glob("answers.rank*.jsonl"))

    code, output = way(place).end()
    assert code == 0, output
    answers = [line for file in two.glob("answers.rank*.jsonl") for line in lines(file)]
    assert len(set(answers)) == len(answers) == 20  # each question was asked once
    assert len(list(two.glob("answers.rank*.jsonl"))) == 2
    for name in ("samples_pope.jsonl", "samples_mme.jsonl", "table.md"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    ours, theirs = (json.loads((out / "record.json").read_text()) for out in (one, two))
    assert (ours["settings"].pop("processes"), theirs["settings"].pop("processes")) == (1, 2)
    assert without_timing(ours) == without_timing(theirs)
    assert theirs["timing"]["resumed_answers"] == kept
    assert theirs["timing"]["questions"] == 20 - kept


def test_the_death_of_another_process_is_one_line(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="another process of this run died"), ranks.together():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:9")
    with pytest.raises(RuntimeError, match="size mismatch"), ranks.together():
        raise RuntimeError("size mismatch")
    with pytest.raises(UserError, match="run the same command again"), ranks.together():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
