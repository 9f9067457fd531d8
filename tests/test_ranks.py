"""Two processes under `accelerate launch`: the answers of one; a killed one ends the run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_kills import evaluation, lines  # noqa: F401
from test_train_cli import free_port

from harness import ranks, run
from tasks.errors import UserError


def launch(arguments: list[str]) -> subprocess.Popen:
    """Two processes on the CPU; all they print comes in one stream."""
    two = ["--num_processes", "2", "--main_process_port", str(free_port())]
    command = [sys.executable, "-m", "accelerate.commands.launch", *two]
    command += ["-m", "harness.run", *arguments, "--device", "cpu"]
    return subprocess.Popen(
        command, env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def process_of_rank(rank: int) -> int:
    """The process id of a rank, by the variable that the launcher gave it."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if f"RANK={rank}".encode() in environment and b"harness.run" in command:
            return int(folder.name)
    raise AssertionError(f"no process of rank {rank}")


def test_a_killed_rank_ends_the_run_and_both_then_give_the_answers_of_one(
    evaluation,  # noqa: F811
    tmp_path,
):
    one, two = tmp_path / "one", tmp_path / "two"
    assert run.main([*evaluation[:-1], str(one)]) == 0
    arguments = [*evaluation[:-1], str(two)]
    process = launch(arguments)
    while process.poll() is None and len(lines(two / "answers.rank1.jsonl")) < 2:
        time.sleep(0.002)
    os.kill(process_of_rank(1), signal.SIGKILL)
    began = time.monotonic()
    output = process.communicate(timeout=120)[0]
    print(f"the run ended {time.monotonic() - began:.1f} s after the kill")
    assert process.returncode != 0
    assert f"error: {ranks.LOST}" in output
    assert not (two / "record.json").exists()
    kept = sum(len(lines(file)) for file in two.glob("answers.rank*.jsonl"))

    process = launch(arguments)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    answers = [line for file in two.glob("answers.rank*.jsonl") for line in lines(file)]
    assert len(set(answers)) == len(answers) == 20  # each question was asked once
    for task in ("pope", "mme"):
        name = f"samples_{task}.jsonl"
        assert (one / name).read_bytes() == (two / name).read_bytes()
    assert (one / "table.md").read_bytes() == (two / "table.md").read_bytes()
    ours, theirs = (json.loads((out / "record.json").read_text()) for out in (one, two))
    assert (ours["terms"].pop("processes"), theirs["terms"].pop("processes")) == (1, 2)
    for part in ("tasks", "data", "model", "events", "terms", "lmms_eval_check"):
        assert ours[part] == theirs[part]
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
