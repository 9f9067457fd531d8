"""The Triton kernels against float64 references; test_triton_scan.py runs this on CPU tensors.

It needs TRITON_INTERPRET=1 before Triton is imported, so it has a process of its own.
"""

from __future__ import annotations

import pytest
import torch
from test_selective_scan import CONV, assert_near, conv_inputs, gradients, scan_inputs, to

from vlmamba.models.scan_backends import check, triton, triton_scan
from vlmamba.models.selective_scan import (
    causal_conv1d,
    causal_conv1d_step,
    resolve_backend,
    selective_scan,
    selective_scan_step,
)

STEPS = 9  # two chunks and a part of one
TOLERANCE = 1e-5
OPTIONAL = ("D", "z", "delta_bias", "initial_state")


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Several chunks and blocks of channels in small tensors: the interpreter is slow."""
    monkeypatch.setattr(check, "STEPS", 7)
    monkeypatch.setattr(triton_scan, "CHUNK", 4)
    monkeypatch.setattr(triton_scan, "STATES_OF_A_WARP", 16)  # 2 channels of 5 states


def small_scan(length=STEPS, **options) -> dict:
    return scan_inputs(length=length, channels=3, states=5, **options)


def without(inputs: dict, names) -> dict:
    return {n: x for n, x in inputs.items() if n not in names}


@pytest.mark.parametrize(
    ("absent", "lengths", "softplus"),
    [
        ((), [STEPS, 6], True),
        ((), None, True),
        (OPTIONAL, [STEPS, 6], True),
        (("delta_bias",), [4, STEPS], False),
    ],
)
def test_the_scan_and_its_gradients_are_the_references(absent, lengths, softplus):
    inputs = without(small_scan(), absent)
    if not softplus:
        inputs["delta"] = inputs["delta"].abs() / 10
    options = {
        "lengths": None if lengths is None else torch.tensor(lengths),
        "delta_softplus": softplus,
    }
    exact = to(inputs, torch.float64)
    truth = selective_scan(**exact, **options, backend="reference")
    assert_near(selective_scan(**inputs, **options, backend="triton"), truth, TOLERANCE)
    truth = gradients(selective_scan, exact, inputs, **options, backend="reference")
    assert_near(gradients(selective_scan, inputs, inputs, **options, backend="triton"), truth, 5e-5)


@pytest.mark.parametrize("states", [1, 16])
def test_the_scan_at_one_step_and_other_sizes(states):
    inputs = scan_inputs(length=1, channels=3, states=states, batch=1)
    exact = to(inputs, torch.float64)
    truth = gradients(selective_scan, exact, inputs, backend="reference")
    assert_near(gradients(selective_scan, inputs, inputs, backend="triton"), truth, 5e-5)


def test_a_row_without_steps_keeps_its_state():
    lengths = torch.tensor([0, 5])
    for function, inputs in (
        (selective_scan, small_scan(5)),
        (causal_conv1d, conv_inputs(length=5, channels=5)),
    ):
        leaves = {n: x.requires_grad_() for n, x in inputs.items()}
        y, state = function(**leaves, lengths=lengths, backend="triton")
        assert torch.equal(state[0], inputs["initial_state"][0]) and (y[0] == 0).all()
        weight = torch.randn_like(state)
        (y[0].sum() + (state * weight)[0].sum()).backward()
        for name, leaf in leaves.items():
            rows = name in ("u", "delta", "B", "C", "z", "x", "initial_state")
            given = leaf.grad[0] if rows else leaf.grad
            expected = weight[0] if name == "initial_state" else torch.zeros(())
            assert torch.equal(given, expected.expand_as(given)), name


@pytest.mark.parametrize("step", [-1e4, -90.0, 30.0, 1e4])
def test_the_scan_survives_extreme_step_sizes(step):
    inputs = small_scan(5)
    inputs["delta"] = inputs["delta"] + step
    exact = to(inputs, torch.float64)
    truth = selective_scan(**exact, backend="reference")
    assert_near(selective_scan(**inputs, backend="triton"), truth, TOLERANCE)
    for ours, expected in zip(
        gradients(selective_scan, inputs, inputs, backend="triton"),
        gradients(selective_scan, exact, inputs, backend="reference"),
        strict=True,
    ):
        assert (ours - expected).abs().max() <= 5e-5 * expected.abs().max() + 1e-30


def test_bfloat16_is_summed_in_float32():
    inputs = small_scan(18)
    for name in ("u", "delta", "B", "C", "z"):
        inputs[name] = inputs[name].bfloat16()
    y, state = selective_scan(**inputs, backend="triton")
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    truth = selective_scan(**to(inputs, torch.float64), backend="reference")
    assert_near([y], truth[:1], 2**-7)  # the interpreter cuts y's last digits, a GPU rounds
    assert_near([state], truth[1:], TOLERANCE)
    rows = {n: x[:, :6] if n in ("u", "delta", "B", "C", "z") else x for n, x in inputs.items()}
    ours = gradients(selective_scan, rows, rows, backend="triton")
    truth = gradients(selective_scan, to(rows, torch.float64), rows, backend="reference")
    assert [x.dtype for x in ours] == [x.dtype for x in rows.values()]
    assert_near(ours, truth, 2**-6)
    conv = {n: x.bfloat16() for n, x in conv_inputs(length=9, channels=5).items()}
    ours = causal_conv1d(**conv, backend="triton")
    assert [x.dtype for x in ours] == [torch.bfloat16] * 2
    assert_near(ours, causal_conv1d(**to(conv, torch.float64), backend="reference"), 2**-7)


def test_slices_of_a_wider_projection_are_read_in_place():
    inputs = small_scan()
    wide = torch.cat([inputs[n] for n in ("u", "z", "delta", "B", "C")], dim=-1)
    u, z, delta, b, c = wide.split([3, 3, 3, 5, 5], dim=-1)
    expected = selective_scan(**inputs, backend="triton")
    sliced = {**inputs, "u": u, "z": z, "delta": delta, "B": b, "C": c}
    for a, b in zip(selective_scan(**sliced, backend="triton"), expected, strict=True):
        assert torch.equal(a, b)


def test_single_steps_are_the_references():
    scan, conv = (
        to(small_scan(4), torch.float64),
        to(conv_inputs(length=4, channels=5), torch.double),
    )
    y, last = selective_scan(**scan, backend="reference")
    state = scan.pop("initial_state").float()
    for t in range(4):
        token = {n: x[:, t] if x.ndim == 3 else x for n, x in to(scan, torch.float32).items()}
        assert_near([selective_scan_step(state, **token, backend="triton")], [y[:, t]], TOLERANCE)
    assert_near([state], [last], TOLERANCE)

    y, last = causal_conv1d(**conv, backend="reference")
    conv = to(conv, torch.float32)
    state = conv["initial_state"].mT.contiguous().mT  # any strides
    for t in range(4):
        token = (conv["x"][:, t], conv["weight"], conv["bias"])
        assert_near([causal_conv1d_step(state, *token, backend="triton")], [y[:, t]], TOLERANCE)
    assert_near([state], [last], TOLERANCE)


@pytest.mark.parametrize(("taps", "activation"), [(4, "silu"), (2, None), (1, "silu")])
@pytest.mark.parametrize("length", [2, 37])  # 32 steps are a tile
@pytest.mark.parametrize("absent", [(), ("bias", "initial_state")])
def test_the_convolution_and_its_gradients_are_the_references(taps, activation, length, absent):
    inputs = without(conv_inputs(length=length, channels=131, taps=taps), absent)  # 128 are a tile
    options = {"lengths": torch.tensor([length, (length + 1) // 2]), "activation": activation}
    exact, names = to(inputs, torch.float64), [n for n in CONV if n in inputs]
    if taps == 1:
        names = [n for n in names if n != "initial_state"]  # it has no elements
    truth = causal_conv1d(**exact, **options, backend="reference")
    ours = causal_conv1d(**inputs, **options, backend="triton")
    assert_near(*(x if taps > 1 else x[:1] for x in (ours, truth)), TOLERANCE)
    truth = gradients(causal_conv1d, exact, names, **options, backend="reference")
    assert_near(gradients(causal_conv1d, inputs, names, **options, backend="triton"), truth, 5e-5)


def test_the_check_before_use_finds_a_kernel_that_is_wrong_or_does_not_run(monkeypatch):
    monkeypatch.setattr(triton_scan, "STATES_OF_A_WARP", 256)
    assert resolve_backend("triton", "cpu") == "triton"
    with torch.inference_mode():
        assert check.check_on(triton, torch.device("cpu")) == ""

    def wrong(*arguments):
        y, last = triton_scan.scan_forward(*arguments)[:2]
        return y, last * 1.01

    monkeypatch.setattr(triton, "needs_grad", lambda *_: False)
    monkeypatch.setattr(triton, "scan_forward", wrong)
    assert "element 0 of tensors does not require grad" in check.check_on(
        triton, torch.device("cpu")
    )
    monkeypatch.undo()
    monkeypatch.setattr(check, "STEPS", 7)
    conv_forward = triton.Conv.forward
    monkeypatch.setattr(triton_scan, "CHUNK", 4)
    monkeypatch.setattr(triton_scan, "STATES_OF_A_WARP", 256)
    monkeypatch.setattr(
        triton.Conv, "forward", lambda *a: tuple(1.01 * x for x in conv_forward(*a))
    )
    assert (
        check.check_on(triton, torch.device("cpu"))
        == "the relative error of the convolution is 1.0e-02 on cpu"
    )
