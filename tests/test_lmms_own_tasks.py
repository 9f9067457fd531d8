"""lmms-eval's own tasks over small local files: by lmms-eval with the registered model, and by
`harness.run`.

Their scores are computed again here from the rows and the model's logged words, by each
benchmark's rule. Rows have one picture, several or none.
"""

from __future__ import annotations

import io
import json
import math
import random
from collections import defaultdict
from pathlib import Path

import datasets
import pytest
import torch
from lmms_eval import evaluator
from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator
from PIL import Image, ImageDraw

from harness import run as harness_run
from vlmamba import checkpoints

OWNER = "lmms-lab-encoder"
LETTERS = "ABCD"
WORDS = ("red", "green", "blue", "two", "a dog", "a cat", "left", "right", "circle", "square")
TASKS = ("seedbench", "seedbench_ppl", "mmmu_val", "ai2d", "mmbench_en_dev", "mme")
JUDGED = "C"  # what stands in for MMBench's judge says to every answer that it is asked about


def drawn(number: int) -> Image.Image:
    """A figure of its own on white."""
    image = Image.new("RGB", (48, 48), "white")
    draw = ImageDraw.Draw(image)
    shape = (draw.ellipse, draw.rectangle)[number % 2]
    shape((8, 8, 20 + 3 * (number % 7), 40), fill=("red", "blue", "green")[number % 3])
    return image


def picture(number: int) -> dict:
    file = io.BytesIO()
    drawn(number).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def options(number: int) -> list[str]:
    return random.Random(number).sample(WORDS, 4)


def question(number: int) -> str:
    asked = ("What color is the circle?", "What is on the left?", "How many squares are there?")
    return f"{asked[number % 3]} ({number})"


def seed_rows() -> list[dict]:
    return [
        {
            **dict(zip(("choice_a", "choice_b", "choice_c", "choice_d"), options(n), strict=True)),
            "question": question(n),
            "answer": LETTERS[n % 4],
            "data_type": ("image", "video")[n % 3 == 2],
            "question_id": str(n),
            "image": [picture(n + shown) for shown in range(1 + 2 * (n % 3 == 2))],
        }
        for n in range(8)
    ]


def mmmu_rows() -> list[dict]:
    """Of one picture, two, or none; every fourth one is open."""
    rows = []
    for n in range(8):
        shown = (1, 2, 0)[n % 3]
        tags = " ".join(f"<image {k}>" for k in range(1, shown + 1))
        is_open = n % 4 == 3
        row = {
            "id": f"validation_{('Art', 'Math')[n % 2]}_{n}",
            "question": f"{tags} {question(n)}".strip(),
            "options": "[]" if is_open else repr(options(n)),
            "answer": ("red", "circle")[n // 4] if is_open else LETTERS[n % 4],
            "question_type": "open" if is_open else "multiple-choice",
        }
        for k in range(1, 8):
            row[f"image_{k}"] = picture(n + k) if k <= shown else None
        rows.append(row)
    return rows


def ai2d_rows() -> list[dict]:
    return [
        {"question": question(n), "options": options(n), "answer": str(n % 4), "image": picture(n)}
        for n in range(8)
    ]


def mmbench_rows() -> list[dict]:
    """Two questions are asked in every rotation of their options (CircularEval)."""
    rows = []
    for n in range(8):
        for turn in range(4 if n < 2 else 1):
            order = [(place + turn) % 4 for place in range(4)]
            rows.append(
                {
                    **{LETTERS[k]: options(n)[order[k]] for k in range(4)},
                    "E": "nan",
                    "index": n + turn * 1_000_000,
                    "question": question(n),
                    "hint": ("nan", "Look closely.")[n % 2],
                    "answer": LETTERS[order.index((n + 3) % 4)],
                    "category": ("color", "place")[n % 2],
                    "L2-category": "perception",
                    "source": "made",
                    "split": "dev",
                    "image": picture(n),
                }
            )
    return rows


def mme_rows() -> list[dict]:
    """The third picture is green: of its questions one has the wrong answer."""
    return [
        {
            "question_id": f"{category}/{n}.png",
            "question": f"Is there {thing}? Please answer yes or no.",
            "answer": ("Yes", "No")[(n + k) % 2],
            "category": category,
            "image": picture(n),
        }
        for category in ("existence", "color", "code_reasoning")
        for n in range(3)
        for k, thing in enumerate(("a red circle", "a blue square"))
    ]


ROWS = {
    "SEED-Bench": seed_rows(),
    "MMMU": mmmu_rows(),
    "ai2d": ai2d_rows(),
    "MMBench": mmbench_rows(),
    "MME": mme_rows(),
}
SPLITS = defaultdict(lambda: "test", {"MMMU": "validation", "MMBench": "dev"})


def write(name: str, folder: Path) -> Path:
    """A benchmark's rows as its parquet file."""
    table = datasets.Dataset.from_list(ROWS[name])
    for column, values in ((c, [row[c] for row in ROWS[name]]) for c in table.column_names):
        first = next((value for value in values if value is not None), None)
        if isinstance(first, list) and isinstance(first[0], dict):
            table = table.cast_column(column, datasets.List(datasets.Image()))
        elif isinstance(first, dict) or first is None:
            table = table.cast_column(column, datasets.Image())
    path = folder / f"{name}.parquet"
    table.to_parquet(path)
    return path


def judge(evaluator, payload):
    return {"choices": [{"message": {"content": JUDGED}}]}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What lmms-eval found; the data and MMBench's judge, both far away, are the test's own."""
    folder = tmp_path_factory.mktemp("own_tasks")
    files = {f"{OWNER}/{name}": str(write(name, folder)) for name in ROWS}
    load = datasets.load_dataset

    def local(path, name=None, cache_dir=None, **_):
        split = SPLITS[path.removeprefix(f"{OWNER}/")]
        return load("parquet", data_files={split: files[path]}, cache_dir=str(folder / "cache"))

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # where the tasks leave their submission files
        patch.setattr(datasets, "load_dataset", local)
        patch.setattr(MMBench_Evaluator, "_post_request", judge)
        return evaluator.simple_evaluate(
            "vlmamba",
            model_args="pretrained=nano",
            tasks=list(TASKS),
            batch_size=16,
            device="cpu",
            bootstrap_iters=0,
        )


def said(run, task: str) -> list:
    """What the model said to each row, in the rows' order; of seedbench_ppl the four losses."""
    samples = sorted(run["samples"][task], key=lambda sample: sample["doc_id"])
    assert [sample["doc_id"] for sample in samples] == list(range(len(samples)))
    if task == "seedbench_ppl":
        return [[loss for ((loss, _),) in sample["resps"]] for sample in samples]
    return [sample["resps"][0][0].strip() for sample in samples]


def score(run, task: str, metric: str) -> float:
    found = run["results"][task]
    return next(value for name, value in found.items() if name.split(",")[0] == metric)


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def test_seedbench(run):
    rows, words = ROWS["SEED-Bench"], said(run, "seedbench")
    right = [
        text[:1].lower() == row["answer"].lower() for row, text in zip(rows, words, strict=True)
    ]
    assert 0 < mean(right) < 1
    assert score(run, "seedbench", "seed_all") == pytest.approx(mean(right))
    for kind in ("image", "video"):
        of_kind = [hit for row, hit in zip(rows, right, strict=True) if row["data_type"] == kind]
        assert score(run, "seedbench", f"seed_{kind}") == pytest.approx(mean(of_kind))


def test_seedbench_ppl_takes_the_likeliest_choice(run):
    rows, losses = ROWS["SEED-Bench"], said(run, "seedbench_ppl")
    model, processor = checkpoints.load("nano")
    for row, found in list(zip(rows, losses, strict=True))[1:3]:  # of one picture and of three
        images = [Image.open(io.BytesIO(shown["bytes"])) for shown in row["image"]]
        prompt = processor.conversation_prompt(f"{row['question']} Answer :", len(images))
        inputs = processor(text=[prompt], images=[images], return_tensors="pt")
        for letter, loss in zip("abcd", found, strict=True):
            more = processor.tokenizer(f" {row[f'choice_{letter}']}", add_special_tokens=False)
            more = torch.tensor([more["input_ids"]])
            ids = torch.cat([inputs["input_ids"], more], dim=1)
            asked = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            with torch.no_grad():
                logits = model(**asked).logits[0, -more.shape[1] - 1 : -1]
            chance = logits.double().softmax(-1)[torch.arange(more.shape[1]), more[0]]
            assert math.exp(-loss * more.shape[1]) == pytest.approx(float(chance.prod()), rel=1e-2)
    chosen = [LETTERS[four.index(min(four))] for four in losses]
    right = [row["answer"] == letter for row, letter in zip(rows, chosen, strict=True)]
    assert 0 < mean(right) < 1
    assert score(run, "seedbench_ppl", "acc") == pytest.approx(mean(right))


def test_mmmu_val(run):
    rows, words = ROWS["MMMU"], said(run, "mmmu_val")
    right = []
    for row, text in zip(rows, words, strict=True):
        if row["question_type"] == "open":
            right.append(row["answer"] in text.lower())
        else:
            assert text in LETTERS  # else a letter would be drawn
            right.append(text == row["answer"])
    assert 0 < mean(right) < 1
    assert score(run, "mmmu_val", "mmmu_acc") == pytest.approx(mean(right), abs=1e-5)


def test_ai2d(run):
    rows, words = ROWS["ai2d"], said(run, "ai2d")
    letters = [text.partition(".")[0].strip() for text in words]
    right = [LETTERS[int(row["answer"])] == own for row, own in zip(rows, letters, strict=True)]
    assert 0 < mean(right) < 1
    assert score(run, "ai2d", "exact_match") == pytest.approx(mean(right))


def test_mmbench_en_dev(run):
    """A question is right where it is in every rotation."""
    right: dict[int, list[bool]] = defaultdict(list)
    for row, text in zip(ROWS["MMBench"], said(run, "mmbench_en_dev"), strict=True):
        letter = text if text in LETTERS else JUDGED
        right[row["index"] % 1_000_000].append(letter == row["answer"])
    found = 100 * mean(all(turns) for turns in right.values())
    assert 0 < found < 100
    assert score(run, "mmbench_en_dev", "gpt_eval_score") == pytest.approx(found)


def test_mme(run):
    """Of a category: accuracy of its questions plus that of its pictures, in per cent."""
    pairs: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for row, text in zip(ROWS["MME"], said(run, "mme"), strict=True):
        assert text.lower().rstrip(".") in ("yes", "no")
        right = text.lower().rstrip(".") == row["answer"].lower()
        pairs[row["category"]][row["question_id"]].append(right)
    scores = {
        category: 100 * mean(mean(two) for two in of.values()) + 100 * mean(map(all, of.values()))
        for category, of in pairs.items()
    }
    perception = scores["existence"] + scores["color"]
    assert 0 < perception < 400
    assert score(run, "mme", "mme_perception_score") == pytest.approx(perception)
    assert score(run, "mme", "mme_cognition_score") == pytest.approx(scores["code_reasoning"])


@pytest.fixture(scope="module")
def ours(run, tmp_path_factory):
    """The same tasks by `harness.run`, over the same rows: the folder that it leaves."""
    folder = tmp_path_factory.mktemp("harness")
    for name in ROWS:
        write(name, folder)
    command = ["--tasks", ",".join(f"lmms:{task}" for task in TASKS), "--data", str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MMBench_Evaluator, "_post_request", judge)
        out = folder / "out"
        assert harness_run.main([*command, "--batch-size", "16", "--out", str(out)]) == 0
    return out


METRICS = [
    *(("seedbench", f"seed_{kind}") for kind in ("image", "video", "all")),
    *(("seedbench_ppl", "acc"), ("mmmu_val", "mmmu_acc"), ("ai2d", "exact_match")),
    *(("mmbench_en_dev", "gpt_eval_score"),),
    *(("mme", "mme_perception_score"), ("mme", "mme_cognition_score")),
]


@pytest.mark.parametrize(("task", "metric"), METRICS)
def test_harness_run_has_the_scores_of_lmms_evals_own_run(run, ours, task, metric):
    record = json.loads((ours / "record.json").read_text())
    found = record["tasks"][f"lmms-{task}"]["metrics"][metric]["value"]
    assert found == pytest.approx(score(run, task, metric), abs=1e-12)


@pytest.mark.parametrize("task", TASKS)
def test_harness_run_has_the_answers_of_lmms_evals_own_run(run, ours, task):
    lines = (ours / f"samples_lmms-{task}.jsonl").read_text().splitlines()
    answers = [json.loads(line)["prediction"] for line in lines]
    if task == "seedbench_ppl":
        answers = [[-chance / n for chance, n, _ in json.loads(text)] for text in answers]
        assert answers == [pytest.approx(four) for four in said(run, task)]
    else:
        assert answers == said(run, task)
