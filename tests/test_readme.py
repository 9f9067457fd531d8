"""Every command and every Python block of README.md runs.

How, by command (see HOW): on the demo they run for real, but on two questions, shrunken models or
prepared runs, and in this process. Commands with placeholders (a checkpoint, published files) need
what no test has: training ones run with `--estimate`, which builds the model they name without
memory; of evaluation and scoring the arguments go through the command's own checks. `make` targets
are expanded (`make -n`), their commands are in other tests. A command that this file cannot run
fails the test, so a new one in the README asks for its line here.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image
from test_bench import tiny  # noqa: F401  # a fixture: every size of the benchmark shrunk
from test_harness_compare import write_run
from test_notebooks import launch

from harness import ablate, bench, profile, report, run, score, study, tables
from harness import compare as compare_command
from harness import plots as plots_command
from harness.runs import store
from harness.speed.sweep import lengths, measure
from vlmamba import ask, experts, quantize, serve, train
from vlmamba.convert import __main__ as convert_command
from vlmamba.demo import __main__ as demo_data
from vlmamba.training.arguments import RunArguments
from vlmamba.training.plan import resolve

ROOT = Path(__file__).resolve().parents[1]
OWN_PICTURES = ROOT / "docs" / "how-to" / "own-pictures.md"
BLOCK = re.compile(r"^```(bash|text|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PLACEHOLDERS = {
    "CHECKPOINT_OR_HUB_ID": "org/name",
    "FOLDER_WITH_PARQUET": "parquet",
    "$D": "published",
}


def pages() -> list[Path]:
    """README.md and every page of the documentation site."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(*kinds: str, of: Sequence[Path] | None = None) -> list[str]:
    """Blocks of these kinds; of all pages but one, which a test of its own takes as a whole."""
    chosen = [page for page in pages() if page != OWN_PICTURES] if of is None else of
    text = "\n".join(page.read_text(encoding="utf-8") for page in chosen)
    return [content for kind, content in BLOCK.findall(text) if kind in kinds]


def commands(of: Sequence[Path] | None = None) -> list[str]:
    """Every command line, continuations joined, comments and output left out."""
    lines = "\n".join(blocks("bash", "text", of=of)).replace("\\\n", " ").splitlines()
    stripped = (shlex.join(shlex.split(line, comments=True)) for line in lines)
    starts = ("python ", "make ", "lmms-eval ", "accelerate ", "pip ")
    return list(dict.fromkeys(line for line in stripped if line.startswith(starts)))


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A working directory in which the README's relative paths mean something."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "parquet").mkdir()
    monkeypatch.setattr(lengths, "launch", launch)
    monkeypatch.setattr(study.hours, "probe", lambda: 1e-3)
    monkeypatch.setattr(lengths, "measure_machine", measure.measure_machine)
    return tmp_path


def made_before(arguments: list[str], flag: str) -> None:
    """A folder that an earlier line of the page makes: the bundled model, packed."""
    folder = dict(pairwise(arguments)).get(flag, "")
    if folder.startswith("runs/") and not Path(folder).exists():
        assert quantize.main(["--model", "nano", "--kind", "int4", "--out", folder]) == 0


def on_two_questions(arguments: list[str]) -> None:
    """harness.run: the demo for real; elsewhere only what is checked before data are needed."""
    away = {"hub", "parquet", "org/name"} & set(arguments)
    if away or any(argument.startswith("api:") for argument in arguments):
        run.parse(arguments)
        return
    made_before(arguments, "--model")
    assert run.main([*arguments, "--limit", "2", "--out", "runs/readme"]) == 0


def parsed(parser: Callable) -> Callable[[list[str]], None]:
    """Arguments that the command's own parser takes, and no others."""

    def check(arguments: list[str]) -> None:
        parser().parse_args(arguments)

    return check


def estimated(arguments: list[str]) -> None:
    """vlmamba.train: the model built on no memory, its cost printed."""
    kept = [a for a in arguments if a not in ("--dry-run",)]
    if not {"--preset", "--recipe"} & set(arguments):
        made_before(arguments, "--init")
    assert train.main([*kept, "--estimate"]) == 0


def profiled(arguments: list[str]) -> None:
    """harness.profile: shrunken models on short sequences."""
    small = ["--tiny", "--seq-lens=16,32", "--image-tokens=4", "--decode=1", "--seconds=0.1"]
    small += ["--models=vl-mamba-130m,pythia-160m", "--dtype=float32", "--device=cpu"]
    assert profile.main([*arguments, *small, "--out=runs/profiled"]) == 0


def on_prepared_runs(main: Callable) -> Callable[[list[str]], None]:
    """Commands that read runs: folders they name are filled with a small one."""

    def go(arguments: list[str]) -> None:
        for argument in arguments:
            if "/" in argument and "." not in argument and not Path(argument).exists():
                write_run(Path(argument), [1, 0, 1, 1])
        extra = ["--no-images"] if main is report.main else []
        assert main([*arguments, *extra]) == 0

    return go


def from_committed_runs(main: Callable) -> Callable[[list[str]], None]:
    """Commands that read results/runs."""

    def go(arguments: list[str]) -> None:
        Path("results/runs").mkdir(parents=True, exist_ok=True)
        assert main(arguments) == 0

    return go


def benchmarked(arguments: list[str]) -> None:
    """harness.bench: on the sizes of its own tests, one section."""
    assert bench.main([*arguments, "--only", "decode"]) == 0


def asked(arguments: list[str]) -> None:
    """vlmamba.ask: the bundled model on a picture of the name given."""
    Image.new("RGB", (64, 48), "red").save("photo.jpg")
    kept = [a for a in arguments if not a.startswith(("--model", "runs/"))]
    sys.stdin = io.StringIO("Is there a dog?\n")
    try:
        assert ask.main([*kept, "--max-new-tokens", "2"]) == 0
    finally:
        sys.stdin = sys.__stdin__


def studied(arguments: list[str]) -> None:
    """harness.ablate: what it would run, once its inputs are there; test_ablate.py runs a study."""
    parsed(ablate.build_parser)(arguments)
    if "--quick" in arguments:
        assert ablate.main([*arguments, "--dry-run"]) == 0


def planned(arguments: list[str]) -> None:
    """harness.study: its plan, of data that are there; test_study.py does a small one."""
    parsed(study.build_parser)(arguments)
    if "paper" not in arguments:
        assert study.main([*arguments, "--plan"]) == 0


HOW: dict[str, Callable[[list[str]], None]] = {
    "harness.run": on_two_questions,
    "harness.score": parsed(score.build_parser),
    "harness.bench": benchmarked,
    "harness.profile": profiled,
    "harness.ablate": studied,
    "harness.study": planned,
    "harness.compare": on_prepared_runs(compare_command.main),
    "harness.report": on_prepared_runs(report.main),
    "harness.tables": from_committed_runs(tables.main),
    "harness.plots": from_committed_runs(plots_command.main),
    "vlmamba.ask": asked,
    "vlmamba.serve": parsed(serve.build_parser),  # test_serve.py asks it
    "vlmamba.train": estimated,
    "vlmamba.convert": parsed(convert_command.build_parser),  # test_convert.py converts
    "vlmamba.quantize": parsed(quantize.build_parser),  # test_learned_scale.py saves models
    "vlmamba.experts": parsed(experts.build_parser),  # test_experts.py prints its table
    "vlmamba.demo": parsed(demo_data.parser),
}


@pytest.mark.parametrize("command", commands())
@pytest.mark.usefixtures("tiny")
def test_command(command, place, capsys):
    for name, value in PLACEHOLDERS.items():
        command = command.replace(name, value)
    words = shlex.split(command)
    if words[0] == "make":
        environment = {k: v for k, v in os.environ.items() if k != "MAKEFLAGS"}
        subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, env=environment, check=True)
    elif words[1].endswith(".py"):
        assert (ROOT / words[1]).is_file()
    elif words[0] == "lmms-eval":
        check_lmms_eval(words[1:], place)
    else:
        start = words.index("-m") + 1
        assert words[start] in HOW, f"tests/test_readme.py does not know how to run: {command}"
        HOW[words[start]](words[start + 1 :])
        assert "error:" not in capsys.readouterr().err


def check_lmms_eval(arguments: list[str], place: Path) -> None:
    """As it stands, in a new process, without a network or caches; the line of its data first."""
    (place / "tasks").symlink_to(ROOT / "tasks")
    (data,) = [line for line in commands() if "--out lmms-lab/" in line]
    demo_data.main(shlex.split(data)[3:])
    caches = ("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "XDG_CACHE_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in caches}
    environment |= {"HOME": str(place / "home"), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "lmms_eval", *arguments],
        capture_output=True,
        text=True,
        cwd=place,
        env=environment,
    )
    (line,) = [line for line in done.stdout.splitlines() if "|accuracy" in line] or [done.stderr]
    assert float(line.split("|")[6]) > 0.9, line


@pytest.mark.parametrize("block", blocks("python"))
def test_python_block(block, place):
    exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})


def test_the_path_from_own_pictures_to_a_score(place, capsys):
    """The page's code and commands as they stand, in order, but for the number of updates."""
    [block] = blocks("python", of=[OWN_PICTURES])
    exec(compile(block, "own-pictures.md", "exec"), {"__name__": "__main__"})
    mains = {
        "vlmamba.ask": ask.main,
        "vlmamba.train": train.main,
        "harness.run": run.main,
        "harness.compare": compare_command.main,
        "harness.report": report.main,
    }
    done = []
    for command in commands(of=[OWN_PICTURES]):
        program, *words = shlex.split(command)
        if program == "python":
            assert not mains[words[1]](["1" if word == "30" else word for word in words[2:]])
            done.append(words[1])
    assert set(done) == set(mains) and len(done) == 7
    shown = capsys.readouterr()
    assert "error:" not in shown.err
    assert "scores added to runs/mine/final/README.md" in shown.out
    assert "What color is the shape?" in Path("report.html").read_text(encoding="utf-8")
    assert "| gqa, mine | accuracy (paper protocol" in Path("runs/mine/final/README.md").read_text()
    written = re.findall(r"^```json\n(.*?)^```$", OWN_PICTURES.read_text(), re.M | re.S)
    [shown_entry] = json.loads(written[0])
    [made, *_] = json.loads(Path("mine/train.json").read_text())
    assert shown_entry == made | {"id": "0"}


def test_the_readme_has_commands_and_each_make_target_exists():
    assert len(commands()) >= 10
    targets = re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = [word for c in commands() if c.startswith("make ") for word in c.split()[1:]]
    assert set(named) <= set(targets)


def commands_of_make(target: str) -> list[list[str]]:
    """What `make -n` would run for a target: the words after `python -m`."""
    environment = {k: v for k, v in os.environ.items() if k != "MAKEFLAGS"}
    shown = subprocess.run(
        ["make", "-n", target],
        cwd=ROOT,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    lines = shown.stdout.replace("\\\n", " ").splitlines()
    return [shlex.split(line.split(" -m ", 1)[1]) for line in lines if "/python -m " in line]


def test_make_trains_the_demo_model_with_flags_and_fields_that_there_are():
    """Each training's plan, of its flags, its recipe and the configuration that --set changes."""
    trainings = 0
    for module, *words in commands_of_make("demo-model"):
        if module == "vlmamba.train":
            resolve(*RunArguments.parse(words, train.__doc__))
            trainings += 1
        elif module != "pip":
            HOW[module](words)
    assert trainings == 9


def test_help_of_every_command_shows_examples():
    for module in HOW:
        done = subprocess.run(
            [sys.executable, "-m", module, "--help"], capture_output=True, text=True, cwd=ROOT
        )
        assert done.returncode == 0
        assert f"python -m {module} " in done.stdout


def test_the_readme_shows_the_latest_table_and_plot():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    made = (ROOT / "results" / "tables" / "demo.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in text.splitlines() if line.startswith(("| pope |", "| mme |"))]
    shown = [line for line in rows if line.count("|") == 7]  # the other table has two columns
    assert len(shown) == 7
    assert all(line in made for line in shown)
    linked = re.findall(r"\]\((results/[^)]+)\)", text)
    assert any(path.endswith(".svg") for path in linked)
    assert all((ROOT / path).is_file() for path in linked)


def test_the_readmes_scores_are_the_committed_runs():
    """The table with and without the picture: every figure from the two records."""
    rows = {
        "POPE, F1": ("pope", "f1"),
        "MME perception": ("mme", "perception"),
        "MME cognition": ("mme", "cognition"),
        "VQAv2": ("vqav2", "accuracy"),
        "GQA": ("gqa", "accuracy"),
        "TextVQA": ("textvqa", "accuracy"),
        "ScienceQA": ("scienceqa", "accuracy"),
        "MMBench, circular": ("mmbench", "accuracy"),
        "MMBench, vanilla": ("mmbench", "vanilla_accuracy"),
        "COCO captions, CIDEr": ("coco_cap", "CIDEr"),
        "easy-VQA test": ("easy_vqa", "accuracy"),
    }
    names = ("demo", "demo-blind", "demo-heldout")
    sees, blind, heldout = (store.read_record(ROOT / "results" / "runs" / name) for name in names)
    text = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    for label, (task, metric) in rows.items():
        with_picture, without = (r["tasks"][task]["metrics"][metric] for r in (sees, blind))
        scale, unit = (1, "") if task == "mme" else (100, " %")
        value, low, high, bare = (
            f"{scale * x:.1f}"
            for x in (*(with_picture[key] for key in ("value", "low", "high")), without["value"])
        )
        n = with_picture.get("n", sees["tasks"][task]["n"])
        row = f"| {label} | {value}{unit} | {low} to {high} | {bare}{unit} | {n} |"
        assert row in text.splitlines(), row
    f1 = heldout["tasks"]["pope"]["metrics"]["f1"]
    shown = f"{100 * f1['value']:.1f} % [{100 * f1['low']:.1f} to {100 * f1['high']:.1f}]"
    assert f"POPE's F1 is {shown}" in text
    accuracy = blind["tasks"]["pope"]["metrics"]["accuracy"]["value"]
    assert f"its accuracy without the picture is {100 * accuracy:.1f} %" in text


def test_the_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 100
    for page in pages():
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            assert link.startswith("https://") or (page.parent / link).exists(), (page, link)
    linked = set(re.findall(r"\]\((docs/[^)#]+)\)", text))
    assert {ROOT / link for link in linked} | {ROOT / "docs" / "index.md"} >= {
        page for page in pages()[1:] if page.parent.name not in ("reference",)
    } - {ROOT / "docs" / "how-to" / "speed.md"}


def test_words_are_where_their_page_says():
    text = (ROOT / "docs" / "concepts" / "words.md").read_text(encoding="utf-8")
    places = re.findall(r"`((?:vlmamba|vlmamba_core|harness|tasks)/[^`]*)`", text)
    assert len(places) > 20
    assert not [place for place in places if not (ROOT / place).exists()]


def test_the_site_is_built_without_a_network(tmp_path):
    """Strict: a broken link or an unknown name is an error. A reader's browser fetches nothing."""
    pytest.importorskip("mkdocs")
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | nowhere,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    made = sorted(tmp_path.rglob("*.html"))
    assert len(made) >= len(pages()) - 1
    fetched = re.compile(r"<(?:script|img|link|iframe)[^>]*(?:src|href)=.?https?://")
    for file in made:
        assert not fetched.search(file.read_text(encoding="utf-8")), file
    reference = (tmp_path / "reference" / "index.html").read_text(encoding="utf-8")
    assert "vlmamba.generation.GroupedGenerator" in reference
