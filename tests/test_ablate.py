"""An ablation: small cells for real, resumed and shared; tables and tests from known scores."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path

import pytest
from harness_world import pope_rows, unexplained, write_parquet
from test_harness_compare import write_run

from harness import ablate, tables
from harness import report as report_command
from harness.ablation import cells, jobs
from harness.ablation.cells import Budget, Cell
from harness.ablation.jobs import Job, Step
from harness.ablation.record import record_of
from harness.ablation.variants import AXES, DEMO, FINAL, SCALES, Variant, variants
from harness.reporting import ablation_tables
from harness.scoring import paired
from vlmamba.config import VLMambaConfig
from vlmamba_core.errors import UserError
from vlmamba_core.launcher import Launcher

BUDGET = Budget("data", "lm", 5, 7, ("--cpu",), "pope", "demo", "demo", None, 10)


@pytest.mark.parametrize("scale", SCALES)
def test_every_variant_is_a_preset_and_every_axis_has_the_final_model(scale):
    for axis in SCALES[scale]:
        found = variants(axis, scale)
        assert sum(v.same_model(FINAL[scale]) for v in found) == 1
        assert len({(v.folder, v.evaluation) for v in found}) == len(found)
        for variant in found:
            config = VLMambaConfig.preset(variant.preset)
            assert (config.connector, config.scan) == (variant.connector, variant.scan)
    axis = SCALES[scale]["encoder"]
    patches = [VLMambaConfig.preset(v.preset).num_image_tokens for v in axis]
    assert patches == {"demo": [25, 49, 100], "paper": [576, 729]}[scale]


def test_the_papers_scale_has_the_papers_axes():
    assert set(SCALES["paper"]) < set(AXES)
    with pytest.raises(UserError, match="unknown axis at --scale paper 'votes'"):
        variants("votes", "paper")


def test_what_a_variant_changes_reaches_its_commands(tmp_path):
    done: list[tuple[str, str]] = []

    def start(module: str, arguments: list[str]) -> int:
        done.append((module, " ".join(arguments)))
        return finished(module, arguments)

    for axis in ("objective", "votes", "adaptation"):
        for variant in variants(axis):
            cells.job(Cell(variant, 0), BUDGET, tmp_path).run(start)
    trained = [text for module, text in done if module == "vlmamba.train"]
    asked = [text for module, text in done if module == "harness.run"]
    assert len(trained) == 2 * (6 + 2) and len(asked) == 6 + 2 + 2  # votes ask the final model
    assert "--preset nano-iaa+efficientnet-lite0+vss_l2+bsm --stage adaptors" in trained[-1]
    contrastive = [text for text in trained if "--objective contrastive" in text]
    assert len(contrastive) == 1 and "--stage pretrain" in contrastive[0]
    taught = [text for text in trained if "--teacher nano" in text]
    assert len(taught) == 3 and all("--stage finetune" in text for text in taught)
    assert asked[7].endswith("--votes 16 --temperature 0.7")
    assert "evaluation-votes-16" in asked[7]


def test_published_parts_need_no_text_stage():
    budget = Budget(**{**BUDGET.__dict__, "scale": "paper"})
    cell = Cell(FINAL["paper"], 0)
    first, second = (cells.training(cell, s, budget, Path("cell")) for s in cells.STAGES)
    assert first[1] == "2.8b-slimpj+siglip-so400m-384+vss_l2+bsm"
    assert "--init" not in first
    assert "--features-cache" not in first
    assert second[second.index("--init") + 1] == "cell/pretrain/final"


def test_quick_starts_from_the_bundled_model_with_pictures_of_its_own(tmp_path, monkeypatch):
    commands: list[tuple[str, list[str]]] = []

    def execute(module: str, arguments: list[str], log: Path | None = None) -> int:
        commands.append((module, list(arguments)))
        return 3 if module == "vlmamba.train" else 0

    monkeypatch.setattr(jobs, "execute", execute)
    monkeypatch.setattr(ablate, "execute", execute)
    quick = ["--axis", "connector", "--quick", "--out", str(tmp_path / "out")]
    assert ablate.main(quick) == 2
    assert [module for module, _ in commands][:2] == ["vlmamba.demo", "vlmamba.train"]
    text = " ".join(commands[1][1])
    assert "--init nano" in text and "--steps 120" in text and "--batch-size 8" in text
    assert ablate.main(["--axis", "llm", "--quick", "--out", str(tmp_path / "out")]) == 2


def test_a_cell_is_two_stages_and_an_evaluation_each_done_once(tmp_path):
    done: list[tuple[str, list[str]]] = []
    fail = ["finetune"]

    def start(module: str, arguments: list[str]) -> int:
        done.append((module, arguments))
        out = Path(arguments[arguments.index("--out") + 1])
        if out.name in fail:
            return 1
        (out / "final").mkdir(parents=True)
        if out.name == "evaluation":
            (out / "record.json").write_text("{}")
        return 0

    cell = Cell(Variant("csm", scan="csm"), 2)
    with pytest.raises(Exception, match="csm, seed 2: `python -m vlmamba.train .* run the same"):
        cells.job(cell, BUDGET, tmp_path).run(start)
    fail.clear()
    cells.job(cell, BUDGET, tmp_path).run(start)
    cells.job(cell, BUDGET, tmp_path).run(start)
    assert [module for module, _ in done] == ["vlmamba.train"] * 3 + ["harness.run"]
    first, second = " ".join(done[0][1]), " ".join(done[2][1])
    assert "--preset nano+efficientnet-lite0+vss_l2+csm --stage pretrain" in first
    assert "--init lm/talk/final" in first
    assert "--seed 2 --resume auto --steps 5 --cpu" in first
    assert "seed-2/pretrain/final" in second
    assert "--steps 7" in second
    assert "--limit 10 --seed 2" in " ".join(done[3][1])


def test_a_step_that_failed_after_its_mark_is_done_again(tmp_path):
    """record.json is there before the run has ended; what came after must not be left out."""
    codes, ran = [0, 0, 3, 0], []

    def start(module: str, arguments: list[str]) -> int:
        ran.append(module)
        finished(module, arguments)
        return codes.pop(0)

    made = cells.job(Cell(FINAL["demo"], 0), BUDGET, tmp_path)
    with pytest.raises(UserError, match="ended with code 3"):
        made.run(start)
    assert not made.finished
    assert set(made.seconds()) == {"pretrain/final", "finetune/final"}
    made.run(start)
    made.run(start)
    assert ran == ["vlmamba.train"] * 2 + ["harness.run"] * 2
    assert made.finished and len(made.seconds()) == 2  # of a part of a step nothing is said


def test_a_step_that_cannot_be_given_again_counts_as_done(tmp_path):
    (tmp_path / "made").touch()
    once = Step("vlmamba.demo", (), tmp_path / "made", again=False)
    job = Job("data", tmp_path / "job", {}, (once,))
    (tmp_path / "job" / ".job").mkdir(parents=True)
    (tmp_path / "job" / ".job" / "begun.txt").write_text(f"{tmp_path}/made\n")
    job.run(pytest.fail)
    assert job.finished


def test_a_cell_of_other_data_or_weights_under_the_same_names_is_refused(tmp_path):
    for name in ("pretrain", "finetune"):
        (tmp_path / f"{name}.json").write_text("[]")
    lm = tmp_path / "lm" / FINAL["demo"].lm / "final"
    lm.mkdir(parents=True)
    (lm / "model.safetensors").write_bytes(b"one")
    budget = Budget(**{**BUDGET.__dict__, "data": str(tmp_path), "lm": str(tmp_path / "lm")})
    cell = Cell(FINAL["demo"], 0)
    cells.job(cell, budget, tmp_path / "out").run(finished)
    cells.job(cell, budget, tmp_path / "out").run(pytest.fail)
    (lm / "model.safetensors").write_bytes(b"another")
    with pytest.raises(UserError, match="begun with weights of the language model"):
        cells.job(cell, budget, tmp_path / "out").run(finished)
    (lm / "model.safetensors").write_bytes(b"one")
    (tmp_path / "finetune.json").write_text("[1]")
    with pytest.raises(UserError, match=r"begun with content of finetune\.json"):
        cells.job(cell, budget, tmp_path / "out").run(finished)


def test_a_cell_begun_under_other_terms_is_refused(tmp_path):
    cell = Cell(FINAL["demo"], 0)
    cells.job(cell, BUDGET, tmp_path).run(finished)
    renamed = Cell(Variant("bsm"), 0)
    cells.job(renamed, BUDGET, tmp_path).run(finished)  # the same model in another axis
    other = Budget(**{**BUDGET.__dict__, "finetune_steps": 8})
    with pytest.raises(Exception, match="was begun with finetune_steps 7, now it is 8"):
        cells.job(cell, other, tmp_path).run(finished)


def finished(module: str, arguments: list[str]) -> int:
    """An instant stand-in for a command."""
    out = Path(arguments[arguments.index("--out") + 1])
    (out / "final").mkdir(parents=True, exist_ok=True)
    (out / "record.json").write_text("{}")
    return 0


def test_tables_follow_from_the_cells_scores(tmp_path):
    chosen = DEMO["connector"][:1] + DEMO["connector"][2:3]
    scores = {("mlp", 0): [0, 0, 1, 0], ("mlp", 1): [0, 1, 1, 0]}
    scores |= {("vss_l2", 0): [1, 1, 1, 0], ("vss_l2", 1): [1, 1, 1, 1]}
    studied = [Cell(variant, seed) for seed in (0, 1) for variant in chosen]
    for cell in studied:
        folder = cell.folder(tmp_path) / "evaluation"
        write_run(folder, scores[cell.variant.name, cell.seed])
        record = json.loads((folder / "record.json").read_text())
        values = scores[cell.variant.name, cell.seed]
        record["tasks"]["pope"]["metrics"] = {"f1": {"value": sum(values) / 4}}
        (folder / "record.json").write_text(json.dumps(record))
    found = json.loads(json.dumps(record_of("connector", studied, BUDGET, tmp_path)))
    table, tests = ablation_tables.tables_of(found)
    assert table.headers == ["connector", "POPE"]
    assert table.rows[0] == ["mlp", "37.5 (25.0 to 50.0)"]
    assert "2 seeds are too few for an interval" in table.note
    assert table.rows[1][0] == "vss_l2 *"
    expected = paired.paired([0, 0.5, 1, 0], [1, 1, 1, 0.5], ["x", "x", "y", "y"])
    [test] = found["tests"]
    assert test["difference"] == expected.difference == -0.5
    assert (test["p_value"], test["low"]) == (expected.p_value, expected.low)
    assert tests.rows[0][:3] == ["mlp", "POPE", "-50.0"]
    assert tests.rows[0][3] == "too few: 2 clusters"
    assert tests.rows[0][-1] == "2/2"


def test_five_seeds_give_an_interval_inside_the_range():
    cells_ = [
        {"variant": "mlp", "seed": s, "metrics": {"pope": value, "coco_cap": cider}}
        for s, (value, cider) in enumerate([(2, 400), (99, 9), (99, 10), (98, 11), (97, 9)])
    ]
    found = {"axis": "connector", "final": "mlp", "arguments": {"seeds": [*range(5)]}}
    found |= {"label": None, "cells": cells_, "tests": []}
    table, _ = ablation_tables.tables_of(found)
    assert table.headers == ["connector", "POPE", "coco_cap"]
    for cell in table.rows[0][1:]:
        mean, low, high = (float(x) for x in re.findall(r"-?[0-9.]+", cell))
        assert 0 <= low < mean < high <= (100 if mean < 80 else 1000), cell
    assert "in brackets the 95 % interval over seeds" in table.note


def test_cells_side_by_side_share_the_cores_and_keep_their_logs(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(jobs.os, "cpu_count", lambda: 6)
    together, seen = threading.Barrier(2, timeout=30), []

    def execute(module: str, arguments: list[str], log: Path | None) -> int:
        together.wait()  # both cells are at work
        seen.append((log, jobs.os.environ["OMP_NUM_THREADS"]))
        return int("--seed 1" in " ".join(arguments))

    monkeypatch.setattr(jobs, "execute", execute)
    two = [Cell(Variant("mlp", connector="mlp"), seed) for seed in (0, 1)]
    monkeypatch.setattr(cells, "STAGES", ("pretrain",))
    for cell in two:
        done = cell.folder(tmp_path) / "evaluation"
        done.mkdir(parents=True)
        (done / "record.json").write_text("{}")
    with pytest.raises(UserError, match="mlp, seed 1"):
        left = [cells.job(cell, BUDGET, tmp_path) for cell in two[1:] + two[:1]]
        list(jobs.run_jobs(left, 2, Launcher("local", tmp_path)))
    assert {log.parent.name for log, _ in seen} == {"seed-0", "seed-1"}
    assert {threads for _, threads in seen} == {"3"}


def test_a_small_study_for_real(tmp_path, monkeypatch, capsys):
    """Two connectors, one seed: trained, evaluated, tabled; the second axis finds its cells."""
    from vlmamba import train
    from vlmamba.generation import GroupedGenerator

    world = training_world(tmp_path)
    small = ["--tiny", "--cpu", "--dtype=fp32", "--batch-size=2", "--micro-batch=2"]
    text = ["--preset", "nano", "--stage", "text", "--data", str(world / "finetune.json")]
    lm = tmp_path / "lm"
    text += ["--out", str(lm / "talk"), "--steps=1", "--max-length=32", *small]
    assert train.main(text) == 0
    write_parquet(pope_rows(2, 1), world / "pope.parquet")
    generate = GroupedGenerator.generate
    monkeypatch.setattr(
        GroupedGenerator,
        "generate",
        lambda self, requests, longest, *rest: generate(self, requests, min(longest, 2), *rest),
    )
    monkeypatch.setattr(jobs, "execute", in_this_process)
    command = ["--seeds", "1", "--tasks", "pope", "--data", str(world), "--lm", str(lm)]
    command += ["--pretrain-steps", "1", "--steps", "1", "--eval-data", str(world), "--limit", "4"]
    command += ["--train-args", " ".join(small), "--out", str(tmp_path / "out")]
    assert ablate.main(["--axis", "connector", "--variants", "mlp", *command]) == 0
    record = json.loads((tmp_path / "out" / "connector" / "record.json").read_text())
    assert [cell["variant"] for cell in record["cells"]] == ["mlp", "vss_l2"]
    assert record["tests"][0]["n"] == 4
    assert "| vss_l2 * |" in (tmp_path / "out" / "connector" / "table.md").read_text()
    assert unexplained(tmp_path / "out") == unexplained(lm / "talk") == []
    assert "Ablation of connector, 1 seed" in capsys.readouterr().out
    page = tmp_path / "report.html"
    assert report_command.main([str(tmp_path / "out" / "connector"), "--out", str(page)]) == 0
    assert "Ablation of connector: against the final model (vss_l2)" in page.read_text()
    assert tables.main(["--from", str(tmp_path / "out"), "--out", str(tmp_path / "tables")]) == 0
    assert (tmp_path / "tables" / "connector.paired.tex").exists()
    monkeypatch.setattr(
        jobs, "execute", lambda module, arguments, log: pytest.fail("trained again")
    )
    assert ablate.main(["--axis", "scan", "--variants", "bsm", *command]) == 0


def training_world(folder: Path) -> Path:
    """pretrain.json, finetune.json and two pictures."""
    from PIL import Image
    from test_llava_data import conversation

    world = folder / "data"
    world.mkdir()
    for i, color in enumerate(("red", "green")):
        Image.new("RGB", (40, 40), color).save(world / f"{i}.png")
    samples = [{"image": f"{i % 2}.png", "conversations": conversation()} for i in range(4)]
    for stage in cells.STAGES:
        (world / f"{stage}.json").write_text(json.dumps(samples))
    return world


def in_this_process(module: str, arguments: list[str], log: Path | None = None) -> int:
    """Run a command without the seconds that a new process takes to load torch."""
    from accelerate.state import AcceleratorState

    from harness import run
    from vlmamba import train

    try:
        return {"vlmamba.train": train.main, "harness.run": run.main}[module](arguments)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--axis", "scans"], "unknown axis 'scans'; known, nearest first: scan"),
        (["--axis", "scan", "--variants", "bms"], "unknown variant of axis scan 'bms'"),
        (["--axis", "scan", "--scale", "papr"], "unknown scale 'papr'"),
        (["--axis", "scan", "--seeds", "0"], "--seeds is 0; expected at least 1"),
        (["--axis", "scan", "--data", "no"], "no/pretrain.json is missing: `make demo-model`"),
        ([], "required: --axis (see --help)"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, capsys, tmp_path):
    assert ablate.main([*arguments, "--out", str(tmp_path / "never")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "never").exists()
