"""Tables: alignment, units, parts, escaping."""

from __future__ import annotations

import re

import pytest
from test_harness_compare import write_run
from test_harness_plots import write_profile

from harness import tables
from harness.reporting import paper
from harness.reporting.render import csv_table, latex_table, markdown_table, report, text_table
from harness.runs.schema import TaskResult
from harness.runs.store import EvaluationRun
from harness.scoring.intervals import Interval

MME = TaskResult(
    task="mme",
    unit="points",
    overall_metrics=("perception", "cognition"),
    metrics={"perception": 190.0, "existence/acc": 0.95, "existence/score": 190.0},
    intervals={
        "perception": Interval(170.25, 200, "bootstrap"),
        "existence/score": Interval(170.25, 200, "bootstrap"),
    },
    n=60,
    n_unparsed=2,
    excluded={"half a pair": 1},
    notes=["cognition: absent"],
)
POPE = TaskResult("pope", False, ("f1",), {"f1": 0.88123}, {}, n=9, n_unparsed=0)


def test_columns_are_aligned():
    lines = text_table(("task", "n"), [("pope", "9"), ("mme", "1234")]).splitlines()
    assert lines == ["task     n", "----  ----", "pope     9", "mme   1234"]


def squeezed(text: str) -> str:
    """Runs of spaces as one."""
    return re.sub(" +", " ", text)


def test_report_has_units_intervals_counts_parts_and_notes():
    text = squeezed(report([MME, POPE], "model x\ndemo: not comparable"))
    assert text.startswith("model x\ndemo: not comparable\n\ntask ")
    counts = "2 not understood; 1 left out: half a pair"
    assert f"mme perception 190.0 170.2 to 200.0 60 {counts}\n" in text
    assert "pope f1 88.1% - 9\n" in text
    assert "existence 95.0% 190.0 [170.2 to 200.0]" in text
    assert "mme: cognition: absent" in text
    assert "mme cognition" not in text  # a total without data has no row


def test_task_without_scores_keeps_a_row():
    nothing = TaskResult("mmvet", True, ("score",), {}, {}, n=0, n_unparsed=0)
    assert "mmvet - - - 0 no score" in squeezed(report([nothing], "t"))


def test_markdown_cells_are_escaped():
    table = markdown_table(("a",), [("x|y <script>\nz & w",)])
    assert table.splitlines()[2] == "| x\\|y &lt;script> z &amp; w |"
    assert report([MME], "t", markdown=True).count("\n| --- |") == 2


def test_latex_is_escaped_and_numbers_stand_right():
    text = latex_table(("task", "n"), [("a_b & 50%", "9"), ("\\x{y}", "12")], ["title\nlabel"])
    assert text.splitlines() == [
        "% title",
        "% label",
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"task & n \\",
        r"\midrule",
        r"a\_b \& 50\% & 9 \\",
        r"\textbackslash{}x\{y\} & 12 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_csv_is_quoted():
    assert csv_table(("a",), [('x, "y"',)]) == 'a\n"x, ""y"""\n'


@pytest.fixture
def all_kinds(tmp_path):
    write_run(tmp_path / "runs" / "demo", [1, 0, None])
    write_profile(tmp_path / "runs" / "speed" / "cpu")
    return tmp_path


def test_every_run_becomes_tables_of_every_format_twice_the_same(all_kinds, capsys):
    for out in ("first", "second"):
        assert tables.main(["--from", str(all_kinds / "runs"), "--out", str(all_kinds / out)]) == 0
    names = {f"paper_{name}" for name in paper.TITLES} | {"demo", "models_and_cost"}
    names |= {f"speed.cpu.{name}" for name in ("points", "growth", "crossovers")}
    files = {file.name: file.read_bytes() for file in (all_kinds / "first").iterdir()}
    assert set(files) == {f"{name}.{suffix}" for name in names for suffix in ("md", "csv", "tex")}
    assert files == {file.name: file.read_bytes() for file in (all_kinds / "second").iterdir()}
    assert "| pope | accuracy | 50.0% | 40.0 to 60.0 | 2 |" in files["demo.md"].decode()
    assert "1000 tokens" in files["speed.cpu.crossovers.csv"].decode()


def test_the_papers_cells_are_numbers_or_say_why_there_is_none(tmp_path):
    found = paper.read()
    assert [len(found[name]) for name in paper.TITLES] == [15, 3, 2, 3, 2]
    final = found["main"][-1]
    assert (final.setup["connector"], final.cells["mme"].text) == ("vss_l2", "1369.6")
    assert (final.cells["mmmu"].text, final.cells["seed"].text) == ("30.6", "60.5")
    assert found["main"][0].cells["vqav2"] == paper.Cell("", "not reported")
    for name, lines in found.items():
        for line in lines:
            assert line.source.startswith("PMLR v262, pp. 102-113, Table ")
            shown = [line.cells[b] for b in paper.benchmarks()]
            assert all(cell.why == "not reported" or float(cell.text) > 0 for cell in shown)
            assert name == "main" or all(cell.text for cell in shown)
    blank = tmp_path / "paper.csv"
    blank.write_text(paper.FILE.read_text().replace(",71.7,49.9,", ",,,"))
    assert paper.read(blank)["llm"][0].cells["gqa"] == paper.Cell("", "not recorded")


def test_the_papers_tables_join_where_they_share_a_model():
    """Each ablation's winner is the next one's first row; the last is Table 1's."""
    found = paper.read()

    def scores(table, row):
        return [found[table][row].cells[name].text for name in paper.benchmarks()]

    assert scores("llm", 2) == scores("encoder", 0)
    assert scores("encoder", 1) == scores("connector", 0)
    assert scores("connector", 2) == scores("scan", 0) == scores("main", -1)
    assert scores("llm", 0) == ["71.7", "49.9", "56.1", "42.6", "84.5", "1277.7", "46.9", "24.0"]
    assert scores("scan", 1) == ["76.6", "55.8", "64.2", "48.8", "85.0", "1364.0", "56.3", "31.1"]


def test_the_notes_beside_the_papers_tables_follow_from_its_cells():
    found = paper.read()

    def leads(table, ours, theirs):
        cells = [found[table][row].cells for row in (ours, theirs)]
        values = [{b: float(c[b].text) for b in paper.benchmarks()} for c in cells]
        return {b: round(values[0][b] - values[1][b], 1) for b in paper.benchmarks()}

    for name, lead in leads("connector", 2, 0).items():  # VSS-L2 and MLP
        assert f"{paper.benchmarks()[name]} {lead:+.1f}" in paper.NOTES["connector"]
    assert [b for b, lead in leads("connector", 1, 0).items() if lead > 0] == ["pope"]
    scans = leads("scan", 0, 1)
    assert (scans["mme"], scans["mmbench"], scans["pope"]) == (5.6, 0.7, -0.6)


def test_measured_runs_stand_below_the_papers_with_reasons(all_kinds):
    run = EvaluationRun.read(all_kinds / "runs" / "demo")
    headers, rows = paper.table("main", [run])
    row = dict(zip(headers, rows[-1], strict=True))
    assert (row["model"], row["GQA"], row["POPE"]) == ("demo", "not run", "no score")
    assert row["source"] == "this harness, protocol paper, template not recorded"


def test_an_altered_paper_file_is_one_line(tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    (tmp_path / "paper.csv").write_text("table,model\nmain,x,y\n")
    arguments = ["--from", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    assert tables.main([*arguments, "--paper", str(tmp_path / "paper.csv")]) == 2
    assert "line 2 is not a row of a known table" in capsys.readouterr().err
