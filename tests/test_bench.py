"""harness.bench: fair comparisons, true ratios, baselines that compute what they claim."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import runpy
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from harness import bench
from harness.speed import (
    bench_report,
    invariance,
    language_model,
    machine,
    models,
    numbers,
    scan,
    timing,
    training,
    transformers_direct,
)
from harness.speed.timing import VL_MAMBA, Comparison, Contender, Effort, Timing, side_by_side
from harness.speed.training import Measured
from vlmamba.configs.presets import LANGUAGE_MODELS

ONCE = Effort(least=1, most=1, seconds=0)
PROMISED = (
    *("scan_forward_speedup", "scan_train_speedup", "scan_max_rel_error", "prefill_speedup"),
    *("decode_speedup", "decode_bandwidth_fraction", "pope_shape_speedup", "mme_shape_speedup"),
    "batch_invariant",
    *("prefill_bf16_speedup", "prefill_bf16_gemm_fraction", "prefill_128_speedup_llama-160m"),
    *("prefill_1024_bf16_speedup_pythia-160m", "prefill_128_speedup_pythia-160m_same_products"),
    *("decode_4_bf16_speedup_fp32", "decode_1_int8_speedup_fp32", "pope_shape_bf16_speedup"),
    "decode_products_read_fraction",
)


@pytest.fixture
def tiny(monkeypatch) -> None:
    """Every size of the measurements shrunk, none of its steps left out."""
    small = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 1008}
    heads = {"num_attention_heads": 2, "intermediate_size": 64}
    for name, spec in models.BASELINES.items():
        shape = small | (heads if "num_attention_heads" in spec else {})
        monkeypatch.setitem(models.BASELINES, name, spec | shape)
    shape = {"d_model": 32, "n_layer": 2, "vocab_size": 1008, "language_model_id": None}
    monkeypatch.setitem(LANGUAGE_MODELS, "130m", shape)
    vision = {"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 2}
    siglip = models.VISION_ENCODERS[models.ENCODER] | vision | {"image_size": 56}
    monkeypatch.setitem(models.VISION_ENCODERS, models.ENCODER, siglip)
    monkeypatch.setattr(scan, "CHANNELS", 8)
    monkeypatch.setattr(scan, "FORWARD_SHAPES", ((1, 5), (2, 9)))
    monkeypatch.setattr(scan, "TRAIN_SHAPES", ((2, 7),))
    monkeypatch.setattr(scan, "ERROR_SHAPE", (2, 9))
    monkeypatch.setattr(machine, "BUFFER_BYTES", 2**16)
    monkeypatch.setattr(machine, "GEMM_SHAPES", ((4, 8, 16),))
    monkeypatch.setattr(language_model, "PROMPT_TOKENS", 12)
    monkeypatch.setattr(language_model, "NEW_TOKENS", 3)
    monkeypatch.setattr(numbers, "LENGTHS", (128, 1024))
    monkeypatch.setattr(numbers, "ROWS", (1, 4))
    monkeypatch.setattr(numbers, "TOKENS", 2)
    monkeypatch.setattr(bench, "QUICK", ONCE)
    answered = invariance.Invariance("random weights", ("pope",), 4, 0, 1e-6)
    monkeypatch.setattr(invariance, "measure", lambda names, questions: answered)


def test_every_contender_runs_in_every_round_after_a_warm_up(monkeypatch):
    monkeypatch.setattr(timing, "SHORT_RUN_S", 0.0)
    calls: list[str] = []
    contenders = {n: Contender(lambda n=n: calls.append(n), units=4) for n in ("a", "b")}
    timings = side_by_side(contenders, Effort(least=2, most=3, seconds=9))
    assert calls == ["a", "b"] * 4  # the warm-up is not counted
    assert [len(t.wall_s) for t in timings.values()] == [3, 3]
    assert side_by_side(contenders, Effort(least=2, most=9, seconds=0))["a"].wall_s != ()
    impatient = side_by_side(contenders, Effort(least=2, most=9, seconds=9, patience=0))
    assert [len(t.wall_s) for t in impatient.values()] == [1, 1]


def test_what_a_gpu_compiles_in_its_first_calls_is_not_counted(monkeypatch):
    monkeypatch.setattr(timing, "synchronize", lambda device: None)
    calls: list[float] = []

    def run() -> None:
        time.sleep(0.3 if len(calls) < 2 else 0.001)
        calls.append(time.perf_counter())

    effort = Effort(least=2, most=3, seconds=9)
    assert side_by_side({"a": Contender(run)}, effort, "cuda")["a"].median_s < 0.1
    calls.clear()
    assert side_by_side({"a": Contender(run)}, Effort(1, 1, 9, patience=0.1), "cuda")["a"].wall_s


def test_a_short_run_is_several_calls_in_a_row():
    calls: list[str] = []
    contenders = {
        "short": Contender(lambda: calls.append("short")),
        "long": Contender(lambda: (calls.append("long"), time.sleep(0.03))),
    }
    timings = side_by_side(contenders, Effort(least=2, most=2, seconds=9))
    assert calls.count("long") == 3
    assert calls.count("short") > 100
    assert max(timings["short"].wall_s) < 0.001 < 0.03 <= min(timings["long"].wall_s)


def test_a_speedup_is_a_ratio_of_medians_for_one_unit():
    own, other = Timing((1.0, 9.0, 2.0), (1.0, 1.0, 1.0)), Timing((4.0, 6.0, 50.0), (3.0,) * 3)
    comparison = Comparison("prefill", "", "run", {VL_MAMBA: own, "baseline": other})
    assert comparison.speedup("baseline") == 3
    assert comparison.processor_speedup("baseline") == 3


def test_the_smallest_of_several_shapes_is_reported():
    def timed(seconds: float) -> Comparison:
        timings = {VL_MAMBA: Timing((1.0,), (1.0,)), scan.TRANSFORMERS: Timing((seconds,), (1.0,))}
        return Comparison("scan_forward", "", "run", timings)

    limits = machine.Machine(1e9, 1e9, 1e9)
    found = bench_report.summary(
        bench_report.Results({}, limits, [timed(80), timed(70), timed(90)])
    )
    assert found["scan_forward_speedup"] == 70
    assert found["scan_forward_speedup_mamba_ssm"] == "not installed"
    assert found["processor_time"]["scan_forward_speedup"] == 1
    assert "decode_speedup" not in found


def test_runs_that_differ_too_much_are_to_be_repeated(tiny):
    steady, wild = Timing((1.0, 1.1, 1.2), (1.0,) * 3), Timing((1.0, 1.0, 1.6), (1.0,) * 3)
    once = Timing((5.0,), (5.0,))
    timings = {VL_MAMBA: steady, "wild": wild, "once": once}
    limits = machine.Machine(1e9, 1e9, 1e9)
    results = bench_report.Results({}, limits, [Comparison("scan_train", "1x8", "run", timings)])
    assert bench_report.summary(results)["too_noisy"] == ["scan_train, 1x8: wild"]
    text = bench_report.tables(results)
    assert "too noisy: repeat (runs differ by more than 25 %: wild by 60 %)" in text
    assert [text.count(share) for share in ("18 %", "60 %", "one run")] == [1, 2, 1]
    assert "busy machine" not in text
    crowded = dataclasses.replace(results, settings={"other_load_cores": 1.5 * os.cpu_count()})
    assert "busy machine: other processes kept" in bench_report.tables(crowded)


def test_mamba_ssms_reference_needs_no_compiled_kernels(monkeypatch):
    def imported(name: str) -> types.SimpleNamespace:
        assert name == "mamba_ssm.ops.selective_scan_interface"
        assert "selective_scan_cuda" in sys.modules
        return types.SimpleNamespace(selective_scan_ref=lambda **inputs: inputs)

    monkeypatch.setattr(scan.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(scan.importlib, "import_module", imported)
    reference = scan.mamba_ssm_reference()
    assert reference is not None
    assert reference({"u": 1, "z": 2}) == {"u": 1, "z": 2, "delta_softplus": True}
    assert "selective_scan_cuda" not in sys.modules


def test_floors_follow_from_the_machines_limits(tiny):
    limits = machine.Machine(copy_bytes_per_s=20, read_bytes_per_s=10, gemm_flops_per_s=100)
    assert limits.prefill_floor_s(50) == 0.5
    own = language_model.Models().vl_mamba.language_model
    linear = 32 * 128 + 64 * (2 + 32) + 2 * 64 + 64 * 32
    convolution, scan_, head = 64 * 4, 9 * 64 * 16, 32 * 1008
    expected = 2 * 10 * (2 * (linear + convolution) + scan_) + 2 * head  # two layers
    assert models.prefill_flops(own, 10) == expected
    assert models.weight_bytes(own) == 4 * sum(p.numel() for p in own.parameters())
    pythia = models.build("pythia-160m").language_model
    untied = 4 * 32 * 1008
    assert models.weight_bytes(pythia) == 4 * sum(p.numel() for p in pythia.parameters()) - untied


def test_contenders_of_the_scan_compute_the_same(tiny):
    x = scan.inputs(2, 9)
    own, loop = scan.vl_mamba(x), scan.transformers_loop(scan.channels_first(x))
    torch.testing.assert_close(own, loop.transpose(1, 2), rtol=1e-4, atol=1e-5)
    assert max(scan.errors().values()) < 1e-5


@pytest.mark.parametrize(
    "name", ["vl-mamba-130m", "transformers-mamba-130m", "pythia-160m", "phi-2", "llama-160m"]
)
@torch.inference_mode()
def test_a_baseline_steps_as_it_reads(tiny, name):
    model = models.build(name)
    ids = torch.randint(1008, (2, 6))
    features = torch.randn(2, 16, 24)
    embeds = models.embed(model, ids, features)
    assert embeds.shape == (2, 16 + 6, 32)
    expected, _ = models.prefill(model, embeds)
    _, cache = models.prefill(model, embeds[:, :-1])
    held = cache.nbytes
    stepped = models.step(model, ids[:, -1], cache)
    torch.testing.assert_close(stepped, expected, rtol=1e-3, atol=1e-4)
    grown = cache.nbytes - held
    assert grown == 0 if "mamba" in name else grown == 2 * 2 * 2 * 32 * 4  # keys, values, layers
    state = 2 * 2 * 64 * (16 + (4 if "transformers" in name else 3)) * 4  # layers, batch, channels
    assert held == (state if "mamba" in name else 21 * grown)


@pytest.mark.parametrize("name", ["transformers-mamba-130m", "pythia-160m", "phi-2", "llama-160m"])
@torch.inference_mode()
def test_a_baseline_called_directly_is_the_wrapped_one(tiny, name):
    model = models.build(name)
    direct = model.language_model.model
    ids = torch.randint(1008, (2, 6))
    embeds = models.embed(model, ids)
    expected, cache = models.prefill(model, embeds)
    logits, own_cache = transformers_direct.prefill(direct, embeds)
    torch.testing.assert_close(logits, expected)
    expected = models.step(model, ids[:, 0], cache)
    torch.testing.assert_close(transformers_direct.step(direct, ids[:, 0], own_cache), expected)
    if "mamba" not in name:  # cropped, it continues as before; a recurrent state cannot
        transformers_direct.crop(own_cache, 6)
        torch.testing.assert_close(transformers_direct.step(direct, ids[:, 0], own_cache), expected)


@torch.inference_mode()
def test_both_mambas_have_the_same_weights(tiny):
    assert language_model.logits_error(language_model.Models()) < 1e-4


def test_the_last_line_is_json_with_every_promised_key(tiny, capsys, tmp_path):
    assert bench.main(["--quick", "--json", str(tmp_path / "all.json")]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(PROMISED) <= set(summary)
    assert summary["batch_invariant"] is True
    assert all(summary[key] > 0 for key in PROMISED)
    saved = json.loads((tmp_path / "all.json").read_text())
    assert saved["summary"] == summary
    assert saved["comparisons"][0]["timings"][VL_MAMBA]["wall_s"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_contenders_of_the_training_step_learn_the_same(tiny, monkeypatch, checkpointing):
    monkeypatch.setattr(training, "TEXT_TOKENS", 9)
    monkeypatch.setattr(training, "ANSWER_TOKENS", 4)
    shared = language_model.Models()
    own, baseline = shared.vl_mamba, shared.baseline
    baseline.connector = copy.deepcopy(own.connector)  # the measurement's are not shared either
    features, ids = training.sample(own)
    steps = [training.stepper(model, checkpointing) for model in (own, baseline)]
    losses = [[step(features, ids), step(None, ids), step(features, ids)] for step in steps]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][2] < losses[0][0]


def test_training_reports_speed_and_memory(tiny, monkeypatch, capsys):
    def measured(contender: str, checkpointing: bool) -> Measured:
        if contender == VL_MAMBA:
            return Measured(Timing((1.0,), (1.0,)), 2**30)
        return Measured(Timing((9.0,), (8.0,)), 3 * 2**30, stopped=checkpointing)

    monkeypatch.setattr(training, "in_own_process", measured)
    assert bench.main(["--only", "train", "--quick"]) == 0
    output = capsys.readouterr().out
    summary = json.loads(output.splitlines()[-1])
    for kind in training.KINDS:
        assert summary[f"{kind}_speedup"] == 9
        assert summary[f"{kind}_peak_memory_ratio"] == 3
        assert summary[f"{kind}_ratios_are_lower_bounds"] == (kind == "train_checkpointed")
    assert output.count("3x VL-Mamba's") == 2
    assert output.count("more than 3x VL-Mamba's") == output.count("more than 9x faster") == 1


def test_a_process_of_its_own_reports_its_own_peak(tiny):
    found = training.measure(VL_MAMBA, checkpointing=False)
    assert len(found.timing.wall_s) >= 1
    assert found.peak_bytes > 10**8
    assert not found.stopped


def test_a_step_that_takes_too_long_gives_bounds():
    script = (
        "import time; from harness.speed import training\n"
        "with training._given_up_after(0.3, 10): time.sleep(60)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert (done.returncode, found["stopped"]) == (0, True)
    assert 0.03 <= found["wall_s"][0] < 0.3
    assert found["peak_bytes"] > 10**7


def test_a_killed_process_is_explained(monkeypatch):
    monkeypatch.setattr(training.sys, "executable", "false")
    with pytest.raises(Exception, match="process measuring VL-Mamba ended with code 1"):
        training.in_own_process(VL_MAMBA, checkpointing=False)


def test_only_the_wanted_sections_run(tiny, capsys):
    assert bench.main(["--quick", "--only", "decode", "--threads", "1"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "decode_speedup" in summary
    assert "scan_forward_speedup" not in summary


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "decoed"], "unknown section 'decoed'; known, nearest first: decode"),
        (["--threads", "0"], "--threads is 0; expected a positive number"),
        (["--json", "no/such/folder/x.json"], "no folder 'no/such/folder' for --json"),
    ],
)
def test_a_mistake_is_one_line(capsys, arguments, message):
    assert bench.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_an_unknown_model_lists_the_known_ones():
    with pytest.raises(Exception, match="unknown model 'pythia-161m'.*pythia-160m"):
        models.build("pythia-161m")


def test_invariance_is_measured_on_the_demo_benchmarks(monkeypatch):
    monkeypatch.setattr(invariance, "BATCH_SIZES", (1, 3))
    monkeypatch.setattr(invariance, "LOGITS_BATCH", 2)
    monkeypatch.setattr(invariance, "NEW_TOKENS", 3)
    found = invariance.measure(["pope", "mme"], 4)
    assert (found.questions, found.different) == (8, 0)
    assert found.logits_error < 1e-4
    assert set(found.others) == {"bfloat16", "int8", "int4"}
    assert all(a.different == 0 and a.from_float32 <= 8 for a in found.others.values())


def test_figures_are_printed_beside_their_limits():
    lines = bench_report.against_limits({"prefill_speedup": 8.9, "decode_1_int8_speedup_fp32": 1.7})
    assert [line.split()[0] for line in lines[1:]] == [
        "prefill_speedup",
        "decode_1_int8_speedup_fp32",
    ]
    assert lines[1].endswith("MISSED") and not lines[2].endswith("MISSED")
    assert bench_report.against_limits({}) == []
    lines = bench_report.against_limits({"decode_outside_products_ms": 1.3})
    assert "at most 1.2" in lines[1] and lines[1].endswith("MISSED")


def test_a_baseline_is_as_shipped_again_after_the_fast_products():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    during = []
    numbers.with_fast_products(model, lambda: during.append(type(model[0]).__module__))()
    assert during == ["vlmamba.models.linear"] and type(model[0]) is torch.nn.Linear


def test_the_command_that_times_the_real_size_runs(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["time_real_size.py", "--tiny", "--repeats", "1"])
    tool = Path(__file__).resolve().parents[1] / "tools" / "time_real_size.py"
    before = torch.get_default_dtype()
    try:
        assert runpy.run_path(str(tool))["main"]() == 0
    finally:
        torch.set_default_dtype(before)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert all(found[f"{part}_s"] > 0 for part in ("encode", "prefill", "question_6", "step_1"))


def test_training_is_not_measured_on_another_device_than_is_named(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert bench.main(["--device", "cuda", "--only", "prefill,train"]) == 2
    assert "training is measured on the CPU alone" in capsys.readouterr().err
