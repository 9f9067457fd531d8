"""Objective distill with a cache of its teacher: same loss, no second question, safe on disk."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from test_distillation import batch, hyper, log_softmax, teacher  # noqa: F401  # fixtures

from vlmamba import checkpoints
from vlmamba.data.collate import Batch, collate
from vlmamba.data.examples import Example
from vlmamba.training.flags import settings
from vlmamba.training.objectives import distillation
from vlmamba.training.objectives.teacher_cache import TeacherCache, row_keys
from vlmamba.training.recipe import build_objective
from vlmamba_core.errors import UserError
from vlmamba_core.tokens import IGNORE

CPU = torch.device("cpu")


@pytest.fixture
def ready(model, processor, teacher, tmp_path):  # noqa: F811
    """A function: an objective with the cache, and the number of rows of each question so far."""

    def make(cache: str | None = "cache", folder: str = teacher[1], **changes):
        place = {} if cache is None else {"teacher_cache": tmp_path / cache}
        objective = build_objective(hyper(folder, **place, **changes))
        objective.prepare(model, processor, CPU)
        asked: list[int] = []
        count = lambda _, args, kwargs: asked.append(len(kwargs["input_ids"]))  # noqa: E731
        objective.teacher.register_forward_pre_hook(count, with_kwargs=True)
        return objective, asked

    return make


def loss_of(objective, model, some: Batch) -> float:
    return float(objective(model.train(), some, CPU).detach())


def rows_of(config, lengths, seed: int = 3) -> list[Example]:
    """Rows of so many tokens, every second with a picture; the last half is supervised."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number, length in enumerate(lengths):
        ids = torch.randint(2, 300, (length,), generator=generator)
        image = torch.full((config.num_image_tokens,), config.image_token_id)
        side = config.vision_config.image_size
        pixels = torch.rand(1, 3, side, side, generator=generator) if number % 2 else None
        ids = torch.cat([image, ids]) if pixels is not None else ids
        labels = ids.clone()
        labels[: -(length // 2)] = IGNORE
        rows.append(Example(ids, labels, pixels))
    return rows


@pytest.mark.parametrize("changes", [{}, {"distill_top": 7}, {"distill_logits": 0.0}])
def test_the_teacher_is_asked_once_and_the_loss_is_the_same(ready, model, batch, changes):  # noqa: F811
    plain, _ = ready(None, **changes)
    first, asked = ready(**changes)
    expected = loss_of(plain, model, batch)
    assert loss_of(first, model, batch) == pytest.approx(expected, rel=1e-6)
    assert asked == [2]
    assert loss_of(first, model, batch) == pytest.approx(expected, rel=1e-6)
    assert asked == [2]  # a second epoch
    second, asked = ready(**changes)
    assert loss_of(second, model, batch) == pytest.approx(expected, rel=1e-6)
    assert asked == []  # a second run


def test_a_sample_is_known_whatever_its_batch_and_padding(ready, model):
    rows = rows_of(model.config, (4, 9, 6, 21))
    objective, asked = ready()
    loss_of(objective, model, collate(rows[:2], 0))
    again = collate([rows[3], rows[1], rows[0], rows[2], rows[2]], 0)
    expected = loss_of(ready(None)[0], model, again)
    assert loss_of(objective, model, again) == pytest.approx(expected, rel=1e-5)
    assert asked == [2, 2]  # the last two samples are new, one of them twice in the batch
    alone = [loss_of(objective, model, collate([row], 8)) for row in rows]
    assert sum(alone) + alone[2] == pytest.approx(expected, rel=1e-5)
    assert asked == [2, 2]


def test_what_a_sample_is_decides_its_key(ready, model):
    objective, _ = ready()
    row = rows_of(model.config, (4, 9))[1]
    other_tokens, other_labels = row.input_ids.clone(), row.labels.clone()
    other_tokens[-2] += 1
    other_labels[-1] = IGNORE
    rows = [
        row,
        Example(other_tokens, row.labels, row.images),
        Example(row.input_ids, other_labels, row.images),
        Example(row.input_ids, row.labels, 1 - row.images),
        Example(row.input_ids, torch.full_like(row.labels, IGNORE), row.images),
    ]
    keys = row_keys(objective.teacher, collate(rows, 0).inputs)
    assert keys.pop() is None  # nothing is asked about it
    assert len(set(keys)) == 4


def test_another_teacher_or_question_has_another_folder(ready, model, processor, tmp_path):
    torch.manual_seed(5)
    other, _ = checkpoints.load(ready(None)[0].options.teacher)
    with torch.no_grad():
        other.language_model.embedding.weight[7, 7] += 1e-3
    other.save_pretrained(tmp_path / "other")
    processor.save_pretrained(tmp_path / "other")
    made = [{}, {"distill_temperature": 2.0}, {"distill_top": 7}, {"distill_features": 0.0}]
    folders = {ready(**changes)[0].cache.folder for changes in made}
    folders.add(ready(folder=str(tmp_path / "other"))[0].cache.folder)
    assert len(folders) == 5
    assert ready(distill_logits=2.0)[0].cache.folder in folders  # a weight is not a question
    assert json.loads((ready()[0].cache.folder / "meta.json").read_text())["asked"]["hidden"]


@pytest.mark.parametrize("top", [1, 7, 319, 320, 1000])
def test_the_likeliest_and_the_rest_are_one_distribution(ready, model, batch, top):  # noqa: F811
    """By the K + 1 outcomes' own sum, token by token in float64."""
    t = 0.7
    objective, _ = ready(None, distill_top=top, distill_features=0.0, distill_temperature=t)
    found = loss_of(objective, model, batch)
    inputs = {name: tensor for name, tensor in batch.inputs.items() if name != "labels"}
    labels, total = batch.inputs["labels"].numpy(), 0.0
    with torch.no_grad():
        outs = [m.eval()(**inputs).logits.double().numpy() for m in (model, objective.teacher)]
    for row, place in np.argwhere(labels[:, 1:] != IGNORE):
        own, its = (out[row, place] for out in outs)
        total -= log_softmax(own)[labels[row, place + 1]]
        q, p = np.exp(log_softmax(own / t)), np.exp(log_softmax(its / t))
        order = np.argsort(-p)
        kept, rest = order[:top], order[top:]
        outcomes = [(p[i], q[i]) for i in kept]
        outcomes += [(p[rest].sum(), q[rest].sum())] if len(rest) else []
        total += t**2 * sum(a * np.log(a / b) for a, b in outcomes)
    assert found == pytest.approx(total, rel=1e-4)


def test_gradients_come_through_the_rest(ready, model, batch):  # noqa: F811
    objective, _ = ready(distill_top=3)
    objective(model.train(), batch, CPU).backward()
    grads = [p.grad for p in model.language_model.parameters() if p.grad is not None]
    assert grads and all(bool(g.isfinite().all()) for g in grads)


@pytest.mark.parametrize("damage", ["cut", "empty", "altered", "text"])
def test_a_damaged_file_is_made_anew(ready, model, batch, damage):  # noqa: F811
    objective, asked = ready()
    expected = loss_of(objective, model, batch)
    path = sorted(objective.cache.folder.glob("*/*.safetensors"))[0]
    whole = path.read_bytes()
    broken = {"cut": whole[:-9], "empty": b"", "text": b"not tensors"}
    flipped = whole[:-3] + bytes([whole[-3] ^ 64]) + whole[-2:]
    path.write_bytes(broken.get(damage, flipped))
    again, asked = ready()
    assert loss_of(again, model, batch) == pytest.approx(expected, rel=1e-6)
    assert asked == [1]
    assert path.read_bytes() == whole


def _write(folder: Path, rounds: int) -> None:
    cache = TeacherCache(folder)
    for number in range(rounds):
        cache.put(f"{number % 3:032x}", {"hidden": torch.full((2000,), float(number % 3))})


def test_two_processes_write_and_a_third_reads_whole_files_only(tmp_path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(tmp_path, 300)) for _ in range(2)]
    cache = TeacherCache(tmp_path)
    for writer in writers:
        writer.start()
    seen = 0
    while any(writer.is_alive() for writer in writers):
        for number in range(3):
            found, path = cache.get(f"{number:032x}"), cache.path(f"{number:032x}")
            if path.exists() and found is None:
                found = cache.get(f"{number:032x}")  # it came between the two looks
                assert found is not None
            if found is not None:
                assert bool((found["hidden"] == number).all())
                seen += 1
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert seen and not list((tmp_path / "parts").iterdir())


def test_what_a_killed_process_left_is_removed_in_time(tmp_path):
    cache = TeacherCache(tmp_path)
    for name, age in (("old", 7200), ("new", 5)):
        (cache.parts / name).write_bytes(b"half")
        os.utime(cache.parts / name, (time.time() - age,) * 2)
    TeacherCache(tmp_path)
    assert [part.name for part in cache.parts.iterdir()] == ["new"]
    assert cache.get("0" * 32) is None


def test_a_cache_that_cannot_be_or_would_be_too_large_is_refused(ready, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"cannot write .*; give another --teacher-cache"):
        ready("file")
    monkeypatch.setattr(distillation, "MOST_KEPT", 319)
    with pytest.raises(UserError, match=r"keep 320 numbers a token; give --distill-top K"):
        ready()
    ready(None)
    ready(distill_top=320)
    ready(distill_logits=0.0)


def test_the_folder_is_no_setting_of_the_run(teacher, tmp_path):  # noqa: F811
    saved = settings(hyper(teacher[1], teacher_cache=tmp_path, distill_top=5))
    assert "teacher_cache" not in saved
    assert saved["distill_top"] == 5
    assert json.loads(json.dumps(saved)) == saved
