"""A small checkpoint and small data that are whole: what every broken input is a copy of."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from harness_world import mme_rows, pope_rows, write_parquet
from tiny import tiny_config

from vlmamba.models.vlm import VLMambaForConditionalGeneration
from vlmamba.processing import VLMambaProcessor

sys.path.append(str(Path(__file__).parents[1] / "tasks"))  # sample_documents.py


@pytest.fixture(scope="session")
def whole_checkpoint(tmp_path_factory, trained_tokenizer) -> Path:
    """A saved tiny model with its processor."""
    folder, config = tmp_path_factory.mktemp("whole") / "model", tiny_config()
    torch.manual_seed(0)
    processor = VLMambaProcessor.from_config(config, trained_tokenizer)
    VLMambaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(tmp_path, whole_checkpoint) -> Path:
    """A copy of it to break."""
    return Path(shutil.copytree(whole_checkpoint, tmp_path / "model"))


@pytest.fixture(scope="session")
def whole_data(tmp_path_factory) -> Path:
    """POPE and MME, six and four questions."""
    folder = tmp_path_factory.mktemp("data")
    write_parquet(pope_rows(images=1), folder / "pope.parquet")
    write_parquet(mme_rows(images=1), folder / "mme.parquet")
    return folder
