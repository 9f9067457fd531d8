"""The Mamba language model against transformers' MambaForCausalLM on the same weights."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from tiny import TINY_MIXERS, tiny_config
from transformers import MambaConfig, MambaForCausalLM

from vlmamba import published
from vlmamba.config import VLMambaConfig
from vlmamba.models.language.mamba_config import published_fields
from vlmamba.models.vlm import VLMambaForConditionalGeneration
from vlmamba_core.errors import UserError

ORIGINAL_CONFIG = {"d_model": 32, "n_layer": 2, "vocab_size": 317, "ssm_cfg": {}}


@pytest.fixture
def theirs() -> MambaForCausalLM:
    config = MambaConfig(vocab_size=320, hidden_size=32, num_hidden_layers=2, time_step_rank=2)
    model = MambaForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def original_layout(state_dict: dict) -> dict:
    return {key.replace("embeddings.", "embedding."): value for key, value in state_dict.items()}


def write_checkpoint(folder, model, layout: str, form: str) -> None:
    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    if layout == "original":
        tensors = original_layout(tensors)
        (folder / "config.json").write_text(json.dumps(ORIGINAL_CONFIG))
    else:
        (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
    names = sorted(tensors)
    shards = [names[::2], names[1::2]] if "sharded" in form else [names]
    suffix = "safetensors" if "safetensors" in form else "bin"
    weight_map = {}
    for n, shard in enumerate(shards):
        name = f"model-{n}.{suffix}"
        part = {key: tensors[key] for key in shard}
        save_file(part, folder / name) if suffix == "safetensors" else torch.save(
            part, folder / name
        )
        weight_map |= dict.fromkeys(shard, name)
    if "sharded" in form:
        index = folder / f"model.{suffix}.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))


def ours_from(folder) -> VLMambaForConditionalGeneration:
    config = tiny_config(**published_fields(folder))
    model = VLMambaForConditionalGeneration(config)
    model.language_model.load_published(folder)
    return model.eval()


@pytest.mark.parametrize("layout", ["original", "hf"])
@pytest.mark.parametrize("form", ["safetensors", "safetensors sharded", "bin", "bin sharded"])
@torch.no_grad()
def test_every_published_layout_gives_the_same_model(tmp_path, theirs, layout, form):
    write_checkpoint(tmp_path, theirs, layout, form)
    ours = ours_from(tmp_path)
    ids = torch.randint(2, 320, (3, 33))
    expected, actual = theirs(ids).logits, ours(ids).logits
    assert (actual - expected).abs().max() / expected.abs().max() < 1e-5


def test_a_revision_is_pinned_behind_the_name(monkeypatch, tmp_path, theirs):
    write_checkpoint(tmp_path, theirs, "original", "bin")
    asked = []
    monkeypatch.setattr(
        published, "snapshot_download", lambda *a, **k: asked.append((a, k)) or str(tmp_path)
    )
    model = VLMambaForConditionalGeneration(tiny_config())
    model.language_model.load_published("state-spaces/mamba-1.4b@abc123", local_files_only=True)
    assert asked == [
        (("state-spaces/mamba-1.4b",), {"revision": "abc123", "local_files_only": True})
    ]


@torch.no_grad()
def test_32_greedy_steps(tmp_path, theirs):
    write_checkpoint(tmp_path, theirs, "original", "safetensors")
    ours = ours_from(tmp_path)
    ids = torch.randint(2, 320, (2, 9))
    options = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False}
    mask = torch.ones_like(ids)
    expected = theirs.generate(ids, attention_mask=mask, **options, output_logits=True,
                               return_dict_in_generate=True)  # fmt: skip
    actual = ours.generate(ids, attention_mask=mask, **options, output_logits=True,
                           return_dict_in_generate=True)  # fmt: skip
    assert torch.equal(actual.sequences, expected.sequences)
    for a, b in zip(actual.logits, expected.logits, strict=True):
        assert (a - b).abs().max() / b.abs().max() < 1e-5


def test_a_wrong_checkpoint_names_its_keys(tmp_path, theirs):
    tensors = original_layout({k: v.clone() for k, v in theirs.state_dict().items()})
    tensors.pop("backbone.layers.1.mixer.D")
    tensors["backbone.norm_f.weight"] = torch.ones(7)
    (tmp_path / "config.json").write_text(json.dumps(ORIGINAL_CONFIG))
    ours = VLMambaForConditionalGeneration(tiny_config())
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"norm_f.weight has shape \(7,\)"):
        ours.language_model.load_published(tmp_path)
    del tensors["backbone.norm_f.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"lacks 2 tensors: layers.1.mixer.D, norm_f.weight"):
        ours.language_model.load_published(tmp_path)
    save_file(tensors | {"extra": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="unexpected tensor 'extra'"):
        ours.language_model.load_published(tmp_path)


@pytest.mark.parametrize("k", range(1, 9))
@torch.no_grad()
def test_continuing_a_state_with_k_tokens_equals_one_pass(model, k):
    ids = torch.randint(2, 320, (2, 20))
    whole = model(ids).logits[:, -k:]
    state = model(ids[:, :-k], use_cache=True).cache_params
    continued = model(ids[:, -k:], cache_params=state).logits
    assert torch.allclose(continued, whole, atol=1e-5)
    assert state.positions == 20


@torch.no_grad()
def test_the_state_is_a_value(model):
    ids = torch.randint(2, 320, (3, 6))
    embeds = model.get_input_embeddings()(ids)
    _, state = model.language_model(embeds)
    before = state.clone()
    model.language_model.step(embeds[:, 0], state)
    assert not torch.equal(before.ssm, state.ssm)
    rows = torch.tensor([2, 0, 2])
    assert torch.equal(before.select(rows).ssm[:, 0], before.ssm[:, 2])
    fresh = model.language_model.new_cache(3)
    assert fresh.nbytes == before.nbytes and fresh.batch == 3


@pytest.mark.parametrize("name", ["1.4b", "2.8b", "2.8b-slimpj"])
def test_presets_have_the_published_sizes(name):
    config = VLMambaConfig.preset(f"{name}+clip-l-336+mlp")
    with torch.device("meta"):
        model = VLMambaForConditionalGeneration(config)
    parameters = sum(p.numel() for p in model.language_model.parameters())
    expected = {"1.4b": 1_372_178_432, "2.8b": 2_768_345_600, "2.8b-slimpj": 2_768_345_600}
    assert parameters == expected[name]


@torch.inference_mode()
def test_a_layer_of_many_taps_steps_as_it_reads():
    model = VLMambaForConditionalGeneration(tiny_config(d_conv=20)).eval()
    language_model, ids = model.language_model, torch.randint(2, 300, (2, 24))
    whole, _ = language_model(language_model.embed(ids))
    state = language_model.new_cache(2)
    steps = [language_model.step(language_model.embed(ids[:, n]), state) for n in range(24)]
    torch.testing.assert_close(torch.stack(steps, dim=1), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mixer", TINY_MIXERS)
@pytest.mark.parametrize("again", [False, True])
def test_gradients_through_a_given_state(mixer, again):
    """The state is the caller's, and the backward pass wants it as it was."""
    torch.manual_seed(0)
    model = VLMambaForConditionalGeneration(tiny_config(**TINY_MIXERS[mixer])).train()
    if again:
        model.activation_checkpointing_enable()
    ids = torch.randint(2, 300, (2, 12))
    state = model.init_state(2)
    with torch.no_grad():
        model(ids[:, :5], cache_params=state)
    model(ids[:, 5:], labels=ids[:, 5:], cache_params=state).loss.backward()
    language_model = model.language_model
    got = {name: p.grad.clone() for name, p in language_model.named_parameters()}
    model.zero_grad()
    state = model.init_state(2)
    with torch.no_grad():
        model(ids[:, :5], cache_params=state)
    hidden, _ = language_model(language_model.embed(ids[:, 5:]), state)
    logits = language_model.head(hidden)[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(logits.float(), ids[:, 6:].flatten()).backward()
    for name, grad in got.items():
        torch.testing.assert_close(
            grad, language_model.get_parameter(name).grad, atol=1e-5, rtol=1e-4
        )
