"""In-context retrieval: what scenes show, nothing to guess from text, parts, chance, prompts."""

from __future__ import annotations

import collections
import dataclasses
import json
import random
from statistics import fmean

import numpy as np
import pytest

import tasks
from harness import run
from harness.data.sources import Source as Data
from harness.data.sources import choose_tasks
from vlmamba.demo.benchmarks import ROWS, build_benchmark
from vlmamba.demo.benchmarks.retrieval import FILLERS, PICTURES, THINGS
from vlmamba.demo.benchmarks.source import Source
from vlmamba.demo.labeled import CELL, MOST, labeled_scene
from vlmamba.demo.render import render
from vlmamba.demo.vocabulary import CLASSES, COLORS, SHOWN_WITH, TRAINING_STYLES, WORDS
from vlmamba.demo.world import SIDE, SPLITS
from vlmamba_core.errors import UserError

task = tasks.load("retrieval")


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """All rows of the split "seen", pictures not drawn."""
    return ROWS["retrieval"](Source("retrieval", "seen", 0, SPLITS["seen"]))


def test_every_number_of_things_is_asked_at_every_distance_alike(rows):
    assert len(rows) == 4000 and len({row["image_source"] for row in rows}) == 200
    for part in (rows, rows[:2000]):
        cells = collections.Counter((row["k"], row["distance"]) for row in part)
        assert set(cells) == {(k, d) for k in THINGS for d in (*FILLERS, *PICTURES)}
        assert set(cells.values()) == {len(part) // 25}
    asked = collections.defaultdict(set)
    for row in rows:
        text = row["question"].replace("images", "image")
        asked[row["image_source"], row["distance"]].add((text, row["answer"], row["image"][0]))
    for (name, distance), questions in asked.items():
        assert len(questions) == 4 and questions == asked[name, "near"], distance


def test_the_answer_is_on_the_sign_of_the_thing_that_is_named(rows):
    for row in rows:
        first, *further = row["image"]
        assert len(further) == PICTURES.get(row["distance"], 0)
        assert len(row["context"].split()) == FILLERS.get(row["distance"], 0)
        assert len(first.things) == len(first.labels) == row["k"]
        named = [n for n in CLASSES if row["question"].rstrip("?").endswith(f"the {n}")]
        if row["kind"] == "existence":
            there = [t.name for t in first.things if f" {t.name} in " in row["question"]]
            assert bool(there) == (row["answer"] == "yes")
        else:
            name = max(named, key=len)
            place = [thing.name for thing in first.things].index(name)
            label, thing = first.labels[place], first.things[place]
            assert row["answer"] in ((label.text,) if row["kind"] == "word" else (label.color,))
            assert label.x == thing.x and 20 < label.y - thing.y < CELL  # in one cell, below


def test_nothing_in_view_comes_twice_or_looks_like_something_else(rows):
    for row in rows:
        things = [thing.name for scene in row["image"] for thing in scene.things]
        words = [label.text for scene in row["image"] for label in scene.labels]
        assert len(set(things)) == len(things) == len(set(words)) == len(words)
        shown = {other for name in things for other in SHOWN_WITH.get(name, ())}
        assert not shown & set(things)
        if row["answer"] == "no":
            assert not any(f" {name} in " in row["question"] for name in shown)
        said = set(row["context"].lower().replace(",", " ").replace(".", " ").split())
        assert not said & {*CLASSES, *COLORS, *WORDS}


def test_text_alone_tells_nothing(rows):
    """The most frequent answer to a question's wording, the other scenes known, is no better than
    chance; and no answer is right often enough to be said always."""
    for kind, chance in (("word", 1 / 30), ("color", 1 / 10), ("existence", 1 / 2)):
        own = [row for row in rows if row["kind"] == kind and row["distance"] == "near"]
        counts = collections.Counter((row["question"], row["answer"]) for row in own)
        answers = sorted({row["answer"] for row in own})
        right = []
        for row in own:
            others = {a: counts[row["question"], a] - (a == row["answer"]) for a in answers}
            right.append(max(answers, key=lambda a: others[a]) == row["answer"])
        assert fmean(right) <= chance + 0.05, kind
        most = collections.Counter(row["answer"] for row in own).most_common(1)[0][1]
        assert most / len(own) <= chance + 0.06, kind


def test_equal_seeds_give_equal_files_and_splits_differ(tmp_path, monkeypatch):
    monkeypatch.setitem(ROWS["retrieval"].__globals__, "SCENES", 1)
    for name in ("one", "two"):
        build_benchmark("retrieval", tmp_path / name, "validation", seed=3)
    build_benchmark("retrieval", tmp_path / "other", "seen", seed=3)
    one, two, other = (
        (tmp_path / name / "retrieval.parquet").read_bytes() for name in ("one", "two", "other")
    )
    assert one == two != other


def test_a_thing_is_drawn_as_large_among_sixteen_as_alone():
    """Every sign is a plate of its color within its own cell, whatever the number of things."""
    for number in (1, 16):
        scene = labeled_scene("size", number, TRAINING_STYLES)
        pixels = np.asarray(render(scene)).astype(int)
        bare = np.asarray(render(dataclasses.replace(scene, labels=()))).astype(int)
        changed = (pixels != bare).any(axis=2)
        cells = changed.reshape(4, CELL, 4, CELL).sum(axis=(1, 3))
        assert SIDE == 4 * CELL and (cells > 0).sum() == number <= MOST
        assert all(54 * 18 * 0.9 <= n <= 56 * 20 for n in cells[cells > 0])
        assert {thing.size for thing in scene.things} == {36}


def document(kind="word", answer="taxi", k=4, distance="near", **more):
    doc = {"question": "Which?", "context": "", "kind": kind, "answer": answer, "k": k}
    return doc | {"distance": distance} | more


def test_parts_by_hand():
    docs = [document(), document(k=16), document("color", "red", 16, "text64")]
    docs += [document("existence", "yes"), document("existence", "no", 16, "text64")]
    report = task.evaluate(docs, ["Taxi.", "milk", "red", "Yes", "Yes"], "paper")
    assert report.metrics == {
        "accuracy": 2 / 3,
        "existence": 1 / 2,
        "k4/accuracy": 1.0,
        "k4/existence": 1.0,
        "near/accuracy": 1 / 2,
        "near/existence": 1.0,
        "k16/accuracy": 1 / 2,
        "k16/existence": 0.0,
        "text64/accuracy": 1.0,
        "text64/existence": 0.0,
    }
    assert report.metric_n["accuracy"] == 3 and report.metric_n["k16/accuracy"] == 2
    assert report.notes == []  # no column tells the chances


def test_chance_of_every_part_is_told_and_is_what_guessing_gives(rows):
    signs = [row for row in rows if row["kind"] != "existence"]
    rng, right = random.Random(0), collections.defaultdict(list)
    for row in signs:
        for _ in range(20):
            label = rng.choice([label for scene in row["image"] for label in scene.labels])
            said = label.text if row["kind"] == "word" else label.color
            for part in ("", f"k{row['k']}", row["distance"]):
                right[part].append(said == row["answer"])
    (note,) = task.notes(rows, "paper")
    overall, each = note.split("in view: ")[1].split(" % (")[:2]
    told = dict(entry.split() for entry in each.split(")")[0].split(", ")) | {"": overall}
    assert told.keys() == right.keys()
    for part, hits in right.items():
        assert float(told[part]) == pytest.approx(100 * fmean(hits), abs=1.5), part
    assert "random word or color: 6.7 % (k1 6.7" in note and "existence 50 %" in note


def test_the_other_text_stands_before_the_question():
    doc = document(context="Some other text.")
    shown = "Some other text.\nWhich?\nAnswer the question using a single word or phrase."
    assert task.prompt(doc, "paper") == task.prompt(doc, "lmms") == shown


def test_it_is_asked_by_name_only():
    demo, hub = Data.parse("demo"), Data.parse("hub")
    for source in (demo, hub):
        assert "retrieval" not in [one.name for one in choose_tasks("all", source)]
    assert choose_tasks("retrieval", demo) == [task]
    with pytest.raises(UserError, match="retrieval is generated, .* give --data demo"):
        choose_tasks("pope,retrieval", hub)


def test_the_bundled_model_answers_it_and_a_blind_run_sees_less(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(ROWS["retrieval"].__globals__, "SCENES", 1)
    build_benchmark("retrieval", tmp_path / "data")
    command = ["--tasks", "retrieval", "--data", str(tmp_path / "data"), "--limit", "60"]
    assert run.main([*command, "--out", str(tmp_path / "sees")]) == 0
    assert "chance of one who names a random sign in view: " in capsys.readouterr().out
    metrics = json.loads((tmp_path / "sees" / "record.json").read_text())["tasks"]["retrieval"]
    assert metrics["n"] == 60 and metrics["metrics"]["k2/accuracy"]["n"] == 10
    assert metrics["metrics"]["pictures4/existence"]["n"] == 6
    assert run.main([*command, "--blind", "--out", str(tmp_path / "blind")]) == 0
    answers = {}
    for name in ("sees", "blind"):
        lines = (tmp_path / name / "samples_retrieval.jsonl").read_text().splitlines()
        answers[name] = [json.loads(line)["prediction"] for line in lines]
    assert len(answers["sees"]) == 60 and answers["sees"] != answers["blind"]
