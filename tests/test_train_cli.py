"""`python -m vlmamba.train` as a user runs it: stages, kill and resume, two processes, errors."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from harness_world import unexplained
from PIL import Image
from safetensors.torch import load_file, save_file
from test_llava_data import conversation, write
from torch._dynamo.utils import counters

from vlmamba import checkpoints, generation, train
from vlmamba.data import llava
from vlmamba.demo.conversations import build_training_data
from vlmamba.training import trainer_state
from vlmamba.training.recipe import load_recipe, recipe_names

PRESET = "2.8b-slimpj+siglip-so400m-384+vss_l2+bsm"
SMALL = ["--tiny", "--cpu", "--dtype", "fp32", "--lr", "1e-3", "--no-gradient-checkpointing"]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """data.json with 24 samples and images/ with four pictures."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "images").mkdir()
    for i, color in enumerate(("red", "green", "blue", "white")):
        Image.new("RGB", (28, 28), color).save(folder / "images" / f"{i}.png")
    records = [
        {"image": f"{i % 4}.png", "conversations": conversation(answer=f"answer {i % 4}" * (i + 1))}
        for i in range(20)
    ]
    write(folder, records + [{"conversations": conversation(f"say {i}")} for i in range(4)])
    return folder


def flags(world: Path, out: Path, stage: str = "finetune", **changes: object) -> list[str]:
    chosen = {"steps": 6, "batch_size": 4, "micro_batch": 2, "save_every": 2} | changes
    files = ["--data", str(world / "data.json"), "--images", str(world / "images")]
    numbers = [f"--{name.replace('_', '-')}={value}" for name, value in chosen.items()]
    return ["--stage", stage, *files, "--out", str(out), *SMALL, *numbers]


def launch(*arguments: str, module: str = "vlmamba.train", threads: int = 1) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "train.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def uninterrupted(world, tmp_path_factory) -> Path:
    """The run that the others are compared with: 12 steps, three epochs of 24 samples."""
    out = tmp_path_factory.mktemp("run") / "whole"
    assert train.main(["--preset", PRESET, *flags(world, out, steps=12, batch_size=6)]) == 0
    return out


def test_the_folder_explains_itself_and_another_readme_stays(uninterrupted, world, tmp_path):
    assert unexplained(uninterrupted) == []
    out = tmp_path / "mine"
    out.mkdir()
    (out / "README.md").write_text("mine")
    held_out = ["--eval-data", str(world / "data.json")]
    assert train.main(["--preset", PRESET, *flags(world, out, steps=1), *held_out]) == 0
    assert (out / "README.md").read_text() == "mine"


def test_every_saved_model_has_a_card_of_its_training(uninterrupted):
    step = "checkpoints/step-00000012"
    cards = {(uninterrupted / place / "README.md").read_text() for place in ("final", step)}
    assert len(cards) == 1
    (card,) = cards
    assert "| data | data.json |" in card and "| batch_size | 6 |" in card


def test_samples_are_grouped_by_how_many_tokens_they_have(uninterrupted, world):
    """Counted once, all together; the same as those that a sample is trained on."""
    _, processor = checkpoints.load(str(uninterrupted / "final"))
    with np.load(uninterrupted / "samples.npz") as known:
        lengths = known["lengths"].tolist()
    records = json.loads((world / "data.json").read_text())
    samples = [llava.parse_sample(json.dumps(record).encode()) for record in records]
    expected = [len(processor.training_example(sample.conversations)[0]) for sample in samples]
    assert lengths == expected
    assert len(set(expected)) > 15


def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(world, uninterrupted, tmp_path):
    arguments = ["--preset", PRESET, *flags(world, tmp_path / "o", steps=12, batch_size=6)]
    # as many threads as the run that it is compared with: sums are cut at other places by fewer
    victim = launch(*arguments, threads=torch.get_num_threads())
    log = tmp_path / "o" / "train.jsonl"
    while victim.poll() is None and not (log.exists() and log.read_text().count("\n") >= 5):
        time.sleep(0.002)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    assert not (tmp_path / "o" / "final").exists()
    leftovers = [tmp_path / "o" / ".final.partial"]  # of a kill while it wrote, or deleted
    leftovers += [
        tmp_path / "o" / "checkpoints" / f".step-0000000{n}" for n in ("1.old", "3.partial")
    ]
    for leftover in leftovers:
        (leftover / "inside").mkdir(parents=True)
    assert train.main([*arguments, "--resume", "auto"]) == 0
    assert not any(map(Path.exists, leftovers))
    assert losses(tmp_path / "o") == losses(uninterrupted)
    final = [folder / "final" / "model.safetensors" for folder in (tmp_path / "o", uninterrupted)]
    assert final[0].read_bytes() == final[1].read_bytes()


def train_in_two_processes(way: str, *arguments: str, script: Path | None = None) -> None:
    """`accelerate launch` with a configuration that the package brings."""
    two = ["--config_file", str(Path(train.__file__).parent / "recipes" / f"{way}.yaml")]
    two += ["--num_processes", "2", "--main_process_port", str(free_port())]
    everything = [*two, *([str(script)] if script else ["-m", "vlmamba.train"]), *arguments]
    process = launch(*everything, module="accelerate.commands.launch")
    output = process.communicate()[0]
    assert process.returncode == 0, output


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_processes_follow_the_curve_of_one(way, world, uninterrupted, tmp_path):
    """Some batches have no image."""
    arguments = ["--preset", PRESET, *flags(world, tmp_path / "o", steps=12, batch_size=6)]
    train_in_two_processes(way, *arguments)
    shutil.rmtree(tmp_path / "o" / "final")
    shutil.rmtree(trainer_state.checkpoints(tmp_path / "o")[-1])
    train_in_two_processes(way, *arguments, "--resume", "auto")  # from step 10
    assert losses(tmp_path / "o") == pytest.approx(losses(uninterrupted), rel=1e-4)
    mine, other = (
        load_file(folder / "final" / "model.safetensors")
        for folder in (tmp_path / "o", uninterrupted)
    )
    assert all((mine[name] - other[name]).abs().max() < 1e-3 for name in mine)
    checkpoint_folder = trainer_state.checkpoints(tmp_path / "o")[-1]
    assert len(list(checkpoint_folder.glob("rng-*.safetensors"))) == 2


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """Eight pictures with captions and eight with conversations, as `make demo-model` has them."""
    folder = tmp_path_factory.mktemp("demo")
    build_training_data(folder, images=8, captions=8, dialogues=0, easy_vqa=False)
    return folder


@pytest.mark.parametrize(
    ("way", "stage"),
    [
        ("ddp", "finetune"),
        pytest.param("ddp", "pretrain", marks=pytest.mark.soak),
        pytest.param("fsdp", "finetune", marks=pytest.mark.soak),
    ],
)
def test_two_processes_on_the_demo_follow_the_curve_of_one(way, stage, demo, tmp_path):
    """The bundled model, its encoder and its data; the cache of features is filled by one."""
    arguments = ["--preset", "nano+vss_l2+bsm", "--stage", stage, "--init", "nano", "--cpu"]
    arguments += ["--data", str(demo / f"{stage}.json"), "--images", str(demo)]
    arguments += ["--features-cache", str(demo / "features"), "--dtype", "fp32", "--steps", "3"]
    arguments += ["--batch-size", "4", "--micro-batch", "2", "--max-length", "256"]
    # at the recipe's rate three steps raise the loss by a third, and what rounding differs with it
    arguments += ["--lr", "1e-4"]
    train_in_two_processes(way, *arguments, "--out", str(tmp_path / "two"))
    assert train.main([*arguments, "--out", str(tmp_path / "one")]) == 0
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 3
    assert two == pytest.approx(one, rel=1e-4)


def test_the_three_stages_chain_into_a_loadable_model(world, tmp_path):
    """The demo preset itself, with the feature cache, on a shrunken language model."""
    text, aligned, tuned = (tmp_path / name for name in ("text", "aligned", "tuned"))
    common = {"steps": 2, "batch_size": 2}
    nano = ["--preset", "nano"]
    assert train.main([*nano, *flags(world, text, "text", max_length=32, **common)]) == 0
    cache = ["--features-cache", str(tmp_path / "cache")]
    for stage, out, before in (("pretrain", aligned, text), ("finetune", tuned, aligned)):
        arguments = [*nano, *flags(world, out, stage, **common), *cache]
        assert train.main([*arguments, "--init", str(before / "final")]) == 0
    [encoder] = (tmp_path / "cache").iterdir()
    assert (encoder / "keys.u64").stat().st_size == 4 * 8
    model, processor = checkpoints.load(str(tuned / "final"))
    ids = processor.encode(processor.conversation_prompt("what?"))
    assert ids.count(model.config.image_token_id) == 49
    settings = json.loads((tuned / "config.json").read_text())
    assert settings["hyperparameters"]["batch_size"] == 2


def test_mamba2_goes_through_the_stages_and_answers(world, tmp_path):
    mamba2 = ["--preset", "mamba2-1.3b+siglip-so400m-384+vss_l2+bsm", "--recipe", "nano"]
    stages = ("text", "pretrain", "finetune")
    common = {"steps": 3, "batch_size": 4}
    before: list[str] = []
    for stage in stages:
        more = {"max_length": 64} if stage == "text" else {}
        arguments = flags(world, tmp_path / stage, stage, **common, **more)
        assert train.main([*mamba2, *arguments, *before]) == 0
        before = ["--init", str(tmp_path / stage / "final")]
    curve = losses(tmp_path / "finetune")
    again = flags(world, tmp_path / "o", **common)
    init = ["--init", str(tmp_path / "pretrain" / "final"), "--gradient-checkpointing"]
    assert train.main([*mamba2, *again, *init]) == 0
    assert losses(tmp_path / "o") == pytest.approx(curve, rel=1e-5)
    model, processor = checkpoints.load(str(tmp_path / "finetune" / "final"))
    assert model.config.mixer == "mamba2"
    asked = [generation.Request(processor.conversation_prompt(q, images=0)) for q in ("a?", "bb?")]
    answer = generation.GroupedGenerator(model, processor).generate
    assert answer(asked, 4, batch_size=2) == answer(asked, 4, batch_size=1)


@pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
def test_compile_does_not_change_the_curve(mixer, world, tmp_path):
    """All blocks share what is compiled; lengths differ from batch to batch."""
    arguments = ["--preset", PRESET, "--set", f"mixer={mixer}"]
    for out, more in (("plain", []), ("compiled", ["--compile"])):
        torch._dynamo.reset()
        counters.clear()
        assert train.main([*arguments, *flags(world, tmp_path / out, steps=5), *more]) == 0
    assert 2 <= counters["stats"]["unique_graphs"] <= 8  # before and behind the mixer
    plain, compiled = losses(tmp_path / "plain"), losses(tmp_path / "compiled")
    assert compiled == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize(
    "name", [name for name in recipe_names() if load_recipe(name).get("preset")]
)
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_every_recipe_of_the_paper_dry_runs(name, stage, world, tmp_path, capsys):
    arguments = flags(world, tmp_path / "never", stage, batch_size=2, micro_batch=1)
    assert train.main(["--recipe", name, "--dry-run", *arguments]) == 0
    assert "dry run: one update made, nothing written" in capsys.readouterr().out
    assert not (tmp_path / "never").exists()


WATCH = """
import json, os, sys
here, written, taken = os.getcwd(), [], []
def look(event, given):
    if event == "open":
        path, mode, flags = given
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        allowed = str(path).startswith("/dev/") or "__pycache__" in str(path)
        if writes and not allowed:
            written.append(str(path))
    elif event in ("os.mkdir", "os.rename", "os.link", "os.symlink", "tempfile.mkdtemp"):
        if "__pycache__" not in str(given[0]):
            written.append(str(given[0]))
from vlmamba import train
from vlmamba.data import collate
from vlmamba.models.scan_backends.build import kernels
kernels()  # built before, or now, in its own place
take = collate.MicroBatches.__getitem__
def count(self, positions):
    taken.append(len(positions))
    return take(self, positions)
collate.MicroBatches.__getitem__ = count
sys.addaudithook(look)
code = train.main(sys.argv[1:])
sys.stdout.write(json.dumps({"code": code, "written": written, "taken": taken}))
"""


@pytest.mark.parametrize(
    ("stage", "more"),
    [
        ("finetune", ["--features-cache", "never"]),
        ("pretrain", ["--lora-dropout=0.1", "--wandb=never"]),
        ("text", ["--max-length=16", "--recipe=nano"]),
    ],
)
def test_a_dry_run_writes_nothing_and_takes_one_micro_batch(stage, more, world, tmp_path):
    arguments = flags(world, tmp_path / "never", stage, batch_size=8, micro_batch=3)
    command = [sys.executable, "-c", WATCH, "--preset", PRESET, "--dry-run", *arguments, *more]
    found = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    last = json.loads(found.stdout.splitlines()[-1])
    assert last == {"code": 0, "written": [], "taken": [3]}
    assert "one update made" in found.stdout
    assert list(tmp_path.iterdir()) == []


def test_estimate_counts_the_published_parameters(capsys):
    assert (
        train.main(["--preset", PRESET, "--stage", "finetune", "--estimate", "--devices", "8"]) == 0
    )
    rows = {
        line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line
    }
    assert rows["language_model"] == ["2,768,345,600"] * 2  # mamba-2.8b's published size
    assert rows["vision_encoder"] == ["412,987,248", "0"]


def test_estimate_of_a_mamba2_model(capsys):
    assert train.main(["--preset", "mamba2-2.7b", "--stage", "finetune", "--estimate"]) == 0
    printed = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line}
    assert rows["language_model"] == ["2,702,599,680"] * 2  # mamba2-2.7b's size
    d, inner, states, tokens = 2560, 5120, 128, 2048
    layer = d * (2 * inner + 2 * states + inner // 64) + inner * d + 4 * (inner + 2 * states)
    model = 2 * 3 * tokens * 64 * layer  # forward and backward of the layers' matrices
    per_update = float(printed.split("compute: ")[1].split(" FLOPs")[0])
    assert 4 / 3 * model * 128 < per_update < 1.5 * 4 / 3 * model * 128  # checkpointing: 4 passes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--stage", "finetun"], "unknown stage 'finetun'; known, nearest first: finetune"),
        (["--preset", "nanno"], "unknown language model preset 'nanno'"),
        (["--preset", "nano+vss_l3"], "unknown preset part 'vss_l3'"),
        (["--recipe", "lava"], "unknown recipe 'lava'"),
        (["--data", "nope.json"], "no data file 'nope.json'"),
        (["--images", "nope"], "no image folder 'nope'"),
        (["--lr", "0"], "lr is 0.0; expected a positive number"),
        (["--init", "nope"], "unknown model 'nope'"),
        (["--dtype", "fp8"], "unknown dtype 'fp8'"),
        (["--set", "scan_share=false"], "unknown configuration field 'scan_share'"),
        (["--set", "scan_shared=maybe"], "a value like True"),
        (["--lora", "0"], "lora is 0; expected a rank"),
        (["--lora", "4", "--lora-targets", "dt_proj"], "unknown LoRA target 'dt_proj'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(changes, message, world, tmp_path, capsys):
    arguments = ["--preset", PRESET, *flags(world, tmp_path / "o"), *changes]
    assert train.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.splitlines()[-1].startswith("error: ")


def test_a_run_without_a_label_is_refused(world, tmp_path, capsys):
    arguments = ["--preset", PRESET, *flags(world, tmp_path / "o", max_length=16)]
    assert train.main([*arguments, "--weight-decay", "0.5"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: nothing to learn")
    assert not (tmp_path / "o" / "final").exists()


def test_finetune_asks_for_the_stage_before(world, tmp_path, capsys):
    arguments = [flag for flag in flags(world, tmp_path / "o") if flag != "--tiny"]
    assert train.main(["--preset", "nano", *arguments]) == 2
    assert "needs --init" in capsys.readouterr().err


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_lora_learns_alone_resumes_exactly_and_is_merged(dropout, world, uninterrupted, tmp_path):
    import peft

    more = {"steps": 4, "lora": 4, "lora_dropout": dropout, "batch_size": 4}
    start = ["--preset", PRESET, "--init", str(uninterrupted / "final")]
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert train.main([*start, *flags(world, whole, **more)]) == 0
    shutil.copytree(whole, part)
    shutil.rmtree(part / "final")
    shutil.rmtree(trainer_state.checkpoints(part)[-1])
    assert train.main([*start, *flags(world, part, **more), "--resume", "auto"]) == 0  # from 2
    assert losses(part) == losses(whole)
    names = ("model.safetensors", "adapter/adapter_model.safetensors")
    for name in names:
        assert (part / "final" / name).read_bytes() == (whole / "final" / name).read_bytes()

    before, after = (load_file(d / "final" / names[0]) for d in (uninterrupted, whole))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {n.split(".")[-2] for n in changed if n.startswith("language_model.")} == {
        *("in_proj", "x_proj", "out_proj")
    }
    assert {name.split(".")[0] for name in changed} == {"connector", "language_model"}
    model, _ = checkpoints.load(str(whole / "final"))  # adapter inside
    base, _ = checkpoints.load(str(trainer_state.checkpoints(whole)[-1]), adapter=False)
    kept = base.language_model.layers[0].mixer.in_proj.weight
    assert torch.equal(kept, before["language_model.layers.0.mixer.in_proj.weight"])
    base.connector.load_state_dict(model.connector.state_dict())
    with_adapter = peft.PeftModel.from_pretrained(base, whole / "final" / "adapter").eval()
    ids = torch.randint(2, 300, (1, 20))
    torch.testing.assert_close(with_adapter(input_ids=ids).logits, model(input_ids=ids).logits)


def test_estimate_counts_what_lora_learns(capsys):
    arguments = ["--preset", PRESET, "--stage", "finetune", "--estimate"]
    rows = []
    for more in ([], ["--lora", "64"]):
        assert train.main([*arguments, *more]) == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines() if line]
        rows.append({name: numbers for name, *numbers in lines})
    assert rows[0]["connector"] == rows[1]["connector"]
    assert rows[0]["language_model"][0] == rows[1]["language_model"][0]
    d, inner, small = 2560, 5120, 160 + 2 * 16
    widths = (d + 2 * inner) + (inner + small) + (inner + d)
    assert rows[1]["language_model"][1] == f"{64 * 64 * widths:,}"  # layers * rank * widths


def test_wandb_offline_needs_no_network(world, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    arguments = ["--preset", PRESET, *flags(world, tmp_path / "o", steps=2), "--wandb", "vl-mamba"]
    assert train.main(arguments) == 0
    assert list((tmp_path / "o" / "wandb").glob("offline-run-*"))


def test_a_missing_tracker_says_how_to_install_it(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    arguments = ["--preset", PRESET, *flags(world, tmp_path / "o", steps=2), "--wandb", "vl-mamba"]
    assert train.main(arguments) == 2
    assert "pip install wandb" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "package"),
    [
        (["--tensorboard"], "tensorboard"),
        (["--wandb", "vl-mamba"], "wandb"),
        (["--lora", "4"], "peft"),
        (["--lora", "4", "--estimate"], "peft"),
    ],
)
def test_a_flag_without_its_package_is_refused_at_once(
    more, package, world, tmp_path, monkeypatch, capsys
):
    """Before the data are read, a model is made or a folder written."""
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr("vlmamba.training.init_model.initial_model", None)
    arguments = ["--preset", PRESET, *flags(world, tmp_path / "o"), *more]
    assert train.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {more[0]} needs its package: pip install {package}")
    assert not (tmp_path / "o").exists()


def test_what_lora_cannot_be_added_to_is_one_line(world, tmp_path, capsys, monkeypatch):
    """Mamba-2 has no x_proj; and what peft says of others."""
    arguments = ["--preset", PRESET, "--set", "mixer=mamba2", *flags(world, tmp_path / "o")]
    more = ["--lora", "4", "--lora-targets", "x_proj"]
    for also in ([], ["--dry-run"], ["--estimate"]):
        assert train.main([*arguments, *more, *also]) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last == "error: unknown LoRA target 'x_proj'; known: in_proj, out_proj"

    def refuse(*given):
        raise ValueError("no such\nmodules")

    monkeypatch.setattr(peft, "inject_adapter_in_model", refuse)
    assert train.main([*arguments, "--lora", "4", "--lora-targets", "in_proj"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "error: --lora 4 --lora-targets in_proj: no such modules"


@pytest.mark.parametrize("damage", ["gone", "cut", "other rank"])
def test_a_damaged_adapter_is_one_line_on_resume(damage, world, tmp_path, capsys):
    out = tmp_path / "o"
    command = ["--preset", PRESET, *flags(world, out, steps=2, lora=4), "--resume", "auto"]
    assert train.main(command) == 0
    (out / "summary.json").unlink()
    file = trainer_state.checkpoints(out)[-1] / "adapter" / "adapter_model.safetensors"
    if damage == "gone":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        save_file({k: v[:1].contiguous() for k, v in load_file(file).items()}, file)
    capsys.readouterr()
    assert train.main(command) == 2
    assert "adapter_model.safetensors" in capsys.readouterr().err.splitlines()[-1]


def test_the_preset_and_the_image_transform_can_be_changed(world, tmp_path):
    arguments = ["--preset", PRESET, *flags(world, tmp_path / "o", steps=1)]
    arguments += ["--set", "scan_shared=false", "scan_merge=mean"]
    assert train.main([*arguments, "--image-aspect-ratio", "resize"]) == 0
    model, processor = checkpoints.load(str(tmp_path / "o" / "final"))
    assert (model.config.scan_shared, model.config.scan_merge) == (False, "mean")
    assert len(model.connector.vss.layers) == 2  # one Mamba layer for each direction of bsm
    assert processor.image_aspect_ratio == "resize"


def test_a_run_is_neither_overwritten_nor_continued_differently(world, uninterrupted, capsys):
    same = ["--preset", PRESET, *flags(world, uninterrupted, steps=12, batch_size=6)]
    assert train.main(same) == 2
    assert "--resume auto" in capsys.readouterr().err
    assert train.main([*same, "--resume", "auto", "--lr", "1e-4"]) == 2
    assert "lr was 0.001 and is now 0.0001" in capsys.readouterr().err
    weights = uninterrupted / "final" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    assert train.main([*same, "--resume", "auto"]) == 0  # finished: nothing is done again
    assert weights.stat().st_mtime_ns == written


@pytest.mark.parametrize("finished", [True, False])
def test_resume_notices_that_the_data_file_changed(finished, world, tmp_path, capsys):
    shutil.copytree(world, tmp_path / "w")
    out, data = tmp_path / "o", tmp_path / "w" / "data.json"
    same = ["--preset", PRESET, *flags(tmp_path / "w", out, steps=2), "--resume", "auto"]
    assert train.main(same) == 0
    if not finished:
        (out / "summary.json").unlink()
    text = data.read_text()
    status = data.stat()
    data.write_text(text.replace("answer 1", "answer 7"))
    os.utime(data, ns=(status.st_atime_ns, status.st_mtime_ns))  # neither size nor time tell
    assert train.main(same) == 2
    assert f"the data file {data} has changed since" in capsys.readouterr().err
    data.write_text(text)
    os.utime(data)
    assert train.main(same) == 0


def test_a_finished_run_is_trained_longer_when_asked(world, tmp_path, capsys):
    """With a constant rate it is the run that had been that long from the start, bit for bit."""
    constant = {"schedule": "constant", "warmup_ratio": 0, "batch_size": 6}
    whole, part = tmp_path / "whole", tmp_path / "part"
    start = ["--preset", PRESET]
    assert train.main([*start, *flags(world, whole, steps=7, **constant)]) == 0
    assert train.main([*start, *flags(world, part, steps=3, **constant)]) == 0
    more = [*start, *flags(world, part, steps=7, **constant)]
    assert train.main([*more, "--resume", "auto"]) == 2
    assert "steps was 3 and is now 7" in capsys.readouterr().err
    assert train.main([*more, "--resume", "longer"]) == 0
    assert losses(part) == losses(whole)
    mine, other = (load_file(f / "final" / "model.safetensors") for f in (part, whole))
    assert all(torch.equal(mine[name], other[name]) for name in other)
    assert json.loads((part / "summary.json").read_text())["step"] == 7
    assert train.main([*more, "--resume", "longer"]) == 0  # finished: nothing is done again
    less = [*start, *flags(world, part, steps=5, **constant), "--resume", "longer"]
    assert train.main(less) == 2
    assert "has trained for 7 steps, more than 5" in capsys.readouterr().err


def test_init_alone_tells_the_preset(world, uninterrupted, tmp_path, capsys):
    arguments = [*flags(world, tmp_path / "o", steps=1), "--init", str(uninterrupted / "final")]
    assert train.main(arguments) == 0
    model, _ = checkpoints.load(str(tmp_path / "o" / "final"))
    before, _ = checkpoints.load(str(uninterrupted / "final"))
    name = {"_name_or_path": ""}
    assert model.config.to_dict() | name == before.config.to_dict() | name
    changed = [*flags(world, tmp_path / "p", "pretrain", steps=1), "--set", "connector=mlp"]
    assert train.main([*changed, "--init", str(uninterrupted / "final")]) == 0
    assert checkpoints.load(str(tmp_path / "p" / "final"))[0].config.connector == "mlp"
    capsys.readouterr()
    assert train.main(["--stage", "finetune", "--init", "nano", "--estimate"]) == 0
    from_init = capsys.readouterr().out
    assert train.main(["--stage", "finetune", "--preset", "nano", "--estimate"]) == 0
    assert capsys.readouterr().out == from_init
    assert train.main(flags(world, tmp_path / "q")) == 2
    assert "give --preset NAME, --init MODEL" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "llava"}')
    (tmp_path / "other" / "model.safetensors").write_bytes(b"")
    arguments = [*flags(world, tmp_path / "q"), "--init", str(tmp_path / "other")]
    assert train.main(arguments) == 2
    assert "'llava', expected 'vlmamba'" in capsys.readouterr().err


def test_init_of_another_connector_is_refused(world, uninterrupted, tmp_path, capsys):
    preset = PRESET.replace("bsm", "csm")
    arguments = ["--preset", preset, *flags(world, tmp_path / "o")]
    assert train.main([*arguments, "--init", str(uninterrupted / "final")]) == 2
    assert "scan=bsm" in capsys.readouterr().err


@pytest.fixture(autouse=True)
def _fresh_accelerate_state():
    """accelerate keeps one state a process; every test starts its own run."""
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)
