"""Little memory and a full disk: a run goes on with less, or stops in one line and loses nothing.

The disk is full for real here: the kernel refuses every byte of a file beyond a limit.
"""

from __future__ import annotations

import contextlib
import json
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_kills import evaluation, lines, log  # noqa: F401
from test_train_cli import PRESET, flags
from test_train_cli import world as training_data  # noqa: F401

from harness import run
from vlmamba import checkpoints, train
from vlmamba.training import trainer_state
from vlmamba_core.folder import AnswerJournal

EVALUATION_LIMITS = [0, 100, 1_000, 2_000, 2_500, 6_000]
TRAINING_LIMITS = [0, 1_000, 20_000, 100_000, 300_000]


@contextlib.contextmanager
def files_of_at_most(limit: int) -> Iterator[None]:
    """No file of this process grows beyond so many bytes: a write ends there, with an OSError."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def one_error_line(text: str) -> str:
    [line] = [line for line in text.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in text
    return line


@pytest.fixture(autouse=True)
def _fresh_accelerate_state() -> Iterator[None]:
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_an_evaluation_on_a_full_disk(evaluation, tmp_path, capsys):  # noqa: F811
    whole = tmp_path / "whole"
    assert run.main([*evaluation[:-1], str(whole)]) == 0
    names = ["samples_pope.jsonl", "samples_mme.jsonl", "table.md"]
    largest = max((whole / name).stat().st_size for name in [*names, "record.json"])
    assert max(EVALUATION_LIMITS) < largest
    kept = []
    for limit in EVALUATION_LIMITS:
        out = tmp_path / f"limit-{limit}"
        capsys.readouterr()
        with files_of_at_most(limit):
            assert run.main([*evaluation[:-1], str(out)]) == 2
        assert "File too large" in one_error_line(capsys.readouterr().err)
        assert not (out / "record.json").exists()
        kept.append(len(AnswerJournal(out)))
        assert run.main([*evaluation[:-1], str(out)]) == 0
        timing = json.loads((out / "record.json").read_text())["timing"]
        assert timing["resumed_answers"] == kept[-1]
        for name in names:
            assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert kept[0] == 0
    assert kept == sorted(kept)
    assert 20 in kept  # full only when the scores were written


def test_a_training_on_a_full_disk(training_data, tmp_path, capsys):  # noqa: F811
    def command(out: Path) -> list[str]:
        steps = flags(training_data, out, steps=3, save_every=1)
        return ["--preset", PRESET, "--resume", "auto", *steps]

    whole = tmp_path / "whole"
    assert train.main(command(whole)) == 0
    for limit in TRAINING_LIMITS:
        out = tmp_path / f"limit-{limit}"
        capsys.readouterr()
        with files_of_at_most(limit):
            assert train.main(command(out)) == 2
        assert "too large" in one_error_line(capsys.readouterr().err)
        for folder in trainer_state.checkpoints(out):
            checkpoints.load(str(folder))
        assert train.main(command(out)) == 0
        assert log(out / "train.jsonl") == log(whole / "train.jsonl")
        weights = [place / "final" / "model.safetensors" for place in (out, whole)]
        assert weights[0].read_bytes() == weights[1].read_bytes()


def test_memory_that_a_batch_does_not_fit(evaluation, tmp_path, monkeypatch):  # noqa: F811
    """The allocator's own error, on the CPU: any tensor for more than two rows is refused."""
    from vlmamba.generation import GroupedGenerator

    assert run.main([*evaluation[:-1], str(tmp_path / "calm")]) == 0
    read = GroupedGenerator._read

    def with_little_memory(self, state, suffixes):
        if len(suffixes) > 2:
            torch.empty(2**60, dtype=torch.uint8)
        return read(self, state, suffixes)

    monkeypatch.setattr(GroupedGenerator, "_read", with_little_memory)
    assert run.main([*evaluation[:-1], str(tmp_path / "tight")]) == 0
    record = json.loads((tmp_path / "tight" / "record.json").read_text())
    assert record["events"] == ["out of memory: batch size halved to 2"]
    for name in ("samples_pope.jsonl", "samples_mme.jsonl"):
        calm, tight = (lines(tmp_path / place / name) for place in ("calm", "tight"))
        assert calm == tight


def test_a_blind_runs_mean_with_little_memory(evaluation, tmp_path, monkeypatch):  # noqa: F811
    from vlmamba.models.vlm import VLMambaForConditionalGeneration as Model

    blind = [*evaluation[:-1], str(tmp_path / "calm"), "--blind"]
    assert run.main(blind) == 0
    encode = Model.encode_images

    def with_little_memory(self, pixels):
        if len(pixels) > 1:
            torch.empty(2**60, dtype=torch.uint8)
        return encode(self, pixels)

    monkeypatch.setattr(Model, "encode_images", with_little_memory)
    blind[-2] = str(tmp_path / "tight")
    assert run.main(blind) == 0
    record = json.loads((tmp_path / "tight" / "record.json").read_text())
    assert record["events"][-1] == "out of memory: batch size halved to 1"
    samples = [tmp_path / place / "samples_pope.jsonl" for place in ("calm", "tight")]
    assert samples[0].read_bytes() == samples[1].read_bytes()


def test_a_damaged_answer_is_asked_again(evaluation, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    assert run.main([*evaluation[:-1], str(out)]) == 0
    samples = (out / "samples_pope.jsonl").read_bytes()
    journal = out / "answers.rank0.jsonl"
    content = bytearray(journal.read_bytes())
    content[content.index(b'"answer": "') + 12] ^= 1
    journal.write_bytes(content)
    assert run.main([*evaluation[:-1], str(out)]) == 0
    assert json.loads((out / "record.json").read_text())["timing"]["questions"] == 1
    assert (out / "samples_pope.jsonl").read_bytes() == samples
