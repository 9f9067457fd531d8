"""Small copies of the published data sets: their folders, splits and columns, their odd rows, and
answers as a model might give them. Each benchmark's expected scores were worked out by the code
that its task's README names as official, on these rows and answers (see `EXPECTED`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from harness_world import png

from vlmamba.demo.benchmarks.hub_schemas import features

Row = dict[str, Any]
ASKED = "asked"  # the answer's place in a row; it is no column of the data


@dataclass(frozen=True)
class Whole:
    """A benchmark's files: where the hub keeps them, their rows, and files not to be read."""

    file: str  # under the data folder; `{}` is the shard
    rows: Sequence[Row]
    others: Sequence[str] = ()  # other splits and configs, with rows that would change the score
    shards: int = 1
    images: str | None = None  # a second table (GQA)
    drop: Sequence[str] = field(default_factory=tuple)  # columns that the hub's first table lacks

    @property
    def asked(self) -> list[Row]:
        """The rows that are asked: those of the benchmark's part."""
        return [row for row in self.rows if row.get("data_type", "image") == "image"]

    @property
    def answers(self) -> list[str]:
        """The answers, in the order of the rows that are asked."""
        return [row[ASKED] for row in self.asked]


def picture(number: int) -> Mapping[str, Any]:
    """A stored picture, one color each."""
    return {"bytes": png((number * 37 % 256, number * 91 % 256, 90)), "path": None}


def pope() -> Whole:
    """Three categories of unequal size, as in LLaVA's file; several questions an image."""
    asked = [
        *(("yes", "Yes", c) for c in ("random", "popular", "adversarial")),
        *(("no", " no\n", c) for c in ("random", "popular", "adversarial")),
        ("yes", "No, there is no dog.", "random"),
        ("no", "Yes.", "adversarial"),
        ("no", "There isn't one", "popular"),
        ("yes", "yes, there is", "popular"),
        ("no", "not that I see", "adversarial"),
    ]
    rows = [
        {
            "id": str(i),
            "question_id": str(i),
            "question": f"Is there a thing {i} in the image?",
            "answer": truth,
            "image_source": f"COCO_val2014_{i % 3}",
            "image": picture(i % 3),
            "category": category,
            ASKED: answer,
        }
        for i, (truth, answer, category) in enumerate(asked)
    ]
    return Whole("POPE/data/test-{}.parquet", rows, ["POPE/Full/random-00000-of-00001.parquet"], 3)


def mme() -> Whole:
    """Pairs in four of the fourteen subtasks; two spaces before an instruction, as in seven."""
    asked = [
        ("existence/1.jpg", "existence", "Yes", "No"),
        ("existence/2.jpg", "existence", " Yes", "yes"),
        ("OCR/1.jpg", "OCR", "Yes.", "\n    No"),
        ("color/1.jpg", "color", "I think so", "no"),
        ("code_reasoning/1.png", "code_reasoning", "Yes", "not"),
        ("code_reasoning/2.png", "code_reasoning", "No", "Yes"),
    ]
    rows = [
        {
            "question_id": name,
            "image": picture(i),
            "question": f"Is it {truth}?{' ' * (i == 3)} Please answer yes or no.",
            "answer": truth,
            "category": subtask,
            ASKED: answer,
        }
        for i, (name, subtask, *answers) in enumerate(asked)
        for truth, answer in zip(("Yes", "No"), answers, strict=True)
    ]
    return Whole("MME/data/test-{}.parquet", rows, shards=2)


def scienceqa() -> Whole:
    """Text-only questions among those with an image; two to five choices; some hints."""
    asked = [
        (2, "", 1, True, "B"),
        (3, "A food web.", 2, False, "C"),
        (4, "", 0, True, "A. choice 0"),
        (5, "Two\nlines.", 4, False, " E\n"),
        (2, "", 0, True, "The answer is B."),
        (3, "", 1, False, "B"),
        (2, "", 1, True, "choice 1"),
        (2, "", 0, False, "A\n"),
        (4, "A map.", 3, True, "D\n"),
    ]
    rows = [
        {
            "image": picture(i) if image else None,
            "question": f"Which is number {i}?",
            "choices": [f"choice {k}" for k in range(n)],
            "answer": right,
            "hint": hint,
            **dict.fromkeys(("task", "grade", "subject", "topic", "category"), ""),
            **dict.fromkeys(("skill", "lecture", "solution"), ""),
            ASKED: answer,
        }
        for i, (n, hint, right, image, answer) in enumerate(asked)
    ]
    folder = "ScienceQA/ScienceQA-FULL"
    others = [
        f"{folder}/train-00000-of-00001.parquet",
        f"{folder}/validation-00000-of-00001.parquet",
    ]
    others += ["ScienceQA/ScienceQA-IMG/test-00000-of-00001.parquet"]
    return Whole(f"{folder}/test-{{}}.parquet", rows, others)


def mmbench() -> Whole:
    """Questions of two, three and four options, and one whose last option never moves."""
    fixed, moving = "All above are not right", ("cat", "dog", "cow", "ape")
    rows: list[Row] = []

    def question(number: int, options: Sequence[str], last: str, answers: Sequence[str]) -> None:
        n = len(options)
        for k, answer in enumerate(answers):
            moved = [options[(i - k) % n] for i in range(n)] + [last] * bool(last)
            moved += ["nan"] * (4 - len(moved))
            rows.append(
                {
                    "index": number + 1_000_000 * k,
                    "question": f"What is number {number}?",
                    "hint": "nan" if number % 2 else "Look well.",
                    "answer": "ABCD"[k % n],
                    **dict(zip("ABCD", moved, strict=True)),
                    "category": "object",
                    "image": picture(number),
                    "source": "x",
                    "L2-category": f"l2 {number % 2}",
                    "comment": "nan",
                    "split": "dev",
                    ASKED: answer,
                }
            )

    question(241, moving[:3], fixed, ["A", "B", "C"])
    question(242, moving[:3], fixed, ["A", "B", "D"])
    question(243, moving, "", ["A", " B\n", "(C)", "D."])
    question(244, moving[:2], "", ["B", "B"])
    question(245, moving[:3], "", ["A. cat", "The answer is B.", "C"])
    rows.sort(key=lambda row: row["index"])  # unrotated questions first, as in the published file
    others = ["MMBench/en/test-00000-of-00001.parquet", "MMBench/cn/dev-00000-of-00001.parquet"]
    return Whole("MMBench/en/dev-{}.parquet", rows, others)


def mmbench_cn() -> Whole:
    """Questions of two and three options, the cells that hold nothing as in MMBench's copy."""
    rows = [
        {
            "index": number + 1_000_000 * k,
            "question": f"图{number}里有什么？",
            "hint": "nan" if number % 2 else "仔细看图。",
            "answer": "ABC"[k],
            **dict.fromkeys("CD", "nan"),
            **dict(zip("ABCD", [options[i - k] for i in range(len(options))], strict=False)),
            "category": "object",
            "image": picture(number),
            "source": "x",
            "L2-category": "l2",
            "comment": "nan",
            "split": "dev",
            ASKED: answer,
        }
        for number, options, answers in (
            (241, ["猫", "狗"], ["A", "B。狗"]),
            (242, ["猫", "狗", "马"], [" A\n", "答案是 B", "C. 猫"]),
            (243, ["红色", "蓝色"], ["蓝色", "红色"]),
        )
        for k, answer in enumerate(answers)
    ]
    others = ["MMBench/cn/test-00000-of-00001.parquet"]
    return Whole("MMBench/cn/dev-{}.parquet", rows, others)


def vqav2() -> Whole:
    """Ten answers each; one question on which all ten people agree on a number with a comma."""
    asked = [
        ("yes/no", ["yes"] * 8 + ["no"] * 2, "Yes"),
        ("yes/no", ["no"] * 9 + ["yes"], " yes."),
        ("number", ["2,000"] * 10, "2,000"),
        ("number", ["2"] * 2 + ["3"] * 8, "two\n"),
        ("other", ["a dog"] * 3 + ["dog"] * 7, "The dog"),
        ("other", ["cat"] * 1 + ["kitten"] * 9, "cat"),
    ]
    rows = [
        {
            "question_type": "what",
            "multiple_choice_answer": people[-1],
            "answers": [
                {"answer": text, "answer_confidence": "yes", "answer_id": k}
                for k, text in enumerate(people, 1)
            ],
            "image_id": 42 + i // 2,
            "answer_type": kind,
            "question_id": 42000 + i,
            "question": f"What is number {i}?",
            "image": picture(i // 2),
            ASKED: answer,
        }
        for i, (kind, people, answer) in enumerate(asked)
    ]
    others = [f"VQAv2/data/{split}-00000-of-00001.parquet" for split in ("test", "testdev")]
    return Whole("VQAv2/data/validation-{}.parquet", rows, others, 2)


def textvqa() -> Whole:
    """Ten answers each; a question without OCR tokens."""
    asked = [
        (["stop"] * 10, ["STOP"], "Stop."),
        (["2,000"] * 4 + ["2000"] * 6, ["2,000"], "2000"),
        (["dog's"] * 2 + ["dogs"] * 8, [], " dog's\n"),
        (["unanswerable"] * 7 + ["exit"] * 3, ["EXIT", "A"], "the exit"),
    ]
    rows = [
        {
            "image_id": f"abc{i // 2}",
            "question_id": 34602 + i,
            "question": f"what does sign {i} say?",
            "question_tokens": ["what"],
            "image": picture(i // 2),
            "image_width": 32,
            "image_height": 24,
            "flickr_original_url": "",
            "flickr_300k_url": "",
            "answers": people,
            "image_classes": ["Sign"],
            "set_name": "val",
            "ocr_tokens": tokens,
            ASKED: answer,
        }
        for i, (people, tokens, answer) in enumerate(asked)
    ]
    others = [f"textvqa/data/{split}-00000-of-00001.parquet" for split in ("train", "test")]
    return Whole("textvqa/data/validation-{}.parquet", rows, others)


def gqa() -> Whole:
    """Questions in one table, their images in another."""
    asked = [
        ("yes", "Yes."),
        ("no", "yes"),
        ("left", " left\n"),
        ("t-shirt", "tshirt"),
        ("dog", "dog ."),
    ]
    nothing = {"objectId": "1", "value": "x"}
    rows = [
        {
            "id": f"20{i}",
            "imageId": f"n{i // 2}",
            "question": f"Is it number {i}?",
            "answer": truth,
            "fullAnswer": "",
            "isBalanced": True,
            "groups": {"global": "", "local": ""},
            "entailed": "",
            "equivalent": "",
            "types": {"structural": "", "semantic": "", "detailed": ""},
            "annotations": {part: [nothing] for part in ("question", "answer", "fullAnswer")},
            "semantic": [{"operation": "", "argument": "", "dependencies": [0]}],
            "semanticStr": "",
            "image": picture(i // 2),
            ASKED: answer,
        }
        for i, (truth, answer) in enumerate(asked)
    ]
    others = ["GQA/val_balanced_instructions/val-00000-of-00001.parquet"]
    return Whole(
        "GQA/testdev_balanced_instructions/testdev-{}.parquet",
        rows,
        others,
        images="GQA/testdev_balanced_images/testdev-00000-of-00001.parquet",
        drop=("image",),
    )


def easy_vqa() -> Whole:
    """One file of the name of the task: the data ship in a package, not on the hub."""
    asked = [("red", "Red"), ("yes", " yes\n"), ("circle", "a circle"), ("no", "no.")]
    rows = [
        {
            "question_id": i,
            "image_id": i // 2,
            "image": picture(i // 2),
            "question": f"what is number {i}?",
            "answer": truth,
            ASKED: answer,
        }
        for i, (truth, answer) in enumerate(asked)
    ]
    return Whole("easy_vqa-{}.parquet", rows)


def retrieval() -> Whole:
    """Generated, one file of the name of the task; a question has one picture or several."""
    asked = [("word", "taxi", "Taxi."), ("color", "red", "the red"), ("word", "taxi", "taxi!")]
    asked += [("existence", "yes", "Yes")]
    rows = [
        {
            "question_id": i,
            "image": [picture(j) for j in range(1 + i % 3)],
            "context": "some other text." * (i % 2),
            "question": f"what is number {i}?",
            "answer": truth,
            "kind": kind,
            "k": 1,
            "distance": "pictures2" if i % 3 else "near",
            "chance_in_view": 1.0,
            "chance_blind": 0.5,
            "image_source": f"01-{i:03}",
            ASKED: answer,
        }
        for i, (kind, truth, answer) in enumerate(asked)
    ]
    return Whole("retrieval-{}.parquet", rows)


def coco_cap() -> Whole:
    """Five references an image, and one with six, as published."""
    asked = [
        (
            ["a dog on a beach", "the dog runs"] + ["a brown dog runs on sand"] * 3,
            " A dog on sand.\n",
        ),
        (["two cats sleep"] * 4 + ["cats on a bed", "cats sleeping"], "two cats on a bed"),
        (["a red bus"] * 5, "a street"),
    ]
    rows = [
        {
            "question_id": f"COCO_val2014_{i + 1:012}.jpg",
            "image": picture(i),
            "question": "Please carefully observe the image and come up with a caption for it.",
            "answer": references,
            "id": i + 1,
            "license": 3,
            "file_name": f"COCO_val2014_{i + 1:012}.jpg",
            "coco_url": "",
            "height": 24,
            "width": 32,
            "date_captured": "",
            ASKED: answer,
        }
        for i, (references, answer) in enumerate(asked)
    ]
    others = ["COCO-Caption2017/data/test-00000-of-00001.parquet"]
    return Whole("COCO-Caption2017/data/val-{}.parquet", rows, others)


def vizwiz() -> Whole:
    """Ten answers each, of which many are "unanswerable"."""
    asked = [
        (["unanswerable"] * 6 + ["blurry"] * 4, "unanswerable", " Unanswerable.\n"),
        (["dog", "dog", *["a dog"] * 8], "other", "The dog"),
        (["2,000"] * 4 + ["2000"] * 6, "number", "2,000"),
        (["yes"] * 10, "yes/no", "no"),
    ]
    rows = [
        {
            "question_id": f"VizWiz_val_{i:08d}",
            "image": picture(i),
            "question": "What IS it?",
            "answers": people,
            "category": kind,
            ASKED: answer,
        }
        for i, (people, kind, answer) in enumerate(asked)
    ]
    others = ["VizWiz-VQA/data/test-00000-of-00001.parquet"]
    return Whole("VizWiz-VQA/data/val-{}.parquet", rows, others, 2)


def seedbench() -> Whole:
    """Questions about an image and, among them, about a video's frames, which are not asked."""
    asked = [
        ("image", 1, "A", "A"),
        ("video", 10, "B", "B"),
        ("image", 1, "C", " C\n"),
        ("image", 5, "D", "D. choice"),
        ("image", 5, "B", "The answer is B"),
        ("image", 9, "A", "a"),
        ("video", 11, "A", "A"),
    ]
    rows = [
        {
            "answer": right,
            **{f"choice_{letter}": f"choice {letter}" for letter in "abcd"},
            "data_id": f"{i // 3}_1",
            "data_type": kind,
            "question": f"What is number {i}?",
            "question_id": str(i),
            "question_type_id": ability,
            "image": [picture(i)] if kind == "image" else [picture(k) for k in range(8)],
            "segment": None if kind == "image" else [1, 2],
            ASKED: answer,
        }
        for i, (kind, ability, right, answer) in enumerate(asked)
    ]
    return Whole("SEED-Bench/data/test-{}.parquet", rows, shards=2)


def mmmu() -> Whole:
    """Options and open answers; one, two and three images, one of them in an option."""
    choice, free = "multiple-choice", "open"
    asked = [
        ("Art_1", choice, "What is in <image 1>?", ["cat", "dog"], "B", "(B)"),
        ("Math_2", choice, "<image 1> and <image 2>?", ["1", "2", "3"], "C", " C.\n"),
        ("Math_3", choice, "Which one? <image 1>", ["x", "<image 2>", "<image 3>"], "A", "B"),
        ("Physics_4", free, "How far in <image 1>?", [], "24", "The answer is 24.0 m"),
        ("Music_5", free, "Who wrote <image 1>?", [], "['Bach', 'J. S. Bach']", "bach"),
        ("Music_6", choice, "What is in <image 1>?", ["cat", "dog"], "A", "vitamin A."),
    ]
    rows = []
    for i, (name, kind, question, options, right, answer) in enumerate(asked):
        shown = f"{question} {options}".count("<image ")
        images = {f"image_{n}": picture(7 * i + n) if n <= shown else None for n in range(1, 8)}
        row = {"id": f"validation_{name}", "question": question, "options": str(options)}
        row |= {"explanation": "", **images, "img_type": "['Photo']", "answer": right}
        rows.append(row | {"topic_difficulty": "Easy", "question_type": kind, "subfield": ""})
        rows[-1][ASKED] = answer
    others = [f"MMMU/data/{split}-00000-of-00001.parquet" for split in ("dev", "test")]
    return Whole("MMMU/data/validation-{}.parquet", rows, others)


def llava_bench() -> Whole:
    """Rated by a judge; without one there is no score."""
    rows = [
        {
            "question_id": str(i),
            "question": f"What is number {i}?",
            "image": picture(i),
            "category": category,
            "image_id": "001.jpg",
            "gpt_answer": "It is a thing.",
            "caption": "A thing.",
            ASKED: f"It is {i}.",
        }
        for i, category in enumerate(("conv", "detail", "complex"))
    ]
    return Whole("llava-bench-in-the-wild/data/train-{}.parquet", rows)


def mmvet() -> Whole:
    """Graded by a judge; without one there is no score, but the file for the online judge."""
    rows = [
        {
            "question_id": f"v1_{i}",
            "image": picture(i),
            "question": "What is x?",
            "answer": "-1 <AND> -5",
            "image_source": "identity",
            "capability": "ocr,math",
            ASKED: f" It is {i}.\n",
        }
        for i in range(3)
    ]
    return Whole("MMVet/data/test-{}.parquet", rows)


BUILDERS = {
    builder.__name__: builder
    for builder in (
        pope,
        mme,
        scienceqa,
        mmbench,
        mmbench_cn,
        vqav2,
        textvqa,
        vizwiz,
        gqa,
        easy_vqa,
        retrieval,
        coco_cap,
        mmvet,
        seedbench,
        mmmu,
        llava_bench,
    )
}


def write(task: str, root: Path) -> list[Path]:
    """A benchmark's files under `root`; returns those with the rows to be scored."""
    whole = BUILDERS[task]()
    rows = [{key: value for key, value in row.items() if key != ASKED} for row in whole.rows]
    first = [{k: v for k, v in row.items() if k not in whole.drop} for row in rows]
    for other in whole.others:
        _save(first[:1] * 3, root / other, task, whole.drop)
    size = -(-len(first) // whole.shards)
    files = []
    for shard in range(whole.shards):
        path = root / whole.file.format(f"{shard:05}-of-{whole.shards:05}")
        files.append(_save(first[shard * size : (shard + 1) * size], path, task, whole.drop))
    if whole.images:
        images = {row["imageId"]: row["image"] for row in rows}
        table = [{"id": name, "image": image} for name, image in images.items()]
        kinds = datasets.Features({"id": datasets.Value("string"), "image": datasets.Image()})
        _to_parquet(datasets.Dataset.from_list(table, features=kinds), root / whole.images)
    return files


def _save(rows: Sequence[Row], path: Path, task: str, drop: Sequence[str]) -> Path:
    kinds = datasets.Features({k: v for k, v in features(task).items() if k not in drop})
    return _to_parquet(datasets.Dataset.from_list(list(rows), features=kinds), path)


def _to_parquet(rows: datasets.Dataset, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows.to_parquet(path)
    return path
