"""The tokenizer decides where an answer ends; vocabularies of any size; slow dtypes say so."""

from __future__ import annotations

import warnings

import pytest
import torch
from test_generate import ask
from test_vlm import picture
from tiny import tiny_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from vlmamba.checkpoints import load
from vlmamba.generation import GroupedGenerator, Request, end_tokens
from vlmamba.models.vlm import VLMambaForConditionalGeneration
from vlmamba.processing import SYSTEM, VLMambaProcessor
from vlmamba.training.init_model import initial_model
from vlmamba.training.stages import STAGES
from vlmamba_core.errors import UserError
from vlmamba_core.tokens import IGNORE

END = "</s>"
TURNS = [
    {"from": "human", "value": "<image>\nWhat?"},
    {"from": "gpt", "value": "A cat."},
    {"from": "human", "value": "Sure?"},
    {"from": "gpt", "value": "Yes."},
]


@pytest.fixture
def other() -> PreTrainedTokenizerFast:
    """A tokenizer in which "<|endoftext|>" is ordinary text, and "</s>", not token 0, the end."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<pad>", END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([SYSTEM], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token="<pad>")


def test_labels_and_chat_end_with_the_tokenizers_own_token(other):
    processor = VLMambaProcessor.from_config(tiny_config(), other)
    ids, labels = processor.training_example(TURNS)
    assert labels.count(other.eos_token_id) == ids.count(other.eos_token_id) == 2
    assert other.decode([t for t in labels if t != IGNORE]) == f" A cat.{END} Yes.{END}"
    assert labels[-1] == other.eos_token_id
    roles = {"human": "user", "gpt": "assistant"}
    messages = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in TURNS]
    chat = processor.apply_chat_template(messages)
    assert chat.endswith(f"ASSISTANT: Yes.{END}") and chat.count(END) == 2
    assert "endoftext" not in chat
    assert processor.encode(chat) == ids


def test_the_models_end_token_is_the_tokenizers(other, tmp_path):
    config = tiny_config()
    processor = VLMambaProcessor.from_config(config, other)
    assert (config.eos_token_id, config.pad_token_id) == (2, 1)
    model = VLMambaForConditionalGeneration(config)
    assert model.generation_config.eos_token_id == 2
    for wrong in (0, [7, 0]):  # as a folder that was saved before
        model.config.eos_token_id = model.generation_config.eos_token_id = wrong
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        loaded, _ = load(str(tmp_path))
        assert end_tokens(loaded) == ({2} if wrong == 0 else {2, 7, 0})
        assert loaded.generation_config.eos_token_id == loaded.config.eos_token_id


def test_training_starts_with_the_tokenizers_end_token(other, tmp_path):
    folder = tmp_path / "init"
    config = tiny_config()
    processor = VLMambaProcessor.from_config(config, other)
    VLMambaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    model, _ = initial_model(tiny_config(), STAGES["finetune"], str(folder), [], seed=0)
    assert model.generation_config.eos_token_id == model.config.eos_token_id == 2


def test_a_tokenizer_without_an_end_token_is_refused(other):
    other.eos_token = None
    with pytest.raises(UserError, match="has no eos_token"):
        VLMambaProcessor.from_config(tiny_config(), other)


@torch.no_grad()
def test_a_list_of_end_tokens_ends_grouped_answers_too(model, processor):
    """Whichever comes first; generate() and the grouped path agree."""
    prompt = processor.conversation_prompt("What?")
    inputs = processor(text=prompt, images=picture(0), return_tensors="pt")
    start = inputs["input_ids"].shape[1]
    free = model.generate(**inputs, max_new_tokens=12, min_new_tokens=12)[0, start:].tolist()
    cut = next(n for n, token in enumerate(free) if n > 1 and token not in free[:n])
    model.generation_config.eos_token_id = [0, free[cut]]
    short = model.generate(**inputs, max_new_tokens=12)[0, start:].tolist()
    assert short == free[: cut + 1]
    answer = GroupedGenerator(model, processor).generate([Request(prompt, "a", picture(0))], 12)
    assert answer == [processor.tokenizer.decode(free[:cut], skip_special_tokens=True).strip()]


@pytest.mark.parametrize("size", [321, 327, 400, 319])
@torch.no_grad()
def test_a_vocabulary_of_any_size_is_saved_and_loaded(size, model, processor, tmp_path):
    model.resize_token_embeddings(size)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, _ = load(str(tmp_path))
    assert again.config.vocab_size == len(again.get_input_embeddings().weight) == size
    inputs = ask(processor, rows=[0])
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    assert again(**inputs).logits.shape[-1] == size


def test_float16_on_a_cpu_is_said_to_be_slow(model, processor, tmp_path):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"float16 on a CPU .* float32 or bfloat16"):
        load(str(tmp_path), dtype=torch.float16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(str(tmp_path), dtype=torch.bfloat16)
