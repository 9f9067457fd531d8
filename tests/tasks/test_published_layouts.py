"""Benchmarks' own published files, as their authors lay them out: --data DIR and --truth FILE."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1]))
from harness_world import png

import tasks
from harness import score
from harness.data.sources import Source
from harness.scoring import imports
from tasks.common import SHORT_ANSWER
from vlmamba_core.errors import UserError

PEOPLE = [{"answer": "red", "answer_confidence": "yes", "answer_id": i} for i in range(1, 11)]


def put(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, list) and path.suffix in (".jsonl", ".lines"):
        path.write_text("\n".join(map(json.dumps, content)))
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def picture(path: Path, n: int = 0) -> None:
    put(path, png((n, 0, 0)))


def vqav2(root: Path) -> None:
    asked = [{"image_id": i, "question": f"What {i}?", "question_id": 10 + i} for i in (1, 2)]
    told = [
        {"question_id": q["question_id"], "image_id": q["image_id"], "answers": PEOPLE}
        | {"answer_type": "other", "multiple_choice_answer": "red", "question_type": "what"}
        for q in asked
    ]
    questions = {"info": {}, "data_subtype": "val2014", "questions": asked}
    put(root / "v2_OpenEnded_mscoco_val2014_questions.json", questions)
    put(root / "v2_mscoco_val2014_annotations.json", {"info": {}, "annotations": told})
    for i in (1, 2):
        picture(root / "val2014" / f"COCO_val2014_{i:012d}.jpg", i)
    questions = {"data_subtype": "test-dev2015", "questions": asked[:1]}
    put(root / "v2_OpenEnded_mscoco_test-dev2015_questions.json", questions)
    picture(root / "test2015" / "COCO_test2015_000000000001.jpg")


def gqa(root: Path) -> None:
    rows = {
        str(i): {"question": f"Is {i}?", "imageId": f"n{i}", "answer": "no", "isBalanced": True}
        for i in (1, 2)
    }
    put(root / "questions1.2" / "testdev_balanced_questions.json", rows)
    for i in (1, 2):
        picture(root / "images" / f"n{i}.jpg", i)


def textvqa(root: Path) -> None:
    rows = [
        {"question": "what brand?", "question_id": 5, "image_id": "ab", "answers": ["x"] * 10},
        {"question": "which?", "question_id": 6, "image_id": "ab", "answers": ["y"] * 10},
    ]
    put(root / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": rows})
    tokens = [{"image_id": "ab", "ocr_tokens": ["NOKIA", "5"]}]
    put(root / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": tokens})
    picture(root / "train_images" / "ab.jpg")


def scienceqa(root: Path) -> None:
    problem = {"question": "Which?", "choices": ["a", "b"], "answer": 1, "hint": "h"}
    problems = {
        "1": problem | {"image": None, "split": "test"},
        "2": problem | {"image": "image.png", "split": "test"},
        "3": problem | {"image": "image.png", "split": "val"},
    }
    put(root / "problems.json", problems)
    put(root / "pid_splits.json", {"train": [], "val": ["3"], "test": ["1", "2"]})
    picture(root / "images" / "test" / "2" / "image.png", 2)
    picture(root / "images" / "val" / "3" / "image.png", 3)


def pope(root: Path) -> None:
    for category in ("random", "popular", "adversarial"):
        rows = [
            {"question_id": i, "image": f"n{i}.jpg", "text": f"A dog {category}?", "label": "no"}
            for i in (1, 2)
        ]
        text = "\n".join(map(json.dumps, rows))
        put(root / "coco" / f"coco_pope_{category}.json", text)
    for i in (1, 2):
        picture(root / "val2014" / f"n{i}.jpg", i)


def mme(root: Path) -> None:
    text = "Is it? Please answer yes or no.\tYes\nIs it not? Please answer yes or no.\tNo\n"
    put(root / "MME_Benchmark_release_version" / "existence" / "n0.txt", text)
    picture(root / "MME_Benchmark_release_version" / "existence" / "n0.jpg")
    landmark = root / "MME_Benchmark_release_version" / "landmark"
    put(landmark / "questions_answers_YN" / "n1.txt", text)
    picture(landmark / "images" / "n1.png", 1)


def coco_cap(root: Path) -> None:
    images = [{"id": i, "file_name": f"COCO_val2014_{i:012d}.jpg"} for i in (1, 2)]
    said = [(i, k) for i in (1, 2) for k in (0, 1)]
    annotations = [{"image_id": i, "id": 9 * i + k, "caption": f"c {k}"} for i, k in said]
    put(root / "captions_val2014.json", {"images": images, "annotations": annotations})
    for i in (1, 2):
        picture(root / "val2014" / f"COCO_val2014_{i:012d}.jpg", i)


def mmvet(root: Path) -> None:
    row = {"imagename": "v1_0.png", "question": "Why?", "answer": "a<OR>b", "capability": ["rec"]}
    put(root / "mm-vet.json", {"v1_0": row})
    picture(root / "images" / "v1_0.png")


# task -> who lays it out, and the first row in hub columns, image aside
LAYOUTS = {
    "vqav2": (vqav2, 2, {"question_id": 11, "question": "What 1?", "answers": PEOPLE}),
    "gqa": (gqa, 2, {"id": "1", "imageId": "n1", "question": "Is 1?", "answer": "no"}),
    "textvqa": (textvqa, 2, {"question_id": 5, "ocr_tokens": ["NOKIA", "5"], "image_id": "ab"}),
    "scienceqa": (scienceqa, 2, {"choices": ["a", "b"], "answer": 1, "has_image": False}),
    "pope": (pope, 6, {"category": "random", "answer": "no", "image_source": "n1"}),
    "mme": (mme, 4, {"category": "existence", "answer": "Yes", "question_id": "existence/n0.jpg"}),
    "coco_cap": (coco_cap, 2, {"answer": ["c 0", "c 1"]}),
    "mmvet": (mmvet, 1, {"question_id": "v1_0", "answer": "a<OR>b", "capability": ["rec"]}),
}


@pytest.mark.parametrize("inside", ["", "eval/deep"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_data_folder_of_published_files(name, inside, tmp_path):
    lay_out, n, first = LAYOUTS[name]
    lay_out(tmp_path / inside)
    rows = Source.parse(str(tmp_path)).load(tasks.load(name), "paper")
    assert len(rows) == n
    assert {column: rows[0][column] for column in first} == first
    stored = [row["image"] for row in rows]
    assert all(image is None or Path(image["path"]).is_file() for image in stored)
    assert [image is None for image in stored] == [name == "scienceqa"] + [False] * (n - 1)


@pytest.mark.parametrize("name", LAYOUTS)
def test_without_its_images_the_folder_is_refused(name, tmp_path):
    LAYOUTS[name][0](tmp_path)
    for path in tmp_path.rglob("*"):
        if path.suffix in (".jpg", ".png"):
            path.unlink()
    with pytest.raises(UserError, match="none of the . images is in .*put the benchmark's images"):
        Source.parse(str(tmp_path)).load(tasks.load(name), "paper")


def test_other_splits_of_published_files(tmp_path):
    vqav2(tmp_path), scienceqa(tmp_path)
    rows = Source.parse(str(tmp_path), split="testdev").load(tasks.load("vqav2"), "paper")
    assert (len(rows), rows[0]["answers"]) == (1, None)
    assert rows[0]["image"]["path"].endswith("test2015/COCO_test2015_000000000001.jpg")
    rows = Source.parse(str(tmp_path), split="validation").load(tasks.load("scienceqa"), "paper")
    assert rows[0]["image"]["path"].endswith("images/val/3/image.png")


def test_llavas_question_files(tmp_path):
    asked = {"question_id": 11, "image": "COCO_test2015_000000000001.jpg", "category": "default"}
    row = asked | {"text": f"What?\n{SHORT_ANSWER}"}
    put(tmp_path / "vqav2" / "llava_vqav2_mscoco_test-dev2015.jsonl", [row])
    picture(tmp_path / "vqav2" / "test2015" / "COCO_test2015_000000000001.jpg")
    rows = Source.parse(str(tmp_path), split="testdev").load(tasks.load("vqav2"), "paper")
    assert (rows[0]["question"], rows[0]["answers"]) == ("What?", None)
    textvqa(tmp_path / "textvqa")
    (tmp_path / "textvqa" / "TextVQA_Rosetta_OCR_v0.2_val.json").unlink()
    row = {"question_id": "ab", "image": "ab.jpg", "text": "What?\nReference OCR token: a, b\nx"}
    put(tmp_path / "textvqa" / "llava_textvqa_val_v051_ocr.jsonl", [row])
    rows = Source.parse(str(tmp_path)).load(tasks.load("textvqa"), "paper")
    assert rows[1]["ocr_tokens"] == ["a", "b"]


TRUTH = {
    "vqav2": (["v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"]),
    "gqa": ["questions1.2/testdev_balanced_questions.json"],
    "textvqa": ["TextVQA_0.5.1_val.json"],
    "scienceqa": ["problems.json"],
    "mme": ["MME_Benchmark_release_version"],
    "mmvet": ["mm-vet.json"],
}
ANSWERS = {
    "vqav2": (11, f"What 1?\n{SHORT_ANSWER}", "red"),
    "gqa": ("1", f"Is 1?\n{SHORT_ANSWER}", "No"),
    "textvqa": ("ab", f"What brand?\n{SHORT_ANSWER}", "x"),
    "scienceqa": ("2", "<image>\nWhich?", "B"),
    "mme": ("existence/n0.png", f"Is it?\n{SHORT_ANSWER}", "Yes"),
    "mmvet": ("v1_0", "Why?", "a"),
}


@pytest.mark.parametrize("name", TRUTH)
def test_truth_in_published_files(name, tmp_path):
    LAYOUTS[name][0](tmp_path)
    identifier, prompt, text = ANSWERS[name]
    answer = {"question_id": identifier, "prompt": prompt, "text": text}
    answers = put(tmp_path / "answers.jsonl", [answer])
    task = tasks.load(name)
    for truth in ([tmp_path / file for file in TRUTH[name]], [tmp_path]):
        rows, missing = imports.load("llava", task, answers, truth)
        assert len(rows) == 1
        assert missing >= 0
        cases = score.score(task, rows * (2 if name == "mme" else 1), "paper").cases
        assert name == "mmvet" or cases[0].score == 1.0


def test_llavas_answers_with_popes_folder(tmp_path):
    pope(tmp_path)
    text = f"A dog popular?\n{SHORT_ANSWER}"
    question = {"question_id": 3, "image": "n1.jpg", "text": text, "category": "popular"}
    put(tmp_path / "llava_pope_test.jsonl", [question])
    answers = put(tmp_path / "a.jsonl", [{"question_id": 3, "prompt": text, "text": "No"}])
    rows, _ = imports.load("llava", tasks.load("pope"), answers, [tmp_path])
    assert rows[0].doc["answer"] == "no"


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_file_that_is_cut_is_one_line(name, tmp_path):
    LAYOUTS[name][0](tmp_path)
    files = tasks.load(name).layout.find(tmp_path, tasks.load(name).hub.split)
    text = files[-1].read_text()
    files[-1].write_text(text[: len(text) * 3 // 4])
    with pytest.raises(UserError, match=files[-1].name.split(".")[0]):
        Source.parse(str(tmp_path)).load(tasks.load(name), "paper")
