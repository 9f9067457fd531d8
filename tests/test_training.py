"""The trainer: what learns in which stage, exact resume, checkpoints that survive a kill."""

from __future__ import annotations

import hashlib
import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file
from test_llava_data import conversation, write

from vlmamba import checkpoints
from vlmamba.data import llava, text
from vlmamba.data.examples import ConversationExamples
from vlmamba.data.images import PixelImages
from vlmamba.models.assemble import assemble
from vlmamba.training import loop, recipe, trainer_state
from vlmamba.training.schedule import constant_with_warmup, cosine_with_warmup
from vlmamba.training.stages import STAGES, freeze, get_stage
from vlmamba_core.errors import UserError

ANSWERS = ("a cat", "a dog", "two birds", "no")


@pytest.fixture
def images(tmp_path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for i, color in enumerate(("red", "green", "blue", "white")):
        Image.new("RGB", (28, 28), color).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def data(tmp_path) -> Path:
    """Twelve samples: eight with an image, four without."""
    records = [
        {"image": f"{i % 4}.png", "conversations": conversation(answer=ANSWERS[i % 4])}
        for i in range(8)
    ]
    records += [{"conversations": conversation(f"say {i}", "fine")} for i in range(4)]
    return write(tmp_path, records)


@pytest.fixture
def make_run(tmp_path, images, data, model, processor):
    """A Run of any stage on the tiny model, written to a folder of its own."""

    def make(stage: str = "finetune", out: str = "out", file: Path = data, **hyper) -> loop.Run:
        defaults = {"lr": 1e-2, "batch_size": 4, "micro_batch": 2, "steps": 6, "dtype": "fp32"}
        chosen = recipe.Hyperparameters(**{**defaults, "save_every": 100, **hyper})
        folder = tmp_path / out
        folder.mkdir(exist_ok=True)
        if stage == "text":
            tokens = text.tokenize_documents([file], processor, folder / "tokens.u32")
            examples = text.PackedText(tokens, 16)
        else:
            found = llava.index_samples(source := llava.LlavaFile(file), images, 4, progress=False)
            pixels = PixelImages(images, processor)
            template = STAGES[stage].template
            examples = ConversationExamples(source, found, processor, template, 99, pixels)
        return loop.Run(model, processor, examples, get_stage(stage), chosen, folder, {"note": 1})

    return make


def accelerator() -> Accelerator:
    return Accelerator(cpu=True, mixed_precision="no")


def digests(model: torch.nn.Module) -> dict[str, str]:
    """Hash of every part's tensors, buffers included."""
    result = {}
    for part in ("vision_encoder", "connector", "language_model"):
        digest = hashlib.sha256()
        for name, tensor in sorted(model.get_submodule(part).state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
        result[part] = digest.hexdigest()
    return result


def losses(run: loop.Run) -> list[float]:
    lines = (run.out / "train.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize("stage", sorted(STAGES.keys() - {"adaptors"}))  # its own: test_adaptors.py
def test_a_stage_changes_its_own_parts_only(make_run, stage):
    run = make_run(stage, weight_decay=0.1)
    before = digests(run.model)
    loop.train(run, accelerator())
    after = digests(run.model)
    changed = tuple(part for part in before if before[part] != after[part])
    assert changed == tuple(part for part in before if part in STAGES[stage].trainable)
    assert "vision_encoder" not in changed


def test_the_demo_encoder_keeps_its_batch_statistics(processor):
    from tiny import tiny_config

    config = tiny_config(vision_config=None)
    model = assemble(config)
    before = digests(model)["vision_encoder"]
    freeze(model, STAGES["finetune"])
    ids = torch.tensor([[config.image_token_id] * config.num_image_tokens + [5, 6]])
    model(input_ids=ids, pixel_values=torch.rand(1, 3, 224, 224), labels=ids).loss.backward()
    assert digests(model)["vision_encoder"] == before


def test_the_final_folder_loads_and_equals_the_trained_model(make_run):
    run = make_run(steps=2)
    final = loop.train(run, accelerator())
    loaded, processor = checkpoints.load(str(final))
    assert digests(loaded) == digests(run.model)
    assert processor.num_image_tokens == 4


def test_overfits_one_batch(make_run):
    run = make_run(steps=60, batch_size=12, micro_batch=12, schedule="constant")
    loop.train(run, accelerator())
    curve = losses(run)
    assert curve[0] > 2
    assert curve[-1] < 0.1


def test_the_cut_into_micro_batches_does_not_change_the_curve(make_run, model):
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    curves = []
    for micro_batch in (1, 3, 4):
        model.load_state_dict(start)
        run = make_run(out=f"out{micro_batch}", micro_batch=micro_batch, lr=1e-3)
        loop.train(run, accelerator())
        curves.append(losses(run))
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    assert curves[0] == pytest.approx(curves[2], rel=1e-4)


def test_a_batch_without_images_gives_the_connector_zero_gradients(model):
    freeze(model, STAGES["finetune"])
    ids = torch.tensor([[5, 6, 7, 8]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.connector.parameters())
    model.zero_grad(set_to_none=True)
    freeze(model, STAGES["text"])
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is None for p in model.connector.parameters())


def test_data_workers_do_not_change_the_curve(make_run, model):
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    alone, helped = make_run(out="alone", steps=3), make_run(out="helped", steps=3)
    helped.workers = 2
    loop.train(alone, accelerator())
    model.load_state_dict(start)
    loop.train(helped, accelerator())
    assert losses(alone) == losses(helped)


def test_gradient_checkpointing_does_not_change_the_curve(make_run, model):
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain, saving = make_run(out="plain"), make_run(out="saving", gradient_checkpointing=True)
    loop.train(plain, accelerator())
    model.load_state_dict(start)
    loop.train(saving, accelerator())
    assert losses(plain) == pytest.approx(losses(saving), rel=1e-5)


def test_bf16_trains(make_run):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    run = make_run(dtype="bf16", steps=30, schedule="constant")
    loop.train(run, loop.make_accelerator(run.hyper, cpu=True))
    AcceleratorState._reset_state()
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    assert losses(run)[-1] < 0.5 * losses(run)[0]


def test_broken_images_are_counted_and_training_goes_on(make_run, images, capsys):
    (images / "2.png").write_bytes(b"broken")
    run = make_run(steps=3)  # one epoch
    loop.train(run, accelerator())
    summary = json.loads((run.out / "summary.json").read_text())
    assert summary["skipped"] == {"broken image file": 2}
    assert "record 6: broken image file" in capsys.readouterr().out
    run = make_run(out="strict", steps=3)
    run.strict = True
    with pytest.raises(UserError, match=r"record \d: broken image file"):
        loop.train(run, accelerator())


def test_a_diverged_run_stops_with_a_reason(make_run, model):
    with torch.no_grad():
        model.connector.linear_out.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="diverged"):
        loop.train(make_run(), accelerator())


@pytest.fixture
def cut_data(tmp_path) -> Path:
    """Twelve samples, all but the last too long for a maximum length that it has itself."""
    return write(
        tmp_path,
        [{"conversations": conversation("why " * 80, "so")} for _ in range(11)]
        + [{"conversations": conversation("why?", "so")}],
    )


def test_a_batch_without_labels_is_skipped_and_counted(make_run, cut_data, capsys):
    run = make_run(file=cut_data, steps=3, weight_decay=0.5, save_every=1, keep=9)
    run.examples.max_length = len(run.examples[11].input_ids)
    loop.train(run, accelerator())
    lines = [json.loads(line) for line in (run.out / "train.jsonl").read_text().splitlines()]
    empty = [line["step"] for line in lines if not line["labels"]]
    assert len(lines) == 3 and len(empty) == 2
    assert all(lines[step - 1]["loss"] is lines[step - 1]["grad_norm"] is None for step in empty)
    summary = json.loads((run.out / "summary.json").read_text())
    assert summary["without_labels"] == 2
    assert summary["skipped"] == {"no answer within the maximum length": 11}
    assert "2 steps without a label made no update" in capsys.readouterr().out
    weights = [
        load_file(folder / "model.safetensors") for folder in trainer_state.checkpoints(run.out)
    ]
    for step in empty:  # weight decay did not move them either
        if step > 1:
            after, before = weights[step - 1], weights[step - 2]
            assert all(torch.equal(after[name], before[name]) for name in after)


@pytest.mark.parametrize("steps", [2, 9])  # less than an epoch, and three
def test_nothing_to_learn_is_refused(make_run, steps):
    run = make_run(steps=steps, weight_decay=0.5)
    before = digests(run.model)
    run.examples.max_length = 3
    with pytest.raises(UserError, match=r"nothing to learn.*the maximum length.*--max-length"):
        loop.train(run, accelerator())
    assert digests(run.model) == before
    assert losses(run) == [None] * (min(steps, 3) - 1)  # an epoch at most
    assert not (run.out / "final").exists() and not (run.out / "summary.json").exists()


def test_resume_equals_an_uninterrupted_run_bit_for_bit(make_run, model):
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole = make_run(out="whole", steps=9, save_every=3)
    loop.train(whole, accelerator())
    expected, curve = digests(model), losses(whole)

    model.load_state_dict(start)
    part = make_run(out="part", steps=9, save_every=3)
    interrupt_after(part, 8)
    resume_from = trainer_state.checkpoints(part.out)[-1]
    assert resume_from.name == "step-00000006"
    assert len(losses(part)) == 8
    part.model, _ = checkpoints.load(str(resume_from))
    torch.rand(7)  # the random state is restored, whatever happened before
    loop.train(part, accelerator(), resume_from)
    assert losses(part) == curve
    assert digests(part.model) == expected


def interrupt_after(run: loop.Run, step: int) -> None:
    """Train until the step, then raise as Ctrl-C does."""
    original = loop.StepLog.write

    def write_then_stop(self, progress, *args):
        original(self, progress, *args)
        if progress.step == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop.StepLog, "write", write_then_stop)
        loop.train(run, accelerator())


def test_random_state_round_trip(tmp_path):
    import numpy as np

    before = trainer_state.random_state()
    drawn = torch.rand(3), np.random.rand(3)
    trainer_state.set_random_state(before)
    assert torch.equal(torch.rand(3), drawn[0])
    assert (np.random.rand(3) == drawn[1]).all()


def test_old_checkpoints_are_deleted(make_run):
    run = make_run(steps=9, save_every=2, keep=2)
    loop.train(run, accelerator())
    names = [folder.name for folder in trainer_state.checkpoints(run.out)]
    assert names == ["step-00000008", "step-00000009"]  # the last step is one, whatever its number
    assert not [p for p in trainer_state.checkpoint_root(run.out).iterdir() if p.name[0] == "."]


def test_a_checkpoint_holds_no_pickle(make_run):
    run = make_run(steps=3, save_every=2)
    loop.train(run, accelerator())
    folder = trainer_state.checkpoints(run.out)[0]
    kinds = {".safetensors", ".json", ".jinja"}
    kinds |= {".md", ".py"}  # the card, and the module that finds this package (vlmamba.hub_files)
    assert {path.suffix for path in folder.iterdir()} <= kinds
    moments = load_file(folder / "optimizer.safetensors")
    assert any(name.startswith("language_model.") and "exp_avg" in name for name in moments)
    assert not any(name.startswith("vision_encoder.") for name in moments)


@pytest.mark.parametrize("failing", ["save_file", "write_model", "_commit"])
def test_a_full_disk_leaves_the_previous_checkpoint(make_run, monkeypatch, failing):
    run = make_run(steps=6, save_every=2)
    real, calls = getattr(trainer_state, failing), []

    def fail_later(*args, **kwargs):
        calls.append(1)
        if trainer_state.checkpoints(run.out):
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(trainer_state, failing, fail_later)
    with pytest.raises(UserError, match="No space left"):
        loop.train(run, accelerator())
    assert [folder.name for folder in trainer_state.checkpoints(run.out)] == ["step-00000002"]
    loaded, _ = checkpoints.load(str(trainer_state.checkpoints(run.out)[0]))
    assert loaded.config.d_model == 32


def test_a_killed_write_is_not_mistaken_for_a_checkpoint(make_run):
    run = make_run(steps=5, save_every=2)
    half = trainer_state.checkpoint_root(run.out) / ".step-00000004.partial"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    assert trainer_state.checkpoints(run.out) == []
    loop.train(run, accelerator())
    assert [folder.name for folder in trainer_state.checkpoints(run.out)] == [
        "step-00000004",
        "step-00000005",
    ]
    assert not half.exists()


def test_schedule():
    total = 200
    factors = [cosine_with_warmup(step, total, 0.03) for step in range(total)]
    assert factors[:6] == pytest.approx([k / 6 for k in range(1, 7)])
    assert max(factors) == 1.0
    assert factors[6 + 97] == pytest.approx(0.5)
    assert all(a > b for a, b in pairwise(factors[6:]))
    assert 0 < factors[-1] < 1e-3
    assert cosine_with_warmup(0, 1, 0.0) == 1.0
    assert [constant_with_warmup(s, 10, 0.2) for s in range(3)] == [0.5, 1.0, 1.0]


def test_matrices_alone_decay(model):
    from vlmamba.training.optimizer import build_optimizer

    freeze(model, STAGES["finetune"])
    chosen = recipe.Hyperparameters(lr=1, batch_size=1, micro_batch=1, weight_decay=0.1)
    decayed, plain = build_optimizer(model, chosen).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert decayed["weight_decay"] == 0.1
    assert plain["weight_decay"] == 0.0
    assert all(p.ndim >= 2 for p in decayed["params"])
    assert "language_model.layers.0.mixer.A_log" in {names[id(p)] for p in plain["params"]}


def test_recipes_load_and_flags_win():
    for name in recipe.recipe_names():
        loaded = recipe.load_recipe(name)
        for stage in loaded.keys() & STAGES.keys():
            assert recipe.hyperparameters(loaded, stage, {}).lr > 0
    llava15 = recipe.load_recipe("llava-1.5")
    stage_1 = recipe.hyperparameters(llava15, "pretrain", {})
    stage_2 = recipe.hyperparameters(llava15, "finetune", {"lr": 1e-6, "seed": None})
    assert (stage_1.lr, stage_1.batch_size, stage_1.weight_decay) == (1e-3, 256, 0.0)
    assert (stage_2.lr, stage_2.batch_size, stage_2.warmup_ratio) == (1e-6, 128, 0.03)
    assert stage_1.total_steps(558_128) == math.ceil(558_128 / 256)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[pretrain]\nlr = 1e-3\nbatchsize = 4", "batchsize.*batch_size"),
        ("[pretrain]\nlr = -1.0\nbatch_size = 4\nmicro_batch = 1", "lr is -1.0"),
        ("[finetune]\nlr = 1e-3", r"no table \[pretrain\]"),
        ("lr = ", "recipe"),
    ],
)
def test_a_wrong_recipe_is_explained(tmp_path, content, message):
    path = tmp_path / "r.toml"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        recipe.hyperparameters(recipe.load_recipe(str(path)), "pretrain", {})
