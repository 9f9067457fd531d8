"""What holds for every benchmark: its task files, and that no text or document breaks it."""

from __future__ import annotations

import io
import math
from pathlib import Path

import datasets
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lmms_eval.utils import load_yaml_config
from PIL import Image
from sample_documents import DOCUMENTS

import tasks
from tasks.coco_cap import scorer
from tasks.common import PROTOCOLS
from vlmamba_core.errors import UserError

FOLDER = Path(tasks.__file__).parent
SCORED_BY_TEXT = [name for name in tasks.NAMES if name not in ("coco_cap", "mmvet", "llava_bench")]
PIECES = [*"ABCDEZabz.,:;()[]*'\" \n\t|=-/?0123", "yes", "No", "not", "The answer is ", "answer is"]
PIECES += ["cat", "dog", "the ", "'s", "dont", "ten", "\u2028", "é", "\ud800"]
ANSWERS = st.text() | st.lists(st.sampled_from(PIECES)).map("".join)
RELAXED = settings(deadline=None, suppress_health_check=list(HealthCheck), database=None)


def test_every_folder_has_documents_here_and_a_readme():
    assert set(DOCUMENTS) == set(tasks.NAMES)
    assert all((FOLDER / name / "README.md").is_file() for name in tasks.NAMES)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", tasks.NAMES)
def test_task_files_say_in_lmms_eval_what_the_task_says(name, protocol, monkeypatch):
    if name == "coco_cap":  # its programs take long to start; test_coco_cap.py runs them
        nothing = scorer.Measured(({}, {}), {})
        monkeypatch.setattr(scorer, "measure", lambda *_: nothing)
        monkeypatch.setattr(scorer, "aggregate", lambda _: {"CIDEr": 0.5})
    task, docs = tasks.load(name), DOCUMENTS[name]
    title = f"vlmamba_{name}" + ("" if protocol == "paper" else "_lmms")
    config = load_yaml_config(str(FOLDER / name / f"{title}.yaml"))
    assert config["task"] == title
    if "/" in task.hub.path:  # easy-VQA is a package, read from a local file
        where = (config["dataset_path"], config.get("dataset_name"), config["test_split"])
        assert where == (task.hub.path, task.hub.name, task.hub.split)
    assert config["generation_kwargs"]["max_new_tokens"] == task.max_new_tokens(protocol)
    assert tuple(config["generation_kwargs"]["until"]) == task.stop(protocol)
    assert config["doc_to_text"](docs[0], None) == task.prompt(docs[0], protocol)
    assert config["doc_to_target"](docs[0]) == task.reference(docs[0])
    answers = ["A", "yes"]
    items = [config["process_results"](*pair) for pair in zip(docs, [["A"], ["yes"]], strict=True)]
    metrics = task.evaluate(docs, answers, protocol).metrics
    assert tuple(entry["metric"] for entry in config["metric_list"]) == task.metrics
    for entry in config["metric_list"]:
        value = entry["aggregation"]([item[entry["metric"]] for item in items])
        assert value == pytest.approx(metrics.get(entry["metric"], math.nan), nan_ok=True)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", SCORED_BY_TEXT)
@pytest.mark.parametrize("text", ["no", "yes", "A", "B", "cat", "stop", "red"])
@pytest.mark.parametrize("ends", [" {}", "{}\n", "\n    {} \t", "\u00a0{}\u2028"])
def test_space_around_an_answer_is_never_part_of_it(name, protocol, text, ends):
    """LLaVA's generation scripts and lmms-eval strip an answer before it is scored."""
    task, docs = tasks.load(name), DOCUMENTS[name]
    plain = task.evaluate(docs, [text, text], protocol)
    assert task.evaluate(docs, [ends.format(text)] * 2, protocol) == plain


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", SCORED_BY_TEXT)
def test_a_document_tells_scoring_the_same_with_its_image_and_without(name, protocol):
    """The rows as the harness and as lmms-eval's command hand them on, images dropped."""
    task = tasks.load(name)
    docs = [{"image": "x", **doc} for doc in DOCUMENTS[name]]
    whole = task.evaluate(docs, ["A", "yes"], protocol)
    assert task.evaluate([task.without_image(d) for d in docs], ["A", "yes"], protocol) == whole
    rows = datasets.Dataset.from_list(
        [doc | {"image": None if doc["image"] is None else stored_picture()} for doc in docs]
    ).cast_column("image", datasets.Image())
    title = f"vlmamba_{name}" + ("" if protocol == "paper" else "_lmms")
    config = load_yaml_config(str(FOLDER / name / f"{title}.yaml"))
    rows = config["process_docs"](rows) if "process_docs" in config else rows
    bare = list(rows.remove_columns("image"))
    assert task.evaluate(bare, ["A", "yes"], protocol).metrics == whole.metrics


def stored_picture():
    file = io.BytesIO()
    Image.new("RGB", (2, 2)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def check_answers(task, protocol, answers):
    docs = DOCUMENTS[task.name]
    for answer in answers:
        if task.name in SCORED_BY_TEXT:
            report = task.evaluate(docs, [answer, answer], protocol)
            assert all(0.0 <= case.score <= 1.0 for case in report.cases)
            assert all(math.isfinite(value) for value in report.metrics.values())
        else:
            case = task.score_case(docs[0], answer, protocol)
            assert (case.score, case.parsed) == (None, answer.strip() or None)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", tasks.NAMES)
@settings(RELAXED, max_examples=20)
@given(answers=st.lists(ANSWERS, min_size=25, max_size=25))
def test_random_answers_raise_nothing(name, protocol, answers):
    check_answers(tasks.load(name), protocol, answers)


@pytest.mark.fuzz
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", tasks.NAMES)
@settings(RELAXED, max_examples=400)
@given(answers=st.lists(ANSWERS, min_size=25, max_size=25))
def test_ten_thousand_random_answers_raise_nothing(name, protocol, answers):
    check_answers(tasks.load(name), protocol, answers)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=3), values),
    max_leaves=4,
)


@pytest.mark.parametrize("name", [name for name in tasks.NAMES if name != "coco_cap"])
@settings(RELAXED, max_examples=60)
@given(data=st.data())
def test_junk_in_a_document_is_a_clear_error_or_left_out(name, data):
    rows = [dict(doc) for doc in DOCUMENTS[name]]
    rows[0][data.draw(st.sampled_from(sorted(rows[0])))] = data.draw(JUNK)
    try:
        for protocol in PROTOCOLS:
            tasks.load(name).evaluate(rows, ["A", "yes"], protocol)
    except UserError:
        pass
