"""The report page: complete, self-contained, safe; and, in a real browser, its filters."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from harness_world import pope_rows, write_parquet
from test_harness_compare import write_run
from test_harness_plots import write_profile

from harness import report
from harness.data.images import image_key
from harness.data.questions import NO_IMAGE
from harness.reporting.browser import _shares

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
FLAGS += ["--enable-logging=stderr", "--v=0", "--virtual-time-budget=4000"]
EVIL = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)> & \u2028"


def escaped(text: str) -> str:
    """As a page writes it: quotation marks by number."""
    return html.escape(text).replace("&#x27;", "&#39;").replace("&quot;", "&#34;")


@pytest.fixture
def world(tmp_path) -> Path:
    """Two runs on 24 questions about 4 pictures, one profile; an answer that is an attack."""
    rows = pope_rows()
    (tmp_path / "data").mkdir()
    write_parquet(rows, tmp_path / "data" / "pope.parquet")
    wrong = {"a": {3, 8, 9}, "b": {3, 4, 5, 6}}
    for name, places in wrong.items():
        folder = write_run(tmp_path / name, [float(i not in places) for i in range(24)])
        path = folder / "record.json"
        record = json.loads(path.read_text())
        record["arguments"]["data"] = str(tmp_path / "data")
        record["label"] = "demo: not comparable with published numbers"
        record["settings"] = {"dtype": "torch.float32", "packages": {"torch": "2.x"}}
        path.write_text(json.dumps(record))
        file = folder / "samples_pope.jsonl"
        samples = [json.loads(line) for line in file.read_text().splitlines()]
        for sample, row in zip(samples, rows, strict=True):
            sample |= {"image": image_key(row["image"]), "question": row["question"]}
        samples[8]["prediction"] = EVIL if name == "a" else "yes"
        file.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    write_profile(tmp_path / "speed")
    return tmp_path


def make(world: Path, *arguments: str) -> str:
    out = world / "report.html"
    assert report.main([*arguments, "--out", str(out)]) == 0
    return out.read_text(encoding="utf-8")


def data(page: str) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_the_page_holds_everything_and_loads_nothing(world, capsys):
    page = make(world, *(str(world / name) for name in ("a", "b", "speed")))
    assert "3 runs, 4 pictures" in capsys.readouterr().out
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?(https?:)?//""", page)
    assert re.findall(r"<(?:link|iframe|object|script[^>]* src)", page) == []
    assert page.count("data:image/svg+xml") == 3
    found = data(page)
    assert found["runs"] == ["a", "b"]
    [task] = found["tasks"]
    assert len(task["questions"]) == 24
    images = found["images"].values()
    assert all(image["src"].startswith("data:image/jpeg;base64,") for image in images)
    assert all(question["image"] in found["images"] for question in task["questions"])
    assert "torch.float32" in page
    assert "demo: not comparable with published numbers" in page
    assert "+4.2" in page  # the difference of the two runs: 3 and 4 of 24 wrong


def test_the_papers_rows_are_there_where_asked_or_filled(world):
    asked = make(world, str(world / "a"), "--paper-tables")
    for words in ("not reported", "CSM by 0.6 on", "not run"):
        assert words in asked
    assert "Beside the paper" not in make(world, str(world / "a"))  # labeled: not comparable
    path = world / "b" / "record.json"
    record = json.loads(path.read_text()) | {"label": None}
    record["tasks"]["pope"]["metrics"]["f1"] = {"value": 0.75}
    path.write_text(json.dumps(record))
    page = make(world, str(world / "a"), str(world / "b"))
    [table] = re.findall(r'<table class="paper">.*?</table>', page, re.DOTALL)
    heads = re.findall(r'<th scope="col".*?>(.*?)</th>', table)
    assert heads[5:] == ["POPE", "source"]
    rows = [re.sub(r"<.*?>", " ", row).split() for row in table.split("<tr")[2:]]
    assert "75.0" in rows[-1]
    assert any("InstructBLIP" in row and "78.9" in row for row in rows)
    assert not any("MiniGPT-4" in row or row[1] == "a" for row in rows)  # no POPE; labeled


def cell(page: str, row: str, column: int) -> str:
    """The text of a cell of the score table; `row` its heading's text."""
    table = re.search(r'<table class="scores".*?</table>', page, re.DOTALL)[0]
    for found in re.findall(r"<tr.*?</tr>", table, re.DOTALL):
        cells = [" ".join(re.sub(r"<.*?>", " ", one).split()) for one in found.split("<td")]
        if cells[0].removesuffix(" parts (1)") == row:
            return cells[1 + column].split(">", 1)[-1].strip()
    raise AssertionError(f"no row {row!r}")


def test_scores_have_runs_across_and_metrics_down(world):
    path = world / "b" / "record.json"
    record = json.loads(path.read_text())
    record["arguments"] |= {"blind": True, "limit": 24}
    record["tasks"]["pope"]["metrics"] = {
        "accuracy": {"value": 20 / 24, "low": 0.7, "high": 0.9, "method": "test"},
        "f1": {"value": 0.5, "no_interval": "too few"},
        "random/accuracy": {"value": 0.25},
    }
    path.write_text(json.dumps(record))
    page = make(world, str(world / "a"), str(world / "b"))
    assert cell(page, "pope accuracy", 0) == "50.0% 40.0 to 60.0, n 24"
    assert cell(page, "pope accuracy", 1) == "83.3% 70.0 to 90.0, n 24, blind"
    assert cell(page, "pope f1", 0) == "no score"
    assert cell(page, "pope f1", 1) == "50.0% too few, n 24, blind"
    assert cell(page, "random accuracy", 1) == "25.0% no interval, n 24, blind"
    assert '<line class="c1" x1="70.00%" x2="90.00%"' in page
    for mark in ("blind", "first 24 questions"):
        assert f'<span class="badge">{mark}</span>' in page
    for table in re.findall(r"<table.*?</table>", page, re.DOTALL):
        assert "<caption" in table
        assert not re.search(r"<th(?! scope)", table.replace("<thead", ""))


def test_a_difference_has_an_interval_where_it_is_the_tested_one(world):
    """20 and 21 of 24 are right: a difference of 4.2 points of the mean score."""
    for name, value in (("a", 21 / 24), ("b", 20 / 24)):
        path = world / name / "record.json"
        record = json.loads(path.read_text())
        # of F1 the difference is the same, as it may be for large benchmarks
        metrics = {"f1": {"value": value - 0.25}, "accuracy": {"value": value}}
        record["tasks"]["pope"]["metrics"] = metrics
        path.write_text(json.dumps(record))
    page = make(world, str(world / "a"), str(world / "b"))
    paired = [json.loads(html.unescape(x)) for x in re.findall(r'data-paired="(.*?)"', page)]
    assert [sorted(found) for found in paired] == [[], [], ["1"], ["0"]]  # f1, then accuracy
    assert paired[2]["1"].startswith("too few")


def test_large_pictures_that_are_too_many_are_files(world, monkeypatch, capsys):
    page = make(world, str(world / "a"))
    inside = data(page)["images"].values()
    assert 'img-src data:">' in page
    assert not (world / "report_pictures").exists()
    monkeypatch.setattr("harness.reporting.pictures.SMALL_PX", 16)
    monkeypatch.setattr("harness.reporting.pictures.LARGE_BYTES", 1)
    page = make(world, str(world / "a"))
    outside = data(page)["images"].values()
    assert len(outside) == len(inside) == 4
    for image in outside:
        assert image["src"].startswith("data:image/jpeg;base64,")
        assert max(image["width"], image["height"]) == 16
        assert (world / image["large"]).read_bytes()[:2] == b"\xff\xd8"
    assert "img-src data: 'self' file:" in html.unescape(page)
    assert f"large pictures in {world / 'report_pictures'}" in capsys.readouterr().out
    monkeypatch.setattr("harness.reporting.pictures.SMALL_BYTES", 1)
    for image in data(make(world, str(world / "a")))["images"].values():
        assert image["src"] == image["large"]
        assert (world / image["src"]).is_file()


@pytest.mark.parametrize(
    ("wanted", "limit", "shares"),
    [
        ({"a": 10, "b": 400, "c": 500}, 1000, {"a": 10, "b": 400, "c": 500}),
        ({"a": 10, "b": 400, "c": 500}, 500, {"a": 10, "b": 245, "c": 245}),
        ({"a": 10, "b": 400}, 0, {"a": 0, "b": 0}),
        ({}, 5, {}),
    ],
)
def test_tasks_share_the_pictures(wanted, limit, shares):
    assert _shares(wanted, limit) == shares


def test_what_a_model_says_stays_text(world):
    page = make(world, str(world / "a"), "--title", EVIL)
    assert page.count("<script") == 2  # data and the page's own
    assert "<img src=x" not in page
    assert f"<title>{escaped(EVIL)}</title>" in page
    [answer] = [q["answers"][0] for q in data(page)["tasks"][0]["questions"] if q["id"] == "row 9"]
    assert answer["prediction"] == EVIL
    assert "</" not in re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1]


def test_pictures_can_be_left_out_or_missing(world, capsys):
    assert data(make(world, str(world / "a"), "--no-images"))["images"] == {}
    assert len(data(make(world, str(world / "a"), "--max-images", "2"))["images"]) == 2
    (world / "data" / "pope.parquet").unlink()
    page = make(world, str(world / "a"))
    assert data(page)["images"] == {}
    assert "pope: no images, the data of a cannot be read" in page
    assert "note: pope: no images" in capsys.readouterr().err


def test_a_picture_that_the_run_did_not_see_is_not_shown(world):
    rows = pope_rows()
    rows[0]["image"] = rows[2]["image"]
    write_parquet(rows, world / "data" / "pope.parquet")
    assert len(data(make(world, str(world / "a")))["images"]) == 3


def test_a_limit_is_stated(world):
    [task] = data(make(world, str(world / "a"), "--max-samples", "5"))["tasks"]
    assert (len(task["questions"]), task["leftOut"]) == (5, 19)


def test_questions_without_an_image_and_several_truths(world):
    sample = {"image": NO_IMAGE, "reference": ["cat", "cat", "dog"], "prediction": None}
    write_run(world / "c", [1.0, None], **sample)
    [task] = data(make(world, str(world / "c")))["tasks"]
    question = task["questions"][0]
    assert (question["imageNote"], question["reference"]) == ("text only", "cat (2), dog")
    assert task["questions"][1]["answers"][0]["score"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no record.json in nowhere"),
        ([], "required: RUN (see --help)"),
        (["x", "--max-samples", "0"], "--max-samples must be at least 1"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, capsys):
    assert report.main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_filter_and_difference_work_in_a_browser(world, tmp_path):
    make(world, *(str(world / name) for name in ("a", "b", "speed")))

    def rows(state: str) -> set[int]:
        dom = browse(world / "report.html", state, tmp_path / "profile")
        assert "owned" not in re.search("<title>(.*?)</title>", dom)[1]
        shown = {int(n) for n in re.findall(r'data-id="row (\d+)"', dom)}
        assert f'data-shown="{len(shown)}"' in dom
        return shown

    assert rows("") == set(range(1, 25))
    assert rows("filter=wrong") == {4, 9, 10}
    assert rows("b=1&filter=better") == {5, 6, 7}
    assert rows("b=1&filter=worse") == {9, 10}
    assert rows("a=1&b=0&filter=differ") == {5, 6, 7, 9, 10}
    assert rows("a=1&filter=wrong&search=cat") == {4, 6}
    assert rows("filter=better") == set()  # one run: nothing to differ from
    assert rows("b=1&filter=bothwrong") == {4}
    assert rows("ref=yes&read=no") == {4, 9, 10}
    assert rows("ref=yes&read=no&search=cat") == {4, 10}
    dom = browse(world / "report.html", "filter=wrong", tmp_path / "profile")
    assert html.escape(EVIL, quote=False).replace("\u2028", "") in dom.replace("\u2028", "")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_a_link_keeps_the_difference_and_the_order(world, tmp_path):
    path = world / "b" / "record.json"
    record = json.loads(path.read_text())
    record["tasks"]["pope"]["metrics"]["accuracy"]["value"] = 0.25
    entry = record["tasks"]["pope"]
    metrics = {"accuracy": {"value": 0.75}, "b/accuracy": {"value": 1}, "a/accuracy": {"value": 0}}
    record["tasks"]["vqav2"] = entry | {"metrics": metrics}
    path.write_text(json.dumps(record))
    make(world, str(world / "a"), str(world / "b"))

    def shown(state: str) -> tuple[list[str], str]:
        dom = browse(world / "report.html", state, tmp_path / "profile")
        assert dom.count('aria-sort="none"') == 3 - ("sort" in state)
        return re.findall(r'<tbody data-task="(\w+)"', dom), cell(dom, "pope accuracy", 1)

    assert shown("") == (["vqav2", "pope"], "25.0% 40.0 to 60.0, n 24")
    assert shown("sort=1.ascending") == (["pope", "vqav2"], "25.0% 40.0 to 60.0, n 24")
    assert shown("sort=name.ascending&base=0") == (
        ["pope", "vqav2"],
        "25.0% -25.0 40.0 to 60.0, n 24",
    )


@pytest.mark.soak
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_twenty_thousand_answers_load_in_two_seconds():
    """On an idle machine: the page's own time, from the start of navigation."""
    from tools.time_report import measure

    found = measure(20_000, 1000)
    assert found["page_mb"] < 40
    assert found["load_s"] < 2


AXE = Path(__file__).resolve().parents[1] / "node_modules" / "axe-core" / "axe.min.js"
RUN_AXE = """
axe.run(document, { resultTypes: ["violations"] }).then((found) => {
  const shown = document.createElement("pre");
  shown.id = "axe";
  const told = found.violations.map((v) => [v.id, v.impact, v.nodes.map((n) => n.html)]);
  const headings = [...document.querySelectorAll("h2")].map((h) => h.textContent);
  const ground = getComputedStyle(document.body).backgroundColor;
  shown.textContent = JSON.stringify({ told, headings, ground, passed: found.passes.length });
  document.body.append(shown);
});
"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.skipif(not AXE.is_file(), reason="no axe-core: npm install --no-save axe-core")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 500])  # headless windows are not narrower
def test_axe_finds_nothing(scheme, width, world, tmp_path):
    """Every section of a page with scores, cost, settings, the paper's tables, speed, answers."""
    arguments = [*(str(world / name) for name in ("a", "b", "speed")), "--paper-tables"]
    text = re.sub(r"<meta http-equiv.*?>", "", make(world, *arguments))
    scripts = f"<script>{AXE.read_text()}</script><script>{RUN_AXE}</script>"
    page = tmp_path / "axe.html"
    page.write_text(text.replace("</html>", f"{scripts}</html>"))
    more = [f"--window-size={width},1000", "--virtual-time-budget=30000"]
    more += ["--blink-settings=preferredColorScheme=0"] * (scheme == "dark")
    dom = browse(page, "", tmp_path / "profile", *more)
    found = json.loads(html.unescape(re.search(r'<pre id="axe">(.*?)</pre>', dom, re.DOTALL)[1]))
    assert found["told"] == []
    assert found["passed"] > 20
    assert {"Scores", "Models and cost", "Answers"} <= set(found["headings"])
    assert found["ground"] == {"light": "rgb(255, 255, 255)", "dark": "rgb(19, 20, 23)"}[scheme]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.skipif(shutil.which("pdftotext") is None, reason="no pdftotext (poppler-utils)")
def test_each_printed_page_of_a_table_has_its_headings_and_all_columns(tmp_path):
    names = [f"run{number}" for number in range(6)]
    for number, name in enumerate(names):
        path = write_run(tmp_path / name, [1.0]) / "record.json"
        record = json.loads(path.read_text())
        entry = record["tasks"]["pope"] | {
            "metrics": {f"metric{row:02}": {"value": (1 + number) / 100} for row in range(90)}
        }
        path.write_text(json.dumps(record | {"tasks": {"mine": entry}}))
    page, printed = tmp_path / "report.html", tmp_path / "report.pdf"
    arguments = [str(tmp_path / name) for name in names]
    assert report.main([*arguments, "--no-images", "--out", str(page)]) == 0
    command = [BROWSER, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--no-pdf-header-footer"]
    command += [f"--print-to-pdf={printed}", page.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    done = subprocess.run(["pdftotext", "-layout", printed, "-"], capture_output=True, text=True)
    scored = [text for text in done.stdout.split("\f") if re.search(r"metric\d\d", text)]
    assert len(scored) >= 3
    for text in scored:
        assert [name for name in names if name not in text] == [], text
        assert "task and" in text
        assert len({text.count(f" {number}.0%") for number in range(1, 7)}) == 1, text
    assert [done.stdout.count(f" {number}.0%") for number in range(1, 7)] == [90] * 6
    assert sorted(set(re.findall(r"metric\d\d", done.stdout))) == sorted(
        f"metric{row:02}" for row in range(90)
    )


def test_a_folder_of_runs_stands_for_these(world, capsys):
    (world / "runs").mkdir()
    for name in ("a", "b"):
        (world / name).rename(world / "runs" / name)
    make(world, str(world / "runs"), str(world / "speed"))
    assert "3 runs" in capsys.readouterr().out


def browse(page: Path, state: str, profile: Path, *more: str) -> str:
    """The document after its script has run; fails on any line of the browser's console."""
    command = [
        BROWSER,
        *FLAGS,
        *more,
        f"--user-data-dir={profile}",
        "--dump-dom",
        f"{page.as_uri()}#{state}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert console == []
    return done.stdout
