"""Files for test servers and official evaluators, read back: `harness.score --import upload`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sample_documents import DOCUMENTS

import tasks
from harness import score
from harness.data.readers import read_table
from harness.runs.schema import Sample
from harness.scoring import imports

SENT = [name for name in tasks.NAMES if tasks.load(name).submission_suffix]
AWKWARD = ["Hes at the two-tone cats' house. ", ""]  # normalized twice is not normalized once


def write(path: Path, content: object) -> Path:
    """JSON lines of a list in a .jsonl file, else JSON; text as it stands."""
    if path.suffix == ".jsonl" and isinstance(content, list):
        content = "\n".join(map(json.dumps, content))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def scored(tmp_path: Path, *arguments: object) -> dict:
    """What --json holds."""
    out = tmp_path / "out.json"
    assert score.main([*map(str, arguments), "--json", str(out)]) == 0
    return json.loads(out.read_text())


def refusal(capsys, *arguments: object) -> str:
    assert score.main([*map(str, arguments)]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("name", SENT)
@pytest.mark.parametrize("answers", ["right", "awkward"])
def test_what_submit_writes_comes_back_equal(name, answers, tmp_path):
    task = tasks.load(name)
    docs = [{k: v for k, v in doc.items() if v == v} for doc in DOCUMENTS[name]]  # no NaN
    right = [task.reference(doc) for doc in docs]
    texts = [r if isinstance(r, str) else r[-1] for r in right] if answers == "right" else AWKWARD
    rows = [doc | {"prediction": text} for doc, text in zip(docs, texts, strict=True)]
    given, truth = write(tmp_path / "p.jsonl", rows), write(tmp_path / "truth.jsonl", docs)
    sent, again = (tmp_path / f"{n}{task.submission_suffix}" for n in "ab")
    assert score.main([name, str(given), "--submit", str(sent)]) == 0
    upload = [name, sent, "--import", "upload", "--truth", truth]
    assert score.main([*map(str, upload), "--submit", str(again)]) == 0
    if task.submission_suffix == ".xlsx":
        assert read_table(again) == read_table(sent)
    else:
        assert again.read_bytes() == sent.read_bytes()
    first, back = scored(tmp_path, name, given), scored(tmp_path, *upload)
    assert (back["n"], back["metrics"]) == (first["n"], first["metrics"])
    assert list(back["per_case"].values()) == list(first["per_case"].values())


def test_an_upload_may_be_the_folder_one_is_in(tmp_path, monkeypatch):
    """MME's, from inside eval_tool's results: "." has no name of its own."""
    folder = tmp_path / "Your_Results"
    folder.mkdir()
    (folder / "OCR.txt").write_text("1.jpg\tIs it?\tYes\tYes\n1.jpg\tNot?\tNo\tNo\n")
    monkeypatch.chdir(folder)
    found = scored(tmp_path, "mme", Path("."), *f"--import upload --out {tmp_path}/run".split())
    assert found["n"] == 2
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["arguments"]["model"] == "Your_Results"


def test_a_run_of_an_upload_is_scored_again_as_it_is(tmp_path):
    doc = DOCUMENTS["vqav2"][0] | {"answers": ["he's", *["he is"] * 9]}
    sent = write(tmp_path / "s.json", [{"question_id": 1, "answer": "he's"}])
    truth = write(tmp_path / "truth.jsonl", [doc])
    once = scored(
        tmp_path, "vqav2", sent, *f"--import Upload --truth {truth} --out {tmp_path}/run".split()
    )
    assert once["metrics"]["accuracy"] == 0.3
    samples = tmp_path / "run" / "samples_vqav2.jsonl"
    assert scored(tmp_path, "vqav2", samples, "--truth", truth)["metrics"] == once["metrics"]


SCIENCEQA = {
    "1": {"question": "Which?", "choices": ["a", "b"], "hint": "", "answer": 0, "split": "test"},
    "2": {"question": "Which?", "choices": ["a", "b"], "hint": "", "answer": 1, "split": "test"},
}
RESULTS = {"1": 0, "2": -1}
SEED = DOCUMENTS["seedbench"]
GQA = {"9": {"question": "Is it?", "imageId": "n", "answer": "yes"}}
MMVET = {"v1_0": {"question": "?", "answer": "a", "capability": ["rec"], "imagename": "x.png"}}
LABELS = [
    {"question_id": n, "image": "a.jpg", "text": f"Is there a {what}?", "label": "no"}
    for n, what in ((1, "cat"), (2, "dog"))
]
POPE = [
    {"question": row["text"], "answer": text}
    for row, text in zip(LABELS, ["No", "Yes"], strict=True)
]
# name -> task, upload, its file, truth, its file, n, metrics
FILES = {
    "GQA's predictions": (
        *("gqa", "p.json", [{"questionId": "9", "prediction": "yes"}]),
        *("testdev_balanced_questions.json", GQA, 1, {"accuracy": 1.0}),
    ),
    "GQA's evaluator compares as it stands": (
        *("gqa", "p.json", [{"questionId": "9", "prediction": "Yes."}]),
        *("testdev_balanced_questions.json", GQA, 1, {"accuracy": 0.0}),
    ),
    "GQA's evaluator asks for balanced questions": (
        *("gqa", "p.json", [{"questionId": "9", "prediction": "yes"}]),
        "testdev_all_questions.json",
        {n: one | {"isBalanced": n == "9"} for n, one in (*GQA.items(), ("8", GQA["9"]))},
        *(1, {"accuracy": 1.0}),
    ),
    "SEED-Bench": (
        *("seedbench", "p.jsonl", [{"question_id": n, "prediction": "A"} for n in ("1", "2")]),
        *("t.jsonl", SEED, 2, {"accuracy": 0.5}),
    ),
    "SEED-Bench, one line": (
        *("seedbench", "p.jsonl", [{"question_id": "2", "prediction": "B"}]),
        *("t.jsonl", SEED, 1, {"accuracy": 1.0}),
    ),
    "ScienceQA's outputs": (
        *("scienceqa", "p.json", {"acc": 0, "results": {}, "outputs": {"1": "A", "2": "hm"}}),
        *("problems.json", SCIENCEQA, 2, {"accuracy_all": 0.5}),
    ),
    "ScienceQA's results": (
        *("scienceqa", "p.json", {"acc": 50.0, "correct": 1, "count": 2, "results": RESULTS}),
        *("problems.json", SCIENCEQA, 2, {"accuracy_all": 0.5}),
    ),
    "MM-Vet": (
        *("mmvet", "p.json", {"v1_0": "In the equation"}),
        *("mm-vet.json", MMVET, 1, {}),
    ),
    "VQAv2 as an object": (
        *("vqav2", "p.json", {"1": "cat", "2": "dogs"}),
        *("t.jsonl", DOCUMENTS["vqav2"], 2, {"accuracy": (1 + 0.3) / 2}),
    ),
    "POPE": (
        *("pope", "p.json", "\n".join(map(json.dumps, POPE))),
        *("coco_pope_random.json", "\n".join(map(json.dumps, LABELS)), 2, {"accuracy": 0.5}),
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_files_of_official_evaluators(case, tmp_path):
    name, file, content, truth_file, truth, n, metrics = FILES[case]
    given, truth = write(tmp_path / file, content), write(tmp_path / "t" / truth_file, truth)
    found = scored(tmp_path, name, given, "--import", "upload", "--truth", truth)
    assert found["n"] == n
    got = {metric: found["metrics"][metric] for metric in metrics}
    assert got == pytest.approx(metrics)


def test_answers_to_pope_that_do_not_follow_its_labels_are_refused(tmp_path, capsys):
    given = write(tmp_path / "p.jsonl", POPE[::-1])
    truth = write(tmp_path / "coco_pope_random.json", "\n".join(map(json.dumps, LABELS)))
    message = refusal(capsys, "pope", given, "--import", "upload", "--truth", truth)
    assert "answer 1 (question_id 1) is to no question in --truth" in message


EVAL_TOOL = "a.jpg\tIs it?\tYes\tYes\na.jpg\tOr not?\tNo\tYes, it is\n\n"


def test_the_folder_of_mmes_eval_tool(tmp_path):
    for name in ("existence", "OCR", "notes"):
        write(tmp_path / "results" / f"{name}.txt", EVAL_TOOL)
    folder, run = tmp_path / "results", tmp_path / "run"
    found = scored(tmp_path, "mme", folder, "--import", "upload", "--out", run)
    assert (found["n"], found["metrics"]["perception"]) == (4, 100.0)
    one = scored(tmp_path, "mme", folder / "OCR.txt", "--import", "upload")
    assert (one["n"], one["metrics"]["perception"]) == (2, 50.0)
    record = json.loads((run / "record.json").read_text())["scored_from"]["mme"]
    assert (record["file"], record["format"]) == ("results", "upload")


@pytest.mark.parametrize(
    ("content", "more", "message"),
    [
        ("a.jpg\tIs it?\tYes\n", "", "line 1 has 3 cells; expected image, question, truth"),
        (EVAL_TOOL, "--truth x", "holds its own truth; leave out --truth"),
        (None, "", "is no upload of mme; expected a <subtask>.txt as MME's eval_tool takes it"),
    ],
)
def test_results_of_mme_that_do_not_fit(content, more, message, tmp_path, capsys):
    file = write(tmp_path / ("existence.txt" if content else "other.txt"), content or EVAL_TOOL)
    found = refusal(capsys, "mme", file.parent, "--import", "upload", *more.split())
    assert message in found


def test_other_files_of_mme_are_told_how_they_are_read(tmp_path, capsys):
    write(tmp_path / "r" / "OCR.txt", EVAL_TOOL)
    truth = write(tmp_path / "t.jsonl", DOCUMENTS["mme"])
    found = refusal(capsys, "mme", tmp_path / "r", "--import", "llava", "--truth", truth)
    assert "r is a folder, expected a file; it looks like an upload of mme: --import up" in found
    given = write(tmp_path / "p.jsonl", LLAVA)
    assert "looks like LLaVA's answers" in refusal(capsys, "mme", given, "--import", "upload")


LLAVA = [{"question_id": 1, "prompt": "Is it?", "text": "yes"}]
KIT = [{"index": 1, "question": "Is it?", "prediction": "yes", "answer": "yes", "category": "x"}]
LMMS = [{"doc_id": 0, "filtered_resps": ["yes"], "target": "yes"}]
GRADES = {"v1_0": {"model": ["gpt-4"], "content": ["1.0"], "score": [1.0]}}
ENTRY = [{"question_id": 1, "answer": "yes"}]
DOCS = [DOCUMENTS["vqav2"][0] | {"prediction": "cat"}]
RUN = [dict.fromkeys(Sample.__dataclass_fields__) | {"doc_id": 0, "prediction": "yes"}]


@pytest.mark.parametrize(
    ("task", "content", "tried", "expected", "looks"),
    [
        ("vqav2", ENTRY, "llava", "has no prompt; LLaVA's answers have", "upload"),
        ("mmvet", {"v1_0": "a"}, "llava", "has no question_id; LLaVA's", "upload"),
        ("vqav2", KIT, "llava", "has no question_id; LLaVA's", "vlmevalkit"),
        ("vqav2", LMMS, "llava", "has no question_id; LLaVA's", "lmms-eval"),
        ("mmvet", GRADES, "llava", "has no question_id; LLaVA's", "mmvet-grades"),
        ("vqav2", LLAVA, "upload", "expected rows of question_id and answer", "llava"),
        ("mmvet", GRADES, "upload", "is no upload of mmvet; expected rows of", "mmvet-grades"),
        ("gqa", ENTRY, "upload", "expected rows of questionId and prediction", ""),
        ("vqav2", LLAVA, "vlmevalkit", "no column 'index'", "llava"),
        ("vqav2", LLAVA, "lmms-eval", "has no doc_id or filtered_resps", "llava"),
        ("vqav2", DOCS, "llava", "has no question_id|has no prompt", None),
        ("vqav2", RUN, "llava", "has no question_id", None),
        ("vqav2", LLAVA, None, "prediction is None", "llava"),
        ("vqav2", ENTRY, None, "prediction is None", "upload"),
    ],
)
def test_a_file_of_another_format_is_told_how_it_is_read(
    task, content, tried, expected, looks, tmp_path, capsys
):
    given = write(tmp_path / "p.json", content)
    how = ["--import", tried] if tried else []
    truth = ["--truth", write(tmp_path / "mm-vet.json", MMVET)] if tried else []
    message = refusal(capsys, task, given, *how, *truth)
    assert any(part in message for part in expected.split("|"))
    if looks:
        assert message.rstrip().endswith(f": --import {looks}")
        assert looks in imports.formats()
    else:
        assert ("leave out --import" in message) == (looks is None)
        assert ("it looks like" in message) == (looks is None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "is no upload of vqav2"),
        ([{"question_id": 1, "answer": 2}], "answer 1 is 2 to 1; expected rows of question_id"),
        ([{"question_id": [1], "answer": "a"}], "answer 1 is 'a' to [1]"),
        ([{"question_id": 1, "answer": "a"}] * 2, "second answer to one question"),
        ([{"question_id": 7, "answer": "a"}], "is to no question in --truth"),
        ({"1": "a", "2": None}, "answer 2 is None to '2'"),
        ({"1": 1}, "is no upload of vqav2"),
        (5, "is no upload of vqav2"),
        ("{", "line 1 is not JSON"),
    ],
)
def test_broken_uploads_are_refused(content, message, tmp_path, capsys):
    given = write(tmp_path / "p.json", content)
    truth = write(tmp_path / "t.jsonl", DOCUMENTS["vqav2"])
    assert message in refusal(capsys, "vqav2", given, "--import", "upload", "--truth", truth)
    assert "need --truth" in refusal(capsys, "vqav2", write(given, ENTRY), "--import", "upload")
