"""Wrong arguments of every command of the harness: one line, code 2, nothing begun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from refusal import refused
from test_harness_compare import write_run
from test_harness_plots import write_profile

from harness import ablate, bench, profile, report, run, score, study, tables
from harness import compare as compare_command
from harness import plots as plots_command

MAINS = {
    "run": run.main,
    "score": score.main,
    "bench": bench.main,
    "profile": profile.main,
    "ablate": ablate.main,
    "study": study.main,
    "report": report.main,
    "compare": compare_command.main,
    "tables": tables.main,
    "plots": plots_command.main,
}
KEY = "sk-secret-0123456789"
# Command line -> what the one line says. `a` and `b` are runs, `p` a profile, `file` a file.
LINES: dict[str, str] = {
    "run": "--tasks is missing",
    "run --tasks": "expected one argument",
    "run --tasks ,": "--tasks is ','",
    "run --tasks popr": "unknown task 'popr'; known, nearest first: pope",
    "run --tasks ../pope": "unknown task '../pope'",
    "run --task pope": "unrecognized arguments: --task",
    "run --tasks pope extra": "unrecognized arguments: extra",
    "run --tasks pope --data gone": "no data folder 'gone'",
    "run --tasks pope --data ~nobody/data": "no data folder",
    "run --tasks pope --data ~nobody_of_this_name": "no data folder",
    "run --tasks pope --data=": "no data folder ''",
    "run --tasks pope --data file": "no data folder 'file'",
    "run --tasks pope --style new": "unknown style 'new'",
    "run --tasks pope --style seen --data hub": "--style seen needs --data demo",
    "run --tasks pope --split ../x": "--split ../x needs --data hub or a folder",
    "run --tasks pope --data-id a/b": "--data-id needs --data hub",
    "run --tasks pope,mme --data hub --data-id a/b": "give one task",
    "run --tasks pope --protocol lmm": "unknown protocol 'lmm'",
    "run --tasks pope --limit 0": "--limit is 0",
    "run --tasks pope --limit 1e3": "invalid int value",
    "run --tasks pope --limit 99999999999999999999 --data gone": "no data folder",
    "run --tasks pope --batch-size 0": "--batch-size is 0",
    "run --tasks pope --seed -1": "--seed is -1",
    "run --tasks pope --seed 4294967296": "--seed is 4294967296",
    "run --tasks pope --dtype int8": "unknown dtype 'int8'",
    "run --tasks pope --backend gpu": "unknown backend 'gpu'",
    "run --tasks pope --model nanoo": "unknown model 'nanoo'",
    "run --tasks pope --model a/b/c": "unknown model 'a/b/c'",
    "run --tasks pope --model file": "unknown model 'file'",
    "run --tasks pope --data good-data --model small --device meta": "runs on cpu, cuda or cuda:N",
    "run --tasks pope --data good-data --model small --device cpu:x": "unknown device 'cpu:x'",
    "run --tasks pope --data good-data --model small --out file": "cannot write to file",
    "run --tasks pope --submit sent": "no chosen task has a test server",
    "run --tasks coco_cap --submit file": "cannot write to file",
    "run --tasks pope --from-record gone.json": "is not a record.json",
    "run --tasks pope --from-record .": "is not a record.json",
    "run --tasks pope --judge http://localhost/v1": "'pope' needs no judge",
    "run --tasks mmvet --judge localhost": "not a web address",
    "run --tasks mmvet --judge http://[::1": "not a web address",
    "run --tasks mmvet --judge http://host:port/v1": "not a web address",
    "run --tasks mmvet --judge http://höst/v1": "not a web address",
    "run --tasks mmvet --judge file:///etc/passwd": "not a web address",
    f"run --tasks mmvet --judge https://me:{KEY}@host/v1": "holds credentials",
    f"run --tasks mmvet --judge https://host/v1?key={KEY}": "holds credentials or a query",
    f"run --tasks mmvet --judge https://host/v1 --judge-key-env {KEY}": "not the key itself",
    "run --tasks mmvet --judge https://host/v1 --judge-key-env NOT_SET": "NOT_SET is not set",
    "score": "required: task, predictions",
    "score pope": "required: predictions",
    "score popo file": "unknown task 'popo'",
    "score pope gone": "no file 'gone'",
    "score pope .": "no file '.'",
    "score pope file --protocol papr": "unknown protocol 'papr'",
    "score pope file --import lava": "unknown prediction format 'lava'",
    "score pope good --truth file": "--truth belongs to --import",
    "score pope file --truth": "expected at least one argument",
    "score pope good --submit x.json": "has no test server",
    "score pope good --json gone/x.json": "cannot write",
    "score pope good --json .": "cannot write",
    "score vqav2 vqa --submit x.txt": "submission is a .json file",
    "score pope good --judge http://localhost/v1": "'pope' needs no judge",
    "bench --only scam": "unknown section 'scam'",
    "bench --only scan,": "unknown section ''",
    "bench --threads 0": "--threads is 0",
    "bench --threads two": "invalid int value: 'two'",
    "bench --json gone/x.json": "no folder 'gone'",
    "bench --json .": "is a folder",
    "bench --fast": "unrecognized arguments: --fast",
    "profile --models ,": "--models is empty",
    "profile --models gpt-5": "unknown model 'gpt-5'",
    "profile --seq-lens ,": "--seq-lens is ','",
    "profile --seq-lens 256,many": "expected positive numbers",
    "profile --seq-lens 0": "expected positive numbers",
    "profile --batch-sizes -1": "expected one argument|expected positive numbers",
    "profile --batch-sizes 1.5": "expected positive numbers",
    "profile --image-tokens 10": "expected a square number",
    "profile --image-tokens -4": "expected one argument|expected a square number",
    "profile --decode 0": "--decode is 0",
    "profile --seconds nan": "--seconds is nan",
    "profile --seconds 0": "--seconds is 0",
    "profile --time-limit inf": "--time-limit is inf",
    "profile --threads 0": "--threads is 0",
    "profile --memory-limit-gib nan": "--memory-limit-gib is nan",
    "profile --memory-limit-gib 0": "--memory-limit-gib is 0",
    "profile --memory-limit-gib inf": "--memory-limit-gib is inf",
    "profile --dtype int8": "unknown dtype 'int8'",
    "profile --device toaster": "unknown device 'toaster'",
    "profile --tiny --models vl-mamba-130m --out file": "cannot write to file",
    "ablate": "required: --axis",
    "ablate --axis size": "unknown axis 'size'",
    "ablate --axis scan --scale huge": "unknown scale 'huge'",
    "ablate --axis scan --variants bsn": "unknown variant of axis scan 'bsn'",
    "ablate --axis scan --seeds 0": "--seeds is 0",
    "ablate --axis scan --steps 0": "--steps is 0",
    "ablate --axis scan --limit -1": "--limit is -1|expected one argument",
    "ablate --axis scan --train-args '": "No closing quotation",
    "ablate --axis scan --tasks popr": "unknown task 'popr'",
    "ablate --axis scan --style new": "unknown style 'new'",
    "ablate --axis scan --eval-data gone": "no data folder 'gone'",
    "ablate --axis scan --data gone --lm gone": "is missing",
    "study --scale dmo": "unknown scale 'dmo'; known, nearest first: demo",
    "study --families mamba3": "unknown language model 'mamba3'",
    "study --connectors mpl": "unknown connector 'mpl'; known, nearest first: mlp",
    "study --seeds 0": "--seeds is 0",
    "study --workers -1": "--workers is -1|expected one argument",
    "study --scale paper": "needs --data FOLDER with LLaVA's pretrain.json",
    "study --scale paper --data a": "needs --data FOLDER with LLaVA's pretrain.json",
    "study --train-args '": "No closing quotation",
    "study --slurm partition=gpu": "needs --launcher slurm",
    "study --page gone/STUDY.md": "cannot write gone/STUDY.md",
    "study --records file --page STUDY.md": "file is no folder of records",
    "report": "required: RUN",
    "report gone": "no record.json in gone",
    "report file": "is not a run's record|no record.json",
    "report a --max-samples 0": "--max-samples must be at least 1",
    "report a --max-images -1": "--max-images at least 0|expected one argument",
    "report a --out gone/r.html": "no folder 'gone'",
    "report a --out .": "is a folder",
    "report a --paper gone.csv": "cannot read gone.csv",
    "report a --paper file": "is not a row of a known table|cannot read|has no column",
    "report a --paper binary": "cannot read binary",
    "compare a": "one run is no comparison",
    "compare a gone": "no record.json in gone",
    "compare a p": "holds a profile; expected a run of harness.run",
    "compare a b --seed -1": "--seed is -1",
    "compare a b --seed x": "invalid int value: 'x'",
    "tables": "required: --from, --out",
    "tables --from gone --out o": "no folder 'gone'",
    "tables --from a --out file": "cannot write to file",
    "tables --from a --out o --paper gone.csv": "cannot read gone.csv",
    "plots": "required: --from, --out",
    "plots --from gone --out o": "no folder 'gone'",
    "plots --from p --out file": "cannot write to file",
    "plots --from file --out o": "no folder 'file'",
}


@pytest.fixture
def world(tmp_path, monkeypatch, whole_data, whole_checkpoint) -> Path:
    """Two runs, a profile, data, a checkpoint and some files, as the current folder."""
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        write_run(tmp_path / name, [1, 0])
    write_profile(tmp_path / "p")
    (tmp_path / "file").write_text("table\nx\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\0")
    row = {"question": "Is it?", "answer": "yes", "category": "random", "prediction": "Yes"}
    (tmp_path / "good").write_text(json.dumps(row))
    row = {"question_id": 1, "question": "What?", "answers": ["cat"] * 10, "answer_type": "other"}
    (tmp_path / "vqa").write_text(json.dumps(row | {"prediction": "cat"}))
    monkeypatch.delenv("NOT_SET", raising=False)
    (tmp_path / "good-data").symlink_to(whole_data)
    (tmp_path / "small").symlink_to(whole_checkpoint)
    return tmp_path


@pytest.mark.parametrize("line", LINES)
def test_refused(line, world, capsys):
    command, *arguments = line.split(" ")
    before = sorted(path.name for path in world.iterdir())
    refused(MAINS[command], arguments, LINES[line], capsys)
    left = {"o", "sent", "runs"}  # folders may be made; what is there is not touched
    assert {path.name for path in world.iterdir()} - left == set(before) - left


@pytest.mark.parametrize("line", [line for line in LINES if KEY in line])
def test_a_key_in_the_wrong_place_is_not_repeated(line, world, capsys):
    command, *arguments = line.split(" ")
    assert MAINS[command](arguments) == 2
    printed = capsys.readouterr()
    assert KEY not in printed.err + printed.out


@pytest.mark.parametrize("command", MAINS)
def test_help_is_no_mistake(command, capsys):
    with pytest.raises(SystemExit) as caught:
        MAINS[command](["--help"])
    assert caught.value.code == 0
    assert f"python -m harness.{command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line",
    [
        "harness.run --tasks popr",
        "harness.score pope gone",
        "harness.report gone",
        "harness.tables --from gone --out o",
        "vlmamba.train --stage finetun",
    ],
)
def test_as_a_process_of_its_own(line, tmp_path):
    root = Path(__file__).resolve().parents[2]
    module, *arguments = line.split()
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(root), "PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 2
    assert done.stdout == ""
    [shown] = done.stderr.splitlines()
    assert shown.startswith("error: ")


def test_a_file_cannot_steer_the_terminal(world, capsys):
    (world / "evil").write_text(json.dumps({"\x1b[2Jcolumn\r": 1, "prediction": "x"}))
    assert score.main(["pope", "evil"]) == 2
    shown = capsys.readouterr().err
    assert "\x1b" not in shown
    assert r"\x1b[2Jcolumn" in shown
