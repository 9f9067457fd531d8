"""Whole files of every benchmark, as published, through all three ways to a score: `harness.run`,
`harness.score` and lmms-eval's own command. The model's words are fixed; all else is as it runs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import datasets
import pytest
import torch
import whole_files

import tasks
from harness import run, score
from harness.models import resumable
from harness.models.vlmamba import VLMambaModel
from tasks.common import PROTOCOLS

# whose scores lmms-eval's own task can check: it knows no MM-Vet without a judge, and of the
# paper's rules only what is counted after reading
LMMS_EVAL_COUNTS = {
    "lmms": set(tasks.NAMES) - {"mmvet", "llava_bench", "retrieval"},
    "paper": {"pope", "mme", "scienceqa", "mmbench", "mmbench_cn", "seedbench", "coco_cap"},
}
FOLDER = Path(tasks.__file__).parent

# Worked out by the official code on these rows and answers (the answers stripped, as LLaVA's
# generation scripts store them). paper: LLaVA c121f04's eval_pope.py (F1 2/3, 4/5, 2/3),
# eval_science_qa.py (60.00 and 77.78 %), m4c_evaluator.py, convert_gqa_for_eval.py with GQA's exact
# match; pycocoevalcap 1.2; MME, VQAv2 and MMBench counted by hand after calculation.py, vqaEval.py
# (which normalizes nothing where all ten people agree) and mcq_circular_eval. lmms: lmms-eval
# 0.7.3's own tasks, which every run under `lmms` here is compared with once more.
CAPTIONS = {"CIDEr": 1.8248847043348908, "BLEU-1": 0.9090909090082646}
EXPECTED = {
    ("pope", "paper"): {"f1": 32 / 45, "accuracy": 8 / 11, "precision": 2 / 3, "recall": 4 / 5},
    ("pope", "lmms"): {"f1": 1, "accuracy": 6 / 11, "recall": 1, "yes_ratio": 5 / 11},
    ("mme", "paper"): {"perception": 125 + 200 + 50, "cognition": 100},
    ("mme", "lmms"): {"perception": 125 + 200 + 50, "cognition": 100},
    ("scienceqa", "paper"): {"accuracy": 3 / 5, "accuracy_all": 7 / 9},
    ("scienceqa", "lmms"): {"accuracy": 3 / 5, "accuracy_all": 7 / 9},
    ("mmbench", "paper"): {"accuracy": 3 / 5, "vanilla_accuracy": 4 / 5},
    ("mmbench", "lmms"): {"accuracy": 3 / 5, "vanilla_accuracy": 4 / 5},
    ("mmbench_cn", "paper"): {"accuracy": 1 / 3, "vanilla_accuracy": 2 / 3},
    ("mmbench_cn", "lmms"): {"accuracy": 1 / 3, "vanilla_accuracy": 2 / 3},
    ("vqav2", "paper"): {"accuracy": 3.2 / 6, "number/accuracy": 0.3, "other/accuracy": 0.65},
    ("vqav2", "lmms"): {"accuracy": 4.2 / 6, "number/accuracy": 0.8, "other/accuracy": 0.65},
    ("textvqa", "paper"): {"accuracy": 0.875},
    ("textvqa", "lmms"): {"accuracy": 0.875},
    ("gqa", "paper"): {"accuracy": 2 / 5},
    ("gqa", "lmms"): {"accuracy": 3 / 5},
    ("easy_vqa", "paper"): {"accuracy": 3 / 4},
    ("easy_vqa", "lmms"): {"accuracy": 3 / 4},
    ("coco_cap", "paper"): CAPTIONS,
    ("coco_cap", "lmms"): CAPTIONS,
    ("vizwiz", "paper"): {"accuracy": 2.6 / 4},
    ("vizwiz", "lmms"): {"accuracy": 3 / 4},
    # paper: letters alone (2 of 5); lmms: first letters, in any case (4 of 5).
    ("seedbench", "paper"): {"accuracy": 2 / 5},
    ("seedbench", "lmms"): {"accuracy": 4 / 5},
    # paper: all but Math_3 right; lmms: lists of answers are one text there, so Music_5 is wrong.
    ("mmmu", "paper"): {"accuracy": 5 / 6},
    ("mmmu", "lmms"): {"accuracy": 4 / 6},
    # paper: "Taxi." and "yes" right, "the red" wrong; lmms: "taxi!" right too.
    ("retrieval", "paper"): {"accuracy": 1 / 3, "existence": 1.0},
    ("retrieval", "lmms"): {"accuracy": 2 / 3, "existence": 1.0},
    ("llava_bench", "paper"): {},
    ("llava_bench", "lmms"): {},
    ("mmvet", "paper"): {},
    ("mmvet", "lmms"): {},
}


@pytest.fixture(autouse=True)
def _fixed_answers(monkeypatch):
    """The model looks at every picture and then says what the file says."""
    answers = {name: build().answers for name, build in whole_files.BUILDERS.items()}

    def say(self, requests, limits, batch_size, on_done):
        for index, request in enumerate(requests):
            assert all(picture.image.mode == "RGB" for picture in request.pictures)
            name = request.task.removeprefix("vlmamba_").removeprefix("whole_")
            on_done(index, answers[name.removesuffix("_lmms")][request.row])

    monkeypatch.setattr(VLMambaModel, "answer", say)
    monkeypatch.setattr(resumable, "cut", lambda text, until: text if text.strip() else "")


@pytest.fixture
def saved_model(tmp_path, model, processor) -> str:
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def equal(values: dict[str, float], name: str, protocol: str) -> None:
    for metric, expected in EXPECTED[name, protocol].items():
        assert values[metric] == pytest.approx(expected, abs=1e-9), (name, protocol, metric)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_run_scores_whole_files(protocol, saved_model, tmp_path):
    files = {name: whole_files.write(name, tmp_path / "data") for name in tasks.NAMES}
    assert set(files) == set(whole_files.BUILDERS)
    out = tmp_path / "out"
    options = ["--tasks", ",".join(tasks.NAMES), "--model", saved_model]
    options += ["--data", str(tmp_path / "data")]
    options += ["--protocol", protocol, "--out", str(out), "--batch-size", "4"]
    assert run.main([*options, "--backend", "torch"]) == 0
    record = json.loads((out / "record.json").read_text())
    for name in tasks.NAMES:
        entry = record["tasks"][name]
        equal({key: found["value"] for key, found in entry["metrics"].items()}, name, protocol)
        assert entry["n"] == len(whole_files.BUILDERS[name]().asked), name
        assert entry["excluded"] == {}, name
        read = [Path(file).name for file in record["data"][name]["files"]]
        assert read == [file.name for file in files[name]], name
        check, against = (record[f"lmms_eval_check{suffix}"][name] for suffix in ("", "_against"))
        if name in LMMS_EVAL_COUNTS[protocol]:
            assert (check, against[:16]) == ("equal", "lmms-eval's own "), name
        else:
            assert (check[:10], against) == ("not made: ", "nothing"), name
    assert record["tasks"]["scienceqa"]["metrics"]["accuracy"]["n"] == 5
    sent = json.loads((out / "mmvet_submission.json").read_text())
    assert sent == {f"v1_{i}": f"It is {i}." for i in range(3)}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("stored", ["image", "has_image"])
@pytest.mark.parametrize("name", [n for n in tasks.NAMES if tasks.load(n).official])
def test_score_scores_the_same_rows_from_a_file(name, stored, protocol, tmp_path):
    """With the image as a path, or (ScienceQA) without it and with `has_image`."""
    lines = []
    for row in whole_files.BUILDERS[name]().rows:
        column = tasks.load(name).image_column
        doc = tasks.load(name).without_image(row)
        del doc[whole_files.ASKED]
        doc.pop("has_image", None)
        told = {column: "a.png" if row[column] else None, "has_image": row[column] is not None}
        told["image"] = told[column]
        at = column if stored == "image" else stored
        doc |= {at: told[stored], "prediction": row[whole_files.ASKED]}
        lines.append(json.dumps(doc))
    path = tmp_path / "predictions.jsonl"
    path.write_text("\n".join(lines))
    out = tmp_path / "scores.json"
    if name == "coco_cap" and (stored, protocol) != ("image", "paper"):
        pytest.skip("its programs take long to start")
    assert score.main([name, str(path), "--protocol", protocol, "--json", str(out)]) == 0
    equal(json.loads(out.read_text())["metrics"], name, protocol)


def lmms_eval_task(name: str, protocol: str, root: Path, folder: Path) -> str:
    """A copy of the task file that reads `root`'s rows in place of the hub's; its name."""
    suffix = "" if protocol == "paper" else "_lmms"
    task = tasks.load(name)
    data = [str(file) for file in whole_files.write(name, root)]
    if task.image_hub:  # its second table is fetched from the hub: here, images in the rows
        rows = whole_files.BUILDERS[name]().rows
        kinds = whole_files.features(name)
        table = [{key: row[key] for key in kinds} for row in rows]
        data = [str(folder / f"{name}.parquet")]
        datasets.Dataset.from_list(table, features=kinds).to_parquet(data[0])
    (folder / f"whole_{name}{suffix}.yaml").write_text(
        f"include: {FOLDER / name / f'vlmamba_{name}{suffix}.yaml'}\n"
        f"task: whole_{name}{suffix}\ndataset_path: parquet\ndataset_name: null\n"
        f"dataset_kwargs: {json.dumps({'data_files': {task.hub.split: data}})}\n"
    )
    return f"whole_{name}{suffix}"


def test_lmms_evals_command_scores_whole_files(saved_model, tmp_path, monkeypatch):
    from lmms_eval.__main__ import cli_evaluate

    folder = tmp_path / "include"
    folder.mkdir()
    names = {
        (name, protocol): lmms_eval_task(name, protocol, tmp_path / "data", folder)
        for name in tasks.NAMES
        for protocol in PROTOCOLS
        if (name, protocol) != ("coco_cap", "lmms")  # the same rules, and slow to start
    }
    options = ["--model", "vlmamba", "--model_args", f"pretrained={saved_model},backend=torch"]
    options += ["--include_path", str(folder), "--tasks", ",".join(names.values())]
    options += ["--device", "cpu", "--batch_size", "4", "--output_path", str(tmp_path / "out")]
    options += ["--log_samples"]
    monkeypatch.setattr(sys, "argv", ["lmms-eval", *options])
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    with torch.random.fork_rng():
        cli_evaluate()
    (file,) = (tmp_path / "out").rglob("*_results.json")
    results = json.loads(file.read_text())["results"]
    for (name, protocol), title in names.items():
        found = {k.removesuffix(",none"): v for k, v in results[title].items()}
        equal({k: v for k, v in found.items() if isinstance(v, float)}, name, protocol)
    # and its logged samples, imported
    for (name, protocol), title in names.items():
        if tasks.load(name).official is None or name == "coco_cap":
            continue
        (log,) = (tmp_path / "out").rglob(f"*samples_{title}.jsonl")
        out = tmp_path / "imported.json"
        options = ["--import", "lmms-eval", "--protocol", protocol, "--json", str(out)]
        assert score.main([name, str(log), *options]) == 0
        equal(json.loads(out.read_text())["metrics"], name, protocol)
