"""The profile: points in processes of their own, resume, fits, crossovers, the last line."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_vlms
from harness_world import unexplained
from scipy import stats

from harness import plots as plots_command
from harness import profile, report
from harness import tables as tables_command
from harness.reporting import plots
from harness.runs.points import (
    FAILED,
    KILLED,
    NOT_RUN,
    OK,
    OUT_OF_MEMORY,
    TIME_LIMIT,
    Row,
)
from harness.speed import certainty, energy, models, whole
from harness.speed.sweep import fits, lengths, measure, subject, summary, tables, worker
from harness.speed.sweep.points import Journal, Point, Settings, Weights, plan, row_of
from vlmamba_core.errors import UserError
from vlmamba_core.folder import Journal as FolderJournal
from vlmamba_core.launcher import Launcher

SETTINGS = Settings(
    image_tokens=16,
    decode=3,
    dtype="float32",
    device="cpu",
    compile=False,
    threads=1,
    seconds=0.0,
    time_limit_s=120.0,
    memory_limit_bytes=None,
    tiny=True,
)
MACHINE = {"copy_bytes_per_s": 1e10, "read_bytes_per_s": 8e9, "gemm_flops_per_s": 1e11}
VL_MAMBA, PYTHIA = "vl-mamba-130m", "pythia-160m"


def result(prefill_s: float, state_bytes: int, peak: int = 3 * 2**20) -> dict:
    """A child's result with the values that summaries read."""
    return {
        "prefill_s": [prefill_s, 9 * prefill_s, prefill_s],
        "ttft_s": [prefill_s * 1.1],
        "decode_s": [0.02, 0.01, 0.01],
        "decode_tok_per_s": 100.0,
        "state_bytes": state_bytes,
        "loaded_mem_bytes": 2**20,
        "peak_mem_bytes": peak,
        "decode_peak_mem_bytes": 2**20 + state_bytes,
        "weight_bytes": 10**8,
        "prefill_flops": 1e9,
    }


def synthetic(point: Point) -> Row:
    """VL-Mamba: linear, constant state. Baseline: faster at first, quadratic, growing cache."""
    n = point.seq_len
    if point.model == VL_MAMBA:
        return row_of(point, OK, result=result(1e-3 * n, 1000))
    return row_of(point, OK, result=result(1e-6 * n**2, 72 * n, 2**20 + 100 * n))


def sweep_of(*lengths: int) -> summary.Profile:
    rows = [synthetic(point) for point in plan([VL_MAMBA, PYTHIA], lengths, [1], SETTINGS)]
    return summary.Profile("p", MACHINE, {}, rows)


def test_an_exponent_and_its_interval_are_linear_regression_in_logarithms():
    lengths = [256, 512, 1024, 2048]
    costs = [n**1.5 * f for n, f in zip(lengths, (1.0, 1.2, 0.9, 1.1), strict=True)]
    fit = fits.power_law(lengths, costs)
    expected = stats.linregress(np.log(lengths), np.log(costs))
    half = expected.stderr * stats.t.ppf(0.975, 2)
    assert (fit.value, (fit.high - fit.low) / 2) == pytest.approx((expected.slope, half))
    assert fits.line([1, 2, 3], [7, 7, 7]) == fits.Fit(0, 0, 0, 3)  # not NaN
    assert fits.power_law([1, 2, 4], [5, 10, 20]).value == pytest.approx(1)
    assert fits.last_step({1: 1, 4: 16, 2: 2}) == fits.Step(2, 4, 8)
    assert fits.last_step({1: 1}) is None


def test_two_points_have_no_exponent_and_one_no_slope():
    assert fits.power_law([1, 2], [1, 4]) is None
    assert fits.power_law([1, 2, 2], [1, 4, 4]) is None
    assert fits.power_law([2], [4]) is None
    assert fits.power_law([1, 2, 4], [0, 1, 2]) is None  # nothing has no logarithm
    assert fits.line([1, 2], [1, 4]) == fits.Fit(3, None, None, 2)
    assert fits.line([2, 2], [4, 4]) is None
    two = summary.summarize(sweep_of(250, 500))["models"][PYTHIA]
    assert two["prefill_exponent"] is None and two["memory_exponent"] is None
    assert two["prefill_last_step"] == {"start": 250, "end": 500, "factor": 4}


@pytest.mark.parametrize(
    ("model", "baseline", "length", "note"),
    [
        ({100: 2, 400: 2}, {100: 1, 400: 4}, 200, "between 100 and 400"),
        ({100: 1, 400: 1}, {100: 2, 400: 4}, 100, "already at 100"),
        ({100: 3, 400: 9}, {100: 2, 400: 4}, None, "not up to 400"),
        ({1: 1, 2: 3, 4: 1}, {1: 2, 2: 2, 4: 2}, 2 * 2 ** (1 - np.log(2) / np.log(3)), "2 and 4"),
        ({100: 3}, {200: 2}, None, "no common length"),
    ],
)
def test_crossovers(model, baseline, length, note):
    found = fits.crossover(model, baseline)
    assert note in found.note
    assert found.at_most == ("already" in note)
    if length in (None, 100, 200):
        assert found.length == (length and pytest.approx(length))
    else:
        assert 2 < found.length < 4


def test_a_crossover_says_how_far_repeats_leave_it_open():
    times = {VL_MAMBA: ([2, 2, 2.5], [2, 2, 2]), PYTHIA: ([1, 1, 1], [4, 4, 4])}
    rows = [
        row_of(Point(model, n, 1, SETTINGS), OK, result=result(1, 1000) | {"prefill_s": runs})
        for model, both in times.items()
        for n, runs in zip((100, 400), both, strict=True)
    ]
    found = summary.Profile("p", MACHINE, {}, rows).crossover((VL_MAMBA, PYTHIA), 1, "prefill_s")
    # in logarithms the slowest run's 2.5 lies ln 2.5 / (ln 2.5 + ln 2) of the way to 400: 220
    assert (found.length, found.at_most) == (pytest.approx(200), False)
    assert found.note == "between 100 and 400 tokens; by the spread of runs 200 to 220"


def test_summary_of_a_sweep_with_known_growth():
    found = summary.summarize(sweep_of(250, 500, 1000, 2000, 4000))
    own, baseline = (found["models"][name] for name in (VL_MAMBA, PYTHIA))
    assert own["prefill_exponent"] | {"n": 0} == {"value": 1, "low": 1, "high": 1, "n": 0}
    assert baseline["prefill_exponent"]["value"] == 2
    assert own["state_bytes_per_token"]["value"] == 0
    assert own["decode_memory_slope"]["value"] == 0
    assert baseline["decode_memory_slope"]["value"] == 72
    assert found["crossover_len"][f"{VL_MAMBA} / {PYTHIA}"]["prefill_s"] == 1000
    assert found["crossover_at_most"][f"{VL_MAMBA} / {PYTHIA}"] == ["state_bytes"]
    assert found["not_measured"] == []
    json.dumps(found, allow_nan=False)


def test_distance_from_the_machines_floor():
    [row] = [synthetic(Point(VL_MAMBA, 100, 1, SETTINGS))]
    assert summary.floors(row, MACHINE) == {
        "prefill": pytest.approx(0.1 / 0.01),
        "decode": pytest.approx(0.01 / ((10**8 + 1000) / 1e10)),
    }


def test_finished_points_are_not_repeated_and_failed_ones_are(tmp_path):
    started: list[str] = []

    def start(point: Point) -> Row:
        started.append(point.name)
        if point.seq_len == 64 and len(started) < 9:
            return row_of(point, FAILED, "ModuleNotFoundError")
        return synthetic(point)

    points = plan([VL_MAMBA, PYTHIA], [32, 64], [1], SETTINGS)
    path = tmp_path / "points.jsonl"
    first = lengths.run(points, Journal(path), start)
    assert [row.status for row in first] == [OK, OK, FAILED, FAILED]
    path.write_bytes(path.read_bytes() + b'\xff\n{"key": "torn')
    started[:] = ["earlier"] * 8
    assert all(row.status == OK for row in lengths.run(points, Journal(path), start))
    assert started[8:] == [f"{VL_MAMBA} 1x64", f"{PYTHIA} 1x64"]
    assert len(Journal(path)) == 4
    assert Journal(path).get(points[0]) == first[0]
    path.write_bytes(path.read_bytes().replace(b'"state_bytes": 1000', b'"state_bytes": 1001', 1))
    assert Journal(path).get(points[0]) is None  # altered: measured anew


@pytest.mark.parametrize("status", [OUT_OF_MEMORY, TIME_LIMIT, KILLED])
def test_longer_points_of_a_model_that_ran_out_are_left_out(tmp_path, status, capsys):
    def start(point: Point) -> Row:
        too_much = point.model == PYTHIA and point.seq_len >= 64
        return row_of(point, status, "why") if too_much else synthetic(point)

    points = plan([VL_MAMBA, PYTHIA], [32, 64, 128], [1], SETTINGS)
    rows = lengths.run(points, Journal(tmp_path / "points.jsonl"), start)
    assert [row.status for row in rows] == [OK, OK, OK, status, OK, NOT_RUN]
    assert rows[-1].detail == f"64 tokens: {status}"
    found = summary.summarize(summary.Profile("p", MACHINE, {}, rows))
    assert found["not_measured"] == [f"{PYTHIA} 1x64: {status}", f"{PYTHIA} 1x128: {NOT_RUN}"]
    table = tables.point_rows(summary.Profile("p", MACHINE, {}, rows))
    assert {len(row) for row in table} == {len(tables.POINT_HEADERS)}
    assert table[-1][-1] == f"{NOT_RUN}: 64 tokens: {status}"
    assert f"{PYTHIA} 1x64: {status} (why)" in capsys.readouterr().err


def test_a_child_that_dies_or_hangs_is_reported(monkeypatch):
    limited = Settings(**{**SETTINGS.__dict__, "memory_limit_bytes": 2**30})

    def run_code(code: str, settings: Settings = SETTINGS) -> Row:
        command = [sys.executable, "-c", code]
        monkeypatch.setattr(
            lengths,
            "_child",
            lambda arguments, limit_s: subprocess.run(
                command, capture_output=True, text=True, timeout=3
            ),
        )
        return lengths.launch(Point(VL_MAMBA, 32, 1, settings))

    killed = run_code("import os; os.kill(os.getpid(), 9)")
    assert (killed.status, killed.detail[:16]) == (KILLED, "ended by SIGKILL")
    segfault = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    assert run_code(segfault).status == KILLED
    exhausted = run_code(segfault, limited)
    assert exhausted.status == OUT_OF_MEMORY
    assert exhausted.detail == "ended by SIGSEGV under its limit of 1 GiB"
    assert run_code("import time; time.sleep(9)").status == TIME_LIMIT
    failed = run_code("raise ValueError('why')")
    assert (failed.status, failed.detail) == (FAILED, "ValueError: why")


def test_a_key_covers_the_terms():
    keys = {
        Point(VL_MAMBA, 32, 1, SETTINGS).key,
        Point(VL_MAMBA, 64, 1, SETTINGS).key,
        Point(VL_MAMBA, 32, 2, SETTINGS).key,
        Point(PYTHIA, 32, 1, SETTINGS).key,
        Point(VL_MAMBA, 32, 1, Settings(**{**SETTINGS.__dict__, "compile": True})).key,
    }
    assert len(keys) == 5
    point = Point(VL_MAMBA, 32, 1, SETTINGS)
    assert Point.from_json(point.to_json()) == point


def test_a_sequence_too_short_for_the_image_is_text_only():
    assert [Point(VL_MAMBA, n, 1, SETTINGS).image_tokens for n in (16, 17)] == [0, 16]


@pytest.mark.parametrize("model", [VL_MAMBA, PYTHIA, "llama-160m"])
def test_a_point_measures_what_it_claims(model):
    short, long = (measure.measure(Point(model, n, 2, SETTINGS)) for n in (8, 24))
    for r, n in ((short, 8), (long, 24)):
        assert len(r["decode_s"]) == 3
        assert all(0 < p <= t for p, t in zip(r["prefill_s"], r["ttft_s"], strict=True))
        assert r["loaded_mem_bytes"] <= r["peak_mem_bytes"]
        assert r["decode_energy_j_per_tok"] is None
        assert r["other_load_cores"] >= 0
        cache = 2 * 2 * 2 * n * 32 * 4  # keys and values, layers, batch, width, float32
        if model == VL_MAMBA:
            assert r["state_bytes"] == r["state_bytes_after_decode"]
        else:
            assert r["state_bytes"] == cache
            assert r["state_bytes_after_decode"] == cache * (n + 3) // n
            assert r["attention"] == "sdpa"
    if model == VL_MAMBA:
        assert long["state_bytes"] == short["state_bytes"]
    assert long["prefill_flops"] > 2 * short["prefill_flops"]


NUMBERS = Weights(["float32", "bfloat16"], ["int8", "int4"], [VL_MAMBA])


def test_a_model_has_a_point_in_every_kind_of_numbers():
    points = plan([VL_MAMBA, PYTHIA], [8, 16], [1], SETTINGS, NUMBERS)
    assert [(p.label, p.settings.dtype, p.quantize) for p in points[:6]] == [
        (f"{VL_MAMBA} float32", "float32", None),
        (f"{VL_MAMBA} bfloat16", "bfloat16", None),
        (f"{VL_MAMBA} int8", "float32", "int8"),
        (f"{VL_MAMBA} int4", "float32", "int4"),
        (f"{PYTHIA} float32", "float32", None),
        (f"{PYTHIA} bfloat16", "bfloat16", None),
    ]
    assert len({point.key for point in points}) == len(points) == 12
    assert Point.from_json(points[2].to_json()) == points[2]
    alone = plan([VL_MAMBA], [8], [1], SETTINGS, Weights(["float32"], ["int8"], [VL_MAMBA]))
    assert [point.label for point in alone] == [VL_MAMBA, f"{VL_MAMBA} int8"]


def expected_bytes(kind: str | None, size: int) -> int:
    """Of the tiny model (D 32, inner 64, N 16, dt_rank 2, vocabulary 1008), from its shapes alone.

    Whole numbers: int8 a byte each, int4 half a byte in blocks of 32 columns with an int8 head; a
    float32 scale for every row, as no row here has more than the 128 columns of a group.
    """
    projections = [(128, 32), (2 + 2 * 16, 64), (32, 64)]  # in_proj, x_proj, out_proj
    rest = 64 * 4 + 64 + 64 * 2 + 64 + 64 * 16 + 64 + 32  # conv, dt_proj, A, D, norm
    head, norm = 1008 * 32, 32
    if kind is None:
        return size * (2 * (sum(o * i for o, i in projections) + rest) + norm + head)
    whole = {"int8": lambda o, i: o * i, "int4": lambda o, i: o * i // 2}[kind]
    layers = 2 * sum(whole(o, i) + 4 * o for o, i in projections)
    return layers + size * (2 * rest + norm) + head + 4 * 1008


def test_a_point_in_whole_numbers_reads_fewer_bytes_and_computes_the_same():
    points = plan([VL_MAMBA], [8], [1], SETTINGS, NUMBERS)
    rows = [row_of(point, OK, result=measure.measure(point)) for point in points]
    wide, narrow, int8, int4 = (row.result for row in rows)
    assert [r.get("quantize") for r in (wide, narrow, int8, int4)] == [None, None, "int8", "int4"]
    assert wide["weight_bytes"] == expected_bytes(None, 4)
    assert int8["weight_bytes"] == expected_bytes("int8", 4)
    assert int4["weight_bytes"] == expected_bytes("int4", 4)
    assert int4["weight_bytes"] < int8["weight_bytes"] < narrow["weight_bytes"]
    assert all(len(r["decode_s"]) == 3 and r["prefill_s"] for r in (int8, int4))
    assert int8["prefill_flops"] == wide["prefill_flops"]
    plain, rounded = (subject.load(point) for point in (points[0], points[2]))
    ids, features = subject.inputs(plain, points[0], 8)
    logits = [s.prefill(models.embed(s.model, ids, features))[0] for s in (plain, rounded)]
    assert (logits[0] - logits[1]).abs().max() < 0.02 * logits[0].abs().max()
    assert not logits[0].equal(logits[1])


def numbers_profile() -> summary.Profile:
    """A sweep in four kinds of numbers, with a baseline in two."""

    def found(point: Point) -> dict:
        more = {"dtype": point.settings.dtype, "quantize": point.quantize}
        size = {"int8": 2**20, "int4": 2**19}.get(point.quantize or "", 4 * 2**20)
        return result(1e-3 * point.seq_len, 1000) | more | {"weight_bytes": size}

    points = plan([VL_MAMBA, PYTHIA], [250, 500], [1], SETTINGS, NUMBERS)
    machine = MACHINE | {"dtype": "float32", "gemm_bf16_flops_per_s": 4e11}
    rows = [row_of(point, OK, result=found(point)) for point in points]
    return summary.Profile("p", machine, {}, rows)


def test_tables_and_floors_tell_kinds_of_numbers_apart():
    profile = numbers_profile()
    assert profile.several_numbers and not sweep_of(250).several_numbers
    assert profile.pairs() == [
        (f"{VL_MAMBA} {own}", f"{PYTHIA} {baseline}")
        for own, baseline in [
            *(("float32", "float32"), ("bfloat16", "bfloat16")),
            *(("int8", "float32"), ("int4", "float32")),
        ]
    ]
    column = tables.POINT_HEADERS.index("weights MiB")
    shown = {row[0]: row[column] for row in tables.point_rows(profile)}
    assert shown[f"{VL_MAMBA} float32"] == "4" and shown[f"{VL_MAMBA} int8"] == "1"
    assert shown[f"{VL_MAMBA} int4"] == "0.5"
    wide, narrow = (summary.floors(row, profile.machine) for row in profile.rows[:2])
    assert narrow["prefill"] == pytest.approx(4 * wide["prefill"])  # by the rate of its own dtype
    half = row_of(
        plan([VL_MAMBA], [8], [1], SETTINGS, Weights(["float16"]))[0],
        OK,
        result=result(1.0, 1000) | {"dtype": "float16"},
    )
    assert summary.floors(half, profile.machine).keys() == {"decode"}  # never measured
    summarized = summary.summarize(profile)["models"]
    assert summarized[f"{VL_MAMBA} int4"]["weight_bytes"] == 2**19


def test_a_long_legend_leaves_room_for_the_panel(recwarn):
    """Six curves of three kinds: the figure grows with its legend, whose lines end within it."""
    profile = numbers_profile()
    with plots.figure_of("paper", 1) as figure:
        axes = figure.subplots(1, 1, squeeze=False)[0]
        plots._draw(axes[0], profile, "memory", 1, 1.0)
        plots.add_legend(figure, axes)
        figure.draw_without_rendering()
        [legend] = figure.legends
        box = legend.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1
        assert axes[0].get_window_extent().height > 100
    assert not [w for w in recwarn if "constrained_layout" in str(w.message)]


def test_one_command_shows_every_kind_of_numbers(tmp_path, monkeypatch, capsys):
    machine = MACHINE | {"dtype": "float32", "gemm_bf16_flops_per_s": 4e11}
    monkeypatch.setattr(lengths, "measure_machine", lambda settings: machine)
    monkeypatch.setattr(
        lengths, "launch", lambda point: row_of(point, OK, result=measure.measure(point))
    )
    command = ["--tiny", "--models", f"{VL_MAMBA},{PYTHIA}", "--seq-lens", "8,16", "--decode", "2"]
    command += ["--threads", "1", "--seconds", "0.01", "--device", "cpu", "--image-tokens", "0"]
    command += ["--dtype", "fp32,bf16", "--quantize", "INT8,int4"]
    runs = tmp_path / "runs"
    assert profile.main([*command, "--out", str(runs / "out")]) == 0
    printed = capsys.readouterr()
    assert f"not of {PYTHIA}, whose layers are transformers' own" in printed.err
    record = json.loads((runs / "out" / "record.json").read_text())
    assert record["settings"]["dtype"] == "float32, bfloat16"
    assert record["settings"]["quantize"] == "int8, int4"
    assert len(record["points"]) == 12
    place = ["--from", str(runs), "--out"]
    assert tables_command.main([*place, str(tmp_path / "t")]) == 0
    points = (tmp_path / "t/out.points.csv").read_text()
    assert all(f"{VL_MAMBA} {kind}" in points for kind in ("float32", "bfloat16", "int8", "int4"))
    assert plots_command.main([*place, str(tmp_path / "p")]) == 0
    assert (tmp_path / "p/out.memory.svg").exists()


def test_flops_of_a_prompt_are_those_of_its_matrices():
    gpt = models.build(PYTHIA, tiny=True).language_model
    layer = 32 * 96 + 32 * 32 + 2 * 32 * 64
    head = 32 * 1008
    expected = 2 * (8 * 2 * layer + head) + 2 * 2 * 32 * 8**2
    assert models.prefill_flops(gpt, 8) == expected
    own = models.build(VL_MAMBA, tiny=True).language_model
    mixer = 2 * (32 * 128 + 64 * (2 + 32) + 2 * 64 + 64 * 32 + 64 * 4)  # with its convolution
    scan = 9 * 64 * 16
    assert models.prefill_flops(own, 8) == 8 * 2 * (mixer + scan) + 2 * head


def test_repeats_that_differ_too_much_are_named():
    assert certainty.spread([2.0, 2.2, 2.1]) == pytest.approx(0.2 / 2.1)
    assert certainty.spread([3.0]) is None
    many = [1.0] * 8 + [9.0] * 2  # single interruptions among many steps say nothing
    assert certainty.spread(many) == 0
    profile = sweep_of(250, 500, 1000)  # runs of one, nine and one
    found = summary.summarize(profile)
    why = "too noisy: repeat (runs differ by more than 25 %: prefill by 800 %, decode by 100 %)"
    assert found["too_noisy"][0] == f"{VL_MAMBA} 1x250: {why}"
    assert tables.point_rows(profile)[0][-4:] == ["800 %", "100 %", "-", why]
    assert found["other_load_cores"] is None  # of a record that does not know


def test_load_of_other_processes_is_seen_and_ones_own_is_not():
    code = "import time; end = time.time() + 1.5\nwhile time.time() < end: pass"
    with subprocess.Popen([sys.executable, "-c", code]) as other:
        time.sleep(0.3)
        load = certainty.OtherLoad()
        time.sleep(0.7)
        assert load.cores() > 0.1
        other.wait()


def test_compile_is_applied_to_every_side_alike(monkeypatch):
    import torch

    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f: compiled.append(f.__name__) or f)
    settings = Settings(**{**SETTINGS.__dict__, "compile": True})
    for model in (VL_MAMBA, PYTHIA):
        subject.load(Point(model, 8, 1, settings))
    assert compiled == ["prefill", "step"] * 2


def test_energy_is_read_where_nvml_is(monkeypatch):
    readings = iter([5000, 9000])
    monkeypatch.setattr(energy, "_nvml_counter", lambda device: lambda: next(readings) / 1e3)
    meter = energy.EnergyMeter("cuda")
    assert meter.since(meter.joules(), 2) == 2.0
    assert energy.EnergyMeter("cpu").joules() is None


def test_one_command_profiles_and_continues(tmp_path, capsys):
    """The whole thing in real processes: a point that fits, one that is refused its memory."""
    out = tmp_path / "out"
    command = ["--tiny", "--models", VL_MAMBA, "--seq-lens", "32", "--image-tokens", "16"]
    command += ["--decode", "2", "--threads", "1", "--seconds", "0.1", "--out", str(out)]
    assert profile.main(command) == 0
    printed = capsys.readouterr().out.splitlines()
    found = json.loads(printed[-1])
    assert found["models"][VL_MAMBA]["state_bytes"]["32"] > 0
    record = json.loads((out / "record.json").read_text())
    assert unexplained(out) == [] and (out / "points.jsonl").exists()
    assert record["settings"]["weights"] == "random"
    assert record["points"][0]["result"]["dtype"] == "float32"
    assert record["machine"]["gemm_flops_per_s"] > 0
    little = Settings(**{**SETTINGS.__dict__, "memory_limit_bytes": 100 * 2**20})
    row = lengths.launch(Point(VL_MAMBA, 32, 1, little))
    assert row.status == OUT_OF_MEMORY, row.detail


@pytest.mark.parametrize(
    "text",
    [
        "libc10.so: failed to map segment from shared object",
        "libgomp: Thread creation failed: Resource temporarily unavailable",
        "can't start new thread",
        "could not create a primitive",
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 14112 bytes",
    ],
)
def test_a_lack_of_memory_is_known_by_its_cause(text):
    """A library that imports on demand names another module first, the cause below."""
    try:
        try:
            raise OSError(text)
        except OSError as error:
            raise RuntimeError("Failed to import a module; look up to see why") from error
    except RuntimeError as error:
        assert worker.caused_by_lack_of_memory(error)
    assert not worker.caused_by_lack_of_memory(ValueError("shapes do not match"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "pythia-161m"], "unknown model 'pythia-161m'; known, nearest first: pythia"),
        (["--models", ","], "--models is empty"),
        (["--seq-lens", "12,x"], "--seq-lens is '12,x'; expected positive numbers"),
        (["--batch-sizes", "0"], "--batch-sizes is '0'"),
        (["--image-tokens", "700"], "--image-tokens is 700; expected a square number"),
        (["--decode", "0"], "--decode is 0; expected a positive number"),
        (["--dtype", "float8"], "unknown dtype 'float8'"),
        (["--dtype", "float32,float8"], "unknown dtype 'float8'"),
        (["--dtype", ","], "--dtype is empty; give one or several of float32"),
        (["--quantize", "int3"], "unknown kind of quantized weights 'int3'"),
        (["--models", PYTHIA, "--quantize", "int8"], f"no model here has such weights ({PYTHIA})"),
        (["--whole", "nano", "--quantize", "int4"], "no model here has such weights (none but"),
        (["--mdels", "x"], "unrecognized arguments: --mdels x (see --help)"),
    ],
)
def test_a_mistake_is_one_line(capsys, arguments, message, tmp_path):
    assert profile.main([*arguments, "--out", str(tmp_path / "never")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not Path(tmp_path / "never").exists()


def test_an_evaluation_in_the_folder_is_left_alone(tmp_path, capsys):
    record = tmp_path / "record.json"
    record.write_text('{"kind": "evaluation", "tasks": {"pope": {"n": 1296}}}')
    assert profile.main(["--models", "vl-mamba-130m", "--tiny", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "holds another finished run (1296 answers scored): it is of kind evaluation" in error
    assert "1296" in record.read_text()


def test_whole_models_have_a_row(tmp_path):
    """A checkpoint and a transformers VLM, image encoder included; kept by their files' content."""
    folder = tiny_vlms.save("llava", tmp_path / "llava")
    asked = []

    def start(given):
        asked.append(given[0])
        return json.loads(json.dumps(whole.measure(*given)))  # as its process prints it

    def rows():
        return whole.run(["nano", f"hf:{folder}"], SETTINGS, FolderJournal(tmp_path / "j"), start)

    nano, _ = found = rows()
    assert [row["template"] for row in found] == ["vicuna_v1", "chat_template"]
    for row in found:
        cost = row["cost"]
        assert cost["new_tokens"] == 32 and 0 < cost["first_token_s"] < cost["total_s"]
        assert cost["tokens_per_s"] == pytest.approx(32 / cost["total_s"])
    assert rows() == found and len(asked) == 2
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # the last bit of the last weight: another checkpoint of the same size
    weights.write_bytes(content)
    assert rows()[0] == nano and asked[2:] == [f"hf:{folder}"]


def test_whole_models_need_no_point_of_a_language_model(tmp_path, capsys, monkeypatch):
    """Nor do the readers of such a record: tables, plots and the report."""
    monkeypatch.setattr(lengths, "measure_machine", lambda settings: MACHINE)
    out = tmp_path / "runs" / "out"
    command = ["--tiny", "--threads", "1", "--device", "cpu", "--whole", "nano"]
    assert profile.main([*command, "--out", str(out)]) == 0
    record = json.loads((out / "record.json").read_text())
    printed = capsys.readouterr().out
    assert record["points"] == [] and record["whole"][0]["status"] == OK
    assert unexplained(out) == [] and (out / "whole.jsonl").exists()
    rate = record["whole"][0]["cost"]["tokens_per_s"]
    assert json.loads(printed.splitlines()[-1])["whole"] == {"nano": float(f"{rate:.4g}")}
    assert "whole models: one question" in printed and "crossovers" not in printed
    place = ["--from", str(tmp_path / "runs"), "--out"]
    assert tables_command.main([*place, str(tmp_path / "t")]) == 0
    [line] = [x for x in (tmp_path / "t/out.whole.csv").read_text().splitlines() if "nano" in x]
    assert f"{rate:.4g}" in line
    assert plots_command.main([*place, str(tmp_path / "p")]) == 0
    assert not list((tmp_path / "p").glob("out.*"))
    assert report.main([str(out), "--out", str(tmp_path / "r.html")]) == 0
    assert "whole models: one question" in (tmp_path / "r.html").read_text()


def test_a_whole_model_alone_is_planned(capsys, tmp_path):
    assert profile.main(["--whole", "nano", "--dry-run", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == ["1 points, one after the other:", "nano", ""]


@pytest.mark.parametrize("name", ["cudafoo", "cuda:", "cuda:x", "cuda:2", "cuda:0", "cuda"])
def test_a_gpu_is_one_that_is_there(name, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    here = Launcher.parse("local", None, Path("jobs"))
    if name in ("cuda", "cuda:0"):
        assert profile._device(name, here) == name
        return
    with pytest.raises(UserError, match="unknown device|GPUs are cuda:0 to cuda:1"):
        profile._device(name, here)
