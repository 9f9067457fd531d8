"""LLaVA JSON -> samples -> batches: what is read, refused, counted, and in which order."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vlmamba.data import collate, feature_cache, llava, sampler, text
from vlmamba.data.examples import ConversationExamples
from vlmamba.data.images import PixelImages
from vlmamba.data.tokenizer import train_tokenizer
from vlmamba_core.errors import UserError
from vlmamba_core.tokens import IGNORE


def turn(speaker: str, value: str) -> dict[str, str]:
    return {"from": speaker, "value": value}


def conversation(question: str = "<image>\nwhat?", answer: str = "a cat") -> list[dict[str, str]]:
    return [turn("human", question), turn("gpt", answer)]


def write(folder: Path, records: list, name: str = "data.json", **options) -> Path:
    path = folder / name
    path.write_text(json.dumps(records, **options), encoding="utf-8")
    return path


@pytest.fixture
def images(tmp_path) -> Path:
    """a.png and b.png, and broken.png that is none."""
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (28, 28), "red").save(folder / "a.png")
    Image.new("RGB", (40, 20), "blue").save(folder / "b.png")
    (folder / "broken.png").write_bytes(b"not a picture")
    return folder


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_index_finds_every_record_whatever_its_text(tmp_path, indent, ascii_only):
    answers = ['quote " and \\', "brackets ]}[{", "naïve 🦜 café\n", "", "\\\\"]
    records = [{"id": i, "conversations": conversation("q", a)} for i, a in enumerate(answers)]
    path = write(tmp_path, records, indent=indent, ensure_ascii=ascii_only)
    file = llava.LlavaFile(path)
    assert [file[i].conversations[1]["value"] for i in range(len(file))] == answers
    assert pickle.loads(pickle.dumps(file))[2].id == "2"  # as data workers get it


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"conversations": []}', "not a JSON array"),
        ("", "not a JSON array"),
        ('[{"id": 1}, {"id": "2', "after 1 complete"),
        ('[{"id": 1}', "truncated"),
    ],
)
def test_a_file_that_is_no_complete_array_is_refused(tmp_path, content, message):
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        llava.LlavaFile(path)


def test_memory_does_not_grow_with_the_file(tmp_path):
    """200,000 records, 300 MB: reading them all takes a tenth of that, mapped pages apart."""
    path, answer = tmp_path / "large.json", "word " * 260
    with open(path, "w", encoding="utf-8") as out:
        for n in range(200_000):
            record = {"id": n, "conversations": conversation("q", answer)}
            out.write(("," if n else "[") + json.dumps(record))
        out.write("]")
    code = (
        "import sys; from vlmamba.data import llava\n"
        "def anonymous():\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return sum(int(x.split()[1]) for x in lines if x.startswith('RssAnon'))\n"
        "before = anonymous(); file = llava.LlavaFile(sys.argv[1])\n"
        "found = llava.index_samples(file, None, image_tokens=4, progress=False)\n"
        "print(len(found.usable), (anonymous() - before) / 1024)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    records, mebibytes = done.stdout.split()
    assert int(records) == 200_000
    assert float(mebibytes) < path.stat().st_size / 2**20 / 10


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nope\.json"):
        llava.LlavaFile(tmp_path / "nope.json")


UNUSABLE = {
    "no conversations": {"id": "x"},
    "turns do not alternate between human and gpt": {
        "conversations": [turn("human", "a"), turn("human", "b")]
    },
    "a turn without 'from' or 'value'": {"conversations": [{"from": "human"}, {}]},
    "number of <image> tags differs from number of images": {"conversations": conversation()},
    "missing image file": {"image": "gone.png", "conversations": conversation()},
}


def test_an_index_counts_what_cannot_be_used(tmp_path, images):
    good = {"image": "a.png", "conversations": conversation()}
    several = {
        "image": ["a.png", "b.png"],
        "conversations": conversation("<image>\n<image>\ndiffer?"),
    }
    text_only = {"conversations": conversation("hello?")}
    file = llava.LlavaFile(write(tmp_path, [*UNUSABLE.values(), "words", good, several, text_only]))
    found = llava.index_samples(file, images, image_tokens=4, progress=False)
    assert found.usable.tolist() == [6, 7, 8]
    assert found.skipped == {**dict.fromkeys(UNUSABLE, 1), "no conversations": 2}
    assert found.lengths[1] - found.lengths[2] >= 8  # two images of four tokens
    assert "3 of 9" in found.describe()
    assert "1 missing image file, first: record 4" in found.describe()
    skipped = Counter()
    assert len(list(file.samples(skipped))) == 4  # reading text does not look for images
    assert skipped.total() == 5


def test_a_file_without_a_usable_record_is_one_line(tmp_path, images, processor):
    file = llava.LlavaFile(write(tmp_path, [*UNUSABLE.values()]))
    with pytest.raises(UserError, match=f"0 of {len(UNUSABLE)} samples usable"):
        llava.index_samples(file, images, 4, progress=False, count=processor.text_lengths)


@pytest.mark.parametrize("reason", UNUSABLE)
def test_strict_stops_at_the_first_unusable_record(tmp_path, images, reason):
    file = llava.LlavaFile(write(tmp_path, [UNUSABLE[reason]]))
    with pytest.raises(UserError, match="record 0"):
        llava.index_samples(file, images, image_tokens=4, strict=True, progress=False)


def test_a_record_of_broken_json_does_not_hide_the_others(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(
        '[{"id": oops}, {"id": "ok", "conversations": ' + json.dumps(conversation("q")) + "}]"
    )
    file = llava.LlavaFile(path)
    found = llava.index_samples(file, None, image_tokens=4, progress=False)
    assert found.skipped == {"record is not valid JSON": 1}
    assert found.usable.tolist() == [1]


def test_published_oddities(tmp_path):
    """The tag at the end of the question, a leading gpt turn, a question without an answer."""
    record = {
        "image": "a.png",
        "conversations": [
            turn("gpt", "hi"),
            *conversation("what?\n<image>"),
            turn("human", "unanswered"),
        ],
    }
    sample = llava.LlavaFile(write(tmp_path, [record]))[0]
    assert sample.conversations == conversation("what?\n<image>")


def build(tmp_path, images, processor, records, template="vicuna_v1", max_length=200):
    file = llava.LlavaFile(write(tmp_path, records))
    found = llava.index_samples(file, images, image_tokens=4, progress=False)
    source = PixelImages(images, processor)
    return ConversationExamples(file, found, processor, template, max_length, source)


def test_labels_cover_the_answers_only(tmp_path, images, processor):
    talk = [*conversation("<image>\nIs it a cat?", "Yes"), *conversation("And a dog?", "No")]
    examples = build(tmp_path, images, processor, [{"image": "a.png", "conversations": talk}])
    example = examples[0]
    learned = processor.tokenizer.decode(example.input_ids[example.labels != IGNORE])
    assert learned == " Yes<|endoftext|> No<|endoftext|>"
    assert (example.input_ids == processor.image_token_id).sum() == 4
    assert example.images.shape == (1, 3, 28, 28)


def test_plain_template_learns_the_caption(tmp_path, images, processor):
    records = [{"image": "a.png", "conversations": conversation("<image>\nDescribe.", "a red box")}]
    example = build(tmp_path, images, processor, records, template="plain")[0]
    assert example.input_ids[:4].tolist() == [processor.image_token_id] * 4
    assert processor.tokenizer.decode(example.input_ids[4:]) == "a red box\n"
    assert example.labels.tolist() == [-100] * 4 + example.input_ids[4:].tolist()


def test_long_conversations_are_cut_and_reported(tmp_path, images, processor):
    talk = [*conversation(), *(conversation("more?", "yes " * 20) * 20)]
    records = [{"image": "a.png", "conversations": talk}]
    example = build(tmp_path, images, processor, records, max_length=100)[0]
    assert len(example.input_ids) == len(example.labels) == 100
    assert example.truncated
    before_answer = int((example.labels != IGNORE).nonzero()[0])
    with pytest.raises(llava.SampleError, match="no answer"):
        build(tmp_path, images, processor, records, max_length=before_answer)[0]
    with pytest.raises(llava.SampleError, match="image lies beyond"):
        build(tmp_path, images, processor, records, max_length=3)[0]


ROUNDS = [
    *conversation("hello?", "hi"),
    *conversation("<image> this?", "a cat"),
    *conversation("and <image> this?", "a dog"),
]


def test_a_picture_that_would_be_cut_is_left_out_with_what_follows(tmp_path, images, processor):
    records = [{"image": ["a.png", "b.png"], "conversations": ROUNDS}]
    whole = build(tmp_path, images, processor, records, max_length=500)[0]
    assert whole.images.shape[0] == 2 and not whole.truncated
    where = (whole.input_ids == processor.image_token_id).nonzero().flatten().tolist()
    for length, shown in ((where[7] + 1, 2), (where[7], 1), (where[4], 1), (where[3], 0)):
        cut = build(tmp_path, images, processor, records, max_length=length)[0]
        left = cut.input_ids == processor.image_token_id
        assert left.sum() == 4 * shown == (0 if cut.images is None else 4 * len(cut.images))
        assert torch.equal(cut.input_ids, whole.input_ids[: len(cut.input_ids)])
        assert cut.truncated and (cut.labels != IGNORE).any()


def test_captions_are_one_picture_question_and_answer(tmp_path, images, processor):
    """Stage pretrain: what the template has no place for is counted before anything trains."""
    pair = {"image": ["a.png", "b.png"], "conversations": conversation("<image>\n<image> differ?")}
    one = {"image": "a.png", "conversations": conversation()}
    rounds = one | {"conversations": [*conversation(), *conversation("more?")]}
    records = [one, {"conversations": conversation("write")}, pair, rounds, one]
    file = llava.LlavaFile(write(tmp_path, records))
    found = llava.index_samples(file, images, image_tokens=4, progress=False, template="plain")
    assert found.usable.tolist() == [0, 2, 4]
    assert found.skipped == {
        "no image, where captions are learnt": 1,
        "more than one round, where captions are learnt": 1,
    }
    pixels = PixelImages(images, processor)
    examples = ConversationExamples(file, found, processor, "plain", 99, pixels)
    batch = collate.MicroBatches(examples, 0)[[0, 1, 2]]
    assert not batch.skipped
    assert batch.inputs["pixel_values"].shape[0] == 4
    image_tokens = (batch.inputs["input_ids"] == processor.image_token_id).sum(1)
    assert image_tokens.tolist() == [4, 8, 4]
    anything = llava.index_samples(file, images, image_tokens=4, progress=False)  # of another stage
    examples = ConversationExamples(file, anything, processor, "plain", 99, pixels)
    batch = collate.MicroBatches(examples, 0)[[0, 1, 2, 3, 4]]
    assert sorted(reason for _, reason in batch.skipped) == sorted(found.skipped)


def test_collate_pads_right_and_keeps_broken_samples_out(tmp_path, images, processor):
    records = [
        {"image": "a.png", "conversations": conversation()},
        {"conversations": conversation("hello there, how are you?", "fine")},
        {"image": "broken.png", "conversations": conversation()},
    ]
    examples = build(tmp_path, images, processor, records)
    batch = collate.MicroBatches(examples, processor.tokenizer.pad_token_id)[[0, 1, 2]]
    short, long = sorted((examples[0], examples[1]), key=lambda e: len(e.input_ids))
    row = (
        0 if short is not examples[1] and len(examples[0].input_ids) == len(short.input_ids) else 1
    )
    ids, labels = batch.inputs["input_ids"], batch.inputs["labels"]
    assert ids.shape == labels.shape == (2, 8 * -(-len(long.input_ids) // 8))
    assert ids[row, len(short.input_ids) :].unique().tolist() in ([], [0])
    assert (labels[row, len(short.input_ids) :] == IGNORE).all()
    assert batch.inputs["pixel_values"].shape == (1, 3, 28, 28)
    assert batch.n_tokens == len(short.input_ids) + len(long.input_ids)
    assert batch.n_labels == int((labels[:, 1:] != IGNORE).sum())
    [(name, reason)] = batch.skipped
    assert reason == "broken image file"
    assert "record 2" in name


def test_an_empty_batch_is_a_placeholder_without_labels():
    batch = collate.collate([], pad_token_id=0)
    assert batch.n_labels == batch.n_tokens == 0
    assert (batch.inputs["labels"] == IGNORE).all()


@pytest.mark.parametrize("n", [1, 7, 64, 1000])
def test_an_epoch_holds_every_sample_once(n):
    lengths = np.random.default_rng(0).integers(10, 500, n)
    batches = sampler.epoch_batches(lengths, 8, seed=1, epoch=0)
    assert sorted(np.concatenate(batches).tolist()) == list(range(n))
    again = sampler.epoch_batches(lengths, 8, seed=1, epoch=0)
    assert all((a == b).all() for a, b in zip(batches, again, strict=True))
    if n == 1000:
        other = sampler.epoch_batches(lengths, 8, seed=1, epoch=1)
        assert any((a != b).any() for a, b in zip(batches, other, strict=True) if len(a) == len(b))


def test_batches_hold_samples_of_one_length():
    lengths = np.random.default_rng(0).integers(10, 500, 4000)
    batches = sampler.epoch_batches(lengths, 16, seed=0, epoch=0)
    padded = sum(lengths[b].max() * len(b) for b in batches)
    assert padded < 1.05 * lengths.sum()


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_share_each_global_batch(processes):
    lengths = np.arange(100)
    whole = sampler.epoch_batches(lengths, 10, seed=0, epoch=0)
    shares = [
        list(sampler.MicroBatchOrder(lengths, 10, 2, 0, (0, 10), processes, rank))
        for rank in range(processes)
    ]
    rounds = len(shares[0]) // 10
    assert {len(share) for share in shares} == {rounds * 10}
    for step in range(10):
        parts = [p for share in shares for p in share[step * rounds : (step + 1) * rounds]]
        assert max(map(len, parts)) <= 2
        assert sorted(itertools.chain(*parts)) == sorted(whole[step].tolist())


def test_order_resumes_anywhere():
    lengths = np.arange(50)
    everything = list(sampler.MicroBatchOrder(lengths, 8, 4, 3, (0, 30)))
    assert list(sampler.MicroBatchOrder(lengths, 8, 4, 3, (17, 30))) == everything[17 * 2 :]


def test_feature_cache_equals_the_live_encoder(tmp_path, images, model, processor):
    cache = feature_cache.open_cache(tmp_path / "cache", images, model, processor)
    broken = feature_cache.fill_cache(
        cache, ["a.png", "b.png", "a.png", "broken.png"], model, processor
    )
    assert (len(cache), broken) == (2, 1)
    pixels = torch.cat(PixelImages(images, processor).load(("b.png", "a.png")))
    live = list(model.encode_images(pixels).split(1))
    torch.testing.assert_close(cache.load(("b.png", "a.png")), live, rtol=1e-3, atol=1e-3)
    with pytest.raises(llava.SampleError, match="broken"):
        cache.load(("broken.png",))
    reopened = feature_cache.open_cache(tmp_path / "cache", images, model, processor)
    assert len(reopened) == 2
    assert feature_cache.fill_cache(reopened, ["a.png", "b.png"], model, processor) == 0


def test_feature_cache_notices_a_changed_image_and_another_encoder(
    tmp_path, images, model, processor
):
    cache = feature_cache.open_cache(tmp_path / "cache", images, model, processor)
    feature_cache.fill_cache(cache, ["a.png"], model, processor)
    Image.new("RGB", (30, 28), "green").save(images / "a.png")
    assert cache.row("a.png") is None
    with torch.no_grad():
        next(model.vision_encoder.parameters()).add_(1.0)
    assert len(feature_cache.open_cache(tmp_path / "cache", images, model, processor)) == 0


def test_feature_cache_is_of_one_layer(tmp_path, images, model, processor):
    """Another hidden state is of the same weights, and has the same shape."""
    cache = feature_cache.open_cache(tmp_path / "cache", images, model, processor)
    feature_cache.fill_cache(cache, ["a.png"], model, processor)
    model.config.vision_feature_layer = -1
    other = feature_cache.open_cache(tmp_path / "cache", images, model, processor)
    assert other.folder != cache.folder and len(other) == 0


def test_feature_cache_drops_what_a_killed_writer_left(tmp_path, images, model, processor):
    cache = feature_cache.open_cache(tmp_path / "cache", images, model, processor)
    feature_cache.fill_cache(cache, ["a.png"], model, processor)
    with open(cache.folder / "features.f16", "ab") as file:
        file.write(b"half a row")
    reopened = feature_cache.open_cache(tmp_path / "cache", images, model, processor)
    feature_cache.fill_cache(reopened, ["b.png"], model, processor)
    live = model.encode_images(PixelImages(images, processor).load(("b.png",))[0])
    torch.testing.assert_close(reopened.load(("b.png",)), [live], rtol=1e-3, atol=1e-3)


def test_packed_text_holds_every_document_in_order(tmp_path, processor):
    (tmp_path / "t.txt").write_text("first line\n\nsecond line\n")
    talks = write(tmp_path, [{"image": "a.png", "conversations": conversation("<image>\nQ?", "A")}])
    tokens = text.tokenize_documents([tmp_path / "t.txt", talks], processor, tmp_path / "t.u32")
    packed = text.PackedText(tokens, block=4)
    joined = torch.cat([packed[i].input_ids for i in range(len(packed))])
    decoded = processor.tokenizer.decode(joined)
    assert decoded.startswith("first line<|endoftext|>second line<|endoftext|>A chat")
    assert "<image>" not in decoded
    assert (packed[0].labels == packed[0].input_ids).all()
    with pytest.raises(UserError, match="too little text"):
        text.PackedText(tokens, block=10_000)


def test_parts_of_a_line_may_be_read_without_being_learned(tmp_path, processor):
    line = "dog red, cat blue: cat\x1f blue\x1f, dog\x1f red\x1f"
    (tmp_path / "t.txt").write_text(f"all of it\n{line}\ntab\ttab\n")
    tokens = text.tokenize_documents([tmp_path / "t.txt"], processor, tmp_path / "t.u32")
    decode, count = processor.tokenizer.decode, len(np.fromfile(tokens, np.uint32))
    block = text.PackedText(tokens, block=count)[0]
    assert decode(block.input_ids).split("<|endoftext|>") == [
        *("all of it", line.replace("\x1f", ""), "tab\ttab", "")
    ]
    learned = block.labels != IGNORE
    assert torch.equal(block.labels[learned], block.input_ids[learned])
    assert decode(block.labels[learned]) == (
        "all of it<|endoftext|> blue red<|endoftext|>tab\ttab<|endoftext|>"
    )
    assert "\x1f" not in "".join(text.plain_texts([tmp_path / "t.txt"]))


def test_parts_at_the_ends_of_a_line_are_parts_too(tmp_path, processor):
    """Nothing read before what is learned; nothing learned behind what is read; no part at all."""
    (tmp_path / "t.txt").write_text("\x1fdog red\x1f is told\n all that is read\x1f \n\x1f \x1f\n")
    tokens = text.tokenize_documents([tmp_path / "t.txt"], processor, tmp_path / "t.u32")
    decode, count = processor.tokenizer.decode, len(np.fromfile(tokens, np.uint32))
    block = text.PackedText(tokens, block=count)[0]
    assert decode(block.input_ids).startswith("dog red is told<|endoftext|>all that is read")
    learned = decode(block.labels[block.labels != IGNORE])
    assert learned.startswith("dog red") and "is told" not in learned and "read" not in learned


def test_text_sources_that_do_not_exist_are_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.txt"):
        list(text.documents([tmp_path / "gone.txt"], Counter()))


def test_tokenizer_learns_its_text_and_round_trips():
    tokenizer = train_tokenizer(["Is there a cat in the image? Yes"] * 50, vocab_size=400)
    assert tokenizer.convert_ids_to_tokens([0, 1]) == ["<|endoftext|>", "<image>"]
    assert len(tokenizer("Is there a cat").input_ids) == 4
    awkward = "Ünï 🦜\n\t  <b> 1,000"
    assert tokenizer.decode(tokenizer(awkward).input_ids) == awkward
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 0


@pytest.mark.parametrize("damage", ["features.f16", "sums.u32", "cut", "earlier version"])
def test_a_damaged_cache_entry_is_encoded_anew(damage, tmp_path, images, model, processor):
    names = ["a.png", "b.png"]
    cache = feature_cache.open_cache(tmp_path / "cache", images, model, processor)
    feature_cache.fill_cache(cache, names, model, processor)
    before = [features.clone() for features in cache.load(("a.png", "b.png"))]
    rows = cache.folder / "features.f16"
    if damage == "cut":
        os.truncate(rows, rows.stat().st_size - 5)
    elif damage == "earlier version":
        (cache.folder / "sums.u32").unlink()
    else:
        content = bytearray((cache.folder / damage).read_bytes())
        content[1] ^= 0x10
        (cache.folder / damage).write_bytes(content)
    reopened = feature_cache.open_cache(tmp_path / "cache", images, model, processor)
    assert feature_cache.fill_cache(reopened, names, model, processor) == 0
    torch.testing.assert_close(reopened.load(("a.png", "b.png")), before, rtol=1e-3, atol=1e-3)
    rows_now = rows.stat().st_size // reopened._row_bytes
    assert rows_now == (3 if damage in ("features.f16", "sums.u32") else 2)


def test_a_tag_in_plain_text_is_no_picture(tmp_path, processor, model):
    """It would be one that is missing, which the model refuses."""
    (tmp_path / "t.txt").write_text("put <image> here\n<image>\nand go on\n")
    tokens = text.tokenize_documents([tmp_path / "t.txt"], processor, tmp_path / "t.u32")
    ids = torch.tensor(np.fromfile(tokens, np.uint32).astype(np.int64))
    assert processor.tokenizer.decode(ids) == "put  here<|endoftext|>and go on<|endoftext|>"
    assert torch.isfinite(model(ids[None], labels=ids[None]).loss)
