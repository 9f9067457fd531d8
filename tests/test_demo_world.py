"""The demo world: deterministic, disjoint splits, hub schemas, nothing to guess from text alone."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections import Counter
from pathlib import Path

import datasets
import pytest

from vlmamba.demo import BENCHMARKS, build_benchmark, demo_benchmark
from vlmamba.demo import questions as ask
from vlmamba.demo.__main__ import main
from vlmamba.demo.benchmarks import ROWS
from vlmamba.demo.benchmarks.hub_schemas import COLUMNS, features
from vlmamba.demo.benchmarks.mme import MME_IMAGES, MME_SUBTASKS
from vlmamba.demo.benchmarks.source import Source
from vlmamba.demo.conversations import (
    LETTERS,
    TURNS_PER_SAMPLE,
    build_training_data,
    conversation_samples,
    fact_lines,
    question_lines,
    told_lines,
    told_samples,
)
from vlmamba.demo.labeled import words_of
from vlmamba.demo.labeled_talks import LEVELS, RECALL_FORMS, labeled_talk, recall_lines
from vlmamba.demo.render import pictures, render
from vlmamba.demo.text import definitions, documents, examples
from vlmamba.demo.vocabulary import (
    CLASSES,
    COLORS,
    HELDOUT_STYLES,
    SHOWN_WITH,
    TRAINING_STYLES,
    with_article,
)
from vlmamba.demo.words import in_words
from vlmamba.demo.world import SIDE, SPLITS, STYLES, SceneOptions, sample_scene
from vlmamba_core.errors import UserError

TRAINING = SceneOptions(variants=True)
PATH = Path("images/t000/t000001.jpg")


def source(task: str, split: str = "heldout") -> Source:
    return Source(task, split, 0, SPLITS[split])


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict]]:
    """The rows of every benchmark, pictures not drawn."""
    return {task: ROWS[task](source(task)) for task in ROWS}


# --- scenes and pictures ----------------------------------------------------------------------


def test_every_class_has_a_picture_in_every_style():
    assert len(CLASSES) == 67
    for style, name in itertools.product(STYLES, CLASSES):
        picture = pictures(style, name)[0]
        assert picture.mode == "RGBA" and max(picture.size) == 96, (style, name)


def test_equal_seeds_give_equal_pictures():
    for augment in (False, True):
        scene = sample_scene("train/0/talk/3", TRAINING)
        again = sample_scene("train/0/talk/3", TRAINING)
        assert scene == again
        first, second = render(scene, augment), render(again, augment)
        assert first.size == (SIDE, SIDE) and first.mode == "RGB"
        assert first.tobytes() == second.tobytes()
    assert render(scene, False).tobytes() != render(scene, True).tobytes()
    assert sample_scene("train/0/talk/4", TRAINING) != scene


def test_things_lie_in_the_picture_and_hardly_overlap():
    for index in range(300):
        scene = sample_scene(f"layout/{index}", TRAINING)
        assert 1 <= len(scene.things) <= 5
        for thing in scene.things:
            assert 0 < thing.x < SIDE and 0 < thing.y < SIDE and 70 <= thing.size <= 108
        for a, b in itertools.combinations(scene.things, 2):
            assert max(abs(a.x - b.x), abs(a.y - b.y)) >= 0.55 * min(a.size, b.size)


def test_signs_keep_their_color_in_training_pictures():
    scene = next(
        scene
        for scene in (sample_scene(f"sign/{i}", TRAINING) for i in range(200))
        if scene.sign and scene.sign.color == "red"
    )
    sign = scene.sign
    corner = (sign.x - sign.width // 2 + 8, sign.y - sign.height // 2 + 8)
    red, green, blue = render(scene, augment=True).getpixel(corner)
    assert red > 2 * green and red > 2 * blue


# --- splits -----------------------------------------------------------------------------------


def test_no_split_but_heldout_shows_the_heldout_style():
    for split, styles in SPLITS.items():
        assert bool(set(styles) & set(HELDOUT_STYLES)) == (split == "heldout")
    drawn = {
        thing.style
        for i in range(400)
        for thing in sample_scene(f"train/0/talk/{i}", TRAINING).things
    }
    assert drawn == set(TRAINING_STYLES)


def test_splits_share_no_scene():
    seen: set = set()
    for split in SPLITS:
        scenes = {
            (scene.place, scene.things, scene.sign)
            for scene in source("pope", split).take(300, styles=TRAINING_STYLES)
        }
        assert not scenes & seen
        seen |= scenes


# --- training data ----------------------------------------------------------------------------


def human_turns(sample: dict) -> list[tuple[str, str]]:
    turns = sample["conversations"]
    return [
        (human["value"], gpt["value"]) for human, gpt in zip(turns[::2], turns[1::2], strict=True)
    ]


@pytest.fixture(scope="module")
def talks() -> list[dict]:
    balance = ask.Existence()
    scenes = (sample_scene(f"train/0/talk/{i}", TRAINING) for i in range(1500))
    return [sample for scene in scenes for sample in conversation_samples(scene, PATH, balance)]


def test_conversations_are_llava_json(talks):
    for sample in talks[:200]:
        assert set(sample) == {"id", "image", "conversations"}
        turns = sample["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert turns[0]["value"].startswith("<image>\n")
        assert sum("<image>" in turn["value"] for turn in turns) == 1
        assert all(turn["value"].strip() for turn in turns)
    assert all(1 <= len(human_turns(sample)) <= TURNS_PER_SAMPLE for sample in talks)
    turns_per_picture = sum(len(human_turns(sample)) for sample in talks) / 1500
    assert 8 <= turns_per_picture <= 13


def test_existence_turns_are_balanced_class_by_class(talks):
    asked: dict[str, Counter] = {}
    for text, answer in (turn for sample in talks for turn in human_turns(sample)):
        for name in CLASSES:
            if f"Is there {with_article(name)} in th" in text:
                asked.setdefault(name, Counter())[answer] += 1
    assert len(asked) == len(CLASSES)
    for name, counts in asked.items():
        assert abs(counts["Yes"] - counts["No"]) <= max(4, 0.12 * sum(counts.values())), name


def test_no_turn_gives_away_a_later_answer():
    """A class that an earlier turn named is not asked for again."""
    balance = ask.Existence()
    for index in range(200):
        scene = sample_scene(f"train/1/talk/{index}", TRAINING)
        earlier = ""
        samples = conversation_samples(scene, PATH, balance)
        for text, answer in (turn for sample in samples for turn in human_turns(sample)):
            for name in scene.counts:
                if f"Is there {with_article(name)} in th" in text:
                    assert f" {name} " not in f" {earlier} ", (earlier, text)
            earlier += f" {answer}"


def test_option_letters_are_uniform(talks):
    letters = Counter(
        answer
        for sample in talks
        for text, answer in human_turns(sample)
        if "option's letter" in text
    )
    assert set(letters) == set("ABCD")
    assert max(letters.values()) < 1.25 * min(letters.values())


def drawn(folder: Path, captions: int = 2, **counts) -> None:
    """Training data in this process, without the pictures of easy-VQA."""
    build_training_data(folder, captions=captions, easy_vqa=False, workers=1, **counts)


def test_training_data_is_written_and_equal_again(tmp_path):
    for name in ("a", "b"):
        drawn(tmp_path / name, images=31, captions=4, dialogues=3)
    for name in ("dialogue.json", "pretrain.json", "finetune.json", "images/t000/t000007.jpg"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    finetune = json.loads((tmp_path / "a" / "finetune.json").read_text())
    assert sum("image" not in sample for sample in finetune) == 1
    for sample in finetune:
        assert "image" not in sample or (tmp_path / "a" / sample["image"]).is_file()
    with pytest.raises(UserError, match="already holds"):
        build_training_data(tmp_path / "a", images=1, captions=1)


def test_words_of_patches_are_an_option_and_change_nothing_else(tmp_path):
    for name, patches in (("without", False), ("with", True)):
        drawn(tmp_path / name, images=31, dialogues=2, labeled=20, patches=patches)
    for name in ("pretrain.json", "finetune.json", "dialogue.json"):
        plain, told = (json.loads((tmp_path / f / name).read_text()) for f in ("without", "with"))
        grids = [sample.pop("patch_words", None) for sample in told]
        assert plain == told
        assert all(
            (grid is not None) == ("image" in s) for grid, s in zip(grids, told, strict=True)
        )
        found = [
            [grid] if isinstance(s["image"], str) else grid
            for grid, s in zip(grids, told, strict=True)
            if grid
        ]
        assert {len(one) for several in found for one in several} <= {16, 49}
        assert name != "finetune.json" or {len(several) for several in found} > {1}


def test_conversations_about_signs_are_an_option_and_change_nothing_else(tmp_path):
    """What was made without the option stands first, byte for byte; then come several pictures,
    other text before the question, and answers that are on the sign."""
    for name, number in (("without", 0), ("with", 40)):
        drawn(tmp_path / name, images=3, dialogues=4, labeled=number)
    for name in ("text.txt", "near.txt", "far.txt", "letters.txt", "pretrain.json"):
        without, with_signs = ((tmp_path / f / name).read_bytes() for f in ("without", "with"))
        assert without == with_signs
    added = {}
    for name in ("finetune.json", "dialogue.json"):
        without, with_signs = (
            json.loads((tmp_path / f / name).read_text()) for f in ("without", "with")
        )
        assert with_signs[: len(without)] == without
        added[name] = with_signs[len(without) :]
        assert len(added[name]) == 40
    facts = (tmp_path / "with" / "facts.txt").read_text()
    assert facts.startswith((tmp_path / "without" / "facts.txt").read_text())
    assert facts.count("\n") == 6 + 40
    counts = Counter()
    for sample in added["finetune.json"]:
        paths = sample["image"] if isinstance(sample["image"], list) else [sample["image"]]
        first = human_turns(sample)[0][0]
        assert first.startswith("<image>\n" * len(paths)) and first.count("<image>") == len(paths)
        assert all((tmp_path / "with" / path).is_file() for path in paths)
        counts[len(paths), len(first.split()) > 30] += 1
    assert counts[1, True] and counts[1, False] and any(n > 2 for n, _ in counts)
    assert sorted((tmp_path / "with" / "images").rglob("l*.jpg"))[0].name == "l000000.jpg"


def test_signs_told_in_words_hold_the_answers():
    presence, lists = ask.Presence(), 0
    for index in range(200):
        talk = labeled_talk(f"told/{index}", presence)
        told = "\n".join(map(words_of, talk.scenes)).split("\n")
        assert all(len(line.split(" ")) >= 48 for line in told)
        for question in talk.questions:
            if question.kind == "signs":
                of_each = question.answer.split(", ")
                assert len(of_each) == sum(len(scene.things) for scene in talk.scenes)
                assert all(f" {one} " in f" {' '.join(told)} " for one in of_each)
                lists += 1
                continue
            name = question.names[0]
            if question.kind == "existence":
                shown = {thing.name for scene in talk.scenes for thing in scene.things}
                assert (question.answer == "Yes") == (name in shown)
                assert name not in shown or any(f"{name} " in f"{t} " for t in told)
                continue
            (at,) = (
                (scene, place)
                for scene in talk.scenes
                for place, thing in enumerate(scene.things)
                if thing.name == name
            )
            label = at[0].labels[at[1]]
            assert f"{name} {label.color} {label.text}" in words_of(at[0])
            assert question.answer in (label.color, label.text)
    assert 60 < lists < 100


def test_style_choice_reaches_the_pictures(tmp_path):
    build_benchmark("mmvet", tmp_path / "a", "validation", styles=("fluent",))
    build_benchmark("mmvet", tmp_path / "b", "validation", styles=("noto",))
    first, second = ((tmp_path / x / "mmvet.parquet").read_bytes() for x in "ab")
    assert first != second


# --- benchmarks -------------------------------------------------------------------------------


def test_rows_have_the_hub_columns(rows):
    assert set(rows) == set(BENCHMARKS) <= set(COLUMNS)
    for task, found in rows.items():
        for row in found:
            assert set(row) == set(COLUMNS[task]), task
    for task in ("vqav2", "gqa", "scienceqa", "textvqa", "mmbench"):
        assert 200 <= len(rows[task]) <= 400
    assert len(rows["easy_vqa"]) == 9673


@pytest.mark.parametrize("task", ["mmvet", "scienceqa", "gqa"])
def test_files_load_with_decoded_pictures(task, tmp_path):
    build_benchmark(task, tmp_path)
    file = str(tmp_path / f"{task}.parquet")
    table = datasets.load_dataset(
        "parquet", data_files=file, split="train", cache_dir=str(tmp_path / "cache")
    )
    assert table.features == features(task)
    found = [row["image"] for row in table]
    assert all(picture.size == (SIDE, SIDE) for picture in found if picture)
    assert any(picture is None for picture in found) == (task == "scienceqa")


def test_pope_has_three_balanced_categories_on_the_same_objects(rows):
    scenes = {row["image_source"]: row["image"] for row in rows["pope"]}
    assert 60 <= len(scenes) <= 100
    affirmed = []
    for category in ("random", "popular", "adversarial"):
        found = [row for row in rows["pope"] if row["category"] == category]
        assert Counter(row["image_source"] for row in found) == dict.fromkeys(scenes, 6)
        assert Counter(row["answer"] for row in found) == dict.fromkeys(
            ("yes", "no"), 3 * len(scenes)
        )
        assert len({(row["image_source"], row["question"]) for row in found}) == len(found)
        affirmed.append(
            {(row["image_source"], row["question"]) for row in found if row["answer"] == "yes"}
        )
    assert affirmed[0] == affirmed[1] == affirmed[2]
    for row in rows["pope"]:
        (name,) = (
            n for n in CLASSES if row["question"] == f"Is there {with_article(n)} in the image?"
        )
        assert (name in row["image"].counts) == (row["answer"] == "yes")
        assert name not in row["image"].hidden


def test_pope_is_near_chance_without_the_picture(rows):
    """Even with the answers at hand, a guess per question text gains little."""
    limits = {"random": 0.52, "popular": 0.66, "adversarial": 0.57}
    for category, limit in limits.items():
        answers: dict[str, Counter] = {}
        for row in rows["pope"]:
            if row["category"] == category:
                answers.setdefault(row["question"], Counter())[row["answer"]] += 1
        total = sum(sum(counts.values()) for counts in answers.values())
        assert sum(max(counts.values()) for counts in answers.values()) / total <= limit


def test_mme_pairs_are_complete(rows):
    assert set(MME_IMAGES) < set(MME_SUBTASKS) and len(MME_SUBTASKS) == 14
    pairs: dict[str, list[dict]] = {}
    for row in rows["mme"]:
        pairs.setdefault(row["question_id"], []).append(row)
        assert row["question"].endswith("? Please answer yes or no.")
    for pair in pairs.values():
        assert sorted(row["answer"] for row in pair) == ["No", "Yes"]
        assert pair[0]["image"] == pair[1]["image"] and pair[0]["category"] == pair[1]["category"]
        assert pair[0]["question"] != pair[1]["question"]
    assert Counter(row["category"] for row in rows["mme"]) == {
        name: 2 * images for name, images in MME_IMAGES.items()
    }


def test_mmbench_has_every_rotation(rows):
    groups: dict[int, list[dict]] = {}
    for row in rows["mmbench"]:
        groups.setdefault(row["index"] % 1_000_000, []).append(row)
    for group in groups.values():
        options = [row[letter] for row in group[:1] for letter in "ABCD" if row[letter] != "nan"]
        assert len(group) == len(options) >= 2
        assert len({row[row["answer"]] for row in group}) == 1
        assert sorted(row["answer"] for row in group) == list("ABCD"[: len(options)])
        assert len({row["index"] for row in group}) == len(group)


def test_answers_with_disagreement_and_references(rows):
    for row in rows["vqav2"]:
        said = Counter(answer["answer"] for answer in row["answers"])
        assert said.total() == 10 and said.most_common(1)[0][0] == row["multiple_choice_answer"]
    assert any(len({a["answer"] for a in row["answers"]}) > 1 for row in rows["vqav2"])
    assert {row["answer_type"] for row in rows["vqav2"]} == {"yes/no", "number", "other"}
    for row in rows["textvqa"]:
        assert len(row["answers"]) == 10 and row["image"].sign.text == row["answers"][0]
    for row in rows["coco_cap"]:
        assert len(set(row["answer"])) == 5
    assert any(row["image"] is None for row in rows["scienceqa"])
    assert all(0 <= row["answer"] < len(row["choices"]) for row in rows["scienceqa"])


def test_hidden_classes_are_known():
    assert set(SHOWN_WITH) <= set(CLASSES)
    assert {other for names in SHOWN_WITH.values() for other in names} <= set(CLASSES)


def test_answers_agree_with_the_scene():
    """Open questions, checked against the scene by other means."""
    rng = random.Random(0)
    for index in range(300):
        scene = sample_scene(f"check/{index}", TRAINING)
        question = ask.OPEN["how many"](scene, rng)
        if question:
            assert int(question.answer) == sum(t.name == question.names[0] for t in scene.things)
        question = ask.OPEN["which side"](scene, rng)
        if question:
            first, second = (scene.only(name) for name in question.names)
            offset = {
                "left": second.x - first.x,
                "right": first.x - second.x,
                "above": second.y - first.y,
                "below": first.y - second.y,
            }
            assert offset[question.answer] > 30


# --- cache, command line, text ----------------------------------------------------------------


def test_a_split_is_one_however_it_is_spelled(tmp_path):
    files = [build_benchmark("mmvet", tmp_path / name, name) for name in ("seen", "Seen")]
    assert len({(folder / "mmvet.parquet").read_bytes() for folder in files}) == 1


@pytest.mark.parametrize("seed", [12, 32])
def test_a_scene_that_leaves_few_wrong_options_is_asked_about(seed):
    rows = ROWS["mmbench"](Source("mmbench", "seen", seed, SPLITS["seen"]))
    assert all(row["A"] != "nan" and row["B"] != "nan" for row in rows)


def test_labeled_conversations_beside_benchmarks_are_all_that_is_drawn(tmp_path):
    arguments = ["--benchmarks", "mmvet", "--labeled", "2", "--dialogues", "0", "--no-easy-vqa"]
    assert main(["--out", str(tmp_path), *arguments]) == 0
    assert len(json.loads((tmp_path / "finetune.json").read_text())) == 2


def test_cached_benchmark_is_built_once(tmp_path, monkeypatch):
    monkeypatch.setenv("VLMAMBA_CACHE", str(tmp_path))
    folder = demo_benchmark("mmvet", "heldout")
    first = (folder / "mmvet.parquet").stat().st_mtime_ns
    assert demo_benchmark("mmvet", "heldout") == folder
    assert (folder / "mmvet.parquet").stat().st_mtime_ns == first
    assert not list(folder.glob("*.part"))


@pytest.mark.parametrize("damage", ["altered", "cut", "without digest"])
def test_a_damaged_cached_benchmark_is_built_anew(damage, tmp_path, monkeypatch):
    monkeypatch.setenv("VLMAMBA_CACHE", str(tmp_path))
    file = demo_benchmark("mmvet", "heldout") / "mmvet.parquet"
    content = file.read_bytes()
    if damage == "altered":
        file.write_bytes(content[:999] + bytes([content[999] ^ 1]) + content[1000:])
    elif damage == "cut":
        file.write_bytes(content[:-9])
    else:
        file.with_suffix(".sha256").unlink()
    demo_benchmark("mmvet", "heldout")
    assert file.read_bytes() == content


def test_command_line(tmp_path, capsys):
    assert main(["--out", str(tmp_path), "--benchmarks", "mmvet", "--split", "validation"]) == 0
    assert (tmp_path / "mmvet.parquet").is_file()
    assert main(["--out", str(tmp_path), "--benchmarks", "mmvet", "--split", "unseen"]) == 2
    assert "unknown split 'unseen'" in capsys.readouterr().err
    styled = ["--benchmarks", "mmvet", "--split", "bogus", "--styles", "noto"]
    assert main(["--out", str(tmp_path / "styled"), *styled]) == 2
    assert main(["--out", str(tmp_path / "all"), "--images", "1", "--split", "Train"]) == 2
    assert "benchmarks have no split 'train'" in capsys.readouterr().err
    assert not (tmp_path / "all").exists()  # before anything is drawn
    assert main(["--out", str(tmp_path), "--benchmarks", "poppe"]) == 2
    assert "pope" in capsys.readouterr().err


def test_text_has_definitions_and_examples():
    lines = list(itertools.islice(definitions(), 2000))
    assert all(": " in line and line.endswith(".") for line in lines)
    assert all('"' not in line for line in itertools.islice(examples(), 500))
    assert next(iter(documents())) == lines[0]


# --- scenes in words --------------------------------------------------------------------------


def test_words_name_what_lies_in_the_cells():
    for index in range(100):
        scene = sample_scene(f"words/{index}", SceneOptions())
        told = in_words(scene, random.Random(index))
        assert told == in_words(scene, random.Random(index))
        for name in scene.counts:
            assert f" {name} " in f" {told} ", (name, told)
        for name in set(CLASSES) - set(scene.counts) - {"orange", "bear"}:  # color, teddy bear
            assert f" {name} " not in f" {told} ", (name, told)
        if scene.sign:
            assert scene.sign.text in told
        for thing in scene.things:
            assert thing.card is None or thing.card in told


def test_dialogues_are_conversations_about_words_instead_of_pictures():
    samples = told_samples("told", 40)
    for sample in samples:
        assert set(sample) == {"id", "conversations"}
        assert not any("<image>" in human for human, _ in human_turns(sample))
        told, question = sample["conversations"][0]["value"].split("\n", 1)
        assert len(told.split()) >= 49 and question


def test_lines_have_checklists_with_as_many_things_there_as_not():
    lines = [line.split(": ") for line in told_lines("told", 20)]
    for index, (told, said) in enumerate(lines):
        checks = re.findall(r"([a-z ]+) (yes|no)[,.]", said)
        assert bool(checks) == bool(index % 3)
        for name, answer in checks:
            assert (f" {name.strip()} " in f" {told} ") == (answer == "yes")
        assert 2 * sum(answer == "yes" for _, answer in checks) == len(checks)


@pytest.mark.parametrize("far", [False, True])
def test_question_lines_ask_as_often_for_what_is_there_as_for_what_is_not(far):
    answers = Counter()
    for line in question_lines("asked", 60, far):
        told, asked = line.split(": ", 1)
        for name, answer in re.findall(r"([a-z ]+) (yes|no)[,.]", asked):  # the plainest form
            if name.strip() in CLASSES:
                assert (f" {name.strip()} " in f" {told} ") == (answer == "yes"), line
        answers.update(re.findall(r"\b(yes|no)\b", asked.lower()))
    assert answers["yes"] == answers["no"] > 200


@pytest.mark.parametrize("level", LEVELS, ids=["copies", "near", "far"])
def test_recall_lines_learn_what_the_told_scene_says(level):
    seen = Counter()
    for line in recall_lines("recall", 200, level):
        told, asked = line.split(":", 1)
        parts = asked.split("\x1f")
        assert not parts.pop()
        for text, answer in zip(parts[::2], parts[1::2], strict=True):
            answer = answer.strip()
            name = max((c for c in CLASSES if re.search(rf"\b{c}\b", text)), key=len)
            if answer.lower() in ("yes", "no"):
                assert f" {name} " in f" {told} " or answer.lower() == "no", line
                seen[answer.lower()] += 1
                continue
            kind = re.search("word|color", text)
            triple = {"word": f"{name} [a-z]+ {answer}", "color": f"{name} {answer} [a-z]+"}
            triple = triple[kind.group()] if kind else f"{name} {answer}"
            assert re.search(rf"(?:^| ){triple}(?: |$)", told), line
            seen["near" if "?" not in text else "question"] += 1
        things = sum(word in COLORS for word in told.split())
        assert 1 <= things <= level.things + ("orange" in told)
    copies = level.forms == 1
    assert copies or (seen["yes"] > 30 and abs(seen["yes"] - seen["no"]) < 30)
    assert seen["near"] > 100 and bool(seen["question"]) == (level.forms == len(RECALL_FORMS))


def test_fact_lines_give_the_letter_of_the_marked_option():
    seen = Counter()
    for line in fact_lines("facts", 120, LETTERS):
        for options, letter in re.findall(r"\? (A\. [^:?]*): ([A-D])\.", line):
            lettered = re.findall(r"([A-D])\. ([^.]+?)(?= [A-D]\. |$)", options)
            marked = [a for a, option in lettered if option.endswith(" yes")]
            seen[bool(marked)] += 1
            assert marked in ([], [letter])
        seen["template"] += len(re.findall(r"ASSISTANT: [A-D]", line))
    assert min(seen.values()) > 50


def test_every_sign_is_asked_for():
    """Reading is rare among the other kinds, and only every third picture has a sign."""
    balance = ask.Existence()
    for index in range(20):
        scene = sample_scene(f"signs/{index}", SceneOptions(sign_chance=1.0, sum_chance=0.0))
        samples = conversation_samples(scene, PATH, balance)
        assert any("Reference OCR token" in text for s in samples for text, _ in human_turns(s))
