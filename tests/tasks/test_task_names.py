"""What is said of a benchmark is said in its own folder: the harness knows none by name."""

import ast
from pathlib import Path

import tasks
from harness.scoring import imports

ROOT = Path(__file__).resolve().parents[2]
# File -> why names may stand there.
ALLOWED = {
    "harness/controlled/predictions.py": "what was expected of single benchmarks before a study",
    "harness/speed/invariance.py": "the tasks of a quick speed measurement",
    "harness/bench.py": "sections of a speed measurement that are named after their task",
}


def named(path: Path) -> set[str]:
    """The benchmarks that a source file names in a text of its own, docstrings left out."""
    texts = (n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant))
    return {text for text in texts if text in tasks.NAMES}


def test_the_harness_names_no_benchmark():
    files = sorted((ROOT / "harness").rglob("*.py"))
    found = {str(p.relative_to(ROOT)): names for p in files if (names := named(p))}
    assert {file: names for file, names in found.items() if file not in ALLOWED} == {}
    assert found.keys() >= ALLOWED.keys(), "a file that names none any more leaves the list"


def test_a_name_in_a_table_is_found(tmp_path):
    file = tmp_path / "table.py"
    file.write_text('"""About pope."""\nTABLE = {"pope": 1, "popes": 2}\nx = f"{y} mme"\n')
    assert named(file) == {"pope"}


def test_formats_of_single_benchmarks_are_listed_with_the_others():
    assert imports.formats() == ["llava", "vlmevalkit", "lmms-eval", "upload", "mmvet-grades"]


def test_columns_of_the_paper_are_distinct_and_in_its_order():
    from harness.reporting import paper

    with paper.FILE.open() as file:
        header = file.readline().strip().split(",")
    first = header[header.index("scan") + 1 : header.index("source")]
    assert list(paper.columns("main")) == first
    assert list(paper.benchmarks()) == list(paper.columns("llm")) == first[:-2]
    headings = ["VQAv2", "GQA", "SQA-I", "TextVQA", "POPE", "MME", "MMB", "MM-Vet"]
    assert list(paper.benchmarks().values()) == headings
    assert list(paper.columns("main").values()) == [*headings, "MMMU", "SEED"]


def test_every_benchmark_says_what_it_is_and_how_large():
    for name in tasks.NAMES:
        task = tasks.load(name)
        assert task.size in (ROOT / "tasks" / name / "README.md").read_text(), name
        assert task.size[0].isdigit(), name
        assert task.description.endswith((".", ")", "?")), name


def test_the_list_of_tasks_and_models(capsys):
    from harness import run
    from harness.models.registry import ABOUT, OWN, eval_models

    assert run.main(["--list"]) == 0
    shown = capsys.readouterr().out
    lines = {line.split()[0]: line for line in shown.splitlines() if line}
    assert lines.keys() >= {*tasks.NAMES, *ABOUT}
    assert " yes " in lines["pope"]
    assert " yes " not in lines["mmmu"]  # the demo has none
    assert "9,000 questions on 500 images" in lines["pope"]
    assert {kind for kind in eval_models if kind != OWN} == {
        k.split(":")[0] for k in ABOUT if ":" in k
    }
