"""Other people's prediction files: what is read from them, and LLaVA-1.5's published answers."""

import copy
import csv
import inspect
import json
from pathlib import Path

import pytest
from sample_documents import DOCUMENTS

import tasks
from harness import score
from harness.models.lmms_tasks import OwnTask
from harness.scoring import imports
from harness.scoring.submit import write_spreadsheet
from tasks.common import OPTION_LETTER, SHORT_ANSWER, lmms_eval_functions
from tasks.mme.prompt import short_question
from tasks.scienceqa.answers import split_choices
from vlmamba_core.errors import UserError

PUBLISHED = Path(__file__).parents[3] / "shared" / "published" / "llava-v1.5-13b"
needs_published = pytest.mark.skipif(
    not PUBLISHED.is_dir(), reason="the published answers of LLaVA-1.5-13B are not at ../shared"
)
FILES = {
    "pope": ("pope.answers.jsonl", "pope.questions.jsonl", "pope.labels.*.jsonl"),
    "mme": ("mme.answers.jsonl", "mme.truth.jsonl"),
    "scienceqa": ("scienceqa.output.json", "scienceqa.questions.json"),
}
FIGURES = {  # as the official scripts print them, in the unit of the metric
    "pope": {"f1": 0.8595, "random/f1": 0.8714, "popular/f1": 0.8625, "adversarial/f1": 0.8446},
    "mme": {"perception": 1531.3187, "cognition": 295.3571},
    "scienceqa": {"accuracy": 0.71641, "accuracy_all": 0.74393},
}
ANSWERED = {"pope": 8910, "mme": 2374, "scienceqa": 4241}


def published(name):
    answers, *truth = FILES[name]
    return PUBLISHED / answers, [path for part in truth for path in sorted(PUBLISHED.glob(part))]


@needs_published
@pytest.mark.parametrize("name", FILES)
def test_published_answers_of_llava_score_as_published(name, tmp_path, capsys):
    answers, truth = published(name)
    out = tmp_path / "out.json"
    arguments = [name, answers, "--import", "llava", "--json", out, "--truth", *truth, "--compare"]
    assert score.main([str(argument) for argument in arguments]) == 0
    content = json.loads(out.read_text())
    assert content["n"] == ANSWERED[name]
    assert "excluded" not in content
    for metric, value in FIGURES[name].items():
        assert content["metrics"][metric] == pytest.approx(value, abs=5e-5), metric
    printed = capsys.readouterr().out
    assert f"0 of {ANSWERED[name]} rows change their score" in printed


@needs_published
def test_published_prompts_are_those_of_the_paper_protocol():
    answers, truth = published("mme")
    rows, _ = imports.load("llava", tasks.load("mme"), answers, truth)
    asked = [json.loads(line)["prompt"] for line in answers.read_text().splitlines()]
    assert [short_question(row.doc["question"], "paper") for row in rows] == asked
    answers, truth = published("pope")
    task = tasks.load("pope")
    rows, _ = imports.load("llava", task, answers, truth)
    asked = [json.loads(line)["prompt"] for line in answers.read_text().splitlines()]
    assert [task.prompt(row.doc, "paper") for row in rows] == asked


@needs_published
def test_published_scienceqa_prompts_and_readings():
    answers, truth = published("scienceqa")
    task = tasks.load("scienceqa")
    rows, _ = imports.load("llava", task, answers, truth)
    judged = json.loads(answers.read_text())
    theirs = [*judged["correct"], *judged["incorrect"]]
    for row, entry in zip(rows, theirs, strict=True):
        prompt = task.prompt(row.doc, "paper")
        assert ("<image>\n" if row.doc["has_image"] else "") + prompt == entry["question"]
        assert (task.score_case(row.doc, row.prediction, "paper").parsed or "FAILED") == (
            entry["parsed_ans"]
        )


@pytest.fixture
def write(tmp_path):
    def write(name, rows):
        path = tmp_path / name
        lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
        path.write_text("\n".join(lines), encoding="utf-8")
        return path

    return write


def test_llava_pope_labels_follow_the_question_file(write):
    def question(number, category, text):
        text = f"{text}\n{SHORT_ANSWER}"
        return {"question_id": number, "image": "a.jpg", "text": text, "category": category}

    questions = write(
        "questions.jsonl", [question(1, "popular", "One?"), question(2, "random", "Two?")]
    )
    popular = write("coco_pope_popular.json", [{"question_id": 1, "text": "One?", "label": "no"}])
    random = write("coco_pope_random.json", [{"question_id": 1, "text": "Two?", "label": "yes"}])
    answers = write("answers.jsonl", [{"question_id": 2, "prompt": "Two?", "text": "Yes"}])
    task = tasks.load("pope")
    rows, missing = imports.load("llava", task, answers, [questions, popular, random])
    assert missing == 1
    assert rows[0].doc == {
        "question_id": "2",
        "question": "Two?",
        "answer": "yes",
        "image_source": "a",
        "category": "random",
    }
    with pytest.raises(UserError, match="question 1 .* has no label in its place"):
        imports.load("llava", task, answers, [questions, random])


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"question_id": 9, "prompt": "", "text": "A"}, "is to no question in --truth"),
        ({"question_id": 7, "prompt": ""}, "has no text"),
        ({"prompt": "", "text": "A"}, "has no question_id"),
    ],
)
def test_llava_answers_that_fit_no_document_are_refused(answer, message, write):
    truth = write("truth.jsonl", [{"index": 7, "question": "What?", "A": "cat", "B": "dog"}])
    answers = write("answers.jsonl", [answer])
    with pytest.raises(UserError, match=message):
        imports.load("llava", tasks.load("mmbench"), answers, [truth])


def test_llava_answers_need_truth_that_fits(write):
    answers = write("answers.jsonl", [{"question_id": "OCR/1.jpg", "prompt": "x", "text": "Yes"}])
    with pytest.raises(UserError, match="need --truth: rows with category"):
        imports.load("llava", tasks.load("mme"), answers)
    with pytest.raises(UserError, match=r"--truth is not rows with category.*KeyError"):
        imports.load("llava", tasks.load("mme"), answers, [write("x.jsonl", [{"answer": "Yes"}])])
    for name in ("pope", "scienceqa", "mmbench"):
        with pytest.raises(UserError, match="--truth"):
            imports.load("llava", tasks.load(name), answers, [write("x.jsonl", [{"a": 1}])])


def test_two_llava_answers_to_one_question_are_refused(write):
    truth = write("truth.jsonl", [{"index": 7, "question": "What?"}])
    answers = write("a.jsonl", [{"question_id": 7, "prompt": "", "text": "A"}] * 2)
    with pytest.raises(UserError, match="second answer to one question"):
        imports.load("llava", tasks.load("mmbench"), answers, [truth])


def test_llava_textvqa_tells_questions_of_one_image_apart(write):
    docs = [{"image_id": "a", "question": "what is it?"}, {"image_id": "a", "question": "why?"}]
    prompt = f"Why?\nReference OCR token: x\n{SHORT_ANSWER}"
    answers = write("a.jsonl", [{"question_id": "a", "prompt": prompt, "text": "so"}])
    rows, missing = imports.load(
        "llava", tasks.load("textvqa"), answers, [write("truth.jsonl", docs)]
    )
    assert (rows[0].doc, missing) == (docs[1], 1)


def test_llava_scienceqa_from_problems(write):
    problem = {"question": "Is it?", "choices": ["no", "yes"], "answer": 1, "hint": ""}
    problems = {
        "3": problem | {"image": "image.png", "split": "test"},
        "4": problem | {"image": None, "split": "test"},
        "5": problem | {"image": None, "split": "train"},
    }
    answers = [{"question_id": name, "prompt": "", "text": "B"} for name in "34"]
    rows, missing = imports.load(
        "llava",
        tasks.load("scienceqa"),
        write("answers.jsonl", answers),
        [write("problems.json", [json.dumps(problems)])],
    )
    assert missing == 0
    assert [row.doc["has_image"] for row in rows] == [True, False]
    assert score.score(tasks.load("scienceqa"), rows, "paper").metrics["accuracy_all"] == 1


@pytest.mark.parametrize(
    ("text", "question", "choices"),
    [
        ("Is it?\nA. no\nB. yes", "Is it?", ["no", "yes"]),
        (f"Is it?\nA. no\nB. yes\n{OPTION_LETTER}", "Is it?", ["no", "yes"]),
        ("A. is\nhere\nA. one\nline\nB. two", "A. is\nhere", ["one\nline", "two"]),
        ("Nothing to choose", "Nothing to choose", []),
    ],
)
def test_choices_are_split_from_the_question(text, question, choices):
    assert split_choices(text) == (question, choices)


MMBENCH_ROWS = [
    {"index": 7, "question": "What?", "A": "cat", "B": "3", "C": None, "answer": "A"},
    {"index": 1_000_007, "question": "What?", "A": "3", "B": "cat", "C": None, "answer": "B"},
]


@pytest.mark.parametrize("suffix", [".xlsx", ".tsv"])
def test_vlmevalkit_mmbench(suffix, tmp_path):
    path = tmp_path / f"model_MMBench_DEV_EN{suffix}"
    rows = [
        row | {"l2-category": "x", "prediction": text}
        for row, text in zip(MMBENCH_ROWS, ("A", "The cat"), strict=True)
    ]
    if suffix == ".xlsx":
        write_spreadsheet(rows, path)
    else:
        lines = [list(rows[0]), *(["" if v is None else str(v) for v in r.values()] for r in rows)]
        path.write_text("\n".join("\t".join(line) for line in lines))
    task = tasks.load("mmbench")
    imported, _ = imports.load("vlmevalkit", task, path)
    assert [row.case_id for row in imported] == ["7", "1000007"]
    metrics = score.score(task, imported, "paper").metrics
    assert metrics == {"accuracy": 1, "vanilla_accuracy": 1, "x/accuracy": 1}


def test_vlmevalkit_pope_mme_and_scienceqa(tmp_path):
    def imported(name, row):
        path = tmp_path / f"{name}.xlsx"
        write_spreadsheet([row], path)
        return imports.load("vlmevalkit", tasks.load(name), path)[0]

    pope = {"index": 1, "question": "Dog?", "answer": "Yes", "category": "random,popular"}
    rows = imported("pope", pope | {"image_path": "COCO_1.jpg", "prediction": "Yes"})
    assert [(row.case_id, row.doc["category"]) for row in rows] == [
        ("1/0", "random"),
        ("1/1", "popular"),
    ]
    assert score.score(tasks.load("pope"), rows, "paper").metrics["f1"] == 1
    mme = {"index": 4, "question": "Is it?", "answer": "No", "category": "OCR", "prediction": "No"}
    assert imported("mme", mme | {"image_path": "OCR/1.jpg"})[0].doc["question_id"] == "OCR/1.jpg"
    sqa = {"index": 2, "question": "Is it?", "A": "no", "B": "yes", "answer": "B", "hint": None}
    rows = imported("scienceqa", sqa | {"prediction": "B"})
    assert rows[0].doc["choices"] == ["no", "yes"]
    assert score.score(tasks.load("scienceqa"), rows, "paper").metrics["accuracy"] == 1
    lost = imported("scienceqa", sqa | {"answer": "", "prediction": "A"})
    assert tasks.load("scienceqa").reference(lost[0].doc) is None  # and not the first choice
    with pytest.raises(UserError, match=r"row 4 is not a mme row \(KeyError\('image_path'\)\)"):
        imported("mme", mme)


def test_vlmevalkit_textvqa(tmp_path):
    path = tmp_path / "x.xlsx"
    row = {"index": 2, "question": "Is it?", "answer": str(["a"] * 10), "prediction": "a"}
    write_spreadsheet([row], path)
    rows, _ = imports.load("vlmevalkit", tasks.load("textvqa"), path)
    assert rows[0].doc["answers"] == ["a"] * 10


@pytest.mark.parametrize("kind", [".json", ".xlsx", ".tsv"])
def test_an_empty_prediction_of_vlmevalkit_counts_as_wrong_in_any_file(kind, tmp_path):
    path, out = tmp_path / f"x{kind}", tmp_path / "out.json"
    row = {"question": "Dog?", "answer": "No", "category": "random", "image_path": "1.jpg"}
    answers: list = ["No", None, float("nan")] if kind == ".json" else ["No", None, ""]
    rows = [row | {"index": n, "prediction": text} for n, text in enumerate(answers)]
    if kind == ".xlsx":
        write_spreadsheet(rows, path)
    elif kind == ".tsv":
        lines = [list(rows[0]), *([str(v or "") for v in row.values()] for row in rows)]
        path.write_text("\n".join("\t".join(line) for line in lines))
    else:
        path.write_text(json.dumps(rows))
    assert score.main(["pope", str(path), "--import", "vlmevalkit", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert (found["n"], found["metrics"]["accuracy"]) == (3, pytest.approx(1 / 3))


def test_other_tables_are_refused(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_text("question\tanswer\n1\t2\n")
    with pytest.raises(UserError, match="no column 'index', so not a VLMEvalKit"):
        imports.load("vlmevalkit", tasks.load("pope"), path)
    path = tmp_path / "x.xlsx"
    path.write_bytes(b"PK\x03\x04 broken")
    with pytest.raises(UserError, match="cannot read .* as a table"):
        imports.load("vlmevalkit", tasks.load("pope"), path)


POPE = {"question": "Dog?", "answer": "yes", "category": "random"}


def test_lmms_eval_samples_of_our_tasks_hold_the_document(write):
    task = tasks.load("pope")
    process = lmms_eval_functions(task)["lmms_process_results"]
    sample = {"doc_id": 3, "target": "yes", "filtered_resps": ["Yes"]}
    path = write("samples.jsonl", [sample | process(POPE, ["Yes"])])
    rows, missing = imports.load("lmms-eval", task, path)
    assert (rows[0].case_id, rows[0].doc, rows[0].prediction, missing) == ("3", POPE, "Yes", 0)


def test_lmms_eval_samples_of_built_in_tasks_need_the_documents(write):
    sample = {"doc_id": 1, "filtered_resps": [["No"]], "input": "Dog?", "target": "yes"}
    samples = write("samples.jsonl", [sample])
    task = tasks.load("pope")
    truth = write("truth.jsonl", [POPE | {"answer": "no"}, POPE])
    rows, missing = imports.load("lmms-eval", task, samples, [truth])
    assert (rows[0].doc, rows[0].prediction, missing) == (POPE, "No", 1)
    with pytest.raises(UserError, match="no document 1; give the data set's files"):
        imports.load("lmms-eval", task, samples)
    with pytest.raises(UserError, match="not a sample of lmms-eval"):
        imports.load("lmms-eval", task, truth)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"input": "Is there a cat?"}, "its prompt is 'Is there a cat.', the document has"),
        ({"input": None, "arguments": [["Cat?", {}]]}, "its prompt is 'Cat"),
        ({"target": "no"}, "its target is 'no', the document's 'yes'"),
        ({"target": None, "input": None}, "it has neither target nor input"),
    ],
)
def test_lmms_eval_samples_of_other_documents_are_refused(changed, message, write):
    sample = {"doc_id": 0, "filtered_resps": "Yes", "input": "Dog?\nAnswer", "target": "yes"}
    truth = write("truth.jsonl", [POPE, POPE])
    samples = write("samples.jsonl", [sample | changed, sample | {"doc_id": 1}])
    with pytest.raises(UserError, match=f"1 of 2 samples do not belong .*doc_id 0: {message}"):
        imports.load("lmms-eval", tasks.load("pope"), samples, [truth])


def logged_by_lmms_eval(name, docs):
    """What lmms-eval's own task of a benchmark logs of the documents: prompt, target, results."""
    official = tasks.load(name).official
    rows = [official.prepare(doc) for doc in docs]
    task = OwnTask.of_file(official.file, rows)
    return [
        {
            "doc_id": doc_id,
            "target": str(task.doc_to_target(row)),
            "filtered_resps": "yes",
            "input": task.doc_to_text(row),
            **inspect.unwrap(type(task).process_results)(task, copy.deepcopy(row), ["yes"]),
        }
        for doc_id, row in enumerate(rows)
    ]


SWAPPED = {  # documents that differ by little, for the benchmarks whose first two differ by more
    "textvqa": [{"question": f"what is {x}?", "answers": [x] * 10, "question_id": x} for x in "ab"],
    "vqav2": [
        {"question": f"What is {x}?", "answers": [{"answer": x}] * 10}
        | {"answer_type": "other", "question_id": x}
        for x in "ab"
    ],
    "mme": [
        {"question_id": "OCR/1.jpg", "category": "OCR", "answer": "Yes"}
        | {"question": f"Is it {x}? Please answer yes or no."}
        for x in ("a cat", "a dog")
    ],
    "scienceqa": [
        {"question": "Which?", "choices": choices, "answer": 1, "hint": "", "has_image": True}
        for choices in (["a", "b"], ["a", "c"])
    ],
    "pope": [
        {"question": "Is it?", "answer": "yes", "category": "random", "question_id": str(i)}
        for i in (1, 2)
    ],
    "mmbench": [
        {"index": i, "question": "Which?", "A": "cat", "B": "dog", "answer": "A"} for i in (1, 2)
    ],
    "mmbench_cn": [
        {"index": i, "question": "图中是什么？", "A": "猫", "B": "狗", "answer": "A"}
        for i in (1, 2)
    ],
    "mmmu": [
        {"id": f"validation_Art_{i}", "question": f"What is {x} in <image 1>?", "answer": "A"}
        | {"question_type": "multiple-choice", "options": "['cat', 'dog']"}
        for i, x in enumerate("ab", 1)
    ],
    "vizwiz": [
        {"question": f"What is {x}?", "answers": [x] * 10, "question_id": f"{x}.jpg"}
        | {"category": "other"}
        for x in "ab"
    ],
    "coco_cap": [
        {"question_id": f"COCO_val2014_{i:012}.jpg", "id": i, "answer": [f"a cat {i}"]}
        for i in (1, 2)
    ],
}


@pytest.mark.parametrize("name", [n for n in tasks.NAMES if tasks.load(n).official])
def test_what_lmms_evals_own_task_logs_belongs_to_its_documents_alone(name, write):
    docs = SWAPPED.get(name) or DOCUMENTS[name]
    samples = write("samples.jsonl", logged_by_lmms_eval(name, docs))
    task = tasks.load(name)
    rows, _ = imports.load("lmms-eval", task, samples, [write("truth.jsonl", docs)])
    assert [row.doc for row in rows] == docs
    with pytest.raises(UserError, match="2 of 2 samples do not belong"):
        imports.load("lmms-eval", task, samples, [write("truth.jsonl", docs[::-1])])


def test_llava_bench_s_categories_are_logged_with_a_prefix(write):
    """tasks/llava-in-the-wild/utils.py: "llava_bench_" + doc["category"]."""
    doc = DOCUMENTS["llava_bench"][0]
    judged = {"question": doc["question"], "category": f"llava_bench_{doc['category']}"}
    sample = {"doc_id": 0, "filtered_resps": "a", "input": doc["question"], "gpt_eval_all": judged}
    task, truth = tasks.load("llava_bench"), [write("truth.jsonl", [doc])]
    rows, _ = imports.load("lmms-eval", task, write("s.jsonl", [sample]), truth)
    assert rows[0].doc == doc
    judged["category"] = "llava_bench_other"
    with pytest.raises(UserError, match="its category is"):
        imports.load("lmms-eval", task, write("s.jsonl", [sample]), truth)


def test_grades_beside_a_truth_of_another_kind_are_one_line(write):
    grades = write("g.json", {"v1_0": {"model": "m", "score": [0.5]}})
    truth = write("t.json", [{"index": 0, "question": "?", "answer": "a"}])
    with pytest.raises(UserError):
        imports.load("mmvet-grades", tasks.load("mmvet"), grades, [truth])


def test_lmms_eval_logs_the_name_of_a_column_that_the_data_lack(write):
    doc = {"question": "What?", "answers": ["a"] * 10}
    sample = {"doc_id": 0, "filtered_resps": "a", "input": "What?", "target": "answer"}
    files = write("samples.jsonl", [sample]), [write("truth.jsonl", [doc])]
    assert imports.load("lmms-eval", tasks.load("textvqa"), *files)[1] == 0


def test_parquet_truth_keeps_only_whether_there_is_an_image(tmp_path, write):
    import pyarrow as pa
    import pyarrow.parquet as pq

    doc = {"question": "Is it?", "choices": ["no", "yes"], "answer": 1, "hint": ""}
    images = [{"bytes": b"x", "path": None}, None]
    table = pa.Table.from_pylist([doc | {"image": image} for image in images])
    pq.write_table(table, tmp_path / "test.parquet")
    sample = {"filtered_resps": "B", "target": "B", "input": "Is it?\nA. no\nB. yes"}
    samples = write("samples.jsonl", [sample | {"doc_id": i} for i in (0, 1)])
    rows, _ = imports.load(
        "lmms-eval", tasks.load("scienceqa"), samples, [tmp_path / "test.parquet"]
    )
    assert [row.doc for row in rows] == [doc | {"has_image": True}, doc | {"has_image": False}]


def test_an_unknown_format_lists_the_known_ones(tmp_path):
    with pytest.raises(UserError, match="nearest first: vlmevalkit"):
        imports.load("vlmeval", tasks.load("pope"), tmp_path)


CAPTIONS = ["A cat sits.", "A cat on a mat.", "One cat."]


@pytest.mark.parametrize("suffix", ["xlsx", "csv", "tsv", "json"])
@pytest.mark.parametrize("as_text", [str, json.dumps])
def test_references_in_one_cell_are_a_list(suffix, as_text, tmp_path):
    path = tmp_path / f"x.{suffix}"
    row = {"index": 0, "question_id": "COCO_1.jpg", "answer": as_text(CAPTIONS), "prediction": "b"}
    if suffix == "xlsx":
        write_spreadsheet([row], path)
    elif suffix == "json":  # VLMEvalKit's PRED_FORMAT=json, with the cells of its table
        path.write_text(json.dumps([row]))
        [joined] = imports.load("vlmevalkit", tasks.load("coco_cap"), path)[0]
        assert tasks.load("coco_cap").reference(joined.doc) == CAPTIONS
        return
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, row, dialect="excel" if suffix == "csv" else "excel-tab")
            writer.writeheader()
            writer.writerow(row)
    task = tasks.load("coco_cap")
    rows, _ = imports.load("vlmevalkit", task, path)
    assert task.reference(rows[0].doc) == CAPTIONS
    rows = score.read(task, path).rows
    assert task.reference(rows[0].doc) == CAPTIONS


def test_a_single_caption_in_a_cell_is_one_reference(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("question_id,answer,prediction\n1,A [red] cat.,A cat.\n")
    rows = score.read(tasks.load("coco_cap"), path).rows
    assert tasks.load("coco_cap").reference(rows[0].doc) == ["A [red] cat."]


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("scienceqa", "choices"),
        ("vqav2", "answers"),
        ("textvqa", "answers"),
        ("coco_cap", "answer"),
    ],
)
def test_text_where_a_list_belongs_is_refused(name, column, write, tmp_path):
    task = tasks.load(name)
    doc = {"question": "Q?", "hint": "", "answer": 0, "answer_type": "other", "prediction": "a"}
    path = write("x.jsonl", [doc | {column: "['one', 'two']"}])
    with pytest.raises(UserError, match=f"row 1: column '{column}' is .*expected a list, not text"):
        score.main.__wrapped__([name, str(path)])
    if task.text_lists:
        return
    path = tmp_path / "x.csv"
    path.write_text(f"question,{column},prediction\nQ?,one and two,a\n")
    with pytest.raises(UserError, match=f"row 1: column '{column}' is .*expected a list such as"):
        score.read(task, path)


def test_vlmevalkit_mmvet(tmp_path):
    path = tmp_path / "x.xlsx"
    row = {"index": 7, "question": "What?", "answer": "two", "category": "rec,ocr"}
    write_spreadsheet([row | {"prediction": "2"}], path)
    rows, _ = imports.load("vlmevalkit", tasks.load("mmvet"), path)
    doc = {"question_id": "7", "question": "What?", "answer": "two", "capability": "rec,ocr"}
    assert rows[0].doc == doc


def test_published_grades_of_mmvet(tmp_path, capsys):
    questions = {
        f"v1_{i}": {"question": "?", "answer": "a", "capability": kinds, "imagename": "x.png"}
        for i, kinds in enumerate((["rec"], ["rec", "ocr"], ["math"]))
    }
    grades = {
        "v1_0": {"model": ["gpt-4"], "content": ["1.0"], "score": [1.0]},
        "v1_1": {"model": ["gpt-4"] * 2, "content": ["0.2", "0.4"], "score": [0.2, 0.4]},
    }
    paths = [tmp_path / "grades.json", tmp_path / "mm-vet.json"]
    for path, content in zip(paths, (grades, questions), strict=True):
        path.write_text(json.dumps(content))
    rows, missing = imports.load("mmvet-grades", tasks.load("mmvet"), paths[0], paths[1:])
    report = score.score(tasks.load("mmvet"), rows, "paper")
    expected = {"score": 0.65, "rec/score": 0.65, "ocr/score": 0.3}  # (1 + 0.3) / 2
    assert report.metrics == pytest.approx(expected)
    assert (missing, report.n, report.n_unparsed) == (1, 2, 0)
    assert report.notes == ["grades as published, by gpt-4"]
    for bad in ({"v1_9": grades["v1_0"]}, {"v1_0": {"model": [], "score": [2]}}, {"v1_0": 1}, [1]):
        paths[0].write_text(json.dumps(bad))
        with pytest.raises(UserError, match="is not in|is no file of grades"):
            imports.load("mmvet-grades", tasks.load("mmvet"), paths[0], paths[1:])


@needs_published
def test_published_grades_of_llava_score_as_published():
    grades = PUBLISHED / "mmvet.gpt4-grades.json"
    truth = [PUBLISHED.parent / "mm-vet.json"]
    rows, missing = imports.load("mmvet-grades", tasks.load("mmvet"), grades, truth)
    metrics = score.score(tasks.load("mmvet"), rows, "paper").metrics
    names = ("score", "rec/score", "ocr/score", "know/score", "gen/score", "spat/score")
    rounded = [round(100 * metrics[name], 1) for name in (*names, "math/score")]
    assert (rounded, missing) == ([36.1, 40.6, 28.0, 23.5, 24.4, 34.7, 7.7], 0)
