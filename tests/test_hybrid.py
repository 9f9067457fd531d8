"""Attention and MLP layers among the Mamba ones, or instead of them."""

from __future__ import annotations

import pytest
import torch
from tiny import TINY_MIXERS, TINY_TRANSFORMER, tiny_config
from transformers import LlamaConfig, LlamaForCausalLM

from vlmamba.config import VLMambaConfig
from vlmamba.configs.language import MambaConfig
from vlmamba.configs.presets import LANGUAGE_MODELS
from vlmamba.models.language.mamba import MambaLM
from vlmamba.models.mixers.attention import ROOM
from vlmamba.models.vlm import VLMambaForConditionalGeneration
from vlmamba.training.init_model import adopt
from vlmamba_core.errors import UserError


def built(**fields) -> VLMambaForConditionalGeneration:
    torch.manual_seed(0)
    return VLMambaForConditionalGeneration(tiny_config(**fields)).eval()


def as_llama(model: MambaLM) -> LlamaForCausalLM:
    """transformers' Llama with the weights of an "attention,mlp" model."""
    c = model.config
    llama = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=c.d_model,
            intermediate_size=c.d_intermediate,
            num_hidden_layers=c.n_layer // 2,
            num_attention_heads=c.d_model // c.head_dim,
            vocab_size=c.vocab_size,
            rms_norm_eps=c.rms_eps,
            rope_theta=10000.0,
            tie_word_embeddings=True,
        )
    )
    own, weights = model.state_dict(), {}
    for n in range(c.n_layer // 2):
        attention, mlp, there = f"layers.{2 * n}.", f"layers.{2 * n + 1}.", f"model.layers.{n}."
        for name, part in zip("qkv", own[attention + "mixer.in_proj.weight"].chunk(3), strict=True):
            weights[f"{there}self_attn.{name}_proj.weight"] = part
        weights[there + "self_attn.o_proj.weight"] = own[attention + "mixer.out_proj.weight"]
        gate, up = own[mlp + "mixer.in_proj.weight"].chunk(2)
        weights |= {f"{there}mlp.gate_proj.weight": gate, f"{there}mlp.up_proj.weight": up}
        weights[there + "mlp.down_proj.weight"] = own[mlp + "mixer.out_proj.weight"]
        weights[there + "input_layernorm.weight"] = own[attention + "norm.weight"]
        weights[there + "post_attention_layernorm.weight"] = own[mlp + "norm.weight"]
    weights["model.embed_tokens.weight"] = own["embedding.weight"]
    weights["model.norm.weight"] = own["norm_f.weight"]
    weights["lm_head.weight"] = own["lm_head.weight"]
    llama.load_state_dict(weights)
    return llama.eval()


@torch.no_grad()
def test_attention_and_mlp_are_llamas():
    model = built(**TINY_TRANSFORMER).language_model
    ids = torch.randint(320, (2, 70))
    expected = as_llama(model)(ids).logits
    hidden, cache = model(model.embed(ids[:, :50]))
    more, cache = model(model.embed(ids[:, 50:69]), cache)
    last = model.step(model.embed(ids[:, 69]), cache)
    found = model.head(torch.cat([hidden, more, last[:, None]], dim=1))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fields", [TINY_MIXERS["hybrid"], TINY_TRANSFORMER])
@torch.no_grad()
def test_rows_of_a_batch_share_a_prefix_and_nothing_else(fields):
    """Prefix, questions of different lengths, then more tokens than the cache has room for."""
    model = built(**fields).language_model
    prefix = torch.randint(320, (1, 9))
    questions = [torch.randint(320, (1, length)) for length in (1, 12, 5)]
    answers = torch.randint(320, (3, ROOM + 3))
    _, began = model(model.embed(prefix))
    before = began.clone()
    lengths = torch.tensor([q.shape[1] for q in questions])
    padded = torch.cat([torch.nn.functional.pad(q, (0, 12 - q.shape[1])) for q in questions])
    state = model.new_cache(3)
    state.write_rows(torch.tensor([2, 0, 1]), began.select(torch.zeros(3, dtype=torch.long)))
    hidden, state = model(model.embed(padded), state, lengths)
    steps = torch.stack([model.step(model.embed(t), state) for t in answers.T], dim=1)
    for row, question in enumerate(questions):
        whole = torch.cat([prefix, question, answers[row : row + 1]], dim=1)
        alone, _ = model(model.embed(whole))
        end = 9 + question.shape[1]
        torch.testing.assert_close(
            hidden[row, : question.shape[1]], alone[0, 9:end], atol=1e-5, rtol=0
        )
        torch.testing.assert_close(steps[row], alone[0, end:], atol=1e-5, rtol=0)
    assert torch.equal(began.attention.keys, before.attention.keys)  # its copies wrote elsewhere
    assert state.nbytes > began.nbytes and state.batch == 3


def test_a_row_that_is_all_padding_keeps_its_state():
    model = built(**TINY_MIXERS["hybrid"]).language_model
    embeds = model.embed(torch.randint(320, (2, 6)))
    with torch.no_grad():
        _, began = model(embeds)
        _, after = model(embeds, began, torch.tensor([0, 6]))
        here = [model.step(embeds[:, 0], state)[0] for state in (began, after)]
    torch.testing.assert_close(*here, atol=1e-6, rtol=0)


@pytest.mark.parametrize("pattern", ["mamba,mamba,attention", "mamba,mlp", "mamba,attention,mlp"])
@torch.no_grad()
def test_layers_put_into_a_trained_model_change_nothing_yet(pattern):
    donor = built(n_layer=4)
    parts = pattern.split(",")
    layers = 4 * len(parts) // parts.count("mamba")
    model = built(n_layer=layers, mixer=pattern, head_dim=8)
    ids = torch.randint(320, (2, 9))
    assert not torch.allclose(model(ids).logits, donor(ids).logits, atol=1e-3)
    adopt(model, donor, "language_model", "donor")
    torch.testing.assert_close(model(ids).logits, donor(ids).logits, atol=0, rtol=0)
    assert model.language_model.layers[-1].mixer.in_proj.weight.std() > 0  # may begin to learn
    with pytest.raises(UserError, match="does not fit"):
        adopt(built(n_layer=3, mixer=pattern, head_dim=8), donor, "language_model", "donor")


@pytest.mark.parametrize(
    ("settings", "change"),
    [
        ({"mixer": "attention", "head_dim": 8}, {"head_dim": 4}),
        (
            {"mixer": "mamba2", "n_groups": 1, "d_state": 8, "head_dim": 8},
            {"n_groups": 2, "d_state": 4},
        ),
        ({"mixer": "mamba,experts", "experts_per_token": 2}, {"experts_per_token": 1}),
        ({"adaptors": [0, 2]}, {"adaptors": [1, 3]}),
    ],
)
def test_weights_that_would_compute_something_else_do_not_fit(settings, change):
    """Of equal shapes all the same."""
    donor, model = (built(n_layer=4, **settings | more) for more in ({}, change))
    names = {k: v.shape for k, v in donor.language_model.state_dict().items()}
    assert names == {k: v.shape for k, v in model.language_model.state_dict().items()}
    with pytest.raises(UserError, match=f"does not fit this preset: .*{next(iter(change))}="):
        adopt(model, donor, "language_model", "donor")
    adopt(built(n_layer=4, **settings), donor, "language_model", "donor")


def test_additions_are_for_the_projections_that_there_are():
    kinds = {"mamba": 3, "mamba2": 2, "attention": 2, "mamba,attention": 3}
    for mixer, count in kinds.items():
        model = built(n_layer=2, mixer=mixer, head_dim=8)
        assert len(model.language_model.lora_targets) == count, mixer


def test_a_pattern_that_cannot_be_built_is_refused():
    with pytest.raises(UserError, match="unknown mixer 'attentoin'; known, nearest.*attention"):
        MambaConfig(mixer="mamba,attentoin")
    with pytest.raises(UserError, match="expected one kind of Mamba"):
        MambaConfig(mixer="mamba,mamba2")
    with pytest.raises(UserError, match="does not divide into attention heads"):
        MambaConfig(mixer="mamba,attention", head_dim=60)
    with pytest.raises(UserError, match="unknown mixer of connector_layer"):
        VLMambaConfig(connector_layer={"mixer": "attention"})


def test_families_of_equal_size():
    """The demo's four language models differ by at most 2 % in parameters outside the embedding."""
    sizes = []
    for name in ("nano", "nano-mamba2", "nano-transformer", "nano-hybrid"):
        with torch.device("meta"):
            model = MambaLM(VLMambaConfig.preset(name).text_config)
        sizes.append(sum(p.numel() for p in model.layers.parameters()))
    assert max(sizes) < 1.02 * min(sizes)


def test_every_kind_of_layer_learns_and_is_counted():
    model = built(**TINY_MIXERS["hybrid"])
    ids = torch.randint(320, (2, 9))
    model.train()(ids, labels=ids).loss.backward()
    of_text = model.language_model.named_parameters()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for _, p in of_text)
    assert set(model.language_model.block_names) == {"MambaBlock", "AttentionBlock", "MLPBlock"}
    matrices = sum(
        p.numel()
        for name, p in model.language_model.layers.named_parameters()
        if p.ndim >= 2 and "A_log" not in name
    )
    assert model.language_model.flops(10) > 2 * 10 * matrices


def test_published_hybrids_keep_the_published_layers():
    fields = LANGUAGE_MODELS["2.8b-plus-attention"]
    kinds = MambaConfig(**{k: v for k, v in fields.items() if k != "language_model_id"}).layer_kinds
    assert kinds.count("mamba") == LANGUAGE_MODELS["2.8b"]["n_layer"]
    assert kinds.count("attention") == 8
