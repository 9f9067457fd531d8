"""Broken checkpoints under `harness.run --model` and `load_published`: refused in one line."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from refusal import refused
from safetensors.torch import load_file, save_file
from tiny import tiny_config

from harness import run
from vlmamba import checkpoints
from vlmamba.models.vlm import VLMambaForConditionalGeneration
from vlmamba_core.errors import UserError

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
Damage = Callable[[Path], object]


class Trap:
    """Unpickled, it would leave a file behind."""

    def __reduce__(self) -> tuple:
        return os.mkdir, (os.environ["TRAP"],)


def config(**fields: object) -> Damage:
    """Other fields in config.json."""

    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return damage


def vision(**fields: object) -> Damage:
    """Other fields in the encoder's part of config.json."""

    def damage(folder: Path) -> None:
        path = folder / "config.json"
        content = json.loads(path.read_text())
        content["vision_config"] |= fields
        path.write_text(json.dumps(content))

    return damage


def overwritten(name: str, content: bytes) -> Damage:
    """A file with other bytes."""
    return lambda folder: (folder / name).write_bytes(content)


def cut(name: str, keep: int) -> Damage:
    """A file's first bytes, or with `keep` below zero all but its last ones."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:keep])


def tensors(change: Callable[[dict], object]) -> Damage:
    """Other tensors in the weights."""

    def damage(folder: Path) -> None:
        held = load_file(folder / WEIGHTS)
        change(held)
        save_file(held, folder / WEIGHTS, {"format": "pt"})

    return damage


def header(text: bytes, length: int | None = None) -> bytes:
    """A safetensors file that is a header alone."""
    return struct.pack("<Q", len(text) if length is None else length) + text


def sharded(*names: object, keep: bool = True) -> Damage:
    """The weights under an index that names these files."""

    def damage(folder: Path) -> None:
        held = list(load_file(folder / WEIGHTS))
        (folder / WEIGHTS).rename(folder / "model-00001-of-00001.safetensors")
        where = {name: names[i % len(names)] for i, name in enumerate(held)}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))

    return damage


def linked(name: str) -> Damage:
    """A file that is a link to one outside of the folder."""

    def damage(folder: Path) -> None:
        (folder / name).rename(folder.parent / f"outside-{name}")
        (folder / name).symlink_to(folder.parent / f"outside-{name}")

    return damage


def pickled(folder: Path) -> None:
    """A pickle in place of the weights."""
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Trap()}))


def remote_code(name: str, content: dict) -> Damage:
    """A class of the checkpoint's own, which would run on loading."""

    def damage(folder: Path) -> None:
        (folder / "trap.py").write_text(
            "import os; os.mkdir(os.environ['TRAP'])\nclass Trap: ...\n"
        )
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | content))

    return damage


def nan(held: dict) -> None:
    held["language_model.layers.0.mixer.in_proj.weight"][0, 0] = torch.nan


EMBEDDING = "language_model.embedding.weight"
ONE = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'

REFUSED: dict[str, tuple[Damage, str]] = {
    "no config": (lambda d: (d / "config.json").unlink(), "no config.json"),
    "an empty config": (overwritten("config.json", b""), "config.json is not JSON"),
    "half a config": (cut("config.json", 100), "config.json is not JSON"),
    "a config in Latin-1": (overwritten("config.json", b'{"a": "\xff"}'), "is not JSON"),
    "a config that is a list": (overwritten("config.json", b"[]"), "holds no JSON object"),
    "a config of brackets": (overwritten("config.json", b"[" * 99_999), "is not JSON"),
    "another model's config": (config(model_type="llama"), "model_type 'llama'"),
    "no model type": (overwritten("config.json", b"{}"), "model_type None"),
    "d_model of text": (config(d_model="big"), "wrong shapes"),
    "d_model of another model": (config(d_model=40), "wrong shapes"),
    "d_model of a billion": (config(d_model=10**9), "wrong shapes"),
    "a vocabulary of a billion": (config(vocab_size=10**9), "wrong shapes"),
    "a billion layers": (config(n_layer=10**9), "asks for 1000000000 layers"),
    "a layer too many": (config(n_layer=3), "lacks"),
    "a layer too few": (config(n_layer=1), "asks for 1 layers"),
    "no layers": (config(n_layer=0), "asks for 0 layers"),
    "a state of a billion": (config(d_state=10**9), "d_state is 1000000000"),
    "expand of zero": (config(expand=0), "expand is 0"),
    "expand of true": (config(expand=True), "expand is True"),
    "expand too large": (config(expand=4), "wrong shapes|cannot load"),
    "dt_rank of text": (config(dt_rank="much"), "dt_rank is 'much'"),
    "rms_eps of text": (config(rms_eps="small"), "rms_eps is 'small'"),
    "rms_eps below zero": (config(rms_eps=-1), "rms_eps is -1"),
    "an unknown connector": (config(connector="vss_l3"), "unknown connector 'vss_l3'"),
    "a connector that is a list": (config(connector=[]), "connector"),
    "an unknown scan": (config(scan="bms"), "unknown scan 'bms'"),
    "a switch of text": (config(scan_shared="no"), "scan_shared is 'no'"),
    "an image token of text": (config(image_token_id="<image>"), "image_token_id is '<image>'"),
    "no such layer of the encoder": (config(vision_feature_layer=99), "vision_feature_layer"),
    "a list as encoder": (config(vision_config=[1]), "vision_config is"),
    "an unknown encoder": (vision(model_type="resnet"), "unknown vision encoder 'resnet'"),
    "an encoder type that is a list": (vision(model_type=[]), "unknown vision encoder"),
    "an encoder of text": (vision(hidden_size="wide"), "vision_config"),
    "an encoder of a billion": (vision(hidden_size=10**9), "vision_config.hidden_size"),
    "a billion layers of the encoder": (vision(num_hidden_layers=10**9), "num_hidden_layers"),
    "patches of no size": (vision(patch_size=0), "vision_config.patch_size"),
    "patches larger than the image": (vision(patch_size=56), "cannot load|tokens"),
    "an encoder without layers": (vision(num_hidden_layers=0), "cannot load|lacks|unknown|tokens"),
    "an image of no size": (vision(image_size=0), "cannot load|tokens"),
    "heads that do not divide": (vision(num_attention_heads=7), "config: vision_config: "),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), r"no \*.safetensors"),
    "weights that are a folder": (
        lambda d: ((d / WEIGHTS).unlink(), (d / WEIGHTS).mkdir()),
        "is missing",
    ),
    "no bytes of weights": (overwritten(WEIGHTS, b""), "not a readable safetensors file"),
    "seven bytes": (overwritten(WEIGHTS, b"1234567"), "not a readable safetensors file"),
    "half the weights": (cut(WEIGHTS, 20_000), "not a readable safetensors file"),
    "weights without their last byte": (cut(WEIGHTS, -1), "not a readable safetensors file"),
    "weights with a tail": (
        lambda d: (d / WEIGHTS).write_bytes((d / WEIGHTS).read_bytes() + b"x"),
        "not a readable safetensors file",
    ),
    "a header of 2^63 bytes": (overwritten(WEIGHTS, header(b"{}", 2**63)), "not a readable"),
    "a header of 2^64 - 1 bytes": (overwritten(WEIGHTS, header(b"{}", 2**64 - 1)), "not a read"),
    "a header longer than the file": (overwritten(WEIGHTS, header(b"{}", 999)), "not a readable"),
    "a header that is no JSON": (overwritten(WEIGHTS, header(b"{{}}")), "not a readable"),
    "a header that is a list": (overwritten(WEIGHTS, header(b"[]")), "not a readable"),
    "a header in Latin-1": (overwritten(WEIGHTS, header(b'{"\xff": 1}')), "not a readable"),
    "an empty header": (overwritten(WEIGHTS, header(b"{}")), "cannot load model"),
    "tensors beyond the file": (overwritten(WEIGHTS, header(ONE)), "not a readable"),
    "tensors that overlap": (
        overwritten(WEIGHTS, header(ONE[:-1] + b"," + ONE[1:].replace(b'"a"', b'"b"')) + b"\0" * 4),
        "not a readable",
    ),
    "an unknown dtype": (
        overwritten(WEIGHTS, header(ONE.replace(b"F32", b"F99")) + b"\0" * 4),
        "not a readable",
    ),
    "a shape below zero": (
        overwritten(WEIGHTS, header(ONE.replace(b"[1]", b"[-1]")) + b"\0" * 4),
        "not a readable",
    ),
    "a shape that overflows": (
        overwritten(WEIGHTS, header(ONE.replace(b"[1]", b"[9999999999,9999999999,9]")) + b"\0" * 4),
        "not a readable",
    ),
    "a pickle called safetensors": (overwritten(WEIGHTS, pickle.dumps({})), "not a readable"),
    "HTML": (overwritten(WEIGHTS, b"<html>404 Not Found</html>"), "not a readable"),
    "pointer of Git LFS": (
        overwritten(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "not a readable",
    ),
    "NaN": (tensors(nan), "holds NaN or infinite values"),
    "infinity": (
        tensors(lambda held: held["language_model.norm_f.weight"].fill_(torch.inf)),
        "holds NaN or infinite values",
    ),
    "a tensor too few": (
        tensors(lambda held: held.pop("language_model.norm_f.weight")),
        "lacks 1 tensors",
    ),
    "a tensor too many": (
        tensors(lambda held: held.update(extra=torch.zeros(1))),
        "has unknown 1 tensors: extra",
    ),
    "a tensor of another shape": (
        tensors(lambda held: held.update({"language_model.norm_f.weight": torch.ones(7)})),
        "cannot load model|wrong shapes",
    ),
    "no embedding": (tensors(lambda held: held.pop(EMBEDDING)), "lacks"),
    "a flat embedding": (
        tensors(lambda held: held.update({EMBEDDING: held[EMBEDDING].flatten()})),
        "wrong shapes",
    ),
    "a pickle": (pickled, "is a pickled checkpoint"),
    "an index without its shard": (sharded("model-00002-of-00002.safetensors"), "is missing"),
    "an index out of the folder": (
        sharded("../model/model-00001-of-00001.safetensors"),
        "leads out of the folder; refused",
    ),
    "an index with an absolute name": (
        sharded("/etc/hostname"),
        "leads out of the folder; refused",
    ),
    "an index that names the folder above": (sharded(".."), "refused|missing"),
    "an index of numbers": (sharded(5), "is missing"),
    "an index of nulls": (sharded(None, "a\0b"), "refused|missing"),
    "an empty index": (
        lambda d: (sharded("x")(d), (d / INDEX).write_text('{"weight_map": {}}')),
        "no weight_map",
    ),
    "an index that is a list": (
        lambda d: (sharded("x")(d), (d / INDEX).write_text("[]")),
        "holds no JSON object",
    ),
    "half an index": (lambda d: (sharded("x")(d), cut(INDEX, 20)(d)), "is not JSON"),
    "weights behind a link": (linked(WEIGHTS), "is a link out of the folder"),
    "a config behind a link": (linked("config.json"), "is a link out of the folder"),
    "a tokenizer behind a link": (linked("tokenizer.json"), "is a link out of the folder"),
    "a link that goes nowhere": (
        lambda d: ((d / "extra.json").symlink_to(d / "gone.json"), None),
        "is missing",
    ),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "cannot load model"),
    "half a tokenizer": (cut("tokenizer.json", 500), "cannot load model"),
    "a tokenizer of another kind": (overwritten("tokenizer.json", b"{}"), "cannot load model"),
    "a tokenizer's config that is a list": (
        overwritten("tokenizer_config.json", b"[]"),
        "cannot load model",
    ),
}


@pytest.fixture
def trap(tmp_path, monkeypatch) -> Path:
    """Where code of a checkpoint would leave its mark."""
    monkeypatch.setenv("TRAP", str(tmp_path / "trapped"))
    return tmp_path / "trapped"


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, checkpoint, trap, tmp_path, capsys, whole_data):
    damage, message = REFUSED[name]
    damage(checkpoint)
    arguments = ["--tasks", "pope", "--data", whole_data, "--model", checkpoint, "--limit", "1"]
    refused(run.main, [*arguments, "--out", tmp_path / "out"], message, capsys)
    assert not (tmp_path / "out" / "record.json").exists()
    assert not trap.exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", {"auto_map": {"AutoModelForImageTextToText": "trap.Trap"}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["trap.Trap", "trap.Trap"]}}),
        ("processor_config.json", {"auto_map": {"AutoProcessor": "trap.Trap"}}),
    ],
)
def test_code_in_a_checkpoint_is_never_run(name, content, checkpoint, trap):
    remote_code(name, content)(checkpoint)
    try:
        checkpoints.load(str(checkpoint))
    except UserError as error:
        assert "\n" not in str(error)
    assert not trap.exists()


def test_whole_shards_and_the_hubs_cache_are_read(checkpoint, tmp_path):
    sharded("model-00001-of-00001.safetensors")(checkpoint)
    assert checkpoints.load(str(checkpoint))[0].config.d_model == 32
    cache = tmp_path / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots" / "0").mkdir(parents=True)
    for number, path in enumerate(sorted(checkpoint.iterdir())):
        path.rename(cache / "blobs" / str(number))
        (cache / "snapshots" / "0" / path.name).symlink_to(Path("../../blobs") / str(number))
    assert checkpoints.load(str(cache / "snapshots" / "0"))[0].config.d_model == 32


def published(folder: Path) -> dict[str, torch.Tensor]:
    """The language model's tensors under their published names."""
    model = VLMambaForConditionalGeneration(tiny_config())
    own = model.language_model.state_dict().items()
    return {f"backbone.{name}": t for name, t in own if not name.startswith("lm_head.")}


def evil(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Trap()}))


LANGUAGE_MODELS: dict[str, tuple[Damage, str]] = {
    "nothing": (lambda d: None, r"no \*.safetensors or \*.bin"),
    "a pickle that runs code": (evil, "not a file of plain tensors"),
    "an empty .bin": (overwritten("pytorch_model.bin", b""), "not a file of plain tensors"),
    "text as .bin": (overwritten("pytorch_model.bin", b"hello"), "not a file of plain tensors"),
    "a list as .bin": (lambda d: torch.save([1], d / "a.bin"), "something else than named tensors"),
    "numbers as .bin": (lambda d: torch.save({"a": 1}, d / "a.bin"), "something else than named"),
    "half a .bin": (
        lambda d: (torch.save(published(d), d / "a.bin"), cut("a.bin", 5000)(d)),
        "not a file of plain tensors",
    ),
    "half a safetensors": (
        lambda d: (save_file(published(d), d / WEIGHTS), cut(WEIGHTS, 5000)(d)),
        "not a readable safetensors",
    ),
    "NaN": (
        lambda d: save_file({k: t * torch.nan for k, t in published(d).items()}, d / WEIGHTS),
        "holds NaN",
    ),
    "another model's tensors": (
        lambda d: save_file({"transformer.h.0": torch.zeros(1)}, d / WEIGHTS),
        "unexpected tensor 'transformer.h.0'",
    ),
    "a tensor too few": (
        lambda d: save_file(dict(list(published(d).items())[1:]), d / WEIGHTS),
        "lacks 1 tensors",
    ),
    "other shapes": (
        lambda d: save_file({k: torch.zeros(3, 3) for k in published(d)}, d / WEIGHTS),
        "has shape",
    ),
    "an index out of the folder": (
        lambda d: (d / INDEX).write_text('{"weight_map": {"a": "../x.safetensors"}}'),
        "leads out of the folder; refused",
    ),
    "an index without its shard": (
        lambda d: (d / INDEX).write_text('{"weight_map": {"a": "x.safetensors"}}'),
        "is missing",
    ),
    "an index of .bin out of the folder": (
        lambda d: (d / "pytorch_model.bin.index.json").write_text(
            '{"weight_map": {"a": "/x.bin"}}'
        ),
        "leads out of the folder; refused",
    ),
    "an index that is no JSON": (lambda d: (d / INDEX).write_text("{"), "is not JSON"),
    "no config.json": (lambda d: (d / "config.json").unlink(), "no config.json"),
    "a config that is no JSON": (overwritten("config.json", b"{"), "is not JSON"),
    "a config of nothing": (overwritten("config.json", b"{}"), "unknown language model"),
    "a layer of no kind": (config(ssm_cfg={"layer": ["Mamba"]}), "unknown layer"),
    "layers by name": (config(ssm_cfg="Mamba2"), "ssm_cfg is 'Mamba2'"),
    "a width of no number": (config(d_model="wide"), "the sizes are"),
    "an eps of no number": (
        config(model_type="mamba", hidden_size=32, layer_norm_epsilon="small"),
        "layer_norm_epsilon",
    ),
    "an eps below zero": (
        config(model_type="mamba", hidden_size=32, num_hidden_layers=2, layer_norm_epsilon=-1.0),
        "rms_eps is -1.0",
    ),
    "limits of no number": (
        config(model_type="mamba2", hidden_size=32, head_dim=8, num_heads=8, time_step_limit="no"),
        "time_step_limit",
    ),
    "more heads than channels": (
        config(model_type="mamba2", hidden_size=32, head_dim=8, num_heads=9),
        "num_heads",
    ),
}


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_a_broken_language_model_is_refused(name, tmp_path, trap, model):
    damage, message = LANGUAGE_MODELS[name]
    folder = tmp_path / "lm"
    folder.mkdir()
    original = {"d_model": 32, "n_layer": 2, "vocab_size": 317, "ssm_cfg": {}}
    (folder / "config.json").write_text(json.dumps(original))
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        model.language_model.load_published(folder)
    assert "\n" not in str(caught.value)
    assert not trap.exists()
