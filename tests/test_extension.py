"""What the field adds every month, each defined here through public registration alone.

A language-model family, a pair of vision encoders, a connector that gives fewer tokens than there
are patches, training objectives, a layout of a picture in tiles, and a model under evaluation:
trained or evaluated on the demo.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from test_ablate import training_world
from torch import Tensor, nn
from transformers import AutoConfig, CLIPImageProcessor, PretrainedConfig

from harness import run
from harness.models.base import EvalModel
from harness.models.registry import eval_models
from harness.speed import models
from vlmamba import checkpoints, registry, train
from vlmamba.generation import GroupedGenerator, Request
from vlmamba.image_layouts import ImageLayout
from vlmamba.models.connector import Connector
from vlmamba.models.language import Cache, LanguageModel
from vlmamba.models.vision import VisionEncoder
from vlmamba.training.flags import flag
from vlmamba.training.objectives import Objective, Options
from vlmamba_core.errors import UserError

WIDTH = 16


class Decay(Cache):
    """One vector a row."""

    def __init__(self, hidden: Tensor, seen: int = 0) -> None:
        self.hidden, self.seen = hidden, seen

    @property
    def batch(self) -> int:
        return len(self.hidden)

    @property
    def nbytes(self) -> int:
        return self.hidden.nbytes

    def clone(self) -> Decay:
        return Decay(self.hidden.clone(), self.seen)

    def select(self, rows: Tensor) -> Decay:
        return Decay(self.hidden[rows], self.seen)

    def write_rows(self, rows: Tensor, other: Decay) -> None:
        self.hidden[rows] = other.hidden

    def write(self, other: Decay) -> None:
        self.hidden, self.seen = other.hidden, other.seen

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen


class DecayConfig(PretrainedConfig):
    model_type = "decay_text"

    def __init__(self, hidden_size: int = WIDTH, vocab_size: int = 512, **kwargs) -> None:
        self.hidden_size, self.vocab_size = hidden_size, vocab_size
        self.num_hidden_layers = 1
        super().__init__(**({"tie_word_embeddings": False} | kwargs))


class Block(nn.Module):
    """h <- (h + W x) / 2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, width)

    def forward(self, state: Tensor, x: Tensor) -> Tensor:
        return (state + torch.tanh(self.proj(x))) / 2


class DecayLM(LanguageModel):
    """A running mean as language model."""

    block_names = ("Block",)
    lora_targets = ("proj",)

    def __init__(self, config: DecayConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.block = Block(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def new_cache(self, batch: int) -> Decay:
        weight = self.embedding.weight
        return Decay(torch.zeros(batch, weight.shape[1], dtype=weight.dtype, device=weight.device))

    def forward(self, inputs_embeds, cache=None, lengths=None, collect=None):
        batch, length, _ = inputs_embeds.shape
        cache = self.new_cache(batch) if cache is None else cache
        state, seen = cache.hidden, []
        for at in range(length):
            after = self.block(state, inputs_embeds[:, at])
            real = torch.ones(batch, dtype=torch.bool) if lengths is None else at < lengths
            state = torch.where(real.to(after.device)[:, None], after, state)
            seen.append(state)
        return torch.stack(seen, dim=1), Decay(state, cache.seen + length)

    def step(self, inputs_embeds, cache):
        cache.hidden, cache.seen = self.block(cache.hidden, inputs_embeds), cache.seen + 1
        return cache.hidden

    def flops(self, tokens: int) -> float:
        return 2 * tokens * self.block.proj.weight.numel()


class ColorsConfig(PretrainedConfig):
    model_type = "colors"

    def __init__(self, hidden_size: int = 8, image_size: int = 64, patch_size: int = 16, **kwargs):
        self.hidden_size, self.image_size = hidden_size, image_size
        self.patch_size = patch_size
        super().__init__(**kwargs)


class Colors(VisionEncoder):
    """A linear map of each patch's mean color."""

    weights_in_checkpoint = True

    def __init__(self, vision, layer, model_id):
        super().__init__(vision, layer, model_id)
        self.side = vision.patch_size
        self.proj = nn.Linear(3, vision.hidden_size)

    @staticmethod
    def transform(vision):
        side = {"height": vision.image_size, "width": vision.image_size}
        return CLIPImageProcessor(size=side, do_center_crop=False)

    @staticmethod
    def working_bytes(vision) -> int:
        return 4 * 3 * vision.image_size**2

    def forward(self, pixel_values: Tensor) -> Tensor:
        means = nn.functional.avg_pool2d(pixel_values, self.side)
        return self.proj(means.flatten(2).transpose(1, 2))


class Pool(Connector):
    """2 x 2 patches become one token."""

    def __init__(self, config, d_vision):
        super().__init__(config, d_vision)
        self.grid = config.grid
        self.linear = nn.Linear(d_vision, config.hidden_size)

    @staticmethod
    def tokens(grid: tuple[int, int]) -> int:
        return (grid[0] // 2) * (grid[1] // 2)

    def forward(self, patches: Tensor) -> Tensor:
        rows, columns = self.grid
        square = patches.transpose(1, 2).unflatten(2, (rows, columns))
        return self.linear(nn.functional.avg_pool2d(square, 2).flatten(2).transpose(1, 2))


class Quarters(ImageLayout):
    """A picture is its four quarters and a thumbnail."""

    most = 5

    def tiles(self, picture, resolution):
        width, height = picture.size
        across, down = (0, width // 2, width), (0, height // 2, height)
        boxes = [(across[i], down[j], across[i + 1], down[j + 1]) for j in (0, 1) for i in (0, 1)]
        return [*map(picture.crop, boxes), picture.resize(resolution)]


class Doubled(Objective):
    """Twice the cross-entropy."""

    def summed(self, model, inputs, batch):
        return 2 * super().summed(model, inputs, batch)


@dataclass(frozen=True)
class ZLossOptions(Options):
    """z_weight: of the square of log Z."""

    z_weight: float = flag(1e-4, at_least=0, help="weight of the square of log Z")


class ZLoss(Objective):
    """Cross-entropy, and how far each softmax's normalizer is from 1 (PaLM, section 5)."""

    options_class = ZLossOptions
    outputs = ("logits", "hidden_states")

    def summed(self, model, inputs, batch):
        output = self.forward(model, inputs)
        assert output.hidden_states[-1].shape[:2] == inputs["input_ids"].shape
        z = output.logits[:, :-1][inputs["labels"][:, 1:] != -100].logsumexp(-1)
        return output.loss * batch.n_labels + self.options.z_weight * z.square().sum()


@pytest.fixture
def registered() -> Iterator[None]:
    """The parts of this file, for the time of a test."""
    AutoConfig.register("decay_text", DecayConfig, exist_ok=True)
    AutoConfig.register("colors", ColorsConfig, exist_ok=True)
    registry.language_models.add("decay_text")(DecayLM)
    registry.vision_encoders.add("colors")(Colors)
    registry.connectors.add("pool")(Pool)
    registry.objectives.add("doubled")(Doubled)
    registry.objectives.add("z_loss")(ZLoss)
    registry.image_layouts.add("quarters")(Quarters)
    yield
    del registry.language_models["decay_text"], registry.vision_encoders["colors"]
    del registry.connectors["pool"], registry.image_layouts["quarters"]
    del registry.objectives["doubled"], registry.objectives["z_loss"]


def losses(folder) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "train.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("registered")
def test_new_parts_train_answer_and_are_evaluated_together(tmp_path, capsys):
    world = training_world(tmp_path)
    colors = [{"model_type": "colors", "hidden_size": width} for width in (8, 6)]
    fused = {"model_type": "fused_vision_model", "encoders": colors}
    parts = ["--preset", "nano+pool", "--cpu", "--dtype", "fp32", "--batch-size", "2"]
    parts += ["--micro-batch", "2", "--set", f"vision_config={json.dumps(fused)}"]
    parts += [f"text_config={json.dumps({'model_type': 'decay_text'})}"]
    text = ["--stage", "text", "--data", str(world / "finetune.json"), "--max-length", "32"]
    assert train.main([*parts, *text, "--steps", "2", "--out", str(tmp_path / "text")]) == 0
    shown = ["--stage", "finetune", "--data", str(world / "finetune.json"), "--images", str(world)]
    align = [*shown, "--steps", "2"]
    align[1:3] = ["pretrain", "--data"]
    align += ["--init", str(tmp_path / "text" / "final")]
    for objective in ("cross_entropy", "doubled", "z_loss"):
        out = ["--objective", objective, "--out", str(tmp_path / objective)]
        assert train.main([*parts, *align, *out]) == 0
    plain, twice, z_loss = (
        losses(tmp_path / name)[0] for name in ("cross_entropy", "doubled", "z_loss")
    )
    assert twice == pytest.approx(2 * plain, rel=1e-5)
    assert plain < z_loss < plain + 0.1  # logsumexp of 512 equal logits: 6.2 ** 2 / 10 ** 4
    init = ["--init", str(tmp_path / "doubled" / "final"), "--image-layout", "quarters"]
    for name in ("done", "cached"):
        cache = ["--features-cache", str(tmp_path / "cache")] if name == "cached" else []
        command = [*parts, *shown, "--steps", "2", *init, *cache, "--out", str(tmp_path / name)]
        assert train.main(command) == 0
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "done"), rel=1e-3)
    assert train.main([*parts, *shown, *init, "--estimate"]) == 0

    model, processor = checkpoints.load(str(tmp_path / "done" / "final"))
    assert isinstance(model.language_model, DecayLM)
    assert (model.config.num_patches, model.config.num_image_tokens) == (16, 4)
    assert model.config.vision_width == 14
    assert processor.image_layout == "quarters"
    from PIL import Image

    pictures = [Image.new("RGB", (40, 30), color) for color in ("red", "blue")]
    asked = [
        Request(processor.conversation_prompt(f"{q}?"), str(n), picture)
        for n, picture in enumerate(pictures)
        for q in ("a", "is it red", "what color is it now")
    ]
    alone = GroupedGenerator(model, processor).generate(asked, 8, 1)
    assert GroupedGenerator(model, processor).generate(asked, 8, 6) == alone
    inputs = processor(text=asked[0].prompt, images=[pictures[0]], return_tensors="pt")
    assert len(inputs["pixel_values"]) == 5
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 5 * 4
    made = model.eval().generate(**inputs, max_new_tokens=8, do_sample=False)
    new = made[0, inputs["input_ids"].shape[1] :]
    assert processor.tokenizer.decode(new, skip_special_tokens=True).strip() == alone[0]

    command = ["--tasks", "pope", "--limit", "4", "--out", str(tmp_path / "run")]
    assert run.main([*command, "--model", str(tmp_path / "done" / "final")]) == 0
    assert "pope" in capsys.readouterr().out


@pytest.mark.usefixtures("registered")
def test_an_objective_brings_its_own_settings(tmp_path, capsys):
    """Its flag, its recipe key, its check, and what is saved: all from the one entry."""
    world = training_world(tmp_path)
    table = "[pretrain]\nlr = 1e-3\nbatch_size = 2\nmicro_batch = 2\nsteps = 1\ndtype = 'fp32'\n"
    files = {"zero": "0.0", "many": "0.5"}
    for name, weight in files.items():
        text = f"{table}objective = 'z_loss'\nz_weight = {weight}\n"
        (tmp_path / f"{name}.toml").write_text(text)
    start = ["--preset", "nano+mlp", "--tiny", "--cpu", "--stage", "pretrain", "--images"]
    start += [str(world), "--data", str(world / "finetune.json")]

    def train_with(out: str, recipe: str, *more: str) -> int:
        folder = ["--recipe", str(tmp_path / f"{recipe}.toml"), "--out", str(tmp_path / out)]
        return train.main([*start, *folder, *more])

    def weight_of(out: str) -> float | None:
        saved = json.loads((tmp_path / out / "config.json").read_text())
        return saved["hyperparameters"].get("z_weight")

    assert [train_with(name, name) for name in files] == [0, 0]
    assert train_with("flag", "zero", "--z-weight", "0.5") == 0
    assert train_with("plain", "many", "--objective", "cross_entropy") == 0
    weights = {name: weight_of(name) for name in ("zero", "many", "flag", "plain")}
    assert weights == {"zero": 0.0, "many": 0.5, "flag": 0.5, "plain": None}
    (zero,), (many,), (by_flag,), (plain,) = (losses(tmp_path / name) for name in weights)
    assert zero == plain < many == by_flag
    assert train_with("plain", "zero", "--objective", "doubled", "--z-weight", "1") == 2
    assert "--z-weight belongs to --objective z_loss" in capsys.readouterr().err
    assert train_with("zero", "zero", "--z-weight", "0.5", "--resume", "auto") == 2
    assert "z_weight was 0.0 and is now 0.5" in capsys.readouterr().err
    assert train_with("none", "zero", "--z-weight", "-1") == 2
    assert "z_weight is -1.0; expected 0 or more" in capsys.readouterr().err


@pytest.mark.usefixtures("registered")
def test_a_setting_that_means_two_things_is_refused(capsys):
    @dataclass(frozen=True)
    class OtherOptions(Options):
        z_weight: float = flag(1.0)

    @dataclass(frozen=True)
    class TakenOptions(Options):
        stage: str = flag("text")

    class Other(Objective):
        options_class: type[Options] = OtherOptions

    registry.objectives.add("other")(Other)
    try:
        command = ["--preset", "nano", "--stage", "pretrain", "--estimate"]
        assert train.main(command) == 2
        assert "both declare z_weight" in capsys.readouterr().err
        Other.options_class = TakenOptions
        assert train.main(command) == 2
        assert "objective other declares a flag that is taken" in capsys.readouterr().err
    finally:
        del registry.objectives["other"]


@pytest.mark.usefixtures("registered")
def test_speed_is_measured_of_a_connector_that_pools():
    subject = models.build("vl-mamba-130m", connector="pool", image_tokens=9, tiny=True)
    assert (subject.config.num_patches, subject.config.num_image_tokens) == (36, 9)
    with pytest.raises(UserError, match="'pool' makes 8 tokens of no square grid"):
        models.build("vl-mamba-130m", connector="pool", image_tokens=8, tiny=True)


class Constant(EvalModel):
    """Always the same."""

    def __init__(self, word: str) -> None:
        self.name = self.word = word

    def provenance(self) -> dict:
        return {"word": self.word}

    def answer(self, requests, limits, batch_size, on_done) -> None:
        for index, _ in enumerate(requests):
            on_done(index, self.word)


def test_a_model_that_is_not_ours_is_evaluated(tmp_path):
    @eval_models.add("constant")
    def load(name, options):
        return Constant(name)

    try:
        command = ["--tasks", "pope", "--limit", "6", "--out", str(tmp_path / "run")]
        assert run.main([*command, "--model", "constant:yes"]) == 0
    finally:
        del eval_models["constant"]
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    samples = (tmp_path / "run" / "samples_pope.jsonl").read_text().splitlines()
    truths = [json.loads(line) for line in samples]
    assert record["tasks"]["pope"]["n"] == len(truths) == 6
    assert {one["prediction"] for one in truths} == {"yes"}
