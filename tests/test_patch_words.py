"""Words of patches: read from a record, learned where they stand, true of the demo's pictures."""

from __future__ import annotations

import json
import random

import pytest
import torch

from vlmamba.data import llava, patch_words
from vlmamba.data.examples import ConversationExamples
from vlmamba.demo import labeled, words
from vlmamba.demo.vocabulary import COLORS, PLACES, TRAINING_STYLES, WORDS
from vlmamba.demo.world import SIDE, SceneOptions, sample_scene
from vlmamba_core.tokens import IGNORE

POOLS = {"colors": COLORS, "words": WORDS}
TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a cat"}]


def examples(tmp_path, processor, *records: dict, template: str = "vicuna_v1", length: int = 200):
    file = tmp_path / "data.json"
    file.write_text(json.dumps(list(records)))
    for name in ("a.png", "b.png"):
        (tmp_path / name).touch()
    opened = llava.LlavaFile(file)
    found = llava.index_samples(opened, tmp_path, processor.num_image_tokens, template=template)
    return ConversationExamples(opened, found, processor, template, length, None), found


def first(processor, word: str) -> int:
    return processor.tokenizer(f"a {word}").input_ids[len(processor.tokenizer("a").input_ids)]


def learned(example, processor) -> list[int | None]:
    """What each image token is to say, None for nothing."""
    places = (example.input_ids == processor.image_token_id).nonzero()[:, 0] + 1
    return [None if label == IGNORE else label for label in example.labels[places].tolist()]


@pytest.mark.parametrize("template", ["vicuna_v1", "plain"])
def test_an_image_token_learns_the_word_of_its_place(tmp_path, processor, template):
    """The tiny model shows a picture as 2 x 2 tokens; in the middle of each stands a cell of 4."""
    grid = ["no", None, "no", "no", *["no"] * 4, "no", "dog", None, "no", "no", "no", "no", "cat"]
    record = {"id": "a", "image": "a.png", "conversations": TURNS}
    small = {**record, "patch_words": ["red", None, "dog", "cat"]}
    large = {**record, "patch_words": grid}
    found, _ = examples(tmp_path, processor, record, small, large, template=template)
    plain, of_small, of_large = (found[place] for place in range(3))
    red, dog, cat, no = (first(processor, word) for word in ("red", "dog", "cat", "no"))
    told = [red, None, dog, cat]
    if template == "plain":  # the caption's first token stands right behind the last patch
        told[3] = plain.labels[processor.num_image_tokens].item()
    assert learned(of_small, processor) == told
    assert learned(of_large, processor)[:3] == [no, no, no]
    assert torch.equal(of_small.input_ids, plain.input_ids)
    others = of_small.labels.clone()
    places = (plain.input_ids == processor.image_token_id).nonzero()[:, 0] + 1
    others[places] = plain.labels[places]
    assert torch.equal(others, plain.labels)


def test_every_image_of_a_record_has_its_grid(tmp_path, processor):
    turns = [{"from": "human", "value": "<image>\n<image>\nWhat?"}, TURNS[1]]
    grids = [["red", None, None, None], [None, None, None, "dog"]]
    record = {"id": "a", "image": ["a.png", "b.png"], "conversations": turns, "patch_words": grids}
    found, _ = examples(tmp_path, processor, record)
    red, dog = (first(processor, word) for word in ("red", "dog"))
    assert learned(found[0], processor) == [red, *[None] * 6, dog]
    cut, _ = examples(tmp_path, processor, record, length=len(found[0].input_ids) - 2)
    assert learned(cut[0], processor)[0] == red and cut[0].truncated


@pytest.mark.parametrize(
    ("words_", "reason"),
    [
        (["red", None], "patch_words is not a square grid"),
        ([], "patch_words is not a square grid"),
        ("red", "patch_words is not a square grid"),
        ([["red"]], "patch_words holds what is neither a word nor null"),
        ([3], "patch_words holds what is neither a word nor null"),
        ([""], "patch_words holds what is neither a word nor null"),
    ],
)
def test_what_is_no_grid_is_counted_and_left_out(tmp_path, processor, words_, reason):
    good = {"id": "a", "image": "a.png", "conversations": TURNS}
    found, index = examples(tmp_path, processor, good, {**good, "patch_words": words_})
    assert len(found) == 1 and index.skipped == {reason: 1}
    listed = {**good, "image": ["a.png"], "patch_words": ["red"]}
    _, index = examples(tmp_path, processor, good, listed)
    assert set(index.skipped) == {"patch_words is not a square grid"}


def test_where_tokens_form_no_square_nothing_is_learned():
    labels = torch.full((12,), IGNORE)
    patch_words.learn(labels, range(6), [("red",) * 4], lambda word: 1)
    assert (labels == IGNORE).all()
    patch_words.learn(labels, range(9), [("red", None, None, "lilac")], len)
    said = {place: int(label) for place, label in enumerate(labels) if label != IGNORE}
    # of three rows and columns the middle one stands on the border, and counts as the second of two
    assert said == {1: 3, 5: 5, 6: 5, 8: 5, 9: 5}


def test_the_demos_words_are_of_what_stands_there():
    signs = 0
    for index in range(60):
        scene = sample_scene(f"patches/{index}", SceneOptions(sign_chance=0.5))
        grid = words.patch_words(scene)
        assert grid == words.patch_words(scene) and len(grid) == 49
        known = {scene.place, *(t.name for t in scene.things), *(t.card for t in scene.things)}
        for thing in scene.things:
            row, column = thing.y * 7 // SIDE, thing.x * 7 // SIDE
            if scene.sign is None:
                assert grid[7 * row + column] not in (None, scene.place)
        if scene.sign:
            known |= {scene.sign.text, scene.sign.color}
            signs += scene.sign.text in grid or scene.sign.color in grid
        assert {word for word in grid if word} <= known
        empty = [word for word in grid if word in (None, scene.place)]
        assert empty.count(scene.place) < 20
    assert signs > 20


def test_the_words_of_scenes_with_signs_are_of_their_cells():
    rng, kinds = random.Random(0), set()
    for index in range(60):
        scene = labeled.labeled_scene(f"cells/{index}", rng.randint(1, 16), TRAINING_STYLES)
        grid = labeled.patch_words(scene)
        told = labeled.words_of(scene).split(" ")
        assert len(grid) == 16 and sum(word is not None for word in grid) >= len(scene.things)
        for thing, sign in zip(scene.things, scene.labels, strict=True):
            word = grid[4 * (sign.y // 64) + sign.x // 64]
            assert word in (thing.name, sign.color, sign.text)
            kinds |= {pool for pool in ("colors", "words") if word in POOLS[pool]} or {"names"}
        assert all(word is None or word.split()[0] in told or word in PLACES for word in grid)
    assert kinds == {"names", "colors", "words"}
