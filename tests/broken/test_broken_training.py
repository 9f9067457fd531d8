"""Broken training data, recipes and flags of `vlmamba.train`: refused, or counted by reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from refusal import refused
from test_llava_data import conversation, turn

from vlmamba import train
from vlmamba.data import feature_cache, llava, text
from vlmamba.training import trainer_state
from vlmamba.training.recipe import load_recipe
from vlmamba_core.errors import UserError

GOOD = {"image": "a.png", "conversations": conversation()}
TEXT = {"conversations": conversation("hello?")}


@pytest.fixture
def images(tmp_path) -> Path:
    """a.png, a secret above the folder, and a link to it."""
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (28, 28), "red").save(folder / "a.png")
    Image.new("RGB", (28, 28), "blue").save(tmp_path / "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "up").symlink_to(tmp_path)
    return folder


def said(value: object) -> dict:
    """A sample whose answer is `value`."""
    return {"conversations": [turn("human", "what?"), {"from": "gpt", "value": value}]}


# name -> (record as JSON text, reason it is counted under)
RECORDS: dict[str, tuple[str, str]] = {
    "null": ("null", "no conversations"),
    "a number": ("7", "no conversations"),
    "NaN": ("NaN", "no conversations"),
    "a word": ("hello", "record is not valid JSON"),
    "a text": ('"hello"', "no conversations"),
    "a list": ("[1, 2]", "no conversations"),
    "an empty object": ("{}", "no conversations"),
    "null as conversations": ('{"conversations": null}', "no conversations"),
    "no turns": ('{"conversations": []}', "no conversations"),
    "one turn": (json.dumps({"conversations": [turn("human", "a")]}), "no conversations"),
    "turns of text": ('{"conversations": ["a", "b"]}', "a turn without 'from' or 'value'"),
    "null as turns": ('{"conversations": [null, null]}', "a turn without 'from' or 'value'"),
    "two questions": (
        json.dumps({"conversations": [turn("human", "a")] * 2}),
        "turns do not alternate between human and gpt",
    ),
    "an unknown speaker": (
        json.dumps({"conversations": [turn("human", "a"), turn("bot", "b")]}),
        "turns do not alternate between human and gpt",
    ),
    "a null answer": (json.dumps(said(None)), "a turn whose value is no text"),
    "an answer of true": (json.dumps(said(True)), "a turn whose value is no text"),
    "an answer of NaN": (json.dumps(said(float("nan"))), "a turn whose value is no text"),
    "a list as answer": (json.dumps(said(["a"])), "a turn whose value is no text"),
    "half a surrogate pair": (json.dumps(said("\ud83d")), "a turn with half a surrogate pair"),
    "a bad escape": ('{"conversations": "\\x"}', "record is not valid JSON"),
    "a missing comma": ('{"a": 1 "b": 2}', "record is not valid JSON"),
    "crossed brackets": ("[{]}", "record is not valid JSON"),
    "deep brackets": ('{"a": ' + "[" * 9_999 + "]" * 9_999 + "}", "record is not valid JSON"),
    "bytes beyond UTF-8": ('{"conversations": "\udcff"}', "record is not valid JSON"),
    "a number as image": (json.dumps(GOOD | {"image": 5}), "image is not a path"),
    "an object as image": (json.dumps(GOOD | {"image": {"a": 1}}), "image is not a path"),
    "a list of nulls as image": (json.dumps(GOOD | {"image": [None]}), "image is not a path"),
    "no tag": (
        json.dumps(TEXT | {"image": "a.png"}),
        "number of <image> tags differs from number of images",
    ),
    "a tag in an answer": (
        json.dumps({"image": "a.png", "conversations": conversation("show me", "here: <image>")}),
        "<image> in an answer",
    ),
    "an image that is missing": (json.dumps(GOOD | {"image": "gone.png"}), "missing image file"),
    "an image that is a folder": (json.dumps(GOOD | {"image": "."}), "missing image file"),
    "an image with a NUL": (
        json.dumps(GOOD | {"image": "a\0.png"}),
        "image path leads out of the image folder",
    ),
    "an image of 5,000 letters": (json.dumps(GOOD | {"image": "x" * 5000}), "missing image file"),
    **{
        f"an image at {path}": (
            json.dumps(GOOD | {"image": path}),
            "image path leads out of the image folder",
        )
        for path in ("../secret.png", "/etc/hostname", "link.png", "up/secret.png", "..")
    },
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_broken_record_is_counted_and_the_others_train(name, tmp_path, images):
    record, reason = RECORDS[name]
    path = tmp_path / "data.json"
    whole = f"[{json.dumps(GOOD)}, {record}, {json.dumps(TEXT)}]"
    path.write_bytes(whole.encode("utf-8", "surrogateescape"))
    found = llava.index_samples(llava.LlavaFile(path), images, image_tokens=4, progress=False)
    assert found.usable.tolist() == [0, 2]
    assert found.skipped == {reason: 1}
    assert found.first == {reason: 1}


WHOLE = json.dumps([GOOD, TEXT]).encode()
# name -> (bytes of the file, what the one line says)
FILES: dict[str, tuple[bytes, str]] = {
    "no bytes": (b"", "not a JSON array"),
    "blanks": (b" \n ", "not a JSON array"),
    "an object": (json.dumps(GOOD).encode(), "not a JSON array"),
    "JSON lines": (json.dumps(GOOD).encode() + b"\n" + json.dumps(TEXT).encode(), "not a JSON"),
    "an error page": (b"<html>404</html>", "not a JSON array"),
    "UTF-16": (WHOLE.decode().encode("utf-16"), "not a JSON array"),
    "cut in a record": (WHOLE[:-30], "ends inside a record"),
    "cut after a record": (WHOLE[:-1], "truncated"),
    "two arrays": (WHOLE + WHOLE, "goes on after its array"),
    "a tail": (WHOLE + b"tail", "goes on after its array"),
    "a bracket too many": (WHOLE + b"]", "goes on after its array"),
    "an empty array": (b"[]", "0 of 0 samples usable"),
    "nothing usable": (b"[1, null]", "0 of 2 samples usable"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_broken_file_is_refused(name, tmp_path, images):
    content, message = FILES[name]
    (tmp_path / "data.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        llava.index_samples(
            llava.LlavaFile(tmp_path / "data.json"), images, image_tokens=4, progress=False
        )


def test_a_byte_order_mark_is_no_record(tmp_path, images):
    (tmp_path / "data.json").write_bytes(b"\xef\xbb\xbf" + WHOLE)
    found = llava.index_samples(llava.LlavaFile(tmp_path / "data.json"), images, 4, progress=False)
    assert (found.usable.tolist(), sum(found.skipped.values())) == ([0, 1], 0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xe9", "is not UTF-8 text"),
        ("a.csv", b"a", "expected an existing .txt or .json"),
        ("a.json", b"{}", "not a JSON array"),
    ],
)
def test_broken_text_is_refused(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(text.plain_texts([tmp_path / name]))


LR = "lr = 1e-3\nbatch_size = 2\nmicro_batch = 1\n"
# name -> (recipe, what the one line says)
RECIPES: dict[str, tuple[str, str]] = {
    "no TOML": ("[[", "recipe "),
    "an empty file": ("", "no preset"),
    "no table": ('preset = "nano"', r"no table \[finetune\]"),
    "a stage that is a number": ('preset = "nano"\nfinetune = 5', r"no table \[finetune\]"),
    "a preset that is a number": ("preset = 5", "preset is 5; expected a name"),
    "a base that is a list": ("base = [1]", "base is \\[1\\]; expected a name"),
    "an unknown base": ('base = "lava"', "unknown recipe 'lava'"),
    "its own base": ('base = "recipe.toml"', "is its own base"),
    "a number over a table": ('base = "nano"\nfinetune = 5', "table here or in its base"),
    "an unknown key": (f"[finetune]\n{LR}learning_rate = 1", "unknown recipe key"),
    "no learning rate": ("[finetune]\nbatch_size = 2\nmicro_batch = 1", "has no lr"),
    "text as a number": (
        '[finetune]\nlr = "small"\nbatch_size = 2\nmicro_batch = 1',
        "lr is 'small'",
    ),
    "a fraction as batch": (
        "[finetune]\nlr = 1e-3\nbatch_size = 2.5\nmicro_batch = 1",
        "batch_size",
    ),
    "a switch that is a number": (f"[finetune]\n{LR}compile = 1", "compile is 1; expected bool"),
    "infinity": (f"[finetune]\n{LR}epochs = inf", "epochs is inf"),
    "NaN": (f"[finetune]\n{LR}clip_norm = nan", "clip_norm is nan"),
    "an unknown schedule": (f'[finetune]\n{LR}schedule = "step"', "unknown schedule 'step'"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_broken_recipe_is_refused(name, tmp_path, capsys, monkeypatch):
    content, message = RECIPES[name]
    monkeypatch.chdir(tmp_path)
    Path("recipe.toml").write_text(content)
    preset = [] if "preset" in name or name == "an empty file" else ["--preset", "nano"]
    arguments = [*preset, "--stage", "finetune", "--recipe", "recipe.toml", "--estimate"]
    if name == "an empty file":
        arguments = ["--stage", "finetune", "--recipe", "recipe.toml", "--estimate"]
    refused(train.main, arguments, message, capsys)


def test_a_recipe_that_cannot_be_read_is_named(tmp_path):
    for name, content in (("binary.toml", b"\xff\xfe"), ("folder.toml", None)):
        if content is None:
            (tmp_path / name).mkdir()
        else:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            load_recipe(str(tmp_path / name))


ESTIMATE = "--preset nano --stage finetune --estimate"
# flags -> what the one line says
FLAGS: dict[str, str] = {
    "": "--stage",
    "--stage finetun": "unknown stage 'finetun'",
    "--stage finetune --what": "unrecognized arguments: --what",
    "--stage": "expected one argument",
    "--stage finetune --preset": "expected one argument",
    "--stage finetune --preset nanno --estimate": "unknown language model preset 'nanno'",
    "--stage finetune --preset nano+ --estimate": "unknown preset part ''",
    f"{ESTIMATE} --lr fast": "invalid float value: 'fast'",
    f"{ESTIMATE} --lr 0": "lr is 0.0; expected a positive number",
    f"{ESTIMATE} --lr nan": "lr is nan",
    f"{ESTIMATE} --lr inf": "lr is inf",
    f"{ESTIMATE} --connector-lr -1": "connector_lr is -1.0",
    f"{ESTIMATE} --steps 0": "steps is 0; expected at least 1",
    f"{ESTIMATE} --steps 1.5": "invalid int value: '1.5'",
    f"{ESTIMATE} --epochs inf": "epochs is inf",
    f"{ESTIMATE} --batch-size 0": "batch_size is 0",
    f"{ESTIMATE} --micro-batch -2": "micro_batch is -2",
    f"{ESTIMATE} --max-length 0": "max_length is 0",
    f"{ESTIMATE} --warmup-ratio 2": "warmup_ratio is 2.0; expected at most 1",
    f"{ESTIMATE} --weight-decay -1": "weight_decay is -1.0; expected 0 or more",
    f"{ESTIMATE} --save-every 0": "save_every is 0; expected at least 1",
    f"{ESTIMATE} --keep -1": "keep is -1; expected 0 or more",
    f"{ESTIMATE} --seed -1": "seed is -1; expected 0",
    f"{ESTIMATE} --dtype fp8": "unknown dtype 'fp8'",
    f"{ESTIMATE} --lora 0": "lora is 0",
    f"{ESTIMATE} --lora-dropout 1.5": "lora_dropout is 1.5; expected at most 1",
    f"{ESTIMATE} --devices 0": "--devices is 0",
    f"{ESTIMATE} --image-aspect-ratio crop": "invalid choice: 'crop'",
    f"{ESTIMATE} --resume yes": "invalid choice: 'yes'",
    f"{ESTIMATE} --recipe lava": "unknown recipe 'lava'",
    f"{ESTIMATE} --recipe gone.toml": "gone.toml",
    f"{ESTIMATE} --set d_model": "expected FIELD=VALUE|d_model",
    f"{ESTIMATE} --set d_modell=5": "unknown configuration field 'd_modell'",
    f"{ESTIMATE} --set d_model=wide": "d_model is 'wide'",
    f"{ESTIMATE} --set d_model=0": "d_model is 0",
    f"{ESTIMATE} --set d_model=1e9": "d_model is 1000000000.0",
    f"{ESTIMATE} --set n_layer=1000000000": "n_layer is 1000000000",
    f"{ESTIMATE} --set vocab_size=many": "vocab_size is 'many'",
    f"{ESTIMATE} --set dt_rank=much": "dt_rank is 'much'",
    f"{ESTIMATE} --set vision_config=5": "vision_config is 5",
    f"{ESTIMATE} --set rms_eps=0": "rms_eps is 0",
    f"{ESTIMATE} --set scan_shared=maybe": "a value like True",
    f"{ESTIMATE} --set language_model_id=5": "language_model_id is 5",
    "--preset nano --stage finetune": "needs --data and --out",
    "--preset nano --stage finetune --data gone.json --out o": "no data file 'gone.json'",
    "--preset nano --stage finetune --data . --out o": "no data file '.'",
    "--preset nano --stage finetune --data a.json --out o --images gone": "no image folder 'gone'",
    "--preset nano --stage finetune --data a.json --out a.json": "a.json is a file|cannot write",
    "--preset nano --stage finetune --data a.json --out o --workers -1": "--workers is -1",
    "--preset nano --stage finetune --data a.json --out o --cpu": "needs --init",
    "--preset nano --stage finetune --data a.json --out o --cpu --init gone": "unknown model",
    "--preset nano --stage text --data b.txt --out o --cpu --dtype fp32 --tiny": "too little text",
    "--preset nano --stage pretrain --data a.json --out o --cpu --tiny": "not a JSON array",
}


@pytest.fixture
def _fresh_accelerate_state():
    """accelerate keeps one state a process; every run starts its own."""
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("_fresh_accelerate_state")
@pytest.mark.parametrize("flags", FLAGS)
def test_a_wrong_flag_is_one_line(flags, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.json").write_text("{}")
    Path("b.txt").write_text("one line\n")
    refused(train.main, flags.split(), FLAGS[flags], capsys, progress=True)
    assert not (tmp_path / "o" / "final").exists()


State = Callable[[Path], object]
STATES: dict[str, tuple[State, str]] = {
    "no state": (lambda d: None, "no state.json"),
    "half a state": (lambda d: (d / "state.json").write_text('{"progress'), "is not JSON"),
    "a list": (lambda d: (d / "state.json").write_text("[]"), "holds no JSON object"),
    "no settings": (lambda d: (d / "state.json").write_text('{"progress": {}}'), "has no settings"),
}


@pytest.mark.parametrize("name", STATES)
def test_a_broken_training_checkpoint_is_refused(name, tmp_path):
    STATES[name][0](tmp_path)
    with pytest.raises(UserError, match=STATES[name][1]):
        trainer_state.read_state(tmp_path)


def test_a_feature_cache_cut_by_hand_is_filled_again(tmp_path, images):
    import torch

    cache = feature_cache.FeatureCache(tmp_path / "cache", images, patches=2, width=3)
    with cache.writing():
        cache.append(["a.png"], torch.ones(1, 2, 3), [1])
    assert cache.row("a.png") == 0
    (tmp_path / "cache" / "features.f16").write_bytes(b"\0" * 11)
    again = feature_cache.FeatureCache(tmp_path / "cache", images, patches=2, width=3)
    assert again.row("a.png") is None
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        feature_cache.FeatureCache(tmp_path / "file", images, patches=2, width=3)
