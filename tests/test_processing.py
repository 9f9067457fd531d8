"""Tokens and labels of prompts and training samples."""

from __future__ import annotations

import base64
import functools
import re
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import TINY_CLIP, tiny_config
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, pipeline

from vlmamba.configs.presets import VISION_ENCODERS
from vlmamba.data.decode import BrokenPicture, rgb_picture
from vlmamba.data.images import PixelImages
from vlmamba.data.text import first_tokens
from vlmamba.generation import GroupedGenerator, Request
from vlmamba.models.vlm import VLMambaForConditionalGeneration
from vlmamba.processing import SYSTEM, VLMambaProcessor, tokens_behind
from vlmamba_core.errors import UserError
from vlmamba_core.tokens import EOS, IGNORE

TURNS = [
    {"from": "human", "value": "What is it?\n<image>"},
    {"from": "gpt", "value": "cat"},
    {"from": "human", "value": "And the color?"},
    {"from": "gpt", "value": "red"},
]


def supervised(processor, ids, labels) -> str:
    assert all(label in (IGNORE, token) for token, label in zip(ids, labels, strict=True))
    return processor.tokenizer.decode([label for label in labels if label != IGNORE])


def test_labels_are_the_answers_only(processor):
    ids, labels = processor.training_example(TURNS, images=1)
    assert supervised(processor, ids, labels) == f" cat{EOS} red{EOS}"
    text = processor.tokenizer.decode(ids).replace("<image>" * 4, "<image>")
    assert text == (
        f"{SYSTEM} USER: <image>\nWhat is it? ASSISTANT: cat{EOS}"
        f"USER: And the color? ASSISTANT: red{EOS}"
    )


def human(value: str) -> dict[str, str]:
    return {"from": "human", "value": value}


def gpt(value: str) -> dict[str, str]:
    return {"from": "gpt", "value": value}


# conversation -> its turns as the model reads them, <image> once for each picture
PLACES = {
    "a picture in the second round": (
        [human("Hello?"), gpt("Hi."), human("<image>\nWhat is it?"), gpt("A cat.")],
        f"USER: Hello? ASSISTANT: Hi.{EOS}USER: <image>\nWhat is it? ASSISTANT: A cat.{EOS}",
    ),
    "a picture each round": (
        [human("<image>\nWhat?"), gpt("A cat."), human("And this? <image>"), gpt("A dog.")],
        f"USER: <image>\nWhat? ASSISTANT: A cat.{EOS}USER: <image>\nAnd this? ASSISTANT: A dog."
        f"{EOS}",
    ),
    "pictures inside a question": (
        [human("First <image>, then <image>: which?"), gpt("The first.")],
        f"USER: <image>\n<image>\nFirst , then : which? ASSISTANT: The first.{EOS}",
    ),
    "a picture alone": (
        [human("<image>"), gpt("A cat.")],
        f"USER: <image>\n ASSISTANT: A cat.{EOS}",
    ),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_picture_belongs_to_its_round(name, processor):
    """In training, in the chat template (tags or image parts) and in a prompt of one question."""
    turns, expected = PLACES[name]
    ids, labels = processor.training_example(turns)
    text = processor.tokenizer.decode(ids).replace("<image>" * 4, "<image>")
    assert text == f"{SYSTEM} {expected}"
    assert supervised(processor, ids, labels) == "".join(
        f" {turn['value']}{EOS}" for turn in turns[1::2]
    )
    roles = {"human": "user", "gpt": "assistant"}
    messages = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in turns]
    assert processor.apply_chat_template(messages) == f"{SYSTEM} {expected}"
    for message in messages:
        words = message["content"].replace("<image>", "").strip()
        parts = [{"type": "text", "text": words}]
        parts += [{"type": "image"}] * message["content"].count("<image>")
        message["content"] = parts
    assert processor.apply_chat_template(messages) == f"{SYSTEM} {expected}"
    question = turns[-2]["value"]
    prompt = processor.conversation_prompt(question, images=question.count("<image>"))
    assert expected.endswith(f"{prompt.removeprefix(SYSTEM + ' ')} {turns[-1]['value']}{EOS}")


@pytest.mark.parametrize("name", PLACES)
def test_pictures_stand_behind_the_question_where_they_are_asked_to(name, processor, tmp_path):
    turns, first = PLACES[name]
    expected = re.sub(r"USER: ((?:<image>\n)+)(.*?) ASSISTANT", moved, first)
    assert expected != first
    processor.image_place = "last"
    try:
        processor.save_pretrained(tmp_path)
        loaded = type(processor).from_pretrained(tmp_path)
        assert loaded.image_place == "last"
        ids, _ = loaded.training_example(turns)
        text = loaded.tokenizer.decode(ids).replace("<image>" * 4, "<image>")
        assert text == f"{SYSTEM} {expected}"
        roles = {"human": "user", "gpt": "assistant"}
        messages = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in turns]
        assert loaded.apply_chat_template(messages) == f"{SYSTEM} {expected}"
        question = turns[-2]["value"]
        prompt = loaded.conversation_prompt(question, images=question.count("<image>"))
        ids = loaded.encode(prompt)
        assert ids == loaded.training_example(turns[-2:])[0][: len(ids)]
    finally:
        processor.image_place = "first"
    assert processor.image_place == "first"
    with pytest.raises(UserError, match="unknown image place 'middle'"):
        processor.image_place = "middle"


def moved(found: re.Match) -> str:
    pictures = "\n<image>" * found[1].count("<image>")
    return f"USER: {found[2]}{pictures} ASSISTANT"


def test_a_picture_in_an_answer_is_refused(processor):
    turns = [human("Show me."), gpt("Here: <image>")]
    with pytest.raises(UserError, match="in an answer"):
        processor.training_example(turns)
    messages = [
        {"role": "user", "content": "Show me."},
        {"role": "assistant", "content": "Here: <image>"},
    ]
    with pytest.raises(Exception, match="a picture in an answer"):
        processor.apply_chat_template(messages)


def test_tags_and_pictures_agree(processor):
    with pytest.raises(UserError, match="1 <image> tags for 0 images"):
        processor.training_example(TURNS, images=0)
    with pytest.raises(UserError, match="2 <image> tags for 1 images"):
        processor.conversation_prompt("<image> <image> which?")


def test_plain_template_shows_every_picture(processor):
    turns = [human("<image>\n<image>\nCompare."), gpt("They differ.")]
    ids, labels = processor.training_example(turns, images=2, template="plain")
    assert ids[:8] == [processor.image_token_id] * 8
    assert supervised(processor, ids, labels) == "They differ.\n"


@pytest.mark.parametrize(
    "turns", [[human("Write."), gpt("A.")], [*TURNS], [human("<image>")]], ids=str
)
def test_plain_template_has_no_place_for_more(turns, processor):
    with pytest.raises(UserError, match="learns captions"):
        processor.training_example(turns, template="plain")


def test_plain_template_supervises_the_caption(processor):
    turns = [
        {"from": "human", "value": "Describe it.\n<image>"},
        {"from": "gpt", "value": "a cat\n"},
    ]
    ids, labels = processor.training_example(turns, images=1, template="plain")
    assert ids[:4] == [processor.image_token_id] * 4
    assert supervised(processor, ids, labels) == "a cat\n"


def test_a_training_prompt_has_the_tokens_of_inference(processor):
    ids, labels = processor.training_example(TURNS[:2], images=1)
    prompt = processor.encode(processor.conversation_prompt("What is it?"))
    assert ids[: len(prompt)] == prompt
    assert all(label == IGNORE for label in labels[: len(prompt)])
    inputs = processor(
        text=processor.conversation_prompt("What is it?"), images=Image.new("RGB", (9, 9))
    )
    assert inputs["input_ids"][0] == prompt


def llama_like(bos: bool) -> PreTrainedTokenizerFast:
    """Byte-level BPE, whose own post-processor puts <s> in front of a text, or does not."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["a dog sits"], trainer)
    if bos:
        bpe.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


TEXT = "What is it? a dog sits so Why USER ASSISTANT"


def sentencepiece_like(scheme: str) -> PreTrainedTokenizerFast:
    """Llama 2's kind: a space in front of a text ("first") or of all between special tokens too."""
    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    bpe.decoder = decoders.Metaspace(prepend_scheme=scheme)
    octets = [f"<0x{octet:02X}>" for octet in range(256)]
    trainer = trainers.BpeTrainer(
        special_tokens=["<s>", "</s>", "<unk>", *octets], show_progress=False
    )
    bpe.train_from_iterator([TEXT], trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def llama3_like() -> PreTrainedTokenizerFast:
    """Byte-level BPE behind Llama 3's own split, BOS by one of two post-processors."""
    bpe = Tokenizer(models.BPE())
    split = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|begin_of_text|>", "<|eot_id|>"]
    trainer = trainers.BpeTrainer(
        special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([TEXT], trainer)
    opens = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[(special[0], 0)]
    )
    bpe.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), opens])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=special[0], eos_token=special[1])


OPENING = {
    "space before a text": lambda: sentencepiece_like("first"),
    "space behind special tokens too": lambda: sentencepiece_like("always"),
    "two post-processors": llama3_like,
    "byte level": lambda: llama_like(bos=True),
}


@pytest.mark.parametrize("kind", OPENING)
@pytest.mark.parametrize("images", [0, 2])
def test_pieces_have_the_tokens_of_the_whole_text(kind, images):
    """BOS once; the labels are the answers' own tokens and their end, nothing in front of them."""
    processor = VLMambaProcessor.from_config(tiny_config(vocab_size=1024), OPENING[kind]())
    tokenizer, per_image = processor.tokenizer, processor.num_image_tokens
    turns = [human("<image>" * images + "What is it?"), gpt("a dog"), human("Why?"), gpt("so")]
    prompt = processor.conversation_prompt("What is it?", images=images)
    end = tokenizer.eos_token
    text = f"{prompt} a dog{end}USER: Why? ASSISTANT: so{end}"
    whole = tokenizer(text.replace("<image>", "<image>" * per_image)).input_ids
    ids, labels = processor.training_example(turns, images=images)
    assert ids == whole and ids.count(tokenizer.bos_token_id) == 1
    answers = [token for token in labels if token != IGNORE]
    space = "▁" if "space" in kind else "Ġ"
    spelt = "".join(tokenizer.convert_ids_to_tokens(answers))
    assert spelt == f"{space}a{space}dog{end}{space}so{end}"
    encoded = processor.encode(prompt)
    assert ids[: len(encoded)] == encoded and set(labels[: len(encoded)]) == {IGNORE}
    assert labels[len(encoded)] == ids[len(encoded)] != IGNORE
    pictures = [Image.new("RGB", (9, 9))] * images
    assert list(processor(text=prompt, images=pictures or None)["input_ids"][0]) == encoded
    head, tail = processor.split_prompt(prompt)
    assert head + tail == encoded
    [length] = processor.text_lengths([turns])
    pieces = images + 4
    assert 0 <= length - (len(ids) - images * per_image) <= (pieces if "space" in kind else 0)
    assert tokens_behind(tokenizer, " a dog") == answers[: answers.index(ids[-1])]


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("images", [0, 1, 2])
def test_a_prompt_opens_with_bos_once_where_the_tokenizer_puts_it(bos, images):
    """As LLaVA's tokenizer_image_token: the pieces' own BOS tokens but the first are left out."""
    processor = VLMambaProcessor.from_config(tiny_config(vocab_size=1024), llama_like(bos))
    tokenizer, image = processor.tokenizer, [processor.image_token_id] * processor.num_image_tokens
    prompt = processor.conversation_prompt("What is it?", images=images)
    first, *others = (tokenizer(piece).input_ids for piece in prompt.split("<image>"))
    expected = first + [token for piece in others for token in [*image, *piece[bos:]]]
    assert processor.encode(prompt) == expected
    assert expected.count(tokenizer.bos_token_id) == bos
    head, tail = processor.split_prompt(prompt)
    assert head + tail == expected
    pictures = [Image.new("RGB", (9, 9))] * images
    assert processor(text=prompt, images=pictures or None)["input_ids"][0] == expected
    assert processor.encode(f"<s>{prompt}").count(tokenizer.bos_token_id) == 1
    turns = [human("<image>" * images + "What is it?"), gpt("a dog"), human("Why?"), gpt("so")]
    ids, labels = processor.training_example(turns, images=images)
    assert ids[: len(expected)] == expected
    assert ids.count(tokenizer.bos_token_id) == bos and labels[0] == IGNORE
    if images:
        caption = [human("<image>" * images), gpt("a dog")]
        ids, _ = processor.training_example(caption, images=images, template="plain")
        assert (
            ids == tokenizer("").input_ids + image * images + tokenizer("a dog\n").input_ids[bos:]
        )


def test_generation_and_packed_text_open_with_bos_once(tmp_path, monkeypatch):
    tokenizer = llama_like(bos=True)
    config = tiny_config(vocab_size=1024)
    processor = VLMambaProcessor.from_config(config, tokenizer)
    model = VLMambaForConditionalGeneration(config).eval()
    picture = Image.new("RGB", (9, 9), "red")
    requests = [Request("q USER: why?"), Request("<image>\nwhat?", "red", picture)]
    seen: list[list[int]] = []
    embedding = model.get_input_embeddings()
    embedding.register_forward_hook(
        lambda _, args, out: seen.extend(args[0].tolist() if args[0].ndim == 2 else [])
    )
    for shares in (True, False):
        monkeypatch.setattr(type(model.language_model), "shares_prefix", shares)
        seen.clear()
        GroupedGenerator(model, processor).generate(requests, 2)
        opened = [row[: row.index(1) if 1 in row else None] for row in seen if row[0] == 0]
        assert len(opened) == 2 and all(row.count(0) == 1 for row in opened), seen
    (tmp_path / "text.txt").write_text("a dog\nsits\n")
    ids = first_tokens([tmp_path / "text.txt"], processor, 100).tolist()
    assert ids == [*tokenizer("a dog").input_ids, 1, *tokenizer("sits").input_ids, 1]


def test_split_prompt_shares_the_image_prefix(processor):
    questions = ["What?", "Where is it?\nAnswer."]
    prompts = [processor.conversation_prompt(q) for q in questions]
    (first, a), (second, b) = map(processor.split_prompt, prompts)
    assert first == second and first[-1] == processor.image_token_id
    assert [first + a, second + b] == [processor.encode(p) for p in prompts]
    assert processor.split_prompt("no image")[0] == []


def test_padding_to_a_square_centers_the_image(processor):
    square = processor.pad_to_square(Image.new("RGB", (6, 2), "white"))
    assert square.size == (6, 6)
    assert square.getpixel((3, 3)) == (255, 255, 255) != square.getpixel((3, 0))


def test_unknown_template(processor):
    with pytest.raises(UserError, match="unknown template 'vicuna'; .*: vicuna_v1"):
        processor.training_example(TURNS, 1, template="vicuna")


ENCODERS = {
    "clip": TINY_CLIP,
    "siglip": TINY_CLIP | {"model_type": "siglip_vision_model", "image_size": 56},
    "efficientnet": VISION_ENCODERS["efficientnet-lite0-160"],
}


def wide_picture() -> Image.Image:
    """60 x 20, different everywhere: stretched, padded and turned ones differ."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 60, 3), np.uint8))


@pytest.fixture
def address(tmp_path):
    """Serves the test's folder on this machine: the URL of it."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def forms(picture: Image.Image, folder, address: str) -> dict[str, object]:
    """Every form that a picture can be handed over in."""
    picture.save(folder / "wide.png")
    content = (folder / "wide.png").read_bytes()
    text = base64.b64encode(content).decode()
    levels = np.asarray(picture)
    tensor = torch.tensor(levels)
    return {
        "PIL": picture,
        "path": str(folder / "wide.png"),
        "Path": folder / "wide.png",
        "URL": f"{address}/wide.png",
        "data URL": f"data:image/png;base64,{text}",
        "base64": text,
        "bytes": content,
        "array": levels,
        "array, channels first": levels.transpose(2, 0, 1),
        "array of int64": levels.astype(np.int64),
        "array of floats": levels / np.float32(255),
        "tensor": tensor,
        "tensor, channels first": tensor.permute(2, 0, 1),
        "tensor of floats": tensor.permute(2, 0, 1) / 255,
        "tensor of levels as floats": tensor.permute(2, 0, 1).float(),
        "RGBA": picture.convert("RGBA"),
    }


@pytest.mark.parametrize("encoder", ENCODERS)
def test_one_picture_is_one_tensor_in_every_form(encoder, tokenizer, tmp_path, address):
    """Processor, chat message, training and pixel_values, with each encoder's transform."""
    config = tiny_config(vision_config=dict(ENCODERS[encoder]))
    processor = VLMambaProcessor.from_config(config, tokenizer)
    picture = wide_picture()
    square = Image.new(
        "RGB", (60, 60), tuple(int(255 * m) for m in processor.image_processor.image_mean)
    )
    square.paste(picture, (0, 20))
    expected = processor.image_processor([square], return_tensors="pt")["pixel_values"]
    prompt = processor.conversation_prompt("What?")
    for name, form in forms(picture, tmp_path, address).items():
        inputs = processor(text=prompt, images=form, return_tensors="pt")
        assert torch.equal(inputs["pixel_values"], expected), name
        inputs = processor(text=[prompt], images=[[form]], return_tensors="pt")
        assert torch.equal(inputs["pixel_values"], expected), name
        assert torch.equal(processor.pixel_values([form]), expected), name
        key = {"path": "path", "URL": "url", "base64": "base64"}.get(name, "image")
        content = [{"type": "image", key: form}, {"type": "text", "text": "What?"}]
        chat = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
        )
        assert torch.equal(chat["pixel_values"], expected), name
        assert torch.equal(chat["input_ids"], inputs["input_ids"])
    [trained] = PixelImages(tmp_path, processor).load(("wide.png",))
    assert torch.equal(trained, expected)


def test_a_batch_of_arrays_is_several_pictures(processor):
    pictures = np.random.default_rng(0).integers(0, 256, (2, 20, 60, 3), np.uint8)
    prompt = processor.conversation_prompt("What?", images=2)
    inputs = processor(text=prompt, images=pictures, return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], processor.pixel_values(list(pictures)))


def test_the_pipeline_sees_the_picture_of_the_processor(tmp_path, model, processor):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    picture = wide_picture()
    picture.save(tmp_path / "wide.png")
    pipe = pipeline("image-text-to-text", model=str(tmp_path))
    seen = []
    encode = pipe.model.encode_images
    pipe.model.encode_images = lambda pixels: seen.append(pixels) or encode(pixels)
    parts = ({"image": picture}, {"path": str(tmp_path / "wide.png")}, {"image": np.array(picture)})
    for part in parts:
        content = [{"type": "image", **part}, {"type": "text", "text": "What?"}]
        pipe(text=[{"role": "user", "content": content}], max_new_tokens=1)
    prompt = processor.conversation_prompt("What?")
    for image in (picture, str(tmp_path / "wide.png")):
        pipe(text=prompt, images=image, max_new_tokens=1)
    assert len(seen) == 5
    assert all(torch.equal(pixels, processor.pixel_values([picture])) for pixels in seen)


def test_a_tokenizer_saved_while_it_cut_texts_cuts_no_prompt(tmp_path, processor):
    prompt = processor.conversation_prompt("What?")
    whole = processor(text=prompt, images=wide_picture(), return_tensors="pt")["input_ids"]
    processor.tokenizer("one of many words", truncation=True, max_length=12)
    processor.save_pretrained(tmp_path)
    loaded = VLMambaProcessor.from_pretrained(tmp_path)
    assert loaded.tokenizer.init_kwargs["max_length"] == 12 < whole.shape[1]
    for cut_before in (loaded, processor):
        again = cut_before(text=prompt, images=wide_picture(), return_tensors="pt")["input_ids"]
        assert torch.equal(again, whole)
        assert cut_before.encode(prompt) == whole[0].tolist()
    cut = loaded(text=prompt.replace("<image>\n", ""), truncation=True)["input_ids"]
    assert len(cut[0]) == 12


def test_sixteen_bit_grey_is_scaled_in_every_form(processor, tmp_path):
    levels = np.linspace(0, 65535, 20 * 60).reshape(20, 60).astype(np.uint16)
    picture = Image.fromarray(levels)
    assert picture.mode == "I;16"
    picture.save(tmp_path / "deep.png")
    picture.save(tmp_path / "deep.tiff")
    gray = Image.fromarray((levels // 257).astype(np.uint8))
    expected = processor.pixel_values([gray])
    prompt = processor.conversation_prompt("What?")
    paths = [str(tmp_path / "deep.png"), str(tmp_path / "deep.tiff")]
    for form in (picture, *paths, levels, torch.tensor(levels)):
        inputs = processor(text=prompt, images=form, return_tensors="pt")
        assert torch.equal(inputs["pixel_values"], expected)


@pytest.mark.parametrize(
    "source",
    [
        "no/such.png",
        b"GIF89a",
        "x" * 5000,
        "a\0b",
        np.zeros((5, 5, 7), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.full((4, 4), 150.5),
        np.full((4, 4), np.nan),
        np.full((4, 4), 70_000),
        np.array([["a"]]),
        Image.new("F", (4, 4)),
        torch.zeros(2),
        {"url": "x"},
        None,
    ],
    ids=lambda source: repr(source)[:30],
)
def test_what_is_no_picture_is_said_in_one_line(source, processor):
    with pytest.raises(BrokenPicture):
        rgb_picture(source)
    with pytest.raises(UserError, match="a picture cannot be read") as caught:
        processor.pixel_values([source])
    assert "\n" not in str(caught.value)


def test_the_processor_wants_as_many_pictures_as_tags_in_every_row(processor):
    with_tag, without = (processor.conversation_prompt("What?", images=n) for n in (1, 0))
    picture = wide_picture()
    for text, images, said in (
        (with_tag, None, "1 <image> tags for 0 images"),
        (with_tag, [], "1 <image> tags for 0 images"),
        (without, picture, "0 <image> tags for 1 images"),
        ([with_tag, without], [[], [picture]], "1 <image> tags for 0 images"),
        ([with_tag, with_tag], [[picture, picture], []], "1 <image> tags for 2 images"),
        ([with_tag, without], [[picture]], "1 lists of pictures for 2 prompts"),
        ("", None, "text 1 of 1 is empty"),
        ([with_tag, ""], [[picture], []], "text 2 of 2 is empty"),
    ):
        with pytest.raises(UserError, match=said):
            processor(text=text, images=images, return_tensors="pt", padding=True)
    mixed = processor(
        text=[without, with_tag], images=[[], [picture]], return_tensors="pt", padding=True
    )
    assert len(mixed["pixel_values"]) == 1
    assert "pixel_values" not in processor(text=without, images=[[]], return_tensors="pt")


def test_resize_stretches_and_cuts_no_side_off(tokenizer):
    """A transform of CLIP's kind would otherwise show the middle of a wide picture alone."""
    processor = VLMambaProcessor.from_config(tiny_config(), tokenizer)
    assert processor.image_processor.do_center_crop
    processor.image_aspect_ratio = "resize"
    picture = Image.new("RGB", (56, 28), "white")
    picture.paste("red", (0, 0, 14, 28))  # a quarter of it, on the left
    shown = processor.pixel_values([picture])
    stretched = picture.resize((28, 28), Image.Resampling.BICUBIC)
    torch.testing.assert_close(shown, processor.pixel_values([stretched]), atol=0.05, rtol=0)
    assert float((shown[0, 1, :, 0] - shown[0, 1, :, -1]).abs().min()) > 1  # red is there
