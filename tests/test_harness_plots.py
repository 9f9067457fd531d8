"""Plots: the same records give the same bytes, in whichever process; crossovers are marked."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from test_harness_compare import write_run
from test_profile import MACHINE, sweep_of

from harness import plots as plots_command
from harness.reporting import plots, score_plots
from harness.runs.store import EvaluationRun


def write_profile(folder: Path) -> Path:
    """A profile's record with known curves: ours is faster from 1000 tokens on."""
    profile = sweep_of(256, 512, 1024, 2048, 4096)
    folder.mkdir(parents=True)
    record = {
        "schema": 1,
        "kind": "profile",
        "label": None,
        "settings": {"threads": 2},
        "machine": MACHINE | {"device": "cpu", "dtype": "float32", "processor": "Test CPU"},
        "points": [asdict(row) for row in profile.rows],
    }
    (folder / "record.json").write_text(json.dumps(record))
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def test_another_process_writes_the_same_bytes(tmp_path, capsys):
    write_profile(tmp_path / "runs" / "cpu")
    first, second = tmp_path / "first", tmp_path / "second"
    assert plots_command.main(["--from", str(tmp_path / "runs"), "--out", str(first)]) == 0
    assert "6 files written to" in capsys.readouterr().out
    command = [sys.executable, "-m", "harness.plots"]
    command += ["--from", str(tmp_path / "runs"), "--out", str(second)]
    subprocess.run(command, check=True, env={"PYTHONHASHSEED": "7"}, cwd=Path.cwd())
    assert digests(first) == digests(second)
    assert set(digests(first)) == {
        f"cpu.{name}.{kind}" for name in ("latency", "decode", "memory") for kind in ("svg", "png")
    }
    svg = (first / "cpu.latency.svg").read_text()
    assert "date" not in svg.lower()
    assert not any(str(year) in svg for year in range(2024, 2031))


def test_crossovers_are_marked_where_there_are_any(monkeypatch):
    from matplotlib.axes import Axes

    marked: list[str] = []
    annotate = Axes.annotate

    def record(self, text, *args, **kwargs):
        marked.append(text)
        return annotate(self, text, *args, **kwargs)

    monkeypatch.setattr(Axes, "annotate", record)
    plots.plot(sweep_of(256, 512, 1024, 2048), "latency", "svg")
    assert marked == ["1000"]
    plots.plot(sweep_of(2048, 4096), "latency", "svg")  # faster from the first length on
    assert marked == ["1000"]


def test_plots_of_runs_that_are_gone_are_named(tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.latency.svg").write_text("x")
    assert plots_command.main(["--from", str(tmp_path / "runs"), "--out", str(out)]) == 0
    assert "of no run here: old.latency.svg" in capsys.readouterr().out
    assert (out / "old.latency.svg").exists()


def texts(monkeypatch) -> list[str]:
    """What the legends of plots made from now on say."""
    from matplotlib.figure import Figure

    said: list[str] = []
    legend = Figure.legend

    def record(self, handles, labels, **kwargs):
        said.extend(labels)
        return legend(self, list(handles), list(labels), **kwargs)

    monkeypatch.setattr(Figure, "legend", record)
    return said


def test_a_legend_explains_the_crossovers_it_shows_or_lacks(monkeypatch):
    said = texts(monkeypatch)
    plots.plot(sweep_of(256, 512, 1024, 2048), "latency", "svg")
    assert said.count("ring: from so many tokens on VL-Mamba costs less") == 1
    said.clear()
    plots.plot(sweep_of(2048, 4096), "latency", "svg")
    assert not any("ring" in label for label in said)
    assert any(label.endswith("less from 2048 tokens, the shortest measured") for label in said)
    said.clear()
    plots.plot(sweep_of(256, 512), "latency", "svg")
    assert any("no crossover (not up to 512 tokens" in label for label in said)


def test_times_have_bars_and_noisy_points_say_so(monkeypatch):
    from matplotlib.axes import Axes

    bars: list[tuple] = []
    errorbar = Axes.errorbar

    def record(self, x, y, yerr=None, **kwargs):
        bars.append((list(x), list(y), yerr))
        return errorbar(self, x, y, yerr=yerr, **kwargs)

    monkeypatch.setattr(Axes, "errorbar", record)
    said = texts(monkeypatch)
    profile = sweep_of(256, 512, 1024)
    row = next(row for row in profile.rows if row.seq_len == 512)
    row.result["prefill_s"] = [1.0, 2.0, 4.0]  # differ by more than their median
    plots.plot(profile, "latency", "svg")
    lengths, medians, (below, above) = bars[profile.models().index(row.model)]
    place = lengths.index(512)
    assert (medians[place], below[place], above[place]) == (2.0, 1.0, 2.0)
    assert said.count("hollow: runs differ by more than 25 %, repeat") == 1
    bars.clear()
    plots.plot(profile, "memory", "svg")  # measured once
    assert bars == []


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [(0.5, 30, ["0.5", "1", "2", "5", "10", "20"]), (2, 4000, ["3", "10", "30", "100", "1000"])],
)
def test_log_axes_have_plain_numbers(low, high, wanted):
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    axis.set(yscale="log", ylim=(low, high))
    plots.label_log_axis(axis.yaxis, low, high)
    labels = [axis.yaxis.get_major_formatter()(value, None) for value in axis.get_yticks()]
    assert set(wanted) <= set(labels)


def test_scores_are_drawn_with_the_record_s_intervals(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn: list[tuple] = []
    errorbar = Axes.errorbar

    def record(self, x, y, xerr=None, **kwargs):
        drawn.append((x, xerr, kwargs["label"]))
        return errorbar(self, x, y, xerr=xerr, **kwargs)

    monkeypatch.setattr(Axes, "errorbar", record)
    runs = [EvaluationRun.read(write_run(tmp_path / name, [1.0, 0.0])) for name in "ab"]
    files = score_plots.of_runs(runs)
    assert files.keys() == {"scores.svg", "scores.png"}
    assert [label for _, _, label in drawn[:2]] == ["a", "b"]
    [value], [[below], [above]], _ = drawn[0]
    assert (value, below, above) == (50.0, pytest.approx(10.0), pytest.approx(10.0))
    assert score_plots.of_runs([]) == {}


def test_an_ablation_is_drawn_over_its_seeds(tmp_path, monkeypatch):
    said = texts(monkeypatch)
    cells = [
        {"variant": name, "seed": seed, "metrics": {"pope": 50.0 + seed + place}}
        for place, name in enumerate(("a", "b"))
        for seed in range(3)
    ]
    record = {"axis": "scan", "final": "b", "label": None, "cells": cells}
    assert score_plots.of_ablation(record).keys() == {"scores.svg", "scores.png"}
    assert "variant: mean over seeds, lowest to highest (an interval takes 5 seeds)" in said
    assert any(label.startswith("final model: mean over seeds") for label in said)
    assert score_plots.of_ablation(record | {"cells": [cells[0] | {"metrics": {}}]}) == {}


def test_slides_are_larger_and_pictures_have_300_dpi(tmp_path):
    from PIL import Image

    small, large = (
        Image.open(io.BytesIO(plots.plot(sweep_of(256, 512), "latency", "png", name)))
        for name in plots.STYLES
    )
    assert round(small.info["dpi"][0]) == 300
    assert large.width > small.width


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--from", ".", "--out", "x", "--style", "poster"], "unknown --style 'poster'"),
        (["--from", "nowhere", "--out", "x"], "no folder 'nowhere'"),
        (["--out", "x"], "--from (see --help)"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, capsys):
    assert plots_command.main(arguments) == 2
    assert message in capsys.readouterr().err
