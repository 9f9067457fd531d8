"""Every scan backend equals the reference: values, gradients, lengths, states, single steps."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch

from vlmamba.models import selective_scan as scan_module
from vlmamba.models.scan_backends import build, check, reference
from vlmamba.models.selective_scan import (
    causal_conv1d,
    causal_conv1d_step,
    resolve_backend,
    selective_scan,
    selective_scan_projected,
    selective_scan_step,
    use_backend,
)
from vlmamba_core.errors import UserError

TOLERANCE = 1e-5  # of the largest value, against the reference in float64
SCAN = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
CONV = ("x", "weight", "bias", "initial_state")
SEQUENCES = ("u", "delta", "B", "C", "z", "x")


@pytest.fixture(scope="module")
def cpu_kernel():
    if build.kernels() is None:
        pytest.skip("no C++ compiler here")


@pytest.fixture(params=["torch", "cpu", "cpu-AVX2", "cpu-DEFAULT"])
def backend(request, monkeypatch):
    """Each fast backend; the C++ one also as built for lesser instruction sets."""
    name, _, instruction_set = request.param.partition("-")
    if name == "cpu":
        request.getfixturevalue("cpu_kernel")
    if instruction_set:
        if instruction_set not in _instruction_sets():
            pytest.skip(f"this machine has no {instruction_set}")
        kernels = _lesser_kernels(instruction_set)
        monkeypatch.setattr("vlmamba.models.scan_backends.cpu.kernels", lambda: kernels)
    return name


def _instruction_sets() -> list[str]:
    """Those the tests can run here: this machine's and the lesser ones."""
    order = list(build.INSTRUCTION_SETS)
    own = torch.backends.cpu.get_cpu_capability()
    return order[order.index(own) :] if own in order else ["DEFAULT"]


def _lesser_kernels(instruction_set, loaded={}):  # noqa: B006  one load per session
    if instruction_set not in loaded:
        loaded[instruction_set] = build.load_kernels(instruction_set)
    return loaded[instruction_set]


def scan_inputs(batch=2, length=17, channels=37, states=16, dtype=torch.float32, seed=0) -> dict:
    """Inputs with the ranges of a trained Mamba: A in -N..-1, step sizes from 0.001 to 0.1."""
    rng = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=rng, dtype=dtype)  # noqa: E731
    return {
        "u": randn(batch, length, channels),
        "delta": randn(batch, length, channels),
        "A": -torch.arange(1, states + 1, dtype=dtype).repeat(channels, 1),
        "B": randn(batch, length, states),
        "C": randn(batch, length, states),
        "D": randn(channels),
        "z": randn(batch, length, channels),
        "delta_bias": torch.linspace(-7, -2, channels, dtype=dtype),
        "initial_state": randn(batch, channels, states),
    }


def conv_inputs(batch=2, length=17, channels=37, taps=4, dtype=torch.float32) -> dict:
    rng = torch.Generator().manual_seed(1)
    randn = lambda *shape: torch.randn(*shape, generator=rng, dtype=dtype)  # noqa: E731
    return {
        "x": randn(batch, length, channels),
        "weight": randn(channels, taps),
        "bias": randn(channels),
        "initial_state": randn(batch, taps - 1, channels),
    }


def to(inputs: dict, dtype: torch.dtype) -> dict:
    return {
        k: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for k, x in inputs.items()
    }


def assert_near(ours, truth, tolerance=TOLERANCE):
    for a, b in zip(ours, truth, strict=True):
        assert a.shape == b.shape
        error = (a.double() - b).abs().max() / b.abs().max().clamp(min=1e-6)
        assert error < tolerance, f"relative error {error:.2e}"


@pytest.mark.parametrize("length", [1, 3, 17, 1000])
@pytest.mark.parametrize(("channels", "states"), [(37, 16), (16, 5)])
def test_scan_equals_float64_reference(backend, length, channels, states):
    inputs = scan_inputs(length=length, channels=channels, states=states)
    inputs["lengths"] = torch.tensor([length, (length + 1) // 2])
    truth = selective_scan(**to(inputs, torch.float64), backend="reference")
    assert_near(selective_scan(**inputs, backend=backend), truth)


@pytest.mark.parametrize("without", ["D", "z", "delta_bias", "initial_state"])
def test_scan_without_an_option(backend, without):
    inputs = {**scan_inputs(), without: None}
    truth = selective_scan(
        **{k: x if x is None else x.double() for k, x in inputs.items()}, backend="reference"
    )
    assert_near(selective_scan(**inputs, backend=backend), truth)


def test_scan_without_softplus(backend):
    inputs = {**scan_inputs(), "delta_bias": None, "delta_softplus": False}
    inputs["delta"] = inputs["delta"].abs() / 10
    truth = selective_scan(**to(inputs, torch.float64), backend="reference")
    assert_near(selective_scan(**inputs, backend=backend), truth)


@pytest.mark.parametrize("step", [-1e4, -90.0, 0.0, 30.0, 1e4])
def test_scan_survives_extreme_step_sizes(backend, step):
    inputs = scan_inputs(length=5)
    inputs["delta"] = inputs["delta"] + step
    truth = selective_scan(**to(inputs, torch.float64), backend="reference")
    assert_near(selective_scan(**inputs, backend=backend), truth)


@pytest.mark.parametrize("gate", [-1e4, -100.0, 100.0])
def test_scan_survives_extreme_gates(backend, gate):
    inputs = {**scan_inputs(length=5), "z": torch.full((2, 5, 37), gate)}
    y, _ = selective_scan(**inputs, backend=backend)
    truth, _ = selective_scan(**to(inputs, torch.float64), backend="reference")
    assert (y - truth).abs().max() <= 1e-5 * max(gate, 1e-5)


def test_bfloat16_sums_in_float32(backend):
    inputs = scan_inputs(length=200)
    for name in ("u", "delta", "B", "C", "z"):
        inputs[name] = inputs[name].bfloat16()
    truth = selective_scan(**to(inputs, torch.float64), backend="reference")
    y, state = selective_scan(**inputs, backend=backend)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert_near([y], truth[:1], 2**-8)  # y's own rounding
    assert_near([state], truth[1:])


def test_mixed_dtypes_are_computed_in_float32(backend):
    inputs = scan_inputs()
    inputs["u"] = inputs["u"].half()
    truth = selective_scan(**to(inputs, torch.float64), backend="reference")
    y, state = selective_scan(**inputs, backend=backend)
    assert y.dtype == torch.float16
    assert_near([state], truth[1:])


def test_sliced_inputs_equal_copies(backend):
    inputs = scan_inputs(channels=32)
    both = torch.cat([inputs["u"], inputs["z"]], dim=-1)
    sliced = {**inputs, "u": both[..., :32], "z": both[..., 32:]}
    expected = selective_scan(**inputs, backend=backend)
    assert_near(selective_scan(**sliced, backend=backend), expected, 1e-7)


@pytest.mark.parametrize("k", range(1, 9))
def test_continuing_with_k_tokens_equals_one_pass(backend, k):
    inputs, conv = scan_inputs(length=20), conv_inputs(length=20)
    cut = lambda d, part: {  # noqa: E731
        n: x[:, part] if n in ("u", "delta", "B", "C", "z", "x") else x for n, x in d.items()
    }
    for function, whole in ((selective_scan, inputs), (causal_conv1d, conv)):
        truth, end = function(**whole, backend=backend)
        head, state = function(**cut(whole, slice(0, 20 - k)), backend=backend)
        tail = {**cut(whole, slice(20 - k, 20)), "initial_state": state}
        rest, final_state = function(**tail, backend=backend)
        assert_near([torch.cat([head, rest], 1), final_state], [truth, end], 2e-6)


@pytest.mark.parametrize("length", [5, 70])
def test_padded_rows_equal_the_rows_alone(backend, length):
    inputs, conv = scan_inputs(length=length), conv_inputs(length=length)
    lengths = torch.tensor([length, 2])
    for function, batch in ((selective_scan, inputs), (causal_conv1d, conv)):
        y, state = function(**batch, lengths=lengths, backend=backend)
        alone = {n: x[1:] if n in ("initial_state",) else x for n, x in batch.items()}
        for name in ("u", "delta", "B", "C", "z", "x"):
            if name in alone:
                alone[name] = alone[name][1:, :2]
        y_alone, state_alone = function(**alone, backend=backend)
        assert_near([y[1:, :2], state[1:]], [y_alone, state_alone], 1e-6)
        assert (y[1, 2:] == 0).all()


@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("length", [1, 5, 100])
def test_a_row_without_steps_keeps_its_state(backend, length, with_state):
    """To the bit; and its gradient goes through to the state that it began with."""
    lengths = torch.tensor([0, length])
    for function, inputs in (
        (selective_scan, scan_inputs(length=length)),
        (causal_conv1d, conv_inputs(length=length)),
    ):
        first = inputs["initial_state"]
        if not with_state:
            inputs["initial_state"], first = None, torch.zeros_like(first)
        y, state = function(**inputs, lengths=lengths, backend=backend)
        assert torch.equal(state[0], first[0]) and (y[0] == 0).all()
        assert not torch.equal(state[1], first[1])
        leaves = {n: x for n, x in inputs.items() if x is not None}
        for leaf in leaves.values():
            leaf.requires_grad_()
        y, state = function(**{**inputs, **leaves}, lengths=lengths, backend=backend)
        weight = torch.randn_like(state)
        (y[0].sum() + (state * weight)[0].sum()).backward()
        for name, leaf in leaves.items():
            expected = weight[0] if name == "initial_state" else torch.zeros(())
            given = leaf.grad[0] if name in (*SEQUENCES, "initial_state") else leaf.grad
            assert torch.equal(given, expected.expand_as(given)), name


@pytest.mark.parametrize("states", [16, 3])
def test_steps_equal_the_sequence(backend, states):
    inputs, conv = scan_inputs(length=9, states=states), conv_inputs(length=9)
    y, final_state = selective_scan(**inputs, backend=backend)
    state = inputs.pop("initial_state").clone()
    for t in range(9):
        token = {n: x[:, t] if x.ndim == 3 else x for n, x in inputs.items()}
        assert_near([selective_scan_step(state, **token, backend=backend)], [y[:, t]], 2e-6)
    assert_near([state], [final_state], 2e-6)

    y, final_state = causal_conv1d(**conv, backend=backend)
    state = conv["initial_state"].clone()
    for t in range(9):
        one = causal_conv1d_step(
            state, conv["x"][:, t], conv["weight"], conv["bias"], backend=backend
        )
        assert_near([one], [y[:, t]], 2e-6)
    assert_near([state], [final_state], 1e-7)


@pytest.mark.parametrize("length", [1, 3, 17, 300])
@pytest.mark.parametrize("taps", [4, 2, 20])  # 20: more than the C++ kernel has registers for
@pytest.mark.parametrize("activation", ["silu", None])
def test_conv_equals_torch(backend, length, taps, activation):
    inputs = conv_inputs(length=length, taps=taps)
    lengths = torch.tensor([length, (length + 1) // 2])
    y, state = causal_conv1d(**inputs, lengths=lengths, activation=activation, backend=backend)
    past = torch.cat([inputs["initial_state"], inputs["x"]], dim=1)
    truth = torch.nn.functional.conv1d(
        past.double().mT, inputs["weight"].double()[:, None], inputs["bias"].double(), groups=37
    ).mT
    truth = torch.nn.functional.silu(truth) if activation else truth
    for row, n in enumerate(lengths):
        assert_near([y[row, :n], state[row]], [truth[row, :n], past[row, n : n + taps - 1]])
        assert (y[row, n:] == 0).all()


def gradients(function, inputs: dict, names, **options) -> list[torch.Tensor]:
    """Gradients of one fixed weighted sum of both outputs."""
    leaves = {n: x.detach().clone().requires_grad_() for n, x in inputs.items()}
    y, state = function(**leaves, **options)
    weight = torch.linspace(-1, 1, y.shape[1], dtype=y.dtype)[:, None]
    loss = (y * weight).sum() + (state * state).sum()
    return torch.autograd.grad(loss, [leaves[n] for n in names])


@pytest.mark.parametrize("length", [1, 3, 17, 100])
@pytest.mark.parametrize("states", [16, 5])
def test_gradients_equal_the_reference(backend, length, states):
    lengths = torch.tensor([length, (length + 1) // 2])
    scan, conv = scan_inputs(length=length, states=states), conv_inputs(length=length)
    for function, inputs, names in ((selective_scan, scan, SCAN), (causal_conv1d, conv, CONV)):
        truth = gradients(
            function, to(inputs, torch.float64), names, lengths=lengths, backend="reference"
        )
        ours = gradients(function, inputs, names, lengths=lengths, backend=backend)
        assert_near(ours, truth, 5e-5)


@pytest.mark.parametrize("lengths", [None, [5, 2]])
def test_gradcheck(backend, lengths):
    lengths = None if lengths is None else torch.tensor(lengths)
    scan = scan_inputs(length=5, channels=3, states=2, dtype=torch.float64)
    scan["delta_bias"] = scan["delta_bias"] + 4  # steps large enough for finite differences
    conv = conv_inputs(length=5, channels=3, dtype=torch.float64)
    for function, inputs in ((selective_scan, scan), (causal_conv1d, conv)):
        names, leaves = zip(*inputs.items(), strict=True)
        torch.autograd.gradcheck(
            lambda *xs, f=function, n=names: f(
                **dict(zip(n, xs, strict=True)), lengths=lengths, backend=backend
            ),
            [x.requires_grad_() for x in leaves],
        )


def test_gradients_of_some_inputs_only(backend):
    inputs = scan_inputs()
    u = inputs.pop("u").requires_grad_()
    y, _ = selective_scan(u, **inputs, backend=backend)
    y.sum().backward()
    assert u.grad is not None and torch.isfinite(u.grad).all()


def test_backward_memory_is_that_of_the_inputs(cpu_kernel):
    inputs = scan_inputs(batch=1, length=256, channels=64)
    leaves = {n: x.requires_grad_() for n, x in inputs.items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        selective_scan(**leaves, backend="cpu")
    extra = sum(x.numel() for x in kept) - sum(x.numel() for x in inputs.values())
    assert extra <= inputs["u"].numel()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": torch.tensor([-1, 3])}, r"lengths are \[-1, 3\], expected integers in 0..17"),
        ({"lengths": torch.tensor([18, 3])}, r"\[18, 3\]"),
        ({"lengths": torch.tensor([17])}, r"lengths has shape \(1,\), expected \(2\)"),
        ({"delta": torch.zeros(2, 17, 36)}, r"delta has shape .*, expected \(2, 17, 37\)"),
        ({"A": torch.zeros(36, 16)}, r"A has shape"),
        ({"B": torch.zeros(2, 17, 15)}, r"B has shape"),
        ({"initial_state": torch.zeros(1, 37, 16)}, r"initial_state has shape"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        selective_scan(**{**scan_inputs(), **change})


def test_wrong_conv_and_step_arguments_are_named():
    with pytest.raises(ValueError, match="0 steps"):
        causal_conv1d(torch.zeros(2, 0, 3), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="'gelu'"):
        causal_conv1d(**conv_inputs(), activation="gelu")
    with pytest.raises(ValueError, match="state has shape"):
        causal_conv1d_step(torch.zeros(2, 2, 3), torch.zeros(2, 3), torch.zeros(3, 4))
    zeros = torch.zeros
    with pytest.raises(ValueError, match="one token"):
        selective_scan_step(
            zeros(2, 3, 4), zeros(2, 3), zeros(2, 3), zeros(3, 4), zeros(2, 5), zeros(2, 4)
        )


def test_backend_names():
    assert resolve_backend("reference", "cpu") == "reference"
    assert resolve_backend("auto", "cpu") in ("cpu", "torch")
    with use_backend("reference"):
        assert resolve_backend("auto", "cpu") == "reference"
        assert resolve_backend("torch", "cpu") == "torch"
    with pytest.raises(UserError, match="torch"):
        resolve_backend("troch", "cpu")
    with pytest.raises(UserError, match="cuda"):
        resolve_backend("cuda", "cpu")


@pytest.fixture
def no_choice_made():
    """The choices of before are forgotten, and those of the test after it."""
    caches = (scan_module._resolve, scan_module._module)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def has_packages(monkeypatch, *names: str, fault: str = "", of_cuda: str = "") -> None:
    """Pretend that only these are installed, and that the checks of the kernels say so."""
    faults = {"triton": fault, "cuda": of_cuda}
    monkeypatch.setattr(scan_module, "fault_of", lambda name, device: faults[name])
    monkeypatch.setattr(scan_module, "_installed", lambda *wanted: set(wanted) <= set(names))


def test_a_gpu_takes_mamba_ssm_else_triton(no_choice_made, monkeypatch):
    monkeypatch.setenv("CC", "cc")
    has_packages(monkeypatch, "mamba_ssm", "causal_conv1d", "triton")
    assert resolve_backend("auto", "cuda") == "cuda"
    scan_module._resolve.cache_clear()
    has_packages(monkeypatch, "mamba_ssm", "triton")
    assert resolve_backend("auto", "cuda") == "triton"
    assert resolve_backend("triton", "cuda") == "triton"


def test_packages_that_do_not_work_as_installed_are_not_taken(no_choice_made, monkeypatch):
    """mamba-ssm before 2.3 imports what transformers has no more; others lack the scan."""
    monkeypatch.setenv("CC", "cc")
    reason = "ImportError: cannot import name 'GreedySearchDecoderOnlyOutput'"
    has_packages(monkeypatch, "mamba_ssm", "causal_conv1d", "triton", of_cuda=reason)
    with pytest.warns(UserWarning, match="mamba-ssm and causal-conv1d are not used: ImportError"):
        assert resolve_backend("auto", "cuda") == "triton"
    with pytest.raises(UserError, match="'cuda' does not work as installed .ImportError"):
        resolve_backend("cuda", "cuda")


def test_a_backend_that_cannot_be_imported_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    monkeypatch.setitem(sys.modules, "causal_conv1d", None)
    monkeypatch.delitem(sys.modules, "vlmamba.models.scan_backends.cuda", raising=False)
    assert "Error: " in check.fault_of("cuda", torch.device("cpu"))


@pytest.mark.parametrize(
    ("packages", "compiler", "fault", "reason"),
    [
        (["triton"], "cc", "RuntimeError: no driver", "RuntimeError: no driver"),
        (["triton"], "", "", "a C compiler"),
        ([], "cc", "", "the package triton"),
    ],
)
def test_a_gpu_without_kernels_runs_torch_and_one_warning_says_why(
    no_choice_made, monkeypatch, packages, compiler, fault, reason
):
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    has_packages(monkeypatch, *packages, fault=fault)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [resolve_backend("auto", "cuda") for _ in range(2)] == ["torch", "torch"]
    assert len(caught) == 1 and reason in str(caught[0].message)
    if not fault:
        with pytest.raises(UserError, match=f"'triton' needs {reason}"):
            resolve_backend("triton", "cuda")


def test_a_backend_is_refused_where_it_cannot_run(no_choice_made, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    has_packages(monkeypatch, "triton")
    with pytest.raises(UserError, match="'triton' cannot run on 'cpu' tensors"):
        resolve_backend("triton", "cpu")
    with pytest.raises(UserError, match="needs mamba-ssm and causal-conv1d"):
        resolve_backend("cuda", "cuda")


def test_without_a_compiler_torch_runs_and_one_warning_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("VLMAMBA_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    caches = (build.kernels, scan_module._resolve, scan_module._module)
    for cache in caches:
        cache.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                assert resolve_backend("auto", "cpu") == "torch"
                selective_scan(**scan_inputs())
        assert [str(w.message)[:20] for w in caught] == ["the C++ scan kernels"]
    finally:
        for cache in caches:
            cache.cache_clear()


def scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state):
    """What mamba-ssm computes, channels first, on any device."""
    u, delta, B, C, z = (None if x is None else x.mT for x in (u, delta, B, C, z))
    y, state = reference.selective_scan(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, None, None
    )
    return y.mT, state


def conv_fn(x, weight, bias, activation):
    """What causal-conv1d computes, channels first, on any device."""
    return reference.causal_conv1d(x.mT, weight, bias, None, None, activation)[0].mT


@pytest.fixture
def cuda_backend(monkeypatch):
    """The `cuda` backend's module around stand-ins for the GPU packages."""
    packages = {
        "causal_conv1d": {"causal_conv1d_fn": conv_fn, "causal_conv1d_update": None},
        "mamba_ssm.ops.selective_scan_interface": {"selective_scan_fn": scan_fn},
        "mamba_ssm.ops.triton.selective_state_update": {"selective_state_update": None},
    }
    for name, functions in packages.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            parent = ".".join(parts[:end])
            monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        vars(sys.modules[name]).update(functions)
    monkeypatch.delitem(sys.modules, "vlmamba.models.scan_backends.cuda", raising=False)
    yield importlib.import_module("vlmamba.models.scan_backends.cuda")
    sys.modules.pop("vlmamba.models.scan_backends.cuda")


@pytest.mark.parametrize("lengths", [None, torch.tensor([17, 5]), torch.tensor([0, 17])])
@pytest.mark.parametrize("with_state", [False, True])
def test_cuda_backend_feeds_states_and_lengths(cuda_backend, lengths, with_state):
    scan = {**scan_inputs(channels=40), "delta_softplus": True, "lengths": lengths}
    conv = {**conv_inputs(channels=40), "activation": "silu", "lengths": lengths}
    for function, inputs in (("selective_scan", scan), ("causal_conv1d", conv)):
        if not with_state:
            inputs["initial_state"] = None
        ours = getattr(cuda_backend, function)(**inputs)
        assert_near(ours, getattr(reference, function)(**inputs), 1e-6)


def test_the_check_before_use_finds_a_wrong_cuda_backend(cuda_backend, monkeypatch):
    """Its last state has no gradient, which is no fault."""
    assert check.check_on(cuda_backend, torch.device("cpu")) == ""

    def wrong(*arguments, **options):
        y, state = scan_fn(*arguments, **options)
        return 1.01 * y, state

    monkeypatch.setattr(cuda_backend, "selective_scan_fn", wrong)
    found = check.check_on(cuda_backend, torch.device("cpu"))
    assert found == "the relative error of the scan is 1.0e-02 on cpu"

    def missing(*arguments, **options):
        raise RuntimeError("built without selective_scan_cuda\nsee MAMBA_KEEP_CUDA_BUILD")

    monkeypatch.setattr(cuda_backend, "selective_scan_fn", missing)
    found = check.check_on(cuda_backend, torch.device("cpu"))
    assert found == "RuntimeError: built without selective_scan_cuda"


def test_what_mamba_ssm_does_not_take_goes_to_pytorch(cuda_backend):
    """float64, more than 256 states, and a step without D and delta's bias (it reads strides)."""
    exact = to(scan_inputs(channels=40), torch.float64)
    options = {"delta_softplus": True, "lengths": None}
    assert cuda_backend.selective_scan(**exact, **options)[1].dtype == torch.float64
    conv = to(conv_inputs(channels=40), torch.float64)
    options = {"activation": "silu", "lengths": None}
    assert cuda_backend.causal_conv1d(**conv, **options)[0].dtype == torch.float64
    given = []
    cuda_backend.selective_state_update = lambda *tensors: given.extend(tensors)
    row, state = torch.ones(2, 3), torch.ones(2, 3, 4)
    rates, inputs = -torch.ones(3, 4), torch.ones(2, 4)
    cuda_backend.selective_scan_step(state, row, row, rates, inputs, inputs, None, None, None, True)
    assert [given[place].tolist() for place in (6, 8)] == [[0.0] * 3] * 2


@pytest.mark.parametrize("damage", [slice(0, -7), slice(1, None), slice(0, 0)])
def test_a_damaged_kept_kernel_is_built_anew(damage, cpu_kernel, tmp_path, monkeypatch):
    name = build.instruction_set()
    build.load_kernels(name)  # kept by now
    key = build._key((*build._FLAGS, *build.INSTRUCTION_SETS.get(name, ())))
    [file] = (build.cache_dir() / "kernels" / key).glob(f"*_{name.lower()}*.so")
    kept = tmp_path / file.relative_to(build.cache_dir())
    kept.parent.mkdir(parents=True)
    monkeypatch.setenv("VLMAMBA_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "_build", lambda *_: "built anew")
    kept.write_bytes(file.read_bytes())
    assert build.load_kernels(name) != "built anew"
    kept.unlink()  # the loaded one is mapped
    kept.write_bytes(file.read_bytes()[damage])
    assert build.load_kernels(name) == "built anew"


def test_cuda_backend_differentiates_y_and_refuses_the_final_state(cuda_backend):
    grads = []
    for module in (cuda_backend, reference):
        leaves = {n: x.requires_grad_() for n, x in scan_inputs().items()}
        y, state = module.selective_scan(**leaves, delta_softplus=True, lengths=None)
        loss = (y * torch.linspace(-1, 1, 17)[:, None]).sum()
        grads.append(torch.autograd.grad(loss, list(leaves.values()), retain_graph=True))
        if module is cuda_backend:
            with pytest.raises(RuntimeError, match="no gradient through final_state"):
                state.sum().backward()
    assert_near(*grads, 5e-5)


@pytest.fixture
def gpu():
    for package in ("mamba_ssm", "causal_conv1d"):
        pytest.importorskip(package, reason=f"needs {package}")
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [None, torch.tensor([100, 37]), torch.tensor([100, 0])])
def test_cuda_backend_equals_the_reference(gpu, dtype, lengths):
    tolerance = TOLERANCE if dtype == torch.float32 else 2**-7
    scan, conv = scan_inputs(channels=64, length=100), conv_inputs(channels=64, length=100)
    for function, inputs in ((selective_scan, scan), (causal_conv1d, conv)):
        rows = {
            n: x.to(dtype) for n, x in inputs.items() if n in ("u", "delta", "B", "C", "z", "x")
        }
        inputs = {**inputs, **rows}
        truth = function(**to(inputs, torch.float64), lengths=lengths, backend="reference")
        there = {n: x.cuda() for n, x in inputs.items()}
        if function is causal_conv1d:
            there["initial_state"] = there["initial_state"].to(dtype)
        ours = function(**there, lengths=lengths, backend="cuda")
        assert_near([x.cpu() for x in ours], truth, tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_without_lengths_and_states_equals_the_reference(gpu, dtype):
    """As training asks it: mamba-ssm's own kernel, in its own numbers, and its gradients."""
    check_on_the_gpu("cuda", dtype, None, False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [None, torch.tensor([100, 37])])
def test_triton_equals_the_reference_on_a_gpu(dtype, lengths):
    check_on_the_gpu("triton", dtype, lengths, True)


def check_on_the_gpu(backend: str, dtype: torch.dtype, lengths, with_state: bool) -> None:
    """The scan and its gradients against float64 on the CPU."""
    inputs = scan_inputs(channels=64, length=100)
    if not with_state:
        del inputs["initial_state"]
    rows = ("u", "delta", "B", "C", "z")
    inputs |= {name: inputs[name].to(dtype) for name in rows}
    found = []
    exact = ("cpu", "reference", to(inputs, torch.float64))
    for device, name, there in (exact, ("cuda", backend, inputs)):
        leaves = {n: x.to(device).detach().requires_grad_() for n, x in there.items()}
        far = None if lengths is None else lengths.to(device)
        y, _ = selective_scan(**leaves, lengths=far, backend=name)
        weights = torch.linspace(-1, 1, 100, device=device)[:, None]
        grads = torch.autograd.grad((y.double() * weights).sum(), list(leaves.values()))
        found.append([x.cpu().double() for x in (y, *grads)])
    assert_near(found[1], found[0], 5e-5 if dtype == torch.float32 else 2**-6)


@pytest.mark.gpu
def test_cuda_steps_equal_the_reference(gpu):
    scan, conv = scan_inputs(channels=64), conv_inputs(channels=64)
    token = {n: x[:, 0] if x.ndim == 3 and n != "initial_state" else x for n, x in scan.items()}
    state = token.pop("initial_state")
    steps = []
    for device, backend in (("cpu", "reference"), ("cuda", "cuda")):
        h, past = state.to(device, copy=True), conv["initial_state"].to(device, copy=True)
        there = {n: x.to(device) for n, x in token.items()}
        taps = [conv[n].to(device) for n in ("weight", "bias")]
        y = selective_scan_step(h, **there, backend=backend)
        c = causal_conv1d_step(past, conv["x"][:, 0].to(device), *taps, backend=backend)
        steps.append([x.cpu().double() for x in (y, h, c, past)])
    assert_near(steps[1], steps[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("continued", [False, True])
def test_projected_scan_equals_the_scan_of_its_parts(dtype, continued):
    torch.manual_seed(0)
    batch, length, channels, states, rank = 3, 37, 21, 5, 4
    z, u = torch.randn(batch, length, 2 * channels).to(dtype).chunk(2, dim=-1)
    delta = torch.randn(batch, length, channels).to(dtype)
    bc = torch.randn(batch, length, rank + 2 * states).to(dtype)[..., rank:]
    a_log, d = torch.randn(channels, states).to(dtype), torch.randn(channels).to(dtype)
    bias = torch.randn(channels).to(dtype)
    options = {
        "initial_state": torch.randn(batch, channels, states) if continued else None,
        "lengths": torch.tensor([37, 0, 20]) if continued else None,
    }
    b, c = bc.chunk(2, dim=-1)
    want, state = selective_scan(
        u, delta, -torch.exp(a_log.float()), b, c, d, z, bias, backend="reference", **options
    )
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    if continued:  # the same state for all rows, which lies in memory once
        options["initial_state"] = options["initial_state"][:1].expand(batch, -1, -1)
        want, state = selective_scan(
            u, delta, -torch.exp(a_log.float()), b, c, d, z, bias, backend="reference", **options
        )
        wrong = options | {"initial_state": options["initial_state"][:1]}
        with torch.inference_mode(), pytest.raises(ValueError, match="initial_state has shape"):
            selective_scan_projected(u, delta, a_log, bc, d, z, bias, **wrong)
    for backend in ("auto", "torch"):
        with torch.inference_mode():
            got = selective_scan_projected(
                u, delta, a_log, bc, d, z, bias, backend=backend, **options
            )
        torch.testing.assert_close(got[0], want, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(got[1], state, rtol=1e-4, atol=1e-4)


GRADIENTS = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from test_selective_scan import gradients, scan_inputs
from vlmamba.models.selective_scan import selective_scan
found = gradients(selective_scan, scan_inputs(batch=2, length=40), ["B", "C"], backend="cpu")
torch.save(found, sys.argv[1])
"""


def test_gradients_where_parallel_regions_have_fewer_threads(cpu_kernel, tmp_path):
    """OMP_NUM_THREADS=4,1: how many groups a row has is not to be asked inside of one."""
    found = []
    for threads in ("4", "4,1"):
        out = tmp_path / f"{threads}.pt"
        command = [sys.executable, "-c", GRADIENTS, str(out), str(Path(__file__).parent)]
        subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": threads}, check=True)
        found.append(torch.load(out))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_of_no_row_are_none_at_all(backend):
    inputs = scan_inputs(batch=0)
    for grad in gradients(selective_scan, inputs, ["u", "A", "B"], backend=backend):
        assert not grad.any()
