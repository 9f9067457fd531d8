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
    assert all(image.startswith("data:image/jpeg;base64,") for image in found["images"].values())
    assert all(question["image"] in found["images"] for question in task["questions"])
    for words in ("not reported", "CSM by 0.6 on", "not run", "torch.float32"):
        assert words in page
    assert "demo: not comparable with published numbers" in page
    assert "+4.2" in page  # the difference of the two runs: 3 and 4 of 24 wrong


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
    dom = browse(world / "report.html", "filter=wrong", tmp_path / "profile")
    assert html.escape(EVIL, quote=False).replace("\u2028", "") in dom.replace("\u2028", "")


def browse(page: Path, state: str, profile: Path) -> str:
    """The document after its script has run; fails on any line of the browser's console."""
    command = [
        BROWSER,
        *FLAGS,
        f"--user-data-dir={profile}",
        "--dump-dom",
        f"{page.as_uri()}#{state}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert console == []
    return done.stdout
