"""`harness.score`: the command, its JSON, and what it does with rows that cannot be scored."""

import json
import math
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import sample_documents
from scipy.stats import binomtest

import tasks
from harness import score
from harness.data.readers import read_rows
from harness.scoring import submit
from vlmamba_core.errors import UserError

POPE, MME = sample_documents.POPE, sample_documents.MME
ROWS = sample_documents.DOCUMENTS
BY_LABEL = ("pope", "mme", "scienceqa", "mmbench", "gqa", "easy_vqa")  # truth is one text


@pytest.fixture
def write(tmp_path):
    def write(rows, name="predictions.jsonl"):
        path = tmp_path / name
        path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
        return path

    return write


def run(capsys, *arguments):
    """(exit code, stdout, stderr) of the command."""
    code = score.main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def test_json_has_the_documented_form(write, tmp_path, capsys):
    rows = [
        POPE | {"prediction": "Yes", "case_id": "a"},
        POPE | {"answer": "no", "prediction": "No dog.", "case_id": "b"},
        POPE | {"prediction": "hm", "case_id": "c"},
    ]
    out = tmp_path / "out.json"
    code, printed, _ = run(capsys, "pope", write(rows), "--json", out, "--protocol", "lmms")
    assert code == 0
    content = json.loads(out.read_text())
    assert list(content) == ["task", "protocol", "n", "n_unparsed", "metrics", "per_case"]
    assert content["n"] == 3
    assert content["n_unparsed"] == 2
    assert content["per_case"] == {
        "a": {"score": 1.0, "parsed": "yes"},
        "b": {"score": 0.0, "parsed": None},
        "c": {"score": 0.0, "parsed": None},
    }
    assert {"f1", "accuracy", "precision", "recall", "yes_ratio"} < content["metrics"].keys()
    assert "f1 " in printed
    assert "not understood: 2" in printed


@pytest.mark.parametrize(
    ("name", "doc", "answer", "parsed"),
    [
        ("pope", POPE, "no\n", "no"),
        ("scienceqa", ROWS["scienceqa"][0], "B\n", "B"),
        ("seedbench", ROWS["seedbench"][0], " A\n", "A"),
    ],
)
def test_space_around_an_answer_is_taken_off_as_the_documentation_says(
    name, doc, answer, parsed, write, tmp_path, capsys
):
    out = tmp_path / "out.json"
    assert run(capsys, name, write([doc | {"prediction": answer}]), "--json", out)[0] == 0
    (case,) = json.loads(out.read_text())["per_case"].values()
    assert case["parsed"] == parsed


@pytest.mark.parametrize("name", BY_LABEL)
def test_every_task_scores_right_answers_as_full_marks(name, write, tmp_path, capsys):
    task = tasks.load(name)
    rows = [doc | {"prediction": task.reference(doc)} for doc in ROWS[name]]
    out = tmp_path / "out.json"
    assert run(capsys, name, write(rows), "--json", out)[0] == 0
    content = json.loads(out.read_text())
    assert list(content["per_case"]) == ["0", "1"]
    assert content["metrics"][task.primary_metric] == (200 if task.unit == "points" else 1)


def test_intervals_units_and_n_are_those_of_a_run(write, capsys):
    """38 of 40 right, one question an image: scipy's Wilson interval of 38 in 39.x."""
    rows = [
        POPE | {"image_source": str(i), "question": f"{i}?", "prediction": "Yes" if i > 1 else "No"}
        for i in range(40)
    ]
    code, printed, _ = run(capsys, "pope", write(rows))
    assert code == 0
    low, high = binomtest(38, 40).proportion_ci(method="wilson")
    found = re.search(r"pope +accuracy +95\.0% +([0-9.]+) to ([0-9.]+) +40", printed)
    assert [float(x) for x in found.groups()] == pytest.approx([100 * low, 100 * high], abs=0.4)
    pair = MME | {"category": "existence", "answer": "Yes", "prediction": "Yes"}
    rows = [pair | {"question_id": f"{i // 2}.png"} for i in range(24)]
    printed = run(capsys, "mme", write(rows))[1]
    assert re.search(r"perception +200\.0 +151\.5 to 200\.0 +24", printed)  # Wilson's of 12 of 12


def test_a_metric_over_some_rows_has_their_n(write, capsys):
    """ScienceQA: 3 of 5 questions have an image, two of their answers are right."""
    docs = [ROWS["scienceqa"][0] | {"has_image": row < 3, "image": None} for row in range(5)]
    rows = [doc | {"prediction": "B" if row else "A"} for row, doc in enumerate(docs)]
    printed = run(capsys, "scienceqa", write(rows))[1]
    assert re.search(r"scienceqa +accuracy +66\.7% .* 3\n", printed)
    assert re.search(r"scienceqa +accuracy_all +80\.0% .* 5\n", printed)


def test_per_case_prints_every_row(write, capsys):
    rows = [
        POPE | {"prediction": "tab\there", "case_id": 5},
        POPE | {"prediction": "x", "answer": 0},
    ]
    printed = run(capsys, "pope", write(rows), "--per-case")[1].splitlines()
    assert '5\t1.0\t"yes"\t"tab\\there"' in printed
    assert '1\t"left out"\tnull\t"x"' in printed


def test_compare_shows_the_rows_that_change(write, capsys):
    rows = [POPE | {"prediction": text} for text in ("Yes", "Yes, a | dog", "no")]
    printed = run(capsys, "pope", write(rows), "--compare")[1]
    assert "1 of 3 rows change their score:" in printed
    assert '| "1" | "yes" | "Yes, a \\| dog" | 1.0 | "yes" | 0.0 | null |' in printed


def bad_files():
    row = json.dumps(POPE | {"prediction": "Yes"})
    no_answer = {key: value for key, value in POPE.items() if key != "answer"}
    return {
        "": "is empty",
        "\n\n": "is empty",
        f"{row}\n{{": "line 2 is not JSON",
        "[1]": "entry 1 is a number",
        json.dumps(POPE): "row 1: prediction is None",
        json.dumps(POPE | {"prediction": math.nan}): "row 1: prediction is nan",
        json.dumps(no_answer | {"prediction": "x"}): "row 1 has no column 'answer'",
        json.dumps(POPE | {"prediction": "x", "answer": None}): "none of 1 rows can be scored",
        "\n".join([json.dumps(POPE | {"prediction": "x", "case_id": 1})] * 2): "'1' comes twice",
    }


@pytest.mark.parametrize(("content", "message"), bad_files().items())
def test_bad_files_are_one_clear_line(content, message, tmp_path, capsys):
    path = tmp_path / "predictions.jsonl"
    path.write_text(content)
    code, _, errors = run(capsys, "pope", path)
    assert code == 2
    assert message in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("popo", "x.jsonl"), "unknown task 'popo'; known, nearest first: pope"),
        (("pope", "nothing.jsonl"), "no file 'nothing.jsonl'"),
        (("pope", "x.jsonl", "--protocol", "lmm"), "unknown protocol 'lmm'"),
        (("pope", "x.jsonl", "--import", "lava"), "nearest first: llava"),
        (("pope", "x.jsonl", "--truth", "y.jsonl"), "--truth belongs to --import"),
        (("pope",), "required: predictions"),
    ],
)
def test_bad_arguments_are_one_clear_line(arguments, message, capsys):
    code, _, errors = run(capsys, *arguments)
    assert code == 2
    assert message in errors


def test_left_out_rows_are_counted_in_both_outputs(write, tmp_path, capsys):
    rows = [doc | {"prediction": "Yes"} for doc in [*ROWS["mme"], MME | {"question_id": "OCR/2"}]]
    rows[2]["answer"] = "Yes"
    out = tmp_path / "out.json"
    printed = run(capsys, "mme", write(rows), "--json", out)[1]
    reason = "image has 1 scorable question(s), MME needs 2"
    assert f"left out: 1 rows: {reason}" in printed
    content = json.loads(out.read_text())
    assert content["n"] == 2
    assert content["excluded"] == {reason: 1}
    assert list(content["per_case"]) == ["0", "1"]


def test_an_unwritable_place_is_said(write, tmp_path, capsys):
    path = write([POPE | {"prediction": "Yes"}])
    code, _, errors = run(capsys, "pope", path, "--json", tmp_path / "none" / "out.json")
    assert code == 2
    assert "cannot write" in errors


def test_line_separators_inside_an_answer_do_not_end_the_row(tmp_path, capsys):
    path = tmp_path / "predictions.jsonl"
    path.write_text(json.dumps(POPE | {"prediction": "Yes\u2028no"}, ensure_ascii=False))
    assert run(capsys, "pope", path)[0] == 0


def test_mmbench_submission(write, tmp_path, capsys):
    hidden = [{**doc, "answer": None} for doc in ROWS["mmbench"]]
    rows = [doc | {"prediction": text} for doc, text in zip(hidden, ("=A1\x07", "B"), strict=True)]
    out = tmp_path / "test.xlsx"
    assert run(capsys, "mmbench", write(rows), "--submit", out)[0] == 0
    written = read_rows(out)
    assert list(written[0]) == ["index", "question", "A", "B", "prediction"]
    assert [row["prediction"] for row in written] == ["=A1", "B"]
    assert [row["index"] for row in written] == ["7", "1000007"]


def test_json_submission(tmp_path):
    docs = [{"question_id": 3}, {"question_id": 4}]
    submit.write(tasks.load("vqav2"), docs, ["Two dogs.", "a Cat"], tmp_path / "v.json")
    assert json.loads((tmp_path / "v.json").read_text()) == [
        {"question_id": 3, "answer": "2 dogs"},
        {"question_id": 4, "answer": "cat"},
    ]


def test_tasks_without_a_submission_say_so(tmp_path):
    with pytest.raises(UserError, match="task 'pope' has no test server"):
        submit.write(tasks.load("pope"), [], [], tmp_path / "x.json")
    with pytest.raises(UserError, match=r"is a \.xlsx file"):
        submit.write(tasks.load("mmbench"), [], [], tmp_path / "x.json")
    with pytest.raises(UserError, match="cannot write"):
        submit.write(tasks.load("mmvet"), [], [], tmp_path / "none" / "x.json")


@pytest.fixture
def judge_url():
    """A chat-completions server that answers "A" to everything."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"choices": [{"message": {"content": "A"}}]}')

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


def test_a_judge_reads_what_the_rules_cannot(judge_url, write, tmp_path, capsys):
    first, second = ROWS["mmbench"]
    rows = [first | {"prediction": "feline"}, second | {"prediction": "B"}]
    out = tmp_path / "out.json"
    options = ("--judge", judge_url, "--judge-model", "fake", "--json", out)
    printed = run(capsys, "mmbench", write(rows), *options)[1]
    content = json.loads(out.read_text())
    assert content["metrics"]["accuracy"] == 1
    assert content["judge_model"] == "fake"
    assert "fake was asked about 1 answers and named an option for 1" in printed
    assert run(capsys, "pope", write([POPE | {"prediction": "x"}]), *options)[0] == 2
