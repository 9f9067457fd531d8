"""The linear layer: equal to nn.Linear whatever the sizes, only where it may run, rows alone."""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from vlmamba.models import products
from vlmamba.models.linear import MOST_ROWS, Linear, use_fast_products
from vlmamba.models.products import LIBRARIES, product
from vlmamba.models.scan_backends import build

NEEDS_KERNELS = pytest.mark.skipif(build.kernels() is None, reason="no C++ compiler")
ROWS = (1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 64)
# the processor's own instructions, and those that stand in where it has fewer
SETS = dict.fromkeys((build.instruction_set(), torch.backends.cpu.get_cpu_capability(), "DEFAULT"))


@pytest.fixture
def with_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def tensors(*sizes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


@NEEDS_KERNELS
@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 768, 80), (3, 17, 5), (8, 100, 1003), (2, 64, 0), (37, 48, 9)]
)
@pytest.mark.parametrize("bias", [False, True])
def test_kernel_equals_the_product(instructions, dtype, shape, bias):
    rows, width, outputs = shape
    x, w, b = tensors((rows, width), (outputs, width), (outputs,), dtype=dtype)
    got = build.load_kernels(instructions).linear(x, w, b if bias else None)
    want = linear(x.double(), w.double(), b.double() if bias else None)
    assert got.dtype == dtype and got.shape == want.shape
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


def many_rows(instructions, dtype):
    """The kernel of many rows; without its instructions the test is skipped."""
    run, x = build.load_kernels(instructions).product, torch.zeros(1, 1, dtype=dtype)
    if run(x, x, None) is None:
        pytest.skip("made for AVX-512")
    return run


MANY = ((1, 1, 1), (17, 3, 5), (64, 33, 192), (65, 1027, 193), (200, 48, 7), (130, 768, 400))


@NEEDS_KERNELS
@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape", MANY)
def test_many_rows_equal_the_product_and_stand_alone(
    instructions, dtype, threads, shape, with_threads
):
    with_threads(threads)
    run, (rows, width, outputs) = many_rows(instructions, dtype), shape
    x, w, b = tensors((rows, width), (outputs, width), (outputs,), dtype=dtype)
    for bias in (None, b):
        got = run(x, w, bias)
        want = linear(x.double(), w.double(), None if bias is None else b.double())
        assert got.dtype == dtype
        tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
        error = float((got.double() - want).abs().max())
        assert error <= tolerance * max(1.0, float(want.abs().max()))
    for some in (slice(0, 1), slice(rows // 3, rows // 3 + 40), slice(rows - 1, rows)):
        assert torch.equal(run(x[some].contiguous(), w, b), got[some])


@NEEDS_KERNELS
def test_many_rows_keep_to_their_own_columns():
    """Behind an odd width the next row begins within the processor's pair of bfloat16."""
    run = many_rows(build.instruction_set(), torch.bfloat16)
    x, w = tensors((80, 5), (6, 5), dtype=torch.bfloat16)
    w[1::2] = torch.nan
    got = run(x, w, None)
    assert got[:, 1::2].isnan().all() and not got[:, ::2].isnan().any()


def test_layer_equals_nn_linear_in_every_situation():
    layer = Linear(33, 21, bias=False)
    for shape in ((33,), (1, 33), (2, 4, 33), (1, 1, 33), (MOST_ROWS + 1, 33), (0, 33)):
        x = torch.randn(shape)
        want = linear(x, layer.weight)
        with torch.inference_mode():
            torch.testing.assert_close(layer(x), want.detach())
        assert layer(x).requires_grad
    x = torch.randn(33, 2).t()  # not contiguous
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), linear(x, layer.weight))
        torch.testing.assert_close(layer(x[None]), linear(x[None], layer.weight))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_layer_runs_without_kernels(monkeypatch):
    monkeypatch.setattr("vlmamba.models.linear.kernels", lambda: None)
    layer, x = Linear(5, 3), torch.randn(1, 5)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), linear(x, layer.weight, layer.bias))


@NEEDS_KERNELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("size", [(256, 4096), (48, 512), (100, 7)])
def test_a_row_is_the_same_bit_for_bit_whatever_the_batch(dtype, threads, size, with_threads):
    with_threads(threads)
    width, outputs = size
    layer = Linear(width, outputs).to(dtype)
    [x] = tensors((max(ROWS), width), dtype=dtype)
    with torch.inference_mode():
        for shape in ((-1, width), (-1, 1, width), (1, -1, width)):
            whole = layer(x.view(shape)).view(-1, outputs)
            for rows in ROWS:
                some = layer(x[:rows].view(shape)).view(-1, outputs)
                assert torch.equal(some, whole[:rows]), (shape, rows)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("shape", [(40, 768, 80), (1, 48, 512), (3, 100, 1003)])
def test_every_library_is_the_same_product(library, shape, monkeypatch):
    if library == "kernels" and not products._has_kernels(torch.float32):
        pytest.skip("made for AVX-512")
    choice = products.Choice(library, products.steady_rows(LIBRARIES[library], torch.float32), {})
    monkeypatch.setattr(products, "chosen", lambda dtype: choice)
    rows, width, outputs = shape
    x, w, b = tensors((1, rows, width), (outputs, width), (outputs,))
    want = linear(x.double(), w.double(), b.double())
    with torch.inference_mode():
        got = product(x, w, b)
        assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())
        assert torch.equal(product(x[:, :1], w, b), got[:, :1])


def test_the_choice_is_measured_once_and_kept_by_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("VLMAMBA_CACHE", str(tmp_path))
    measured = []

    def measure(dtype):
        measured.append(dtype)
        return products.Choice("pytorch", 3, {"pytorch": 1.0}), False

    monkeypatch.setattr(products, "measure", measure)
    for _ in range(2):  # two processes
        assert products._chosen.__wrapped__(torch.float32, 1).steady_rows == 3
    assert measured == [torch.float32]
    [file] = (tmp_path / "products").iterdir()
    content = json.loads(file.read_text())
    assert content["threads"] == 1 and content["torch"] == torch.__version__
    file.write_text(file.read_text()[:20])  # cut short: measured again
    products._chosen.__wrapped__(torch.float32, 1)
    products._chosen.__wrapped__(torch.float32, 2)  # more threads: another measurement
    assert len(measured) == 3 and len(list(file.parent.iterdir())) == 2


@pytest.mark.parametrize("busy", [False, True])
def test_what_a_busy_machine_measured_is_not_kept(busy, tmp_path, monkeypatch):
    """A choice that others' work made would slow this machine down for good."""
    monkeypatch.setenv("VLMAMBA_CACHE", str(tmp_path))
    spent = itertools.count(1.0, 0.1) if busy else itertools.cycle([1.0, 1.1])
    clock = itertools.chain.from_iterable((0.0, next(spent)) for _ in itertools.count())
    own = SimpleNamespace(perf_counter=lambda: next(clock))  # the lock reads the time as well
    monkeypatch.setattr(products, "time", own)
    assert products._chosen.__wrapped__(torch.float32, 1).library in LIBRARIES
    assert bool(list((tmp_path / "products").iterdir())) != busy


def test_those_that_start_together_take_one_choice(tmp_path, monkeypatch):
    """Ranks of one run: what each has measured would differ, and with it the last bits."""
    monkeypatch.setenv("VLMAMBA_CACHE", str(tmp_path))
    found, both = iter(["pytorch", "onednn"]), threading.Barrier(2)

    def measure(dtype):
        library = next(found)
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(timeout=0.5)
        if library == "onednn":
            time.sleep(0.5)  # the other has written and read its own by then
        return products.Choice(library, 3, {library: 1.0}), False

    monkeypatch.setattr(products, "measure", measure)
    with ThreadPoolExecutor(2) as pool:
        choices = list(pool.map(products._chosen.__wrapped__, [torch.float32] * 2, [1] * 2))
    assert choices[0] == choices[1]


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "products").write_text("in the way")
    monkeypatch.setenv("VLMAMBA_CACHE", str(tmp_path))
    assert products._chosen.__wrapped__(torch.bfloat16, 1).library in LIBRARIES


def test_measuring_draws_nothing_and_names_what_it_tried():
    before = torch.random.get_rng_state()
    choice, _ = products.measure(torch.float32)
    assert {"pytorch"} <= choice.gflop_per_s.keys() <= LIBRARIES.keys()
    assert torch.equal(before, torch.random.get_rng_state())
    assert choice.library == max(choice.gflop_per_s, key=lambda name: choice.gflop_per_s[name])
    assert 1 <= choice.steady_rows <= products.MOST_ROWS


def test_other_peoples_layers_take_the_fast_product():
    part = nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 1))
    use_fast_products(part)
    assert type(part[0]) is Linear
    assert type(part[1].out_proj) is not Linear  # a subclass of theirs stays what it is
