"""The evaluation loop: each row is read, put into a prompt and scored once, for any model."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence

import datasets
import pytest
import whole_files
from harness_world import pope_rows
from PIL import Image

import tasks
from harness import run
from harness.data import questions
from harness.data.images import UnreadableImage
from harness.data.questions import NO_IMAGE
from harness.data.sources import Source
from harness.models import ranks
from harness.models.base import EvalModel, Limits, Request
from harness.models.registry import ModelOptions, eval_models
from harness.runs.evaluation import request_of
from tasks.common import Benchmark
from vlmamba.demo.benchmarks import demo_benchmark
from vlmamba_core.errors import UserError


class Parrot(EvalModel):
    """Says yes, and knows what it was asked."""

    def __init__(self, name: str, options: ModelOptions) -> None:
        self.name, self.options, self.batch_size = name, options, options.batch_size
        self.asked: list[Request] = []

    def provenance(self) -> dict:
        return {"answer": self.name}

    def answer(self, requests: Sequence[Request], limits: Limits, batch_size: int, on_done) -> None:
        self.asked += requests
        for index, _ in enumerate(requests):
            on_done(index, self.name)


@pytest.fixture
def parrots(monkeypatch) -> list[Parrot]:
    """The kind "parrot" of models, and those that were made."""
    made: list[Parrot] = []

    def load(name: str, options: ModelOptions) -> EvalModel:
        made.append(Parrot(name, options))
        return made[-1]

    monkeypatch.setitem(eval_models, "parrot", load)
    return made


def counting(monkeypatch, counts: Counter, owner: object, name: str, key: str = "") -> None:
    """Count the calls of a method."""
    real = getattr(owner, name)

    def counted(*args, **kwargs):
        counts[key or name] += 1
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)


@pytest.mark.parametrize("data", ["demo", "folder"])
def test_one_scoring_one_prompt_one_row_read_a_question(data, tmp_path, monkeypatch, parrots):
    if data == "folder":
        data = str(demo_benchmark("pope", "seen"))
    counts: Counter[str] = Counter()
    pope = type(tasks.load("pope"))
    for owner, name in ((Benchmark, "evaluate"), (pope, "score_case"), (pope, "prompt")):
        counting(monkeypatch, counts, owner, name)
    batches = datasets.Dataset.iter

    def iterated(self, size, *rest):
        for batch in batches(self, size, *rest):
            counts["rows of a data set"] += len(batch)
            yield batch

    values = questions._values

    def valued(task, table, first):
        counts["rows as values"] += len(table)
        return values(task, table, first)

    monkeypatch.setattr(datasets.Dataset, "iter", iterated)
    monkeypatch.setattr(questions, "_values", valued)
    # every other way to a data set's rows
    counting(monkeypatch, counts, datasets.Dataset, "_getitem", "rows of a data set")
    arguments = ["--tasks", "pope", "--limit", "30", "--model", "parrot:yes", "--data", data]
    assert run.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    expected = {"evaluate": 1, "score_case": 30, "prompt": 30, "rows as values": 30}
    assert counts == expected | ({} if data == "demo" else {"rows of a data set": 30})


def test_any_model_is_evaluated(tmp_path, parrots, capsys):
    arguments = ["--tasks", "pope,mme", "--limit", "12", "--model", "parrot:yes"]
    assert run.main([*arguments, "--batch-size", "5", "--out", str(tmp_path)]) == 0
    (parrot,) = parrots
    assert (parrot.name, parrot.options.batch_size) == ("yes", 5)
    assert Counter(request.task for request in parrot.asked) == {"pope": 12, "mme": 12}
    assert all(len(request.pictures) == 1 for request in parrot.asked)
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["model"] == {"name": "parrot:yes"}
    assert record["settings"]["answer"] == "yes"
    assert record["tasks"]["pope"]["metrics"]["yes_ratio"]["value"] == 1.0
    assert " questions/s; decoding images " in capsys.readouterr().out
    assert run.main(["--tasks", "pope", "--model", "parot:yes"]) == 2
    assert "unknown kind of model 'parot'; known, nearest first: parrot" in capsys.readouterr().err
    assert run.main(["--tasks", "pope", "--model", "parrot:"]) == 2
    assert "names no model; expected parrot:NAME" in capsys.readouterr().err


def test_a_run_loads_no_library_that_it_does_not_need(tmp_path):
    """Of scipy, transformers itself loads what matches boxes (loss_for_object_detection)."""
    code = (
        "import sys; from harness import run\n"
        "code = run.main(['--tasks', 'pope', '--limit', '30', '--out', sys.argv[1]])\n"
        "heavy = 'lmms_eval', 'wandb', 'scipy.stats', 'matplotlib', 'datasets', 'pandas'\n"
        "heavy = set(heavy) & set(sys.modules)\n"
        "assert code == 0 and not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


@pytest.mark.parametrize(("protocol", "limit"), [("lmms", ["--limit", "30"]), ("paper", [])])
def test_the_check_is_written_into_the_record(tmp_path, parrots, protocol, limit):
    arguments = ["--tasks", "mme,vqav2", "--protocol", protocol, "--model", "parrot:yes", *limit]
    assert run.main([*arguments, "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "record.json").read_text())
    check, against = record["lmms_eval_check"], record["lmms_eval_check_against"]
    assert check["mme"] == "equal"
    assert against["mme"].startswith("lmms-eval's own mme")
    if protocol == "lmms":
        assert check["vqav2"] == "equal"
    else:
        assert check["vqav2"] == "not made: lmms-eval has no rules of this protocol"
        assert against["vqav2"] == "nothing"


def test_images_are_views_of_the_data_until_they_are_shown(tmp_path):
    rows = pope_rows()
    rows[1]["image"] = None
    rows[2]["image"] = {"bytes": None, "path": "gone.png"}
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "pope.parquet")
    task = tasks.load("pope")
    found = questions.read(task, Source.parse(str(tmp_path)).rows(task), "paper", limit=5)
    assert [question.row for question in found] == [0, 1, 2, 3, 4]
    assert isinstance(found[0].images[0]["bytes"], memoryview)
    assert found[0].picture().size == (32, 24)
    assert found[0].doc == {k: v for k, v in rows[0].items() if k != "image"}
    assert found[2].image_key is None
    assert "gone.png" in found[2].trouble
    assert found[3].image_key not in (None, found[0].image_key)
    assert NO_IMAGE not in {question.image_key for question in found}  # POPE's always have one


@pytest.mark.parametrize("name", ["mmmu", "seedbench"])
def test_a_question_is_asked_with_all_its_images_in_order(name, tmp_path):
    """Columns image_1 to image_7, or lists of images; rows of another part are not asked.

    Under `lmms`: MMMU's own script shows the first one alone.
    """
    whole_files.write(name, tmp_path)
    task, rows = tasks.load(name), whole_files.BUILDERS[name]().asked
    found = questions.read(task, Source.parse(str(tmp_path)).rows(task), "lmms")
    assert len(found) == len(rows)
    for question, row in zip(found, rows, strict=True):
        shown = [cell["bytes"] for column in task.image_columns for cell in cells(row.get(column))]
        request = request_of(question, "lmms")
        assert [bytes(image["bytes"]) for image in question.images] == shown
        assert [picture.key for picture in request.pictures] == question.image_keys
        colors = [picture.read().getpixel((0, 0)) for picture in request.pictures]
        assert colors == [Image.open(io.BytesIO(png)).getpixel((0, 0)) for png in shown]
        assert not set(task.image_columns) & set(question.doc)
    assert name == "seedbench" or {len(question.images) for question in found} == {1, 2, 3}


def test_one_unreadable_image_of_several_leaves_the_question_out(tmp_path):
    rows = [dict(row) for row in whole_files.mmmu().rows]
    rows[1]["image_2"] = {"bytes": b"not a picture", "path": None}
    rows[2]["image_3"] = None
    for row in rows:
        del row[whole_files.ASKED]
    kinds = whole_files.features("mmmu")
    datasets.Dataset.from_list(rows, features=kinds).to_parquet(tmp_path / "mmmu.parquet")
    task = tasks.load("mmmu")
    found = questions.read(task, Source.parse(str(tmp_path)).rows(task), "lmms")
    with pytest.raises(UnreadableImage):
        request_of(found[1], "lmms").pictures[1].read()
    with pytest.raises(UnreadableImage):
        request_of(found[2], "lmms").pictures[2].read()


def cells(cell):
    """The images of a cell."""
    return cell if isinstance(cell, list) else [] if cell is None else [cell]


def test_equal_images_stay_with_one_process(monkeypatch):
    keys = ["a", "b", "a", None, None, "c", "b"]
    assert ranks.share(keys) == list(range(7))
    monkeypatch.setenv("WORLD_SIZE", "2")
    parts = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        parts.append(ranks.share(keys))
    assert parts == [[0, 2, 3, 5], [1, 4, 6]]


def test_a_blind_run_is_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="blind run needs every image"):
        eval_models.load("nano", ModelOptions(blind=True))
