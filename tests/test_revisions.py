"""Published parts pinned as ID@REVISION, read from a hub cache without a network."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import TINY_CLIP, tiny_config
from transformers import CLIPVisionConfig, CLIPVisionModel, MambaConfig, MambaForCausalLM

from vlmamba.config import VLMambaConfig
from vlmamba.models.assemble import assemble
from vlmamba.published import tokenizer_for
from vlmamba.training.init_model import tiny
from vlmamba_core.errors import UserError

COMMITS = {"main": "a" * 40, "v1": "b" * 40}
PARTS = {"vision_model_id": "org/clip", "language_model_id": "org/mamba", "tokenizer_id": "org/bpe"}
OFFLINE = {"local_files_only": True}


@pytest.fixture
def cache(tmp_path, tokenizer):
    """A hub cache with two revisions of each part; in v1 all weights are 0.25."""
    lm = MambaConfig(vocab_size=320, hidden_size=32, num_hidden_layers=2, time_step_rank=2)
    models = {
        "clip": CLIPVisionModel(CLIPVisionConfig(**TINY_CLIP)),
        "mamba": MambaForCausalLM(lm),
        "bpe": tokenizer,
    }
    for name, model in models.items():
        repository = tmp_path / f"models--org--{name}"
        (repository / "refs").mkdir(parents=True)
        for revision, commit in COMMITS.items():
            (repository / "refs" / revision).write_text(commit)
            if revision == "v1" and name != "bpe":
                for parameter in model.parameters():
                    torch.nn.init.constant_(parameter, 0.25)
            folder = repository / "snapshots" / commit
            model.save_pretrained(folder)
            if name == "bpe":  # the published tokenizer lies beside a model
                (folder / "config.json").write_text('{"model_type": "gpt_neox"}')
            if name == "bpe" and revision == "v1":
                path = folder / "tokenizer_config.json"
                path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "!"}))
    return tmp_path


def pinned(revision: str | None, **changes) -> VLMambaConfig:
    at = f"@{revision}" if revision else ""
    return tiny_config(**{field: name + at for field, name in PARTS.items()} | changes)


@pytest.mark.parametrize("revision", [None, "main", "v1", COMMITS["v1"]])
def test_every_part_comes_from_its_revision(cache, revision):
    config = pinned(revision)
    model = assemble(config, cache_dir=cache, **OFFLINE)
    tokenizer = tokenizer_for(config, cache_dir=cache, **OFFLINE)
    second = revision in ("v1", COMMITS["v1"])
    for part in (model.vision_encoder, model.language_model):
        assert all((p == 0.25).all() for p in part.parameters()) == second
    assert tokenizer.pad_token == ("!" if second else "<|endoftext|>")


def test_the_resolved_configuration_keeps_the_revisions(tmp_path):
    pinned("v1").save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert {field: saved[field] for field in PARTS} == {f: f"{n}@v1" for f, n in PARTS.items()}
    preset = VLMambaConfig.preset("1.4b", tokenizer_id="EleutherAI/gpt-neox-20b@abc")
    assert preset.tokenizer_id.endswith("@abc")
    assert VLMambaConfig.preset("1.4b").tokenizer_id == "EleutherAI/gpt-neox-20b"
    assert VLMambaConfig.preset("nano").tokenizer_id is None
    assert tiny(preset).tokenizer_id is None


@pytest.mark.parametrize(
    ("field", "what"),
    [
        ("vision_model_id", "vision encoder"),
        ("language_model_id", "language model"),
        ("tokenizer_id", "tokenizer"),
    ],
)
@pytest.mark.parametrize("source", ["org/other@v1", f"{{}}@{'c' * 40}"])
def test_what_is_not_in_the_cache_is_named_with_the_way_to_get_it(cache, field, what, source):
    source = source.format(PARTS[field])
    config = pinned(None, **{field: source})
    with pytest.raises(UserError) as caught:
        assemble(config, cache_dir=cache, **OFFLINE)
        tokenizer_for(config, cache_dir=cache, **OFFLINE)
    message = str(caught.value)
    name, revision = source.split("@")
    assert f"cannot fetch the {what} {source!r}: " in message
    assert f"`hf download {name} --revision {revision}`" in message
    assert "\n" not in message


def test_a_folder_may_have_an_at_sign_in_its_name(cache, tmp_path):
    folder = tmp_path / "clip@home"
    (cache / "models--org--clip" / "snapshots" / COMMITS["v1"]).rename(folder)
    config = pinned(None, vision_model_id=str(folder))
    model = assemble(config, cache_dir=cache, **OFFLINE)
    assert all((p == 0.25).all() for p in model.vision_encoder.parameters())
