"""Every benchmark's files as its authors publish them: as `--data DIR` and as `--truth FILE`.

`llava_eval` is LLaVA's playground/data/eval in small, laid out as its docs/Evaluation.md and
scripts/v1_5/eval say.
"""

from __future__ import annotations

import base64
import json
from dataclasses import asdict
from pathlib import Path

import pytest
from harness_world import png

import tasks
from harness import run, score
from harness.data.sources import Source
from harness.runs.schema import Sample
from harness.scoring import imports
from tasks.common import SHORT_ANSWER
from tasks.vizwiz.published import IF_UNANSWERABLE
from vlmamba_core.errors import UserError

PICTURE = png((9, 8, 7))
TEN = [{"answer": "red", "answer_confidence": "yes", "answer_id": n} for n in range(1, 11)]


def write(path: Path, content: object) -> Path:
    """A file of JSON, JSON lines (a list of objects in .jsonl or POPE's), text or bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.suffix == ".jsonl" or "pope" in path.name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_text(content)
    elif lines and isinstance(content, list):
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    else:
        path.write_text(json.dumps(content))
    return path


def vqav2(home: Path) -> None:
    questions = [
        {"image_id": 42, "question": "What color?", "question_id": 42000},
        {"image_id": 73, "question": "How many?", "question_id": 73000},
    ]
    annotations = [
        {"question_id": row["question_id"], "image_id": row["image_id"], "answers": TEN}
        | {"answer_type": kind, "question_type": "x", "multiple_choice_answer": "red"}
        for row, kind in zip(reversed(questions), ("number", "other"), strict=True)
    ]
    for subset in ("val2014", "test-dev2015"):
        content = {"info": {}, "data_subtype": subset, "questions": questions}
        write(home / f"v2_OpenEnded_mscoco_{subset}_questions.json", content)
    content = {"info": {}, "data_subtype": "val2014", "annotations": annotations}
    write(home / "v2_mscoco_val2014_annotations.json", content)
    for picture in ("val2014/COCO_val2014", "test2015/COCO_test2015"):
        write(home / f"{picture}_000000000042.jpg", PICTURE)


def gqa(home: Path) -> None:
    content = {
        "200": {"question": "Is it red?", "imageId": "n1", "answer": "no", "isBalanced": True}
        | {"fullAnswer": "No.", "semantic": [{"a": 1}], "groups": {"global": None}},
        "201": {"question": "Is it?", "imageId": "n2", "answer": "yes", "isBalanced": True},
    }
    write(home / "data" / "testdev_balanced_questions.json", content)
    write(home / "data" / "images" / "n1.jpg", PICTURE)


TEXTVQA = [
    {"question_id": 34602 + i, "question": question, "image_id": "a1", "answers": ["Dakota"] * 10}
    for i, question in enumerate(("what is the brand?", "who made this?"))
]


def textvqa(home: Path) -> None:
    write(home / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": TEXTVQA})
    prompt = "What is the brand?\nReference OCR token: DAKOTA, 1,5, x\n" + SHORT_ANSWER
    row = {"question_id": "a1", "image": "a1.jpg", "text": prompt, "category": "default"}
    write(home / "llava_textvqa_val_v051_ocr.jsonl", [row, row])
    write(home / "train_images" / "a1.jpg", PICTURE)


def scienceqa(home: Path) -> None:
    row = {"question": "Which?", "choices": ["a", "b"], "hint": "", "lecture": "", "solution": ""}
    problems = {
        "1": row | {"answer": 0, "image": None, "split": "test"},
        "2": row | {"answer": 1, "image": "image.png", "split": "test"},
        "3": row | {"answer": 1, "image": None, "split": "val"},
        "4": row | {"answer": 1, "image": None, "split": "train"},
    }
    write(home / "problems.json", problems)
    splits = {"train": ["4"], "val": ["3"], "test": ["2", "1"], "minitest": ["1"]}
    write(home / "pid_splits.json", splits)
    write(home / "images" / "test" / "2" / "image.png", PICTURE)


def pope(home: Path) -> None:
    image = "COCO_val2014_000000310196.jpg"
    for n, category in enumerate(("random", "popular", "adversarial")):
        rows = [
            {"question_id": i, "image": image, "text": f"Is there a cat {n}{i}?", "label": label}
            for i, label in ((1, "yes"), (2, "no"))
        ]
        write(home / "coco" / f"coco_pope_{category}.json", rows)
    write(home / "val2014" / image, PICTURE)


def mme(home: Path) -> None:
    text = "Is it? Please answer yes or no.\tYes\nIs it not? Please answer yes or no.\tNo\n"
    release = home / "MME_Benchmark_release_version"
    write(release / "code_reasoning" / "0020.txt", text)
    write(release / "code_reasoning" / "0020.png", PICTURE)
    write(release / "landmark" / "questions_answers_YN" / "b.txt", text)
    write(release / "landmark" / "images" / "b.jpg", PICTURE)
    write(home / "eval_tool" / "Your_Results" / "code_reasoning.txt", "0020.png\tIs it?\tYes\tYes")


def mmbench(home: Path) -> None:
    cells = ["7", "What?", "cat", "dog", "A", base64.b64encode(PICTURE).decode()]
    lines = ["\t".join(row) for row in (["index", "question", "A", "B", "answer", "image"], cells)]
    write(home / "mmbench_dev_20230712.tsv", "\n".join(lines))
    for folder in (home, home.with_name("mmbench_cn")):  # as Evaluation.md and the script say
        text = "\n".join(lines).replace("What?", "什么？").replace("7\t", "8\t")
        write(folder / "mmbench_dev_cn_20231003.tsv", text)


def mmvet(home: Path) -> None:
    row = {"question": "What is x?", "answer": "-1<AND>-5", "capability": ["ocr", "math"]}
    write(home / "mm-vet.json", {"v1_0": row | {"imagename": "v1_0.png", "imagesource": "web"}})
    write(home / "images" / "v1_0.png", PICTURE)


def coco_cap(home: Path) -> None:
    names = {9: "COCO_val2014_000000000009.jpg", 42: "COCO_val2014_000000000042.jpg"}
    captions = [(9, "A dog runs."), (42, "A cat sits."), (9, "A dog in a field.")]
    content = {
        "images": [{"id": number, "file_name": name} for number, name in names.items()],
        "annotations": [
            {"image_id": number, "id": n, "caption": text}
            for n, (number, text) in enumerate(captions)
        ],
    }
    write(home / "annotations" / "captions_val2014.json", content)
    write(home / "val2014" / names[9], PICTURE)


def vizwiz(home: Path) -> None:
    row = {"image": "VizWiz_val_00000000.jpg", "question": "What is it?", "answerable": 1}
    row |= {"answer_type": "other", "answers": [{"answer": "red"}] * 10}
    write(home / "Annotations" / "val.json", [row])
    write(home / "val" / row["image"], PICTURE)
    prompt = "What is it?\nWhen the provided information is insufficient, respond with "
    prompt += f"'Unanswerable'.\n{SHORT_ANSWER}"
    asked = {"image": "VizWiz_test_00000003.jpg", "text": prompt, "category": "default"}
    write(home / "llava_test.jsonl", [{"question_id": 0} | asked])
    write(home / "test" / asked["image"], PICTURE)


def seed_bench(home: Path) -> None:
    row = {"answer": "A", "data_id": "1454426_2591111986", "data_type": "image"}
    row |= {"question": "How many?", "question_id": "101669", "question_type_id": 5}
    row |= {f"choice_{letter}": letter for letter in "abcd"}
    video = row | {"data_type": "video", "data_id": "9.webm", "segment": [1.0, 2.0]}
    content = {"questions": [video, row], "question_type": {"Instances Counting": 5}}
    write(home / "SEED-Bench.json", content)
    write(home / "SEED-Bench-image" / row["data_id"], PICTURE)


def llava_bench(home: Path) -> None:
    asked = {"question_id": 0, "image": "001.jpg", "category": "conv", "text": "What is it?"}
    write(home / "questions.jsonl", [asked, asked | {"question_id": 1}])
    write(home / "context.jsonl", [{"id": "001", "image": "001.jpg", "caption": "A bus."}])
    answers = [{"question_id": n, "text": f"A bus {n}.", "answer_id": "x"} for n in (1, 0)]
    write(home / "answers_gpt4.jsonl", answers)
    write(home / "images" / "001.jpg", PICTURE)


FOLDERS = {  # as docs/Evaluation.md and the scripts of LLaVA name them
    "vqav2": vqav2,
    "gqa": gqa,
    "textvqa": textvqa,
    "scienceqa": scienceqa,
    "pope": pope,
    "MME": mme,
    "mmbench": mmbench,
    "mm-vet": mmvet,
    "coco": coco_cap,
    "vizwiz": vizwiz,
    "seed_bench": seed_bench,
    "llava-bench-in-the-wild": llava_bench,
}
# task -> rows, and of the first row what shows that the files were understood
ROWS = {
    "vqav2": (2, {"question_id": 42000, "answer_type": "other", "answers": TEN, "image_id": 42}),
    "gqa": (2, {"id": "200", "answer": "no", "imageId": "n1", "isBalanced": True}),
    "textvqa": (2, {"question_id": 34602, "ocr_tokens": ["DAKOTA", "1,5", "x"]}),
    "scienceqa": (2, {"question_id": "2", "answer": 1, "choices": ["a", "b"]}),
    "pope": (
        6,
        {"category": "random", "answer": "yes"} | {"image_source": "COCO_val2014_000000310196"},
    ),
    "mme": (4, {"question_id": "code_reasoning/0020.png", "answer": "Yes"}),
    "mmbench": (1, {"index": "7", "answer": "A"}),
    "mmbench_cn": (1, {"index": "8", "question": "什么？"}),
    "mmvet": (1, {"question_id": "v1_0", "capability": ["ocr", "math"]}),
    "vizwiz": (1, {"question_id": "VizWiz_val_00000000", "answers": ["red"] * 10}),
    "seedbench": (1, {"question_id": "101669", "answer": "A", "question_type_id": 5}),
    "llava_bench": (2, {"gpt_answer": "A bus 0.", "caption": "A bus.", "category": "conv"}),
    "coco_cap": (2, {"answer": ["A dog runs.", "A dog in a field."]}),
}


OWN = {"coco_cap": "coco", "mmbench_cn": "mmbench", "seedbench": "seed_bench"}
OWN |= {"llava_bench": "llava-bench-in-the-wild"}


@pytest.fixture
def llava_eval(tmp_path):
    for name, build in FOLDERS.items():
        build(tmp_path / "eval" / name)
    return tmp_path / "eval"


@pytest.mark.parametrize("name", ROWS)
def test_the_folder_of_llavas_scripts(name, llava_eval):
    task = tasks.load(name)
    count, first = ROWS[name]
    own = OWN.get(name) or next(f for f in FOLDERS if f.replace("-", "").lower() == name)
    for folder in (llava_eval, llava_eval / own):
        source = Source.parse(str(folder))
        source.check(task)
        rows = source.load(task, "paper")
        assert len(rows) == count
        assert {column: rows[0][column] for column in first} == first
        image = rows[0]["image"]
        assert (image["bytes"] or Path(image["path"]).read_bytes()) == PICTURE
        assert source.describe(task, rows)["files"]


def test_what_the_documents_say_of_their_images(llava_eval):
    rows = Source.parse(str(llava_eval)).load(tasks.load("scienceqa"), "paper")
    assert [row["image"] is None for row in rows] == [False, True]
    assert rows[1]["question_id"] == "1"  # the order of pid_splits.json
    rows = Source.parse(str(llava_eval)).load(tasks.load("gqa"), "paper")
    assert not Path(rows[1]["image"]["path"]).exists()  # one that is absent is counted in its turn
    rows = Source.parse(str(llava_eval)).load(tasks.load("mme"), "paper")
    assert rows[2]["question_id"] == "landmark/b.jpg"
    files = Source.parse(str(llava_eval)).describe(tasks.load("mme"), rows)["files"]
    assert files[0] == "MME/MME_Benchmark_release_version/code_reasoning/*.txt"


def test_other_splits(llava_eval):
    rows = Source.parse(str(llava_eval), split="testdev").load(tasks.load("vqav2"), "paper")
    assert rows[0]["image"]["path"].endswith("test2015/COCO_test2015_000000000042.jpg")
    assert rows[0]["answers"] is None  # hidden
    (row,) = Source.parse(str(llava_eval), split="test").load(tasks.load("vizwiz"), "paper")
    assert (row["question"], row["answers"]) == ("What is it?", None)
    for split, count in (("minitest", 1), ("validation", 1), ("val", 1)):
        source = Source.parse(str(llava_eval), split=split)
        assert len(source.load(tasks.load("scienceqa"), "paper")) == count
    with pytest.raises(UserError, match="no split 'dev' .it has: train, val, test, minitest"):
        Source.parse(str(llava_eval), split="dev").load(tasks.load("scienceqa"), "paper")
    with pytest.raises(UserError, match="which split .*as published TextVQA_0.5.1_"):
        Source.parse(str(llava_eval), split="test").check(tasks.load("textvqa"))


def test_llavas_own_question_file_where_the_truth_is_hidden(tmp_path):
    row = {"question_id": 5, "image": "COCO_test2015_000000262144.jpg", "category": "default"}
    row |= {"text": f"Is the ball flying?\n{SHORT_ANSWER}"}
    write(tmp_path / "llava_vqav2_mscoco_test-dev2015.jsonl", [row, row | {"question_id": 6}])
    write(tmp_path / "test2015" / row["image"], PICTURE)
    rows = Source.parse(str(tmp_path), split="testdev").load(tasks.load("vqav2"), "paper")
    assert [row["question"] for row in rows] == ["Is the ball flying?"] * 2


def test_ocr_tokens_of_the_rosetta_file(llava_eval):
    home = llava_eval / "textvqa"
    (home / "llava_textvqa_val_v051_ocr.jsonl").unlink()
    with pytest.raises(UserError, match="a row has no 'ocr_tokens'"):
        Source.parse(str(home)).load(tasks.load("textvqa"), "paper")
    tokens = {"image_id": "a1", "ocr_tokens": ["DAKOTA", "1,5"], "ocr_info": [{"word": "x"}]}
    write(home / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": [tokens]})
    rows = Source.parse(str(home)).load(tasks.load("textvqa"), "paper")
    assert rows[1]["ocr_tokens"] == ["DAKOTA", "1,5"]


def answered(question: object, prompt: str, text: str) -> dict:
    return {"question_id": question, "prompt": f"{prompt}\n{SHORT_ANSWER}", "text": text}


# task -> truth in LLaVA's folder, answers, accuracy by hand
SCORED = {
    "vqav2": (
        [
            "vqav2/v2_OpenEnded_mscoco_val2014_questions.json",
            "vqav2/v2_mscoco_val2014_annotations.json",
        ],
        [answered(42000, "What color?", "Red"), answered(73000, "How many?", "2")],
        {"accuracy": 0.5, "other/accuracy": 1.0, "number/accuracy": 0.0},
    ),
    "gqa": (
        ["gqa/data/testdev_balanced_questions.json"],
        [answered("201", "Is it?", "Yes."), answered("200", "Is it red?", "yes")],
        {"accuracy": 0.5},
    ),
    "textvqa": (
        ["textvqa/TextVQA_0.5.1_val.json"],
        [
            answered("a1", "Reference OCR token: DAKOTA\nWho made this?", "Dakota"),
            answered("a1", "What is the brand?\nReference OCR token: DAKOTA", "nokia"),
        ],
        {"accuracy": 0.5},
    ),
    "scienceqa": (
        ["scienceqa/problems.json", "scienceqa/pid_splits.json"],
        [answered("2", "<image>\nWhich?", "B"), answered("1", "Which?", "B")],
        {"accuracy": 1.0, "accuracy_all": 0.5},
    ),
    "mme": (
        ["MME/MME_Benchmark_release_version"],
        [
            answered("code_reasoning/0020.png", "Is it?", "Yes"),
            answered("code_reasoning/0020.png", "Is it not?", "Yes"),
            answered("landmark/b.jpg", "Is it?", "Yes"),
            answered("landmark/b.jpg", "Is it not?", "No"),
        ],
        {"perception": 200.0, "cognition": 50.0},
    ),
    "pope": (
        ["pope/coco/coco_pope_popular.json"],
        [answered(1, "Is there a cat 11?", "Yes"), answered(2, "Is there a cat 12?", "Yes")],
        {"accuracy": 0.5},
    ),
}


@pytest.mark.parametrize("name", SCORED)
def test_the_same_files_as_truth(name, llava_eval, tmp_path):
    truth, answers, metrics = SCORED[name]
    path = write(tmp_path / "answers.jsonl", answers)
    paths = [str(llava_eval / file) for file in truth]
    out = tmp_path / "out.json"
    arguments = [name, str(path), "--import", "llava", "--json", str(out), "--truth", *paths]
    assert score.main([*arguments, "--out", str(tmp_path / "run")]) == 0
    found = json.loads(out.read_text())["metrics"]
    assert {metric: found[metric] for metric in metrics} == metrics
    samples = str(tmp_path / "run" / f"samples_{name}.jsonl")  # read back as what a run has left
    if name != "pope":  # of its three label files one was given
        assert score.main([name, samples, "--json", str(out), "--truth", *paths]) == 0
        assert json.loads(out.read_text())["metrics"] == found


@pytest.mark.parametrize("photo", [".jpg", "", None])
def test_llavas_vizwiz_answers_become_its_submission(photo, tmp_path):
    """By the question file's own ids, as convert_vizwiz_for_submission.py; or by the photos."""
    names = [f"VizWiz_test_{n:08d}" for n in (0, 1, 2)]
    asked = [
        {"question_id": n + 5, "image": f"{name}.jpg", "category": "default"}
        | {"text": f"What is this?\n{IF_UNANSWERABLE}\n{SHORT_ANSWER}"}
        for n, name in enumerate(names)
    ]
    answers = [
        answered(row["question_id"] if photo is None else names[n] + photo, "What is this?", text)
        for n, (row, text) in enumerate(zip(asked, ("Black", "A cat.", "Two"), strict=True))
    ]
    truth = write(tmp_path / "llava_test.jsonl", asked)
    given = write(tmp_path / "answers.jsonl", answers[::-1])
    out = tmp_path / "upload.json"
    arguments = ["vizwiz", given, "--import", "llava", "--truth", truth, "--submit", out]
    assert score.main([str(argument) for argument in arguments]) == 0
    expected = zip(names, ("black", "cat", "2"), strict=True)
    assert json.loads(out.read_text()) == [
        {"image": f"{name}.jpg", "answer": text} for name, text in expected
    ]


def test_llavas_vizwiz_answers_score_where_the_photos_answers_stand_beside(tmp_path):
    row = {"image": "VizWiz_val_00000004.jpg", "question": "What is it?", "answer_type": "other"}
    own = write(tmp_path / "val.json", [row | {"answers": [{"answer": "red"}] * 10}])
    asked = {"question_id": 0, "image": row["image"], "category": "default"}
    questions = write(
        tmp_path / "llava_val.jsonl", [asked | {"text": f"What is it?\n{SHORT_ANSWER}"}]
    )
    given = write(tmp_path / "answers.jsonl", [answered(0, "What is it?", "Red")])
    out = tmp_path / "out.json"
    for truth in ([questions, own], [own, questions]):
        arguments = ["vizwiz", given, "--import", "llava", "--json", out, "--truth", *truth]
        assert score.main([str(argument) for argument in arguments]) == 0
        found = json.loads(out.read_text())
        assert (found["n"], found["metrics"]["accuracy"]) == (1, 1.0)


def test_llavas_vizwiz_questions_may_not_share_an_id(tmp_path):
    asked = [
        {"question_id": 0, "image": f"VizWiz_test_{n:08d}.jpg", "text": "What?"} for n in (0, 1)
    ]
    truth = write(tmp_path / "llava_test.jsonl", asked)
    given = write(tmp_path / "answers.jsonl", [answered(0, "What?", "red")])
    with pytest.raises(UserError, match="two photos for question '0'"):
        imports.load("llava", tasks.load("vizwiz"), given, [truth])


def seed_questions(llava_eval: Path) -> Path:
    """Two questions about images, one about a video."""
    path = llava_eval / "seed_bench" / "SEED-Bench.json"
    content = json.loads(path.read_text())
    video, row = content["questions"]
    video = video | {"question_id": "7", "question_type_id": 10}
    other = row | {"question_id": "9", "question": "Where?", "answer": "B"}
    return write(path, content | {"questions": [video, row, other]})


def test_seed_bench_answers_about_videos_are_left_out_and_counted(llava_eval, tmp_path):
    """As convert_seed_for_submission.py, which skips them for what it prints of images."""
    truth, out = seed_questions(llava_eval), tmp_path / "out.json"
    answers = [{"question_id": n, "prompt": "", "text": "A"} for n in (7, 101669, 9)]
    given = write(tmp_path / "answers.jsonl", answers)
    arguments = ["seedbench", given, "--import", "llava", "--truth", truth, "--json", out]
    arguments += ["--out", tmp_path / "run"]
    assert score.main([str(argument) for argument in arguments]) == 0
    found = json.loads(out.read_text())
    assert (found["n"], found["metrics"]["accuracy"]) == (2, 0.5)
    assert found["excluded"] == {"not about an image": 1}
    samples = tmp_path / "run" / "samples_seedbench.jsonl"
    assert score.main(["seedbench", str(samples), "--truth", str(truth), "--json", str(out)]) == 0
    assert json.loads(out.read_text())["metrics"] == found["metrics"]


# task -> truth in LLaVA's folder, answers to a part of it, what is said of the rest
UNANSWERED = {
    "scienceqa": (
        ["scienceqa/problems.json", "scienceqa/pid_splits.json"],
        [answered("2", "<image>\nWhich?", "B")],
        "counts them as wrong: accuracy_all would be 50.0%",
    ),
    "seedbench": (
        ["seed_bench/SEED-Bench.json"],
        [answered(9, "Where?", "B")],
        "counts them as wrong: accuracy would be 50.0%",
    ),
    "gqa": (
        ["gqa/data/testdev_balanced_questions.json"],
        [answered("201", "Is it?", "Yes.")],
        "refuses a file without them",
    ),
}


@pytest.mark.parametrize("name", UNANSWERED)
def test_questions_without_an_answer_are_counted_wherever_the_score_is(
    name, llava_eval, tmp_path, capsys
):
    seed_questions(llava_eval)  # its question about a video is nobody's to answer
    truth, answers, said = UNANSWERED[name]
    given, out = write(tmp_path / "answers.jsonl", answers), tmp_path / "out.json"
    arguments = [name, given, "--import", "llava", "--json", out, "--out", tmp_path / "run"]
    arguments += ["--truth", *(llava_eval / file for file in truth)]
    assert score.main([str(argument) for argument in arguments]) == 0
    printed = capsys.readouterr().out
    assert "left out: 1 questions without an answer" in printed
    assert f"note: 1 questions have no answer; the official script {said}" in printed
    found = json.loads(out.read_text())
    assert (found["n"], found["excluded"]) == (1, {"no answer in the file": 1})
    assert found["metrics"][tasks.load(name).primary_metric] == 1.0
    entry = json.loads((tmp_path / "run" / "record.json").read_text())["tasks"][name]
    assert entry["excluded"] == found["excluded"]
    assert said in "\n".join(entry["notes"])
    assert score.main([str(argument) for argument in [*arguments[:6], *arguments[8:]]]) == 0
    lmms = ["--protocol", "lmms"]
    assert score.main([str(a) for a in [*arguments[:6], *arguments[8:], *lmms]]) == 0
    assert "the official script" not in capsys.readouterr().out.split("protocol lmms")[1]


def test_only_images_of_seed_bench_are_asked(llava_eval):
    seed_questions(llava_eval)
    task = tasks.load("seedbench")
    rows = Source.parse(str(llava_eval)).load(task, "paper")
    assert rows["question_id"][:] == ["101669", "9"]
    assert set(rows["data_type"]) == {"image"}


@pytest.mark.parametrize("form", ["SEED-Bench.json", "hub.jsonl"])
def test_a_runs_answers_to_seed_bench_find_their_rows_in_the_whole_truth(
    form, llava_eval, tmp_path
):
    """A run counts the rows that it asks; the published files also have those about videos."""
    truth = seed_questions(llava_eval)
    task = tasks.load("seedbench")
    docs = json.loads(truth.read_text())["questions"]
    if form != truth.name:
        truth = write(tmp_path / form, docs)
    samples = [
        Sample(n, task.prompt(doc, "paper"), "A", "A", doc["answer"], 0.0, None)
        for n, doc in enumerate(docs[1:])
    ]
    path = write(tmp_path / "samples_seedbench.jsonl", [asdict(sample) for sample in samples])
    out = tmp_path / "out.json"
    assert score.main(["seedbench", str(path), "--truth", str(truth), "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert (found["n"], found["metrics"]["accuracy"]) == (2, 0.5)


@pytest.mark.parametrize(
    "prompt",
    [
        "OCR tokens: DAKOTA, x. Question: Who made this? Short answer:",
        "OCR tokens: a\nb. Question: Who made this? Short answer: Short answer:",
        "Reference OCR token: DAKOTA\nWho made this?\nshort",
        "Who made this?\nReference OCR token: DAKOTA\nshort",
        "Who made this?\nshort",
    ],
)
def test_every_prompt_that_eval_textvqa_reads(prompt, llava_eval, tmp_path):
    truth = llava_eval / "textvqa" / "TextVQA_0.5.1_val.json"
    given = write(tmp_path / "a.jsonl", [{"question_id": "a1", "prompt": prompt, "text": "Dakota"}])
    out = tmp_path / "out.json"
    arguments = ["textvqa", given, "--import", "llava", "--truth", truth, "--json", out]
    assert score.main([str(argument) for argument in arguments]) == 0
    found = json.loads(out.read_text())
    assert (list(found["per_case"]), found["metrics"]) == (["a1/who made this?"], {"accuracy": 1.0})


def test_cocos_own_results_and_captions(llava_eval, tmp_path):
    results = write(tmp_path / "captions.json", [{"image_id": 42, "caption": "A cat sits."}])
    truth = llava_eval / "coco/annotations/captions_val2014.json"
    rows, missing = imports.load("llava", tasks.load("coco_cap"), results, [truth])
    assert missing == 1
    assert (rows[0].doc["answer"], rows[0].prediction) == (["A cat sits."], "A cat sits.")


@pytest.mark.parametrize(
    ("task", "file", "content", "message"),
    [
        (
            "gqa",
            "gqa/data/testdev_balanced_questions.json",
            [1],
            "no rows of .*_balanced_questions",
        ),
        ("gqa", "gqa/data/testdev_balanced_questions.json", "{", "line 1 is not JSON"),
        (
            "scienceqa",
            "scienceqa/pid_splits.json",
            {"train": [], "test": ["9"]},
            "1 of 1 problems .* '9'",
        ),
        (
            "mme",
            "MME/MME_Benchmark_release_version/color/1.txt",
            "Is it? Yes",
            "is not a question, a tab",
        ),
        ("pope", "pope/coco/coco_pope_random.json", [{"text": "a"}], "no rows of coco_pope_random"),
        ("coco_cap", "coco/annotations/captions_val2017.json", {}, "--split val2014"),
        (
            "vqav2",
            "vqav2/v2_mscoco_val2014_annotations.json",
            {"annotations": []},
            "has no annotation",
        ),
        (
            "vqav2",
            "vqav2/v2_mscoco_val2014_annotations.json",
            {"annotations": [{"question_id": 1}]},
            "question 42000 has no annotation",
        ),
        ("textvqa", "textvqa/TextVQA_0.5.1_val.json", {"data": [{}]}, "no rows of TextVQA"),
    ],
)
def test_files_that_do_not_fit_are_refused(task, file, content, message, llava_eval):
    write(llava_eval / file, content)
    with pytest.raises(UserError, match=message):
        Source.parse(str(llava_eval)).load(tasks.load(task), "paper")


def test_copies_of_a_file_that_differ_are_refused(llava_eval):
    copy = llava_eval / "gqa" / "data" / "questions1.2" / "testdev_balanced_questions.json"
    write(copy, (llava_eval / "gqa/data/testdev_balanced_questions.json").read_bytes())
    assert len(Source.parse(str(llava_eval)).load(tasks.load("gqa"), "paper")) == 2
    write(copy, {"7": {"question": "Is it?", "imageId": "n1", "answer": "no"}})
    with pytest.raises(UserError, match=r"testdev_balanced_questions.json and .* differ"):
        Source.parse(str(llava_eval)).check(tasks.load("gqa"))


def test_annotations_that_are_missing_are_named(llava_eval):
    (llava_eval / "vqav2/v2_mscoco_val2014_annotations.json").unlink()
    with pytest.raises(UserError, match=r"questions.json needs its v2_mscoco_\*_annotations"):
        Source.parse(str(llava_eval)).load(tasks.load("vqav2"), "paper")


def test_an_image_that_is_absent_is_not_another_of_its_name(llava_eval):
    release = llava_eval / "MME" / "MME_Benchmark_release_version"
    write(release / "OCR" / "b.jpg", png((1, 1, 1)))
    (release / "landmark" / "images" / "b.jpg").unlink()
    rows = Source.parse(str(llava_eval)).load(tasks.load("mme"), "paper")
    assert not Path(rows[2]["image"]["path"]).exists()
    images = llava_eval / "scienceqa" / "images"
    write(images / "train" / "9" / "image.png", png((1, 1, 1)))
    write(images / "test" / "5" / "image.png", png((1, 1, 1)))
    (images / "test" / "2" / "image.png").unlink()
    with pytest.raises(UserError, match="scienceqa: none of the 1 images"):
        Source.parse(str(llava_eval)).load(tasks.load("scienceqa"), "paper")


def test_of_two_images_of_one_name_the_nearer_is_taken(llava_eval):
    write(llava_eval / "a" / "n1.jpg", png((1, 1, 1)))  # another data set's, higher up
    rows = Source.parse(str(llava_eval)).load(tasks.load("gqa"), "paper")
    assert Path(rows[0]["image"]["path"]).read_bytes() == PICTURE
    write(llava_eval / "gqa" / "data" / "other" / "n1.jpg", png((1, 1, 1)))
    with pytest.raises(UserError, match=r"n1.jpg and .*n1.jpg differ"):
        Source.parse(str(llava_eval)).load(tasks.load("gqa"), "paper")


def test_images_without_tokens_are_named(llava_eval):
    home = llava_eval / "textvqa"
    row = {"question_id": "zz", "image": "zz.jpg", "text": "What?\nReference OCR token: a"}
    write(home / "llava_textvqa_val_v051_ocr.jsonl", [row])
    with pytest.raises(UserError, match="a row has no 'ocr_tokens'"):
        Source.parse(str(home)).load(tasks.load("textvqa"), "paper")


def test_no_image_at_all_is_refused_with_the_places(llava_eval):
    (llava_eval / "gqa/data/images/n1.jpg").unlink()
    with pytest.raises(UserError, match="none of the 2 images is in .*n1.jpg"):
        Source.parse(str(llava_eval)).load(tasks.load("gqa"), "paper")


def test_an_image_path_in_them_may_not_leave_the_folder(llava_eval):
    rows = [{"question_id": 1, "image": "../../../x.jpg", "text": "Is it?", "label": "no"}]
    write(llava_eval / "pope/coco/coco_pope_random.json", rows)
    with pytest.raises(UserError, match="leads out of the data folder"):
        Source.parse(str(llava_eval)).load(tasks.load("pope"), "paper")


def test_a_run_over_the_mme_folder(llava_eval, tmp_path, model, processor):
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    arguments = ["--tasks", "mme", "--data", llava_eval, "--model", tmp_path / "model"]
    arguments += ["--out", tmp_path / "out", "--backend", "torch"]
    assert run.main([str(argument) for argument in arguments]) == 0
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert (record["tasks"]["mme"]["n"], record["tasks"]["mme"]["excluded"]) == (4, {})
    assert record["lmms_eval_check"]["mme"].startswith("equal")
