"""A picture as several tiles: the same everywhere that a picture is shown, trained on or cached."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from PIL import Image
from tiny import tiny_config

from harness.models.base import Limits, Picture
from harness.models.base import Request as Asked
from harness.models.vlmamba import VLMambaModel
from vlmamba import checkpoints, registry
from vlmamba.data import collate, feature_cache, llava
from vlmamba.data.examples import ConversationExamples
from vlmamba.data.images import PixelImages
from vlmamba.generation import GroupedGenerator, Request
from vlmamba.image_layouts import ImageLayout
from vlmamba.models.vlm import VLMambaForConditionalGeneration
from vlmamba.processing import VLMambaProcessor
from vlmamba.serving.engine import Engine, Ticket
from vlmamba.serving.requests import Job
from vlmamba.training.estimate import estimate
from vlmamba.training.recipe import Hyperparameters
from vlmamba.training.stages import STAGES
from vlmamba_core.errors import UserError
from vlmamba_core.tokens import IGNORE

QUESTIONS = ("What is it?", "Is it a box?", "And the color?")
P = 4  # tokens of a tile: 2 x 2 patches


class Halves(ImageLayout):
    """A wide picture is its two halves and a thumbnail; any other is itself."""

    most = 3

    def tiles(self, picture, resolution):
        assert resolution == (28, 28)
        width, height = picture.size
        if width < 2 * height:
            return [picture]
        left = picture.crop((0, 0, width // 2, height))
        right = picture.crop((width // 2, 0, width, height))
        return [left, right, picture.resize(resolution)]


@pytest.fixture
def layout() -> Iterator[None]:
    registry.image_layouts.add("halves")(Halves)
    yield
    del registry.image_layouts["halves"]


@pytest.fixture
def made(layout, model, processor) -> tuple[VLMambaForConditionalGeneration, VLMambaProcessor]:
    """A model to which pictures matter, and a processor that shows wide ones in halves."""
    processor.image_layout = "halves"
    torch.nn.init.normal_(model.connector.linear_out.weight, std=0.5)
    return model, processor


def noise(seed: int, wide: bool) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    shape = (28, 64 if wide else 28, 3)
    pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


PICTURES = [noise(n, wide=n % 2 == 0) for n in range(4)]


def by_hand(processor: VLMambaProcessor, picture: Image.Image) -> torch.Tensor:
    """The pixels of a picture's tiles, each put through the transform as a picture of its own."""
    width, height = picture.size
    tiles = [picture]
    if width >= 2 * height:
        tiles = [picture.crop((0, 0, 32, 28)), picture.crop((32, 0, 64, 28))]
        tiles.append(picture.resize((28, 28)))
    squares = [processor.pad_to_square(tile) for tile in tiles]
    return processor.image_processor(squares, return_tensors="pt")["pixel_values"]


def test_tiles_are_pictures_whose_tokens_follow_each_other(made):
    _, processor = made
    pixels, tiles = processor.tiled(PICTURES)
    assert tiles == [3, 1, 3, 1]
    expected = torch.cat([by_hand(processor, picture) for picture in PICTURES])
    assert torch.equal(pixels, expected)
    prompts = [processor.conversation_prompt("What is it?", 2)] * 2
    inputs = processor(text=prompts, images=[PICTURES[:2], PICTURES[2:]], return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], expected)
    one = processor.encode(prompts[0], [3, 1])
    assert inputs["input_ids"][0].tolist() == one
    where = [place for place, token in enumerate(one) if token == processor.image_token_id]
    assert len(where) == 4 * P
    assert where[3 * P - 1] - where[0] == 3 * P - 1  # no token between tiles of a picture
    assert where[3 * P] - where[3 * P - 1] > 1
    with pytest.raises(ValueError, match="zip"):
        processor.encode(prompts[0], [3])


def test_one_tile_is_the_default_and_changes_nothing(made):
    _, processor = made
    processor.image_layout = "whole"
    prompt = processor.conversation_prompt("What is it?")
    ids = processor(text=prompt, images=PICTURES[0], return_tensors="pt")["input_ids"][0]
    assert ids.tolist() == processor.encode(prompt)
    assert processor.tiled(PICTURES)[1] == [1] * 4


def test_a_layout_is_saved_by_name_and_an_unknown_one_is_named(made, tmp_path):
    _, processor = made
    processor.save_pretrained(tmp_path)
    assert VLMambaProcessor.from_pretrained(tmp_path).image_layout == "halves"
    del registry.image_layouts["halves"]
    with pytest.raises(UserError, match="unknown image layout 'halves'; .*: whole"):
        VLMambaProcessor.from_pretrained(tmp_path)
    registry.image_layouts.add("halves")(Halves)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    del saved["image_layout"]  # as older versions wrote it
    (tmp_path / "processor_config.json").write_text(json.dumps(saved))
    assert VLMambaProcessor.from_pretrained(tmp_path).image_layout == "whole"


@pytest.mark.parametrize("count", [0, 4])
def test_a_layout_keeps_to_what_it_says(count, made, monkeypatch):
    _, processor = made
    monkeypatch.setattr(Halves, "tiles", lambda self, picture, resolution: [picture] * count)
    with pytest.raises(UserError, match=f"'halves' made {count} tiles .* expected 1 to 3"):
        processor.pixel_values(PICTURES[:1])


@pytest.fixture
def asked(made) -> list[Request]:
    """Every question of every picture, one of two pictures, one of none."""
    _, processor = made
    found = [
        Request(processor.conversation_prompt(question), str(n), picture)
        for question in QUESTIONS
        for n, picture in enumerate(PICTURES)
    ]
    both = processor.conversation_prompt("What is it?", 2)
    found.append(Request(both, "0+1", [PICTURES[0], lambda: PICTURES[1]]))
    found.append(Request(processor.conversation_prompt("What is it?", 0)))
    return found


@pytest.mark.parametrize("shares_prefix", [True, False])
@torch.no_grad()
def test_answers_are_those_of_generate_whatever_the_batch(shares_prefix, made, asked, monkeypatch):
    model, processor = made
    monkeypatch.setattr(type(model.language_model), "shares_prefix", shares_prefix)
    expected = []
    for request in asked:
        images = [p() if callable(p) else p for p in request.pictures] or None
        inputs = processor(text=request.prompt, images=images, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0]
        text = processor.tokenizer.decode(
            tokens[inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        expected.append(text.strip())
    assert len(set(expected)) > 3
    for batch_size in (1, 3, 16):
        assert GroupedGenerator(model, processor).generate(asked, 6, batch_size) == expected


def test_the_server_answers_the_same(made, asked):
    model, processor = made
    engine = Engine(model, processor)
    try:
        grouped = GroupedGenerator(model, processor).generate(asked[:2], 6, 2)
        for request, expected in zip(asked[:2], grouped, strict=True):
            ended, pieces = [], []
            job = Job(request, 6)
            engine._answer([Ticket(job, ended.append, pieces.append)])
            engine._answer([Ticket(job, ended.append)])
            streamed, whole = ended
            assert streamed.text == whole.text == expected
            inputs = processor(text=request.prompt, images=request.pictures[0])
            assert streamed.prompt_tokens == whole.prompt_tokens == len(inputs["input_ids"][0])
    finally:
        engine.close()


def test_a_blind_run_sees_one_mean_tile_for_every_picture(made, tmp_path, monkeypatch):
    model, processor = made
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    pictures = [Picture(str(n), lambda p=p: p) for n, p in enumerate(PICTURES)]
    given: list[str] = []
    shown: list[int] = []
    embed = VLMambaForConditionalGeneration.embed

    def counting(self, ids, *args, **kwargs):
        shown.extend(ids.eq(self.config.image_token_id).sum(1).tolist())
        return embed(self, ids, *args, **kwargs)

    monkeypatch.setattr(VLMambaForConditionalGeneration, "embed", counting)
    for order in (1, -1):
        blind = VLMambaModel(str(tmp_path), device="cpu", blind=True, batch_size=3)
        blind.begin_task("t", pictures, 2)
        pixels = torch.cat([by_hand(processor, picture) for picture in PICTURES])
        expected = blind.model.encode_images(pixels).mean(0, keepdim=True)
        torch.testing.assert_close(blind._stand_in, expected)
        requests = [Asked("t", n, "What is it?", (p,), Limits(6)) for n, p in enumerate(pictures)]
        some = requests[::order]
        blind.answer(some, Limits(6), 3, lambda at, text: given.append(text))
    assert (len(given), len(set(given))) == (8, 1)
    assert shown == [P, P]  # one tile, whichever picture is asked about first
    assert blind.provenance()["image_layout"] == "halves"


def records(folder) -> llava.LlavaFile:
    for number, picture in enumerate(PICTURES):
        picture.save(folder / f"{number}.png")

    def talk(tags: str) -> list[dict[str, str]]:
        return [
            {"from": "human", "value": f"{tags}What is it?"},
            {"from": "gpt", "value": "a red box"},
        ]

    held = [
        {"image": "0.png", "conversations": talk("<image>\n")},
        {"image": ["1.png", "0.png"], "conversations": talk("<image>\n<image>\n")},
        {"conversations": talk("")},
    ]
    (folder / "data.json").write_text(json.dumps(held))
    return llava.LlavaFile(folder / "data.json")


def examples(folder, processor, source, length: int = 200) -> ConversationExamples:
    file = records(folder)
    found = llava.index_samples(file, folder, 3 * P, progress=False)
    return ConversationExamples(file, found, processor, "vicuna_v1", length, source)


def test_training_shows_the_tiles_that_answering_shows(made, tmp_path):
    model, processor = made
    for picture in range(4):
        PICTURES[picture].save(tmp_path / f"{picture}.png")
    cache = feature_cache.open_cache(tmp_path / "cache", tmp_path, model, processor)
    assert feature_cache.fill_cache(cache, [f"{n}.png" for n in range(4)], model, processor) == 0
    assert len(cache) == 8
    live = examples(tmp_path, processor, PixelImages(tmp_path, processor))
    # the pictures were written again: the same names, sizes and pixels at another time
    feature_cache.fill_cache(cache, [f"{n}.png" for n in range(4)], model, processor)
    cached = examples_of(cache, live)
    for number, images in enumerate(([0], [1, 0], [])):
        expected = [by_hand(processor, PICTURES[n]) for n in images]
        prompt = processor.conversation_prompt("What is it?", len(images))
        ids = live[number].input_ids[: int((live[number].labels != IGNORE).int().argmax())]
        assert ids.tolist() == processor.encode(prompt, list(map(len, expected)))
        assert torch.equal(cached[number].input_ids, live[number].input_ids)
        if images:
            assert torch.equal(live[number].images, torch.cat(expected))
            encoded = model.encode_images(torch.cat(expected))
            torch.testing.assert_close(cached[number].images, encoded, rtol=1e-2, atol=1e-2)
    batch = collate.MicroBatches(live, 0)[[0, 1, 2]]
    assert batch.inputs["pixel_values"].shape == (7, 3, 28, 28)
    loss = model.train()(**batch.inputs).loss
    loss.backward()
    assert torch.isfinite(loss)


def examples_of(source, like: ConversationExamples) -> ConversationExamples:
    found = llava.SampleIndex(like.records, like.lengths, {}, {})
    return ConversationExamples(like.file, found, like.processor, "vicuna_v1", 200, source)


def test_a_picture_whose_tiles_do_not_fit_is_left_out_whole(made, tmp_path):
    _, processor = made
    source = PixelImages(tmp_path, processor)
    whole = examples(tmp_path, processor, source)[1]
    places = (whole.input_ids == processor.image_token_id).nonzero().flatten().tolist()
    # the second picture's last tile is cut: of its three none stays, and no answer is left
    short = examples(tmp_path, processor, source, length=places[2 * P] + 1)
    with pytest.raises(llava.SampleError, match="image lies beyond the maximum length"):
        short[1]
    talk = llava.Sample("", ("1.png", "0.png"), two_rounds("<image>\n", "<image>\n"))
    everything, shown = examples(tmp_path, processor, source).tokenize(talk, [1, 3])
    places = (everything.input_ids == processor.image_token_id).nonzero().flatten().tolist()
    assert (shown, len(places)) == (2, 4 * P)
    for length in (places[P] + 1, places[-1]):  # in the second picture's first tile and its last
        short.max_length = length
        example, shown = short.tokenize(talk, [1, 3])
        assert shown == 1
        assert example.input_ids.tolist() == everything.input_ids[: places[P]].tolist()


def two_rounds(*tags: str) -> list[dict[str, str]]:
    return [
        turn
        for tag in tags
        for turn in ({"from": "human", "value": f"{tag}Q?"}, {"from": "gpt", "value": "a"})
    ]


@pytest.mark.parametrize("written", range(8))
def test_a_cache_whose_writer_was_killed_has_whole_pictures_only(written, made, tmp_path):
    """Keys are written row by row, and a picture's tiles are there together or not at all."""
    model, processor = made
    names = ["0.png", "1.png", "2.png", "3.png"]
    for name, picture in zip(names, PICTURES, strict=True):
        picture.save(tmp_path / name)
    cache = feature_cache.open_cache(tmp_path / "cache", tmp_path, model, processor)
    feature_cache.fill_cache(cache, names, model, processor)
    expected = cache.load(tuple(names))
    os.truncate(cache.folder / "keys.u64", 8 * written)
    again = feature_cache.open_cache(tmp_path / "cache", tmp_path, model, processor)
    there = [name for name in names if again.row(name) is not None]
    assert there == names[: {0: 0, 1: 0, 2: 0, 3: 1, 4: 2, 5: 2, 6: 2, 7: 3}[written]]
    # another picture comes first: it must not take over the tiles that were left
    feature_cache.fill_cache(again, names[::-1], model, processor)
    torch.testing.assert_close(again.load(tuple(names)), expected)


@pytest.mark.parametrize("row", range(3))
def test_a_picture_with_one_damaged_tile_is_encoded_anew(row, made, tmp_path):
    model, processor = made
    names = ["0.png", "1.png"]
    for name, picture in zip(names, PICTURES, strict=False):
        picture.save(tmp_path / name)
    cache = feature_cache.open_cache(tmp_path / "cache", tmp_path, model, processor)
    feature_cache.fill_cache(cache, names, model, processor)
    expected = [features.clone() for features in cache.load(tuple(names))]
    content = bytearray((cache.folder / "features.f16").read_bytes())
    content[row * cache._row_bytes + 1] ^= 0x10
    (cache.folder / "features.f16").write_bytes(content)
    again = feature_cache.open_cache(tmp_path / "cache", tmp_path, model, processor)
    feature_cache.fill_cache(again, names, model, processor)
    torch.testing.assert_close(again.load(tuple(names)), expected)
    assert (len(expected[0]), len(expected[1])) == (3, 1)


def test_another_layout_has_another_cache(made, tmp_path):
    model, processor = made
    halves = feature_cache.open_cache(tmp_path, tmp_path, model, processor)
    processor.image_layout = "whole"
    assert feature_cache.open_cache(tmp_path, tmp_path, model, processor).folder != halves.folder


def test_an_estimate_counts_the_tiles_of_an_image():
    hyper = Hyperparameters(lr=1e-3, batch_size=1, micro_batch=1, max_length=64, dtype="fp32")
    config = tiny_config(connector="mlp")
    found = [estimate(config, STAGES["pretrain"], hyper, n).flops_per_step for n in (1, 2, 3)]
    head = P * 2 * 32 * 320 * (1 + 1)  # of labels that a tile takes the place of; frozen
    connector = 3 * P * 2 * (24 * 32 + 32 + 32 * 32 + 32)  # a multiply-add of each weight and bias
    encoder = {after - before + head - connector for before, after in pairwise(found)}
    patches = 2 * P * 24 * 3 * 14 * 14
    layer = 2 * 5 * (4 * 24 * 24 + 2 * 24 * 32) + 2 * 2 * 5 * 5 * 24  # 4 patches and a class token
    assert encoder == {patches + 2 * layer}


def test_the_bundled_demo_shows_pictures_whole():
    _, processor = checkpoints.load("nano")
    assert processor.image_layout == "whole"


@pytest.mark.parametrize(
    ("size", "most", "grid"),
    [
        ((39, 39), 12, (1, 1)),  # 2 x 2 is as near, but has more than twice as many pixels
        ((100, 100), 12, (3, 3)),
        ((100, 100), 4, (2, 2)),
        ((200, 100), 12, (4, 2)),
        ((300, 100), 12, (6, 2)),
        ((40, 20), 12, (2, 1)),
        ((20, 90), 12, (1, 5)),
        ((20, 90), 4, (1, 4)),
        ((1200, 10), 12, (12, 1)),
        ((45, 30), 4, (2, 1)),  # 3:2 is as far from 1:1 and 2:2 as from 2:1
    ],
)
def test_dynamic_tiles_follow_the_published_rule(size, most, grid):
    """Grids by hand, for tiles of 28 x 28."""
    layout = registry.image_layouts[f"dynamic_{most}"]()
    assert layout.grid(size, (28, 28)) == grid
    picture = Image.effect_noise(size, 40).convert("RGB")
    tiles = layout.tiles(picture, (28, 28))
    cells = grid[0] * grid[1]
    assert len(tiles) == cells + (cells > 1) <= layout.most
    assert {tile.size for tile in tiles} == {(28, 28)}
    stretched = picture.resize((28 * grid[0], 28 * grid[1]))
    last = stretched.crop((28 * (grid[0] - 1), 28 * (grid[1] - 1), *stretched.size))
    assert tiles[cells - 1].tobytes() == last.tobytes()
    assert tiles[-1].tobytes() == (picture.resize((28, 28)) if cells > 1 else last).tobytes()
