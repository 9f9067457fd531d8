"""Validation during training: held-out loss, a benchmark every N steps, the picture of a run."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from test_llava_data import conversation, write
from test_train_cli import PRESET, flags, train_in_two_processes

from vlmamba import checkpoints, train
from vlmamba.training import plot
from vlmamba_core.errors import UserError

BENCHMARK = """
import json, os, sys
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert "RANK" not in os.environ and "WORLD_SIZE" not in os.environ
from safetensors import safe_open
with safe_open(given["--model"] + "/model.safetensors", "pt") as weights:
    scale = float(weights.get_tensor("connector.linear_out.weight").abs().max())
os.makedirs(given["--out"])
entry = {"metrics": {"accuracy": {"value": scale}}}
json.dump({"tasks": {"pope": entry}}, open(given["--out"] + "/record.json", "w"))
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """data.json with twelve samples, held_out.json with seven others, and images/."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "images").mkdir()
    for i, color in enumerate(("red", "green", "blue", "white")):
        Image.new("RGB", (28, 28), color).save(folder / "images" / f"{i}.png")

    def samples(count: int, words: str) -> list[dict]:
        seen = [
            {"image": f"{i % 4}.png", "conversations": conversation(answer=words * (i + 1))}
            for i in range(count - 2)
        ]
        return seen + [{"conversations": conversation(f"say {i}", words)} for i in range(2)]

    write(folder, samples(7, "other ")).rename(folder / "held_out.json")
    write(folder, samples(12, "answer "))
    (folder / "benchmark.py").write_text(BENCHMARK)
    return folder


def arguments(world: Path, out: Path, *more: str, **changes: object) -> list[str]:
    return ["--preset", PRESET, *flags(world, out, steps=5, **changes), *more]


def log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]


def own_loss(folder: Path, world: Path) -> float:
    """Mean over all labels of the held-out samples, one by one, from logits and by hand."""
    model, processor = checkpoints.load(str(folder))
    total, labels = 0.0, 0
    for record in json.loads((world / "held_out.json").read_text()):
        ids, targets = processor.training_example(record["conversations"])
        given = {}
        if "image" in record:
            given["pixel_values"] = processor.pixel_values([world / "images" / record["image"]])
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([ids]), **given).logits[0].log_softmax(-1)
        for position, target in enumerate(targets[1:]):
            if target != -100:
                total, labels = total - float(scores[position, target]), labels + 1
    return total / labels


@pytest.fixture(scope="module")
def watched(world, tmp_path_factory) -> Path:
    """A run of five steps that looks at the held-out samples after 2, 4 and 5."""
    out = tmp_path_factory.mktemp("run") / "watched"
    held_out = ["--eval-data", str(world / "held_out.json"), "--eval-every", "2"]
    held_out += ["--eval-other-pictures"]
    assert train.main(arguments(world, out, *held_out, save_every=2)) == 0
    return out


def test_the_held_out_loss_is_that_of_the_saved_model(watched, world):
    lines = log(watched)
    assert [line["step"] for line in lines if "eval_loss" in line] == [2, 4, 5]
    for step in (4, 5):
        folder = watched / "checkpoints" / f"step-{step:08d}"
        assert lines[step - 1]["eval_loss"] == pytest.approx(own_loss(folder, world), rel=1e-5)


@pytest.mark.parametrize("more", [[], ["--lora", "2", "--lora-dropout", "0.5"]], ids=str)
def test_validation_changes_nothing_of_the_training(more, watched, world, tmp_path):
    start = ["--init", str(watched / "final"), *more]
    held_out = ["--eval-data", str(world / "held_out.json"), "--eval-every", "1"]
    assert train.main(arguments(world, tmp_path / "plain", *start)) == 0
    assert train.main(arguments(world, tmp_path / "seen", *start, *held_out)) == 0
    plain, seen = log(tmp_path / "plain"), log(tmp_path / "seen")
    assert [line["loss"] for line in plain] == [line["loss"] for line in seen]
    weights = [tmp_path / run / "final" / "model.safetensors" for run in ("plain", "seen")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    resumed = tmp_path / "seen" / "summary.json"
    resumed.unlink()
    again = arguments(world, tmp_path / "seen", *start, *held_out)
    assert train.main([*again, "--resume", "auto"]) == 0
    assert [line["eval_loss"] for line in log(tmp_path / "seen")] == [
        line["eval_loss"] for line in seen
    ]


def scores_of_card(folder: Path) -> list[float] | None:
    found = ModelCard.load(folder / "README.md").data.eval_results
    return None if found is None else [result.metric_value for result in found]


def test_a_benchmark_is_run_every_n_steps(world, tmp_path):
    command = f"python {world / 'benchmark.py'}"
    more = ["--eval-command", command, "--eval-every", "2"]
    assert train.main(arguments(world, tmp_path / "o", *more, save_every=1, keep=9)) == 0
    scores = {
        line["step"]: line["eval_scores"]
        for line in log(tmp_path / "o")
        if line["step"] > 0 and "eval_scores" in line
    }
    assert list(scores) == [2, 4, 5]
    for step, found in scores.items():
        saved = load_file(tmp_path / "o" / "checkpoints" / f"step-{step:08d}" / "model.safetensors")
        assert found == {"pope/accuracy": float(saved["connector.linear_out.weight"].abs().max())}
        [shown] = scores_of_card(tmp_path / "o" / "checkpoints" / f"step-{step:08d}")
        assert shown == pytest.approx(100 * found["pope/accuracy"], abs=0.005)
    assert scores_of_card(tmp_path / "o" / "final") == [shown]
    assert scores_of_card(tmp_path / "o" / "checkpoints" / "step-00000003") is None
    assert not (tmp_path / "o" / "eval" / "model").exists()
    assert (tmp_path / "o" / "eval" / "step-00000002" / "record.json").is_file()


def answer_loss(model, processor, conversation_: list[dict], picture: Path) -> float:
    """Mean over the labels of one sample, by hand."""
    ids, targets = processor.training_example(conversation_)
    pixels = processor.pixel_values([picture])
    with torch.no_grad():
        given = {"input_ids": torch.tensor([ids]), "pixel_values": pixels}
        scores = model(**given).logits[0].log_softmax(-1)
    scored = [(p, t) for p, t in enumerate(targets[1:]) if t != -100]
    return -sum(float(scores[p, t]) for p, t in scored) / len(scored)


def test_the_gain_of_a_picture_is_what_another_one_costs(watched, world, tmp_path):
    more = ["--eval-data", str(world / "held_out.json"), "--eval-other-pictures"]
    more += ["--init", str(watched / "final")]
    more += ["--eval-every", "4"]
    assert train.main(arguments(world, tmp_path / "o", *more, lr=0.02)) == 0
    found = {line["step"]: line.get("eval_picture_gains") for line in log(tmp_path / "o")}
    assert [step for step, gains in found.items() if gains is not None] == [4, 5]
    model, processor = checkpoints.load(str(tmp_path / "o" / "final"))
    seen = [r for r in json.loads((world / "held_out.json").read_text()) if "image" in r]
    names = [record["image"] for record in seen]
    assert names == ["0.png", "1.png", "2.png", "3.png", "0.png"]
    others = ["1.png", "2.png", "3.png", "0.png", "1.png"]
    for record, gain, other in zip(seen, found[5], others, strict=True):
        loss = [
            answer_loss(model, processor, record["conversations"], world / "images" / name)
            for name in (other, record["image"])
        ]
        assert gain == pytest.approx(loss[0] - loss[1], abs=1e-4)
    assert any(abs(gain) > 1e-3 for gain in found[5])


def test_two_processes_measure_what_one_does(watched, world, tmp_path):
    more = ["--eval-data", str(world / "held_out.json"), "--eval-every", "2"]
    more += ["--eval-other-pictures"]
    more += ["--eval-command", f"python {world / 'benchmark.py'}"]
    train_in_two_processes("fsdp", *arguments(world, tmp_path / "o", *more))
    one, two = log(watched), log(tmp_path / "o")
    for step in (2, 4, 5):
        assert two[step - 1]["eval_loss"] == pytest.approx(one[step - 1]["eval_loss"], rel=1e-4)
        gains = [lines[step - 1]["eval_picture_gains"] for lines in (one, two)]
        assert gains[1] == pytest.approx(gains[0], abs=2e-4)
        assert two[step - 1]["eval_scores"].keys() == {"pope/accuracy"}


def test_a_benchmark_that_fails_is_reported_and_training_goes_on(world, tmp_path, capsys):
    more = ["--eval-command", f"{sys.executable} -c raise(SystemExit(3))"]
    assert train.main(arguments(world, tmp_path / "o", *more)) == 0
    assert [line.get("eval_scores", 0) for line in log(tmp_path / "o")] == [0, None, 0, None, None]
    assert "gave no score" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--eval-data", "nope.json"], "no data file 'nope.json'"),
        (["--eval-other-pictures"], "--eval-other-pictures needs --eval-data FILE"),
        (["--eval-every", "2"], "--eval-every needs --eval-data"),
        (["--eval-every", "0"], "--eval-every is 0"),
        (["--eval-command", "no-such-program --tasks pope"], "no program of that name"),
        (["--eval-command", "python 'x"], "No closing quotation"),
    ],
)
def test_a_mistake_is_refused_before_anything_is_loaded(more, message, world, tmp_path, capsys):
    assert train.main(arguments(world, tmp_path / "o", *more)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_the_picture_shows_what_the_log_says(watched, tmp_path):
    losses, held_out = plot.read_losses(watched / "train.jsonl")
    lines = log(watched)
    assert losses.tolist() == [[line["step"], line["loss"]] for line in lines]
    assert held_out[:, 0].tolist() == [2, 4, 5]
    with Image.open(watched / "loss.png") as picture:
        assert picture.size == (1050, 600)
        colors = {color for _, color in picture.convert("RGB").getcolors(10**6)}
    assert (31, 119, 180) in colors  # the line
    again = plot.draw([watched], tmp_path / "loss.png")
    assert again.read_bytes() == (watched / "loss.png").read_bytes()


def test_a_log_with_gaps_is_drawn(tmp_path, capsys):
    """A step without labels has no loss; the last line is being written."""
    lines = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": None}, {"step": 3, "loss": 1.0}]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo'
    (tmp_path / "train.jsonl").write_text(text)
    losses, held_out = plot.read_losses(tmp_path / "train.jsonl")
    assert losses.tolist() == [[1, 3], [3, 1]] and held_out.shape == (0, 2)
    for name in ("a.png", "a.svg", "a.pdf"):
        assert plot.main([str(tmp_path), str(tmp_path), "--to", str(tmp_path / name)]) == 0
        assert (tmp_path / name).stat().st_size > 1000
    (tmp_path / "train.jsonl").write_text("[]\n")
    assert plot.main([str(tmp_path)]) == 2
    assert plot.main([str(tmp_path / "gone")]) == 2
    assert plot.main([str(tmp_path), "--to", "x.txt"]) == 2
    assert capsys.readouterr().err.count("error: ") == 3


def test_the_running_mean_is_unbiased():
    assert plot.running_mean(np.full(5, 7.0)).tolist() == pytest.approx([7] * 5)
    [_, second] = plot.running_mean(np.array([1.0, 2.0]))
    assert math.isclose(second, (0.95 * 1 + 2) / 1.95)
    with pytest.raises(UserError):
        plot.read_losses(Path("gone"))


@pytest.fixture(autouse=True)
def _fresh_accelerate_state():
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)
