"""Mamba-2: its scan against the recurrence, the model against transformers' Mamba2ForCausalLM."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from safetensors.torch import save_file
from test_mamba import original_layout
from tiny import TINY_MIXERS, tiny_config
from transformers import Mamba2Config, Mamba2ForCausalLM

from vlmamba.config import VLMambaConfig
from vlmamba.configs.presets import LANGUAGE_MODELS
from vlmamba.models.language.mamba_config import published_fields
from vlmamba.models.mixers.mamba2 import CHUNK, Mamba2Mixer, ssd, ssd_step
from vlmamba.models.scan_backends import build, cpu
from vlmamba.models.vlm import VLMambaForConditionalGeneration
from vlmamba_core.errors import UserError

MAMBA2 = TINY_MIXERS["mamba2"]


def scan_inputs(length, dtype=torch.float64, batch=2, heads=4, width=3, groups=2, states=5) -> dict:
    shapes = {
        "x": (batch, length, heads, width),
        "dt": (batch, length, heads),
        "B": (batch, length, groups, states),
        "C": (batch, length, groups, states),
        "D": (heads,),
        "dt_bias": (heads,),
        "initial_state": (batch, heads, width, states),
    }
    tensors = {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
    return tensors | {"A": -torch.rand(heads, dtype=dtype) - 0.1}


def recurrence(x, dt, A, B, C, D, dt_bias, initial_state, lengths=None):
    """The definition, one token at a time."""
    h, outputs = initial_state, []
    B, C = (t.repeat_interleave(x.shape[2] // t.shape[2], dim=2) for t in (B, C))
    for t in range(x.shape[1]):
        step = torch.nn.functional.softplus(dt[:, t] + dt_bias)
        new = torch.exp(step * A)[..., None, None] * h
        new = new + (step[..., None] * x[:, t])[..., None] * B[:, t, :, None, :]
        keep = torch.ones(len(x)) if lengths is None else (t < lengths)
        h = torch.where(keep.bool()[:, None, None, None], new, h)
        outputs.append((h * C[:, t, :, None, :]).sum(-1) + D[:, None] * x[:, t])
    return torch.stack(outputs, dim=1), h


@pytest.fixture(params=["torch", "cpu"])
def backend(request) -> str:
    if request.param == "cpu" and build.kernels() is None:
        pytest.skip("needs a C++ compiler")
    return request.param


@pytest.mark.parametrize("length", [1, 5, CHUNK, CHUNK + 1, 3 * CHUNK - 7])
@pytest.mark.parametrize("padded", [False, True])
def test_the_chunked_scan_is_the_recurrence(length, padded, backend):
    inputs = scan_inputs(length)
    lengths = torch.tensor([length, (length + 1) // 2]) if padded else None
    y, state = ssd(**inputs, lengths=lengths, backend=backend)
    expected_y, expected_state = recurrence(**inputs, lengths=lengths)
    assert torch.allclose(state, expected_state, rtol=1e-10, atol=1e-12)
    for row, real in enumerate(lengths if padded else [length] * 2):
        assert torch.allclose(y[row, :real], expected_y[row, :real], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("length", [1, CHUNK + 9])
def test_a_row_without_steps_keeps_its_state(length, backend):
    inputs = scan_inputs(length)
    _, state = ssd(**inputs, lengths=torch.tensor([0, length]), backend=backend)
    assert torch.equal(state[0], inputs["initial_state"][0])
    assert not torch.equal(state[1], inputs["initial_state"][1])


def test_its_gradients_are_those_of_the_recurrence(backend):
    inputs = scan_inputs(CHUNK + 9)
    lengths = torch.tensor([CHUNK + 9, CHUNK - 3])
    weights = torch.randn(2, CHUNK + 9, 4, 3, dtype=torch.float64)
    weights[1, CHUNK - 3 :] = 0  # outputs at padding mean nothing
    state_weights = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    gradients = []
    for scan in (functools.partial(ssd, backend=backend), recurrence):
        leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
        y, state = scan(**leaves, lengths=lengths)
        ((y * weights).sum() + (state * state_weights).sum()).backward()
        gradients.append({name: leaf.grad for name, leaf in leaves.items()})
    for name in inputs:
        assert torch.allclose(gradients[0][name], gradients[1][name], rtol=1e-8, atol=1e-9), name


def test_gradcheck(backend):
    inputs = scan_inputs(6, batch=1, heads=2, width=2, groups=1, states=2)
    names = list(inputs)
    tensors = [inputs[name].requires_grad_() for name in names]

    def run(*tensors):
        return ssd(**dict(zip(names, tensors, strict=True)), backend=backend)

    assert torch.autograd.gradcheck(run, tensors)


def test_small_decays_behind_large_ones_keep_their_digits(backend):
    """Step sizes from 1e-4 to 30 in one chunk, in float32."""
    inputs = scan_inputs(CHUNK, batch=1)
    inputs["dt"] = torch.linspace(30, -9, CHUNK, dtype=torch.float64)[None, :, None].expand(
        1, -1, 4
    )
    expected, expected_state = recurrence(**inputs)
    narrow = {name: tensor.float() for name, tensor in inputs.items()}
    y, state = ssd(**narrow, backend=backend)
    assert (y - expected).abs().max() / expected.abs().max() < 2e-6
    assert (state - expected_state).abs().max() / expected_state.abs().max() < 2e-6


def scanned_and_gradients(run, inputs, weights, state_weights) -> list[torch.Tensor]:
    """y, the state, and what (y weights + state state_weights) gives each input."""
    leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
    y, state = run(**leaves)
    loss = (y.double() * weights).sum() + (state.double() * state_weights).sum()
    return [y, state, *torch.autograd.grad(loss, leaves.values())]


@pytest.mark.parametrize("instructions", build.INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("batch", "heads", "width", "groups", "states"), [(1, 8, 64, 1, 64), (3, 6, 20, 2, 33)]
)
def test_each_instruction_set_computes_the_recurrence(
    instructions, dtype, batch, heads, width, groups, states, monkeypatch
):
    """Sizes of whole registers and others; several threads share a group's heads."""
    if list(build.INSTRUCTION_SETS).index(instructions) < list(build.INSTRUCTION_SETS).index(
        build.instruction_set()
    ):
        pytest.skip(f"this machine has no {instructions}")
    built = build.load_kernels(instructions)
    monkeypatch.setattr(cpu, "kernels", lambda: built)
    length = 2 * CHUNK + 9
    sizes = {"batch": batch, "heads": heads, "width": width, "groups": groups, "states": states}
    inputs = scan_inputs(length, **sizes)
    rows = ("x", "dt", "B", "C")  # the layer's own parameters and states are wider
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = {name: t.to(dtype if name in rows else wide) for name, t in inputs.items()}
    weights = torch.randn(batch, length, heads, width, dtype=dtype).double()
    state_weights = torch.randn(batch, heads, width, states, dtype=wide).double()
    got = scanned_and_gradients(
        functools.partial(ssd, backend="cpu"), inputs, weights, state_weights
    )
    exact = {name: t.double() for name, t in inputs.items()}
    expected = scanned_and_gradients(recurrence, exact, weights, state_weights)
    tolerance = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 8e-3}[dtype]
    for one, other in zip(got, expected, strict=True):
        assert (one - other).abs().max() / other.abs().max() < tolerance


@torch.no_grad()
def test_one_token_steps_are_the_recurrence():
    inputs = scan_inputs(7)
    expected, expected_state = recurrence(**inputs)
    state = inputs.pop("initial_state")
    one = {name: inputs[name] for name in ("A", "D", "dt_bias")}
    for t in range(7):
        y = ssd_step(state, **one, **{name: inputs[name][:, t] for name in ("x", "dt", "B", "C")})
        assert torch.allclose(y, expected[:, t], rtol=1e-10)
    assert torch.allclose(state, expected_state, rtol=1e-10)


@pytest.mark.parametrize("groups", [1, 2])
@torch.no_grad()
def test_a_layer_stepped_equals_a_layer_run(groups):
    config = tiny_config(**MAMBA2, n_groups=groups)
    mixer = Mamba2Mixer(config)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    u = torch.randn(2, 11, config.d_model)
    expected, conv, ssm = mixer(u)
    shapes = Mamba2Mixer.state_shapes(config)
    assert (conv.shape[1:], ssm.shape[1:]) == shapes
    conv_state, ssm_state = (torch.zeros(2, *shape) for shape in shapes)
    for t in range(11):
        y = mixer.step(u[:, t], conv_state, ssm_state)
        assert torch.allclose(y, expected[:, t], atol=1e-5)
    assert torch.allclose(ssm_state, ssm, atol=1e-5)


@pytest.fixture(params=[1, 2], ids=["1 group", "2 groups"])
def theirs(request) -> Mamba2ForCausalLM:
    config = Mamba2Config(
        vocab_size=320,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=16,
        num_heads=8,
        head_dim=8,
        n_groups=request.param,
        chunk_size=16,
        tie_word_embeddings=True,
    )
    model = Mamba2ForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def write_checkpoint(folder, model: Mamba2ForCausalLM, layout: str) -> None:
    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    config = model.config.to_dict()
    if layout == "original":
        tensors = original_layout(tensors)
        config = {
            "d_model": 32,
            "d_intermediate": 0,
            "n_layer": 2,
            "vocab_size": 317,
            "ssm_cfg": {
                "layer": "Mamba2",
                "d_state": 16,
                "headdim": 8,
                "ngroups": model.config.n_groups,
            },
            "attn_layer_idx": [],
            "rms_norm": True,
            "residual_in_fp32": True,
            "pad_vocab_size_multiple": 16,
            "tie_embeddings": True,
        }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")


def ours_from(folder) -> VLMambaForConditionalGeneration:
    model = VLMambaForConditionalGeneration(tiny_config(**published_fields(folder)))
    model.language_model.load_published(folder)
    return model.eval()


@pytest.mark.parametrize("layout", ["original", "hf"])
@pytest.mark.parametrize("length", [3, 33, 150])
@torch.no_grad()
def test_both_published_layouts_give_the_same_model(tmp_path, theirs, layout, length):
    write_checkpoint(tmp_path, theirs, layout)
    ours = ours_from(tmp_path)
    ids = torch.randint(2, 320, (3, length))
    expected, actual = theirs(ids).logits, ours(ids).logits
    assert (actual - expected).abs().max() / expected.abs().max() < 1e-5


@torch.no_grad()
def test_32_greedy_steps(tmp_path, theirs):
    write_checkpoint(tmp_path, theirs, "original")
    ours = ours_from(tmp_path)
    ids = torch.randint(2, 320, (2, 9))
    options = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False,
               "output_logits": True, "return_dict_in_generate": True}  # fmt: skip
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)
    actual = ours.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(actual.sequences, expected.sequences)
    for a, b in zip(actual.logits, expected.logits, strict=True):
        assert (a - b).abs().max() / b.abs().max() < 1e-5


def test_gradients_equal_those_of_transformers(tmp_path, theirs):
    write_checkpoint(tmp_path, theirs, "hf")
    ours = ours_from(tmp_path).train()
    ids = torch.randint(2, 320, (2, 90))
    theirs(ids, labels=ids).loss.backward()
    ours(ids, labels=ids).loss.backward()
    mine = dict(ours.language_model.named_parameters())
    for name, parameter in theirs.backbone.named_parameters():
        grad = mine[name.replace("embeddings.", "embedding.")].grad
        error = (grad - parameter.grad).abs().max() / parameter.grad.abs().max()
        assert error < 1e-4, name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_bias": True}, "use_bias"),
        ({"time_step_limit": [0.0, 0.5]}, "time_step_limit"),
        ({"use_conv_bias": False}, "use_conv_bias"),
    ],
)
def test_what_we_do_not_have_is_refused(tmp_path, theirs, change, message):
    write_checkpoint(tmp_path, theirs, "hf")
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        published_fields(tmp_path)


def test_a_head_of_its_own_is_refused(tmp_path, theirs):
    write_checkpoint(tmp_path, theirs, "hf")
    tensors = {k: v.clone() for k, v in theirs.state_dict().items()}
    tensors["lm_head.weight"] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="output head"):
        ours_from(tmp_path)


@pytest.fixture
def config() -> VLMambaConfig:
    return tiny_config(**MAMBA2)


@pytest.mark.parametrize("k", range(1, 9))
@torch.no_grad()
def test_continuing_a_state_with_k_tokens_equals_one_pass(model, k):
    ids = torch.randint(2, 320, (2, CHUNK + 12))
    whole = model(ids).logits[:, -k:]
    state = model(ids[:, :-k], use_cache=True).cache_params
    continued = model(ids[:, -k:], cache_params=state).logits
    assert torch.allclose(continued, whole, atol=1e-5)
    assert state.positions == CHUNK + 12


@torch.no_grad()
def test_a_row_does_not_depend_on_its_neighbors(model):
    ids = torch.randint(2, 320, (3, CHUNK + 20))
    lengths = [CHUNK + 20, CHUNK - 1, 2]
    mask = torch.arange(CHUNK + 20) < torch.tensor(lengths)[:, None]
    padded = model(ids, attention_mask=mask.long(), use_cache=True)
    for row, length in enumerate(lengths):
        alone = model(ids[row : row + 1, :length], use_cache=True)
        assert torch.allclose(padded.logits[row, :length], alone.logits[0], atol=1e-5)
        for name in ("conv", "ssm"):
            mine, other = getattr(padded.cache_params, name), getattr(alone.cache_params, name)
            assert torch.allclose(mine[:, row], other[:, 0], atol=1e-5)


@pytest.mark.parametrize("name", [name for name in LANGUAGE_MODELS if name.startswith("mamba2-")])
def test_presets_have_the_published_shapes(name):
    sizes = {"130m": (768, 24), "370m": (1024, 48), "780m": (1536, 48), "1.3b": (2048, 48)}
    width, layers = (sizes | {"2.7b": (2560, 64)})[name.removeprefix("mamba2-")]
    published = Mamba2Config(
        vocab_size=50288,  # 50277 padded to a multiple of 16
        hidden_size=width,
        num_hidden_layers=layers,
        num_heads=2 * width // 64,
        n_groups=1,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        ours = VLMambaForConditionalGeneration(VLMambaConfig.preset(f"{name}+clip-l-336+mlp"))
        theirs = Mamba2ForCausalLM(published).backbone
    shapes = [
        {name.replace("embeddings.", "embedding."): p.shape for name, p in lm.named_parameters()}
        for lm in (ours.language_model, theirs)
    ]
    assert shapes[0] == shapes[1]


def test_channels_that_do_not_divide_into_heads_are_explained():
    with pytest.raises(UserError, match="head_dim"):
        VLMambaForConditionalGeneration(tiny_config(mixer="mamba2", head_dim=24))
    with pytest.raises(UserError, match="n_groups"):
        VLMambaForConditionalGeneration(tiny_config(mixer="mamba2", head_dim=8, n_groups=3))
