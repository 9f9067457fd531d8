"""transformers' own language models behind the project's interface equal themselves."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import TINY_CLIP
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig

from vlmamba.config import VLMambaConfig
from vlmamba.models.assemble import assemble
from vlmamba.models.language import WrappedLM
from vlmamba.models.language.wrapped import shrunk
from vlmamba.models.low_rank import LowRankSettings, add
from vlmamba.models.quantized import QuantizedLinear, quantize
from vlmamba.models.vlm import VLMambaForConditionalGeneration
from vlmamba.training.evaluation import without_dropout
from vlmamba_core.errors import UserError

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "num_attention_heads": 4}
SHAPE |= {"intermediate_size": 48, "max_position_embeddings": 512}
HYBRID = SHAPE | {"num_hidden_layers": 3, "mamba_d_state": 8, "mamba_headdim": 8}
HYBRID |= {"n_mamba_heads": 8, "layers_block_type": ["mamba", "hybrid", "mamba"]}
FAMILIES = {
    "llama": SHAPE | {"num_key_value_heads": 2},
    "gpt_neox": SHAPE,
    "phi": SHAPE,
    "zamba2": HYBRID | {"num_mem_blocks": 1, "use_mem_eff_path": False},
}
SHARES = {"llama": True, "gpt_neox": True, "phi": True, "zamba2": False}
LENGTHS = (9, 5, 2)


def language_model(name: str, changes: dict | None = None) -> WrappedLM:
    torch.manual_seed(0)
    model = WrappedLM(AutoConfig.for_model(name, **(FAMILIES[name] | (changes or {})))).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def prompts(model: WrappedLM) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(2, 64, (len(LENGTHS), max(LENGTHS))), torch.tensor(LENGTHS)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_logits_and_greedy_steps_are_those_of_transformers(name):
    model = language_model(name)
    ids, lengths = prompts(model)
    hidden, cache = model(model.embed(ids), None, lengths)
    for row, n in enumerate(LENGTHS):
        expected = model.model(input_ids=ids[row : row + 1, :n]).logits[0]
        assert torch.allclose(model.head(hidden[row, :n]), expected, atol=1e-5)
    tokens = model.head(hidden[torch.arange(len(LENGTHS)), lengths - 1]).argmax(-1)
    answers = [tokens]
    for _ in range(31):
        answers.append(model.head(model.step(model.embed(answers[-1]), cache)).argmax(-1))
    for row, n in enumerate(LENGTHS):
        made = model.model.generate(
            ids[row : row + 1, :n], max_new_tokens=32, do_sample=False, eos_token_id=None
        )
        assert made[0, n:].tolist() == torch.stack(answers)[:, row].tolist()


class Asked(TorchDispatchMode):
    """Counts the values of tensors that the host waits for."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "_local_scalar_dense" in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("padded", [True, False])
@torch.no_grad()
def test_a_step_does_not_wait_for_the_device(padded):
    model = language_model("llama")
    ids, lengths = prompts(model)
    _, cache = model(model.embed(ids), None, lengths if padded else None)
    assert cache.padded == padded
    row, longest = torch.tensor([2]), torch.tensor([0])
    assert (cache.select(row).padded, cache.select(longest).padded) == (padded, False)
    given = []
    model.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs), with_kwargs=True
    )
    with Asked() as waits:
        model.step(model.embed(ids[:, 0]), cache)
    [options] = given
    assert ("attention_mask" in options) == padded
    options["past_key_values"] = copy.deepcopy(cache.layers)
    with Asked() as theirs:
        model.model.base_model(**options)
    assert waits.count == theirs.count


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_prefix_is_shared_only_where_continuing_it_is_exact(name):
    model = language_model(name)
    assert model.shares_prefix is SHARES[name]
    ids, _ = prompts(model)
    _, cache = model(model.embed(ids[:1, :4]))
    if not SHARES[name]:
        with pytest.raises(UserError, match="zamba2 cannot continue a cache"):
            model(model.embed(ids[:1, 4:]), cache)
        return
    rows = cache.select(torch.tensor([0, 0]))
    before = rows.clone()
    lengths = torch.tensor([5, 2])
    continued, _ = model(model.embed(ids[:1, 4:].expand(2, -1)), rows, lengths)
    whole, _ = model(model.embed(ids[:1]))
    assert torch.allclose(continued[0], whole[0, 4:], atol=1e-5)
    assert torch.allclose(continued[1, :2], whole[0, 4:6], atol=1e-5)
    assert rows.nbytes == before.nbytes > cache.nbytes  # what was continued is as it was


def test_a_sliding_window_shares_no_prefix():
    """It counts columns: padding behind a prefix would push the prefix out of sight."""
    sliding = {**SHAPE, "num_key_value_heads": 2, "sliding_window": 16}
    torch.manual_seed(0)
    assert not WrappedLM(AutoConfig.for_model("mistral", **sliding)).eval().shares_prefix
    whole = sliding | {"sliding_window": None}
    assert WrappedLM(AutoConfig.for_model("mistral", **whole)).eval().shares_prefix


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_packed_projections_are_found_by_their_names(name):
    model = language_model(name, {"tie_word_embeddings": False})
    before = model.lora_targets
    quantize(model, "int8")
    assert before and model.lora_targets == before
    assert add(model, LowRankSettings(2, 4.0, before))


@torch.no_grad()
def test_rows_of_different_lengths_are_joined():
    model = language_model("llama")
    ids, _ = prompts(model)
    cache = model.new_cache(2)
    _, long = model(model.embed(ids[:1, :7]))
    _, short = model(model.embed(ids[1:2, :3]))
    cache.write_rows(torch.tensor([0]), long)
    cache.write_rows(torch.tensor([1]), short)
    assert cache.lengths.tolist() == [7, 3]
    token = model.embed(torch.tensor([5, 6]))
    stepped = model.step(token, cache)
    for row, alone in enumerate((long, short)):
        assert torch.allclose(stepped[row], model.step(token[row : row + 1], alone)[0], atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_whole_model_trains_saves_loads_and_generates(name, tmp_path):
    torch.manual_seed(0)
    text = AutoConfig.for_model(name, **FAMILIES[name])
    config = VLMambaConfig(text_config=text, vision_config=dict(TINY_CLIP), connector="vss_l2")
    model = VLMambaForConditionalGeneration(config)
    ids = torch.randint(2, 64, (2, 10))
    ids[:, : config.num_image_tokens] = config.image_token_id
    pixels = torch.rand(2, 3, 28, 28)
    loss = model(input_ids=ids, pixel_values=pixels, labels=ids).loss
    loss.backward()
    learnt = [n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()]
    assert any(name.startswith("language_model") for name in learnt)
    assert any(name.startswith("connector") for name in learnt)
    model.save_pretrained(tmp_path)
    again = VLMambaForConditionalGeneration.from_pretrained(tmp_path).eval()
    model.eval()
    with torch.no_grad():
        expected = model(input_ids=ids, pixel_values=pixels).logits
        assert torch.equal(again(input_ids=ids, pixel_values=pixels).logits, expected)
        made = again.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=6)
        alone = again.generate(input_ids=ids[1:], pixel_values=pixels[1:], max_new_tokens=6)
        assert made[1].tolist() == alone[0].tolist()


@pytest.mark.parametrize("beams", [2, 3])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_beams_continue_the_callers_cache(name, beams):
    """Pictures before and behind the place where the cache ends, each in its own row."""
    text = AutoConfig.for_model(name, **FAMILIES[name])
    model = VLMambaForConditionalGeneration(
        VLMambaConfig(text_config=text, vision_config=dict(TINY_CLIP))
    ).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    picture = [model.config.image_token_id] * model.config.num_image_tokens
    ids = torch.tensor([[7, *picture, 9, 11, *picture, 5], [8, *picture, 6, 3, *picture, 4]])
    pixels = torch.rand(4, 3, 28, 28)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": beams}
    whole = model.generate(input_ids=ids, pixel_values=pixels, **options)
    seen = 3 + len(picture)
    state = model(input_ids=ids[:, :seen], pixel_values=pixels[[0, 2]]).cache_params
    going_on = {"input_ids": ids, "pixel_values": pixels[[1, 3]], "cache_params": state}
    if SHARES[name]:
        assert model.generate(**going_on, **options).tolist() == whole.tolist()
    else:
        with pytest.raises(UserError, match="zamba2 cannot continue a cache"):
            model.generate(**going_on, **options)


def test_published_weights_of_a_wrapped_model_are_loaded(tmp_path):
    published = language_model("llama").model
    published.save_pretrained(tmp_path)
    text = AutoConfig.for_model("llama", **FAMILIES["llama"])
    config = VLMambaConfig(text_config=text, vision_config=dict(TINY_CLIP))
    model = VLMambaForConditionalGeneration(config)
    model.language_model.load_published(tmp_path)
    ids = torch.randint(2, 64, (1, 6))
    with torch.no_grad():
        expected = published(input_ids=ids).logits
        assert torch.equal(model.eval()(input_ids=ids).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_a_wrapped_model_is_assembled_from_its_published_weights(name, tmp_path):
    """Nothing of it has memory before the file is read: buffers that nobody saves included."""
    published = language_model(name).model
    published.save_pretrained(tmp_path)
    text = AutoConfig.for_model(name, **FAMILIES[name])
    model = assemble(VLMambaConfig(text_config=text, language_model_id=str(tmp_path)))
    ids = torch.randint(2, 64, (1, 6))
    assert torch.equal(model.eval()(input_ids=ids).logits, published(input_ids=ids).logits)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "phi"])
def test_its_cost_is_counted_without_weights_in_memory(name):
    model = language_model(name)
    layers = [m for m in model.model.base_model.modules() if isinstance(m, torch.nn.Linear)]
    matrices = sum(layer.weight.numel() for layer in layers)
    attention = 2 * 2 * 32 * 10**2  # two layers: scores and mixing, half of 10 x 10, width 32
    assert model.flops(10) == 2 * 10 * matrices + attention
    model.train()
    found = model.activation_bytes(1, 12, torch.float32)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model(torch.randn(1, 12, 32, requires_grad=True))[0]
    expected = sum(size for place, size in saved.items() if place not in own)
    assert hidden.requires_grad
    assert found.forward == found.kept < found.backward
    assert found.kept == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("name", [*FAMILIES, "mamba", "gemma2"])
def test_checkpointing_changes_no_gradient(name):
    shape = FAMILIES.get(name, SHAPE | {"head_dim": 8, "num_key_value_heads": 4})
    model = WrappedLM(AutoConfig.for_model(name, **shape)).train()
    embeds = torch.randn(2, 7, 32)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(embeds)[0].sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradients()
    model.model.activation_checkpointing_enable()
    assert all(map(torch.equal, gradients(), expected))


def test_checkpointing_sums_a_shared_block_s_gradients():
    """A block with two places gets its terms in another order: equal but for rounding."""
    kinds = ["mamba", "hybrid", "mamba", "hybrid"]
    model = language_model("zamba2", {"num_hidden_layers": 4, "layers_block_type": kinds}).train()
    embeds = torch.randn(2, 20, 32)
    found = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.model.activation_checkpointing_enable()
        model.head(model(embeds)[0]).logsumexp(-1).sum().backward()
        learning = [(n, p.grad.clone()) for n, p in model.named_parameters() if p.grad is not None]
        found.append(dict(learning))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        error = (found[1][name] - gradient).abs().max()
        assert error <= 1e-5 * gradient.abs().max(), name


@torch.no_grad()
@pytest.mark.parametrize("name", ["cohere", "gemma2", "granite"])
def test_logits_are_scaled_and_capped_as_the_family_does(name):
    heads = {"num_key_value_heads": 4, "head_dim": 8, "pad_token_id": 0}
    special = {"gemma2": {"final_logit_softcapping": 0.5}, "granite": {"logits_scaling": 4.0}}
    config = AutoConfig.for_model(name, **SHAPE | heads | special.get(name, {}))
    model = WrappedLM(config).eval()
    ids = torch.randint(2, 64, (2, 7))
    expected = model.model(input_ids=ids).logits
    hidden, _ = model(model.embed(ids))
    assert not torch.allclose(model.lm_head(hidden), expected, rtol=0.1)
    assert torch.allclose(model.head(hidden), expected, atol=1e-5)
    assert torch.allclose(model.head(hidden[:, -1]), expected[:, -1], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["opt", "falcon_h1"])
def test_a_head_that_asks_parts_of_its_model_is_the_family_s(name):
    """OPT's asks `model.decoder`, Falcon-H1's multiplies by `model.lm_head_multiplier`."""
    special = {"lm_head_multiplier": 0.25} if name == "falcon_h1" else {}
    model = WrappedLM(shrunk(AutoConfig.for_model(name, **special))).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    ids = torch.randint(2, 64, (2, 7))
    hidden, _ = model(model.embed(ids))
    assert torch.allclose(model.head(hidden), model.model(input_ids=ids).logits, atol=1e-5)


def test_embeddings_of_another_width_are_refused():
    """opt-350m's are narrower than its states: an image token would have to be as well."""
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 16, "ffn_dim": 48, "vocab_size": 64}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4}
    with pytest.raises(UserError, match="embeddings of width 16 and states of 32"):
        WrappedLM(AutoConfig.for_model("opt", **sizes, **heads))


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("mamba", ["linear_attention"] * 2),
        ("mamba2", ["linear_attention"] * 2),
        ("falcon_mamba", ["linear_attention"] * 2),
        ("falcon_h1", ["hybrid"] * 2),
        ("jamba", ["linear_attention", "linear_attention", "full_attention"]),
        ("recurrent_gemma", ["linear_attention", "linear_attention", "sliding_attention"]),
        ("rwkv", None),
        ("opt", None),
    ],
)
def test_published_recurrent_models_are_shrunk_with_a_layer_of_each_kind(name, kinds):
    small = shrunk(AutoConfig.for_model(name))
    assert getattr(small, "layer_types", None) == kinds
    assert small.hidden_size == 32


@pytest.mark.parametrize("name", ["gpt2", "bloom", "deepseek_v2"])
def test_every_family_is_shrunk_or_refused_in_one_line(name):
    config = AutoConfig.for_model(name)
    try:
        assert shrunk(config).num_hidden_layers == 2
    except UserError as error:
        assert str(error).startswith(f"--tiny cannot shrink a '{name}' model: ")


@torch.no_grad()
def test_a_hybrid_that_lists_its_attention_layers_is_shrunk_with_one_of_them():
    small = shrunk(AutoConfig.for_model("bamba", attn_layer_indices=[9, 18, 27]))
    assert (small.num_hidden_layers, small.attn_layer_indices) == (3, [2])
    model = WrappedLM(small).eval()
    ids = torch.randint(2, 64, (1, 9))
    hidden, _ = model(model.embed(ids))
    assert torch.allclose(model.head(hidden), model.model(input_ids=ids).logits, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_new_embedding_and_head_take_the_places_of_the_old_ones(name):
    model = language_model(name)
    names = set(model.state_dict())
    embedding, head = torch.nn.Embedding(70, 32), torch.nn.Linear(32, 70, bias=False)
    model.embedding, model.lm_head = embedding, head
    assert model.embedding is embedding is model.model.get_input_embeddings()
    assert model.lm_head is head is model.model.get_output_embeddings()
    assert set(model.state_dict()) == names - {"model.lm_head.bias"}  # Phi's
    assert model.head(torch.zeros(1, 32)).shape == (1, 70)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "phi"])
@torch.no_grad()
def test_the_head_of_a_quantized_model_is_quantized_too(name):
    model = language_model(name)
    hidden = torch.randn(2, 3, 32)
    want = model.head(hidden)
    quantize(model, "int8")
    assert isinstance(model.lm_head, QuantizedLinear)
    assert "lm_head" not in model._modules
    got = model.head(hidden)
    assert not torch.equal(got, want)
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05 * float(want.abs().max()))


@torch.no_grad()
def test_validation_switches_off_dropout_that_is_no_module():
    """Attention's is an argument of a function, by whether the layer is in training mode."""
    text = AutoConfig.for_model("llama", **FAMILIES["llama"], attention_dropout=0.5)
    config = VLMambaConfig(text_config=text, vision_config=dict(TINY_CLIP))
    model = VLMambaForConditionalGeneration(config).train()
    ids = torch.randint(2, 64, (2, 10))
    state = torch.get_rng_state()
    with without_dropout(model):
        output = model(input_ids=ids, labels=ids)
        assert output.logits is None  # as in training, where nobody needs them
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert model(input_ids=ids, labels=ids).loss != output.loss
    torch.testing.assert_close(model.eval()(input_ids=ids, labels=ids).loss, output.loss)
