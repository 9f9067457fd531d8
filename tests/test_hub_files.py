"""A saved folder loads elsewhere: by `import vlmamba` or its auto_map, or says what to install."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from vlmamba import VLMambaConfig, VLMambaForConditionalGeneration, VLMambaProcessor, hub_files

ROOT = Path(__file__).parent.parent
ABSENT = """
import sys

class Absent:
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] == "vlmamba":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent)
"""


@pytest.fixture
def saved(model, processor, tmp_path) -> Path:
    folder = tmp_path / "saved"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def elsewhere(code: str, folder: Path, package: bool) -> subprocess.CompletedProcess:
    """Python in another folder, with or without this package; `folder` is its first argument."""
    kept = os.environ | {"HF_MODULES_CACHE": str(folder.parent / "modules"), "HF_HUB_OFFLINE": "1"}
    kept |= {"PYTHONPATH": str(ROOT)} if package else {}
    code = code if package else ABSENT + code
    command = [sys.executable, "-c", code, str(folder)]
    return subprocess.run(command, cwd=folder.parent, env=kept, capture_output=True, text=True)


def test_what_a_folder_says_of_itself(saved):
    config = json.loads((saved / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "modeling_vlmamba.VLMambaConfig",
        "AutoModel": "modeling_vlmamba.VLMambaForConditionalGeneration",
        "AutoModelForImageTextToText": "modeling_vlmamba.VLMambaForConditionalGeneration",
    }
    processor = json.loads((saved / "processor_config.json").read_text())
    assert processor["auto_map"] == {"AutoProcessor": "modeling_vlmamba.VLMambaProcessor"}
    assert sorted(path.name for path in saved.glob("*.py")) == ["modeling_vlmamba.py"]


def test_the_distribution_named_is_ours(saved):
    name = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["name"]
    assert name == hub_files.DISTRIBUTION
    for file in ("modeling_vlmamba.py", "README.md"):
        assert set(re.findall(r"pip install ([\w-]+)", (saved / file).read_text())) == {name}


def test_with_the_package_imported_nothing_has_to_be_trusted(saved, model):
    loaded = AutoModelForImageTextToText.from_pretrained(saved)
    assert type(loaded) is VLMambaForConditionalGeneration
    assert type(AutoProcessor.from_pretrained(saved)) is VLMambaProcessor
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_trusting_alone_finds_the_installed_package(saved):
    code = """
import sys
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
assert "vlmamba" not in sys.modules
folder = sys.argv[1]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
import vlmamba
assert type(model) is vlmamba.VLMambaForConditionalGeneration, type(model)
assert type(processor) is vlmamba.VLMambaProcessor, type(processor)
model.save_pretrained(folder + "/again")
processor.save_pretrained(folder + "/again")
"""
    done = elsewhere(code, saved, package=True)
    assert done.returncode == 0, done.stderr[-3000:]
    again = saved / "again"
    for file in ("processor_config.json", "modeling_vlmamba.py"):
        assert (again / file).read_text() == (saved / file).read_text()
    before, after = (json.loads((f / "config.json").read_text()) for f in (saved, again))
    assert before["auto_map"] == after["auto_map"]
    assert sorted(path.name for path in again.glob("*.py")) == ["modeling_vlmamba.py"]


@pytest.mark.parametrize("auto", ["AutoConfig", "AutoModelForImageTextToText", "AutoProcessor"])
def test_without_the_package_the_error_says_what_to_install(saved, auto):
    code = f"""
import sys
from transformers import {auto}
{auto}.from_pretrained(sys.argv[1], trust_remote_code=True)
"""
    done = elsewhere(code, saved, package=False)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        "ImportError: this checkpoint is a VL-Mamba model; its code is the package vlmamba-harness:"
        " pip install vlmamba-harness (or pip install . in its source tree)"
    )


def test_the_cards_commands_are_ones_that_load(saved, monkeypatch):
    """The Python of the card, run as it stands on this folder."""
    (code,) = re.findall(r"```python\n(.*?)```", (saved / "README.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(code.replace("FOLDER_OR_HUB_ID", str(saved)), names)
    assert type(names["model"]) is VLMambaForConditionalGeneration
    assert type(names["processor"]) is VLMambaProcessor


def test_the_map_is_no_part_of_a_configuration(saved):
    """It says where code is, not what the model is; another repository's is not carried on."""
    path = saved / "config.json"
    config = json.loads(path.read_text())
    config["auto_map"] = {"AutoConfig": "somebody/else--code.Other"}
    path.write_text(json.dumps(config))
    loaded = AutoConfig.from_pretrained(saved)
    assert type(loaded) is VLMambaConfig
    assert "auto_map" not in loaded.to_dict()
    loaded.save_pretrained(saved)
    assert json.loads(path.read_text())["auto_map"] == hub_files.CONFIG_MAP
