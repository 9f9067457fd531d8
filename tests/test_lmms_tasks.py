"""lmms-eval's own tasks by `harness.run`: odd rows, intervals, kills, refusals, what is read of it.

`tests/test_lmms_own_tasks.py` holds the scores beside lmms-eval's own.
"""

from __future__ import annotations

import io
import json
import math
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import datasets
import numpy as np
import pytest
import test_lmms_own_tasks as world
import tiny_vlms
from harness_world import pope_rows, write_parquet
from kills import LONGEST_S, Workplace
from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator
from PIL import Image
from scipy import stats
from test_api_models import Server, question, said

from harness import compare, report, run, score
from harness.models import lmms_tasks, lmms_values
from harness.models.base import EvalModel
from harness.models.registry import eval_models


def stored(image: Image.Image | bytes, kind: str = "PNG") -> dict:
    file = io.BytesIO()
    content = image if isinstance(image, bytes) else (image.save(file, kind), file.getvalue())[1]
    return {"bytes": content, "path": None}


ODD_PICTURES = {
    "palette": stored(world.drawn(0).convert("P")),
    "with transparency": stored(world.drawn(1).convert("LA")),
    "cmyk": stored(world.drawn(2).convert("CMYK"), "JPEG"),
    "16 bits": stored(Image.fromarray(np.full((40, 40), 40_000, np.uint16))),
    "bilevel": stored(world.drawn(1).convert("1")),
    "one pixel": stored(Image.new("RGB", (1, 1), "red")),
    "large": stored(Image.new("RGB", (3000, 2500), "blue")),
    "absurdly long": stored(Image.new("RGB", (6000, 1), "blue")),
    "no picture": stored(b"no picture"),
    "cut": stored(stored(world.drawn(0))["bytes"][:-40]),
    "nothing": {"bytes": b"", "path": None},
    "absent": None,
}
READABLE = 8  # of them, the first ones


def save(rows: list[dict], folder: Path, name: str, image: object) -> None:
    kinds = datasets.Dataset.from_list(
        [{k: v for k, v in rows[0].items() if k != "image"}]
    ).features
    table = datasets.Dataset.from_list(rows, features=datasets.Features(kinds | {"image": image}))
    folder.mkdir(exist_ok=True)
    table.to_parquet(folder / f"{name}.parquet")


def ai2d(**changes) -> dict:
    return world.ai2d_rows()[1] | changes


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> Path:
    """Sound rows among odd ones: of pictures, of texts, of lists; the first row is a broken one."""
    folder = tmp_path_factory.mktemp("odd")
    rows = [ai2d(image=picture) for picture in reversed(ODD_PICTURES.values())]
    rows += [
        ai2d(question=""),
        ai2d(question=None),
        ai2d(options=["alone"], answer="0"),
        ai2d(options=[], answer="0"),
        ai2d(options=None),
        ai2d(answer="none"),
        *world.ai2d_rows(),
    ]
    save(rows, folder, "ai2d", datasets.Image())
    seed = world.seed_rows()
    seed[0]["image"], seed[1]["image"], seed[2]["choice_b"] = [], None, None
    seed[3]["image"] = [ODD_PICTURES["palette"], ODD_PICTURES["cut"]]
    seed[4]["image"] = [ODD_PICTURES["palette"], ODD_PICTURES["16 bits"]]
    seed[5]["question"] = None
    save(seed, folder, "SEED-Bench", datasets.List(datasets.Image()))
    return folder


def go(folder: Path, tasks: str, *more: str, out: str = "out") -> dict:
    place = folder / out
    names = ",".join(f"lmms:{task}" for task in tasks.split(","))
    arguments = ["--tasks", names, "--data", str(folder), "--batch-size", "8", "--out", str(place)]
    assert run.main([*arguments, *more]) == 0
    return json.loads((place / "record.json").read_text())


def samples(folder: Path, task: str, out: str = "out") -> list[dict]:
    file = folder / out / f"samples_lmms-{task}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_an_odd_row_is_counted_and_the_others_are_asked(odd):
    record = go(odd, "ai2d,seedbench,seedbench_ppl")
    lines = samples(odd, "ai2d")
    answered = {line["doc_id"] for line in lines if line["prediction"] is not None}
    pictures, rows = len(ODD_PICTURES), len(lines)
    texts = {pictures, pictures + 1, pictures + 2}  # no question, and one option
    assert answered == {*range(pictures - READABLE, pictures), *texts, *range(rows - 8, rows)}
    found = {task: entry["excluded"] for task, entry in record["tasks"].items()}
    assert found["lmms-ai2d"] == {"cannot be asked": 4, "unreadable image": 3}
    assert found["lmms-seedbench"] == {"cannot be asked": 2, "unreadable image": 1}
    (why,) = [reason for reason in found["lmms-seedbench_ppl"] if reason.startswith("not scored")]
    assert "TypeError" in why
    assert found["lmms-seedbench_ppl"] == {"cannot be asked": 1, "unreadable image": 1, why: 1}
    assert samples(odd, "seedbench")[0]["image"] == "none"  # a list without pictures is asked
    events = "\n".join(record["events"])
    assert all(f"row {number}: " in events for number in (1, 2, 3, 4, 16, 17, 18))


def test_no_row_that_can_be_asked_is_an_error(tmp_path, capsys):
    save([ai2d(options=None)] * 3, tmp_path, "ai2d", datasets.Image())
    assert refused(tmp_path, "ai2d", capsys) == (
        "lmms:ai2d cannot be made of the rows of data: TypeError: object of type 'NoneType' has "
        "no len()"
    )


@pytest.mark.parametrize("fails", [True, False])
def test_a_tasks_own_preparation_of_its_rows(fails, tmp_path, capsys, monkeypatch):
    """One that looks at the pictures, and one that cannot be made."""

    def prepare(rows):
        if fails:
            raise KeyError("no such column")
        return rows.filter(lambda row: row["image"].size == (48, 48))

    make = lmms_tasks.LmmsTask.__init__
    monkeypatch.setattr(
        lmms_tasks.LmmsTask,
        "__init__",
        lambda task, name, config, whose: make(
            task, name, {**config, "process_docs": prepare}, whose
        ),
    )
    rows = [*world.ai2d_rows(), ai2d(image=stored(Image.new("RGB", (9, 9))))]
    save(rows, tmp_path, "ai2d", datasets.Image())
    if fails:
        line = refused(tmp_path, "ai2d", capsys, data=str(tmp_path))
        whose = f"cannot be made of the rows of {tmp_path.name}"
        assert line == f"lmms:ai2d {whose}: KeyError: 'no such column'"
    else:
        assert go(tmp_path, "ai2d")["tasks"]["lmms-ai2d"]["n"] == 8


def test_a_tasks_own_scoring_sees_decoded_pictures_and_needs_no_other_split(tmp_path, monkeypatch):
    """process_results_use_image (refcoco's), and a fewshot_config of no shots (illusionvqa's)."""

    def score_of_size(doc, results):
        return {"accuracy": float(doc["image"].size == (48, 48))}

    changes = {
        "process_results_use_image": True,
        "process_results": score_of_size,
        "metric_list": [{"metric": "accuracy", "aggregation": "mean", "higher_is_better": True}],
        "num_fewshot": 0,
        "fewshot_split": "train",
        "fewshot_config": {"sampler": "first_n"},
    }
    make = lmms_tasks.LmmsTask.__init__
    monkeypatch.setattr(
        lmms_tasks.LmmsTask,
        "__init__",
        lambda task, name, config, whose: make(task, name, {**config, **changes}, whose),
    )
    rows = [*world.ai2d_rows(), ai2d(image=stored(Image.new("RGB", (9, 9))))]
    save(rows, tmp_path, "ai2d", datasets.Image())
    found = go(tmp_path, "ai2d")["tasks"]["lmms-ai2d"]
    assert found["n"] == len(rows) == 9
    assert found["metrics"]["accuracy"]["value"] == pytest.approx(8 / 9)


def refused(folder: Path, tasks: str, capsys, *more: str, data: str | None = None) -> str:
    """The one line of a run that is an error."""
    place = folder.rename(folder.with_name("data")) if data is None and folder.is_dir() else folder
    names = ",".join(f"lmms:{task}" for task in tasks.split(","))
    arguments = ["--tasks", names, "--data", data or str(place), "--out", str(place / "none")]
    assert run.main([*arguments, *more]) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    return line.removeprefix("error: ")


def test_what_cannot_be_run_is_refused_in_one_line(tmp_path, capsys):
    def said(tasks: str, *more: str, data: str = str(tmp_path)) -> str:
        return refused(tmp_path, tasks, capsys, *more, data=data)

    assert said("ai2dd").startswith("lmms-eval has no task 'ai2dd'; nearest: ai2d")
    assert said("mmbench_en").startswith("lmms:mmbench_en is a group of tasks; name those to run: ")
    assert "lmms:mmbench_en_dev" in said("mmbench_en")
    assert "no data for lmms:ai2d" in said("AI2D")
    assert said("") == "--tasks lmms: names no task; expected lmms:NAME"
    assert "the demo has no rows of lmms:ai2d" in said("ai2d", data="demo")
    multi = said("mmmu_val_pass64,vstat")
    assert multi == "lmms:vstat is a class of its own, which only lmms-eval can run"


def test_without_a_network_the_error_is_one_line(tmp_path):
    command = [sys.executable, "-m", "harness.run", "--tasks", "lmms:ai2d"]
    away = {"HF_HUB_OFFLINE": "1", "HOME": str(tmp_path), "HF_HOME": str(tmp_path)}
    root = str(Path(run.__file__).parents[1])
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": root, **away},
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: lmms:ai2d: lmms-lab-encoder/ai2d could not be fetched")
    assert "--data DIR" in line


class Constant(EvalModel):
    name, said = "constant", "A"

    def provenance(self):
        return {}

    def answer(self, requests, limits, batch_size, on_done):
        for index, _ in enumerate(requests):
            on_done(index, self.said)


@pytest.fixture
def constant(monkeypatch):
    monkeypatch.setitem(eval_models, "constant", lambda name, options: Constant())
    return ["--model", "constant:a"]


def test_likelihoods_are_refused_where_the_model_has_none(odd, constant, capsys):
    line = refused(odd, "seedbench_ppl", capsys, *constant, data=str(odd))
    assert line == (
        "lmms-seedbench_ppl asks for log-likelihoods, which model constant does not offer"
    )


def test_a_slow_judge_is_told_of_and_not_asked_for_intervals(
    odd, constant, monkeypatch, tmp_path, capsys
):
    asked = []

    def slow(*_, **__):
        asked.append(1)
        time.sleep(lmms_values.SLOW_S / 3)
        return "C"

    monkeypatch.setattr(Constant, "said", "no letter at all")
    monkeypatch.setattr(MMBench_Evaluator, "get_chat_response", slow)
    monkeypatch.setattr(lmms_tasks, "PATIENCE_S", 0.1)
    world.write("MMBench", tmp_path)
    found = go(tmp_path, "mmbench_en_dev", *constant)["tasks"]["lmms-mmbench_en_dev"]
    assert "no_interval" in found["metrics"]["gpt_eval_score"]
    assert found["metrics"]["gpt_eval_score"]["no_interval"] == "its aggregation takes too long"
    assert 0 < len(asked) <= len(world.mmbench_rows())
    assert "lmms-mmbench_en_dev: lmms-eval is still scoring" in capsys.readouterr().err
    assert (tmp_path / "out" / "submissions" / "mmbench_en_dev_results.xlsx").is_file()


def test_every_kind_of_model(many, tmp_path, monkeypatch):
    """The same weights read by transformers and by lmms-eval's class give the same answers."""
    folder = tiny_vlms.save("llava", tmp_path / "llava")
    monkeypatch.setitem(sys.modules, "decord", types.SimpleNamespace(VideoReader=None, cpu=None))
    template = "{% for turn in messages %}USER: {{ turn.content }} ASSISTANT:{% endfor %}"
    settings = f"pretrained={folder},dtype=float32,device_map=cpu,chat_template={template}"
    server = Server()
    server.reply = lambda body, number: said("B" if "blue" in question(body) else "A")
    models = {
        "hf": f"hf:{folder}",
        "lmms": f"lmms:llava_hf,{settings}",
        "api": f"api:{server.url},model=m",
    }
    lines = {}
    for kind, model in models.items():
        record = go(many, "ai2d", "--model", model, "--limit", "12", out=kind)
        assert record["tasks"]["lmms-ai2d"]["n"] == 12
        lines[kind] = [line["prediction"] for line in samples(many, "ai2d", kind)]
    server.http.shutdown()
    server.http.server_close()
    assert lines["hf"] == lines["lmms"]
    assert set(lines["api"]) == {"A", "B"}
    asked = json.loads((many / "lmms" / "record.json").read_text())["data"]["lmms-ai2d"]
    assert asked["lmms_eval"] == {"task": "ai2d", "model_name": "llava_hf", "task_version": 0.0}
    world.write("SEED-Bench", tmp_path)
    record = go(tmp_path, "seedbench_ppl", "--model", models["hf"])
    assert record["tasks"]["lmms-seedbench_ppl"]["n"] == 8


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """Enough rows for intervals."""
    folder = tmp_path_factory.mktemp("many")
    rows = [
        {"question": world.question(n), "options": world.options(n), "answer": str(n % 4)}
        | {"image": world.picture(n // 2)}
        for n in range(40)
    ]
    save(rows, folder, "ai2d", datasets.Image())
    pairs = [
        {
            "question_id": f"{category}/{n}.png",
            "question": f"Is there {thing}? Please answer yes or no.",
            "answer": ("Yes", "No")[(n + k) % 2],
            "category": category,
            "image": world.picture(n),
        }
        for n in range(12)
        for category in ("existence", "color")
        for k, thing in enumerate(("a red circle", "a blue square"))
    ]
    save(pairs, folder, "MME", datasets.Image())
    return folder


def test_a_mean_has_wilsons_interval_and_other_scores_the_jackknifes(many):
    found = go(many, "ai2d,mme")["tasks"]
    share = found["lmms-ai2d"]["metrics"]["exact_match"]
    assert found["lmms-ai2d"]["unit"] == "fraction"
    assert share["method"].startswith("Wilson") and share["method"].endswith("20 clusters")
    assert 0 <= share["low"] < share["value"] < share["high"] <= 1

    right: dict[tuple[str, int], list[bool]] = {}
    for line in samples(many, "mme"):
        row, category = line["doc_id"] // 4, ("existence", "color")[line["doc_id"] // 2 % 2]
        right.setdefault((category, row), []).append(line["score"] == 1)

    def points(left_out: int | None) -> float:
        total = 0.0
        for category in ("existence", "color"):
            pairs = [two for (c, n), two in right.items() if c == category and n != left_out]
            total += 100 * np.mean([np.mean(two) + all(two) for two in pairs])
        return total

    score = found["lmms-mme"]["metrics"]["mme_perception_score"]
    assert found["lmms-mme"]["unit"] == "points"
    assert score["value"] == pytest.approx(points(None))
    variance = 11 / 12 * sum((points(n) - points(None)) ** 2 for n in range(12))
    half = stats.t.ppf(0.975, 11) * math.sqrt(variance)
    assert score["low"] == pytest.approx(score["value"] - half)
    assert score["high"] == pytest.approx(score["value"] + half)


def test_runs_are_compared_and_reported(many, constant, capsys):
    go(many, "ai2d,mme")
    go(many, "ai2d,mme", *constant, out="other")
    capsys.readouterr()
    assert compare.main([str(many / "out"), str(many / "other")]) == 0
    table = capsys.readouterr().out
    assert "lmms-ai2d" in table and "lmms-mme" in table
    page = many / "report.html"
    assert report.main([str(many / "out"), str(many / "other"), "--out", str(page)]) == 0
    assert "lmms-ai2d" in page.read_text()
    assert score.main(["lmms-ai2d", str(many / "out" / "samples_lmms-ai2d.jsonl")]) == 2
    assert "harness.run scores" in capsys.readouterr().err


def test_with_a_benchmark_of_ours_in_one_run(many, tmp_path):
    (tmp_path / "ai2d.parquet").symlink_to(many / "ai2d.parquet")
    write_parquet(pope_rows(), tmp_path / "pope.parquet")
    names = ["--tasks", "lmms:ai2d,pope", "--data", str(tmp_path), "--limit", "6"]
    assert run.main([*names, "--out", str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert {task: entry["n"] for task, entry in record["tasks"].items()} == {
        "pope": 6,
        "lmms-ai2d": 6,
    }
    assert record["protocol"] == "paper"
    assert record["data"]["lmms-ai2d"]["lmms_eval"]["task"] == "ai2d"


def test_votes_are_counted_by_what_the_task_reads(many, tmp_path):
    sampled = ["--votes", "3", "--temperature", "2", "--limit", "6"]
    record = go(many, "ai2d", *sampled, out="votes")
    assert len(record["votes"]["lmms-ai2d"]["exact_match"]) == 3
    lines = (many / "votes" / "votes_lmms-ai2d.jsonl").read_text().splitlines()
    assert [len(json.loads(line)["votes"]) for line in lines] == [3] * 6


@pytest.fixture(scope="module")
def whole(odd, tmp_path_factory) -> Workplace:
    """A run that nobody disturbed."""
    arguments = ["--tasks", "lmms:ai2d,lmms:seedbench_ppl", "--data", str(odd)]
    arguments += ["--batch-size", "4", "--out", "out"]
    place = Workplace(tmp_path_factory.mktemp("runs") / "whole", "counted_run", arguments)
    place.run()
    return place


@pytest.mark.parametrize("after", [5, 30])
def test_killed_and_continued(after, whole, tmp_path):
    """Between answers to a row's own choices too: nothing lost, nothing asked twice."""
    place = Workplace(tmp_path / "killed", "counted_run", whole.arguments)
    process = place.start(DIE_AFTER=str(after))
    process.join(LONGEST_S)
    assert process.exitcode == -signal.SIGKILL
    kept = (place.out / "answers.rank0.jsonl").read_text().splitlines()
    before = len((place.folder / "asked.txt").read_text().splitlines())
    assert len(kept) == after
    place.run()
    for task in ("ai2d", "seedbench_ppl"):
        name = f"samples_lmms-{task}.jsonl"
        assert (place.out / name).read_bytes() == (whole.out / name).read_bytes()
    answers = (place.out / "answers.rank0.jsonl").read_text().splitlines()
    asked = (whole.folder / "asked.txt").read_text().splitlines()
    again = (place.folder / "asked.txt").read_text().splitlines()[before:]
    assert answers[:after] == kept and len(set(answers)) == len(answers) == len(asked)
    assert len(again) == len(asked) - after


def test_lmms_eval_is_loaded_only_where_it_is_asked_for(tmp_path):
    code = "import sys; from harness import run; run.main(['--list']); "
    code += "print('lmms_eval' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert "lmms:ai2d" in done.stdout
