"""Shared fixtures: a tiny model, a tiny tokenizer, one processor. No network, no GPU."""

from __future__ import annotations

import copy
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # several test processes share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from tiny import tiny_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from vlmamba.config import VLMambaConfig
from vlmamba.models.vlm import VLMambaForConditionalGeneration
from vlmamba.processing import SYSTEM, VLMambaProcessor
from vlmamba_core.tokens import EOS, IMAGE


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _own_accelerator():
    """accelerate keeps one state a process: a file's trainings must not decide the next one's."""
    yield
    if (state := sys.modules.get("accelerate.state")) is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def trained_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 320 tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=318,
        special_tokens=[EOS, IMAGE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([SYSTEM, "USER: ASSISTANT: yes no cat"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, pad_token=EOS)


@pytest.fixture
def tokenizer(trained_tokenizer) -> PreTrainedTokenizerFast:
    """A copy: a tokenizer remembers how it cut and padded last, and saves that with itself."""
    return copy.deepcopy(trained_tokenizer)


@pytest.fixture
def config() -> VLMambaConfig:
    return tiny_config()


@pytest.fixture
def processor(config, tokenizer) -> VLMambaProcessor:
    return VLMambaProcessor.from_config(config, tokenizer)


@pytest.fixture
def model(config, processor) -> VLMambaForConditionalGeneration:
    """Random weights, large enough that different inputs get different answers."""
    model = VLMambaForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("proj.weight", "embedding.weight")):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


LONG = {
    "fuzz": "a long random run: pytest -m fuzz",
    "kill": "kills at many moments: pytest -m kill",
    "wheel": "installs the wheel and runs its commands: pytest -m wheel",
    "soak": "a long run: pytest -m soak",
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long tests run only where their mark is asked for."""
    for mark, reason in LONG.items():
        if mark not in (config.option.markexpr or ""):
            for item in items:
                if mark in item.keywords:
                    item.add_marker(pytest.mark.skip(reason=reason))
