"""MMMU against its own evaluation (stored cases) and lmms-eval's functions."""

import datasets
import pytest
import yaml
from lmms_eval.tasks._task_utils import mmmu_mcq_utils
from lmms_eval.tasks.mmmu import utils as official_lmms
from PIL import Image

from tasks import load, mmmu
from tasks.common import OPTION_LETTER, SHORT_ANSWER

task = load("mmmu")
DOC = {"id": "validation_Art_Theory_1", "question": "What is in <image 1>?", "answer": "B"}
DOC |= {"options": "['a cat', '<image 2>']", "question_type": "multiple-choice"}
OPEN = DOC | {"options": "[]", "question_type": "open", "answer": "24"}


class Nothing:
    """In place of `random`: lmms-eval draws an option where it finds none."""

    choice = staticmethod(lambda options: None)


def test_paper_equals_the_official_code(official_cases):
    cases = official_cases("mmmu")
    assert len(set(cases.predictions)) >= 100
    found = [task.score_case(row["doc"], row["prediction"], "paper") for row in cases.rows]
    for row, case in zip(cases.rows, found, strict=True):
        assert case.score == row["score"], row
        assert case.parsed == row.get("parsed", case.parsed), row  # of questions with options
    metrics = task.aggregate(cases.docs, found, "paper")
    assert metrics == pytest.approx(cases.metrics, abs=1e-9)


def test_lmms_equals_lmms_eval(official_cases, monkeypatch):
    monkeypatch.setattr(mmmu_mcq_utils, "random", Nothing)
    for row in official_cases("mmmu").rows:
        doc = row["doc"]
        given = official_lmms.mmmu_process_results(doc, [row["prediction"]])["mmmu_acc"]
        case = task.score_case(doc, row["prediction"], "lmms")
        assert case.score == official_lmms.evaluate_mmmu([given])[1]["acc"], row
        if doc["question_type"] == "multiple-choice":
            assert case.parsed == given["parsed_pred"][0], row


@pytest.mark.parametrize("doc", [DOC, OPEN, DOC | {"options": "['x', 'y', \"it's\", '1']"}])
def test_lmms_prompt_equals_lmms_eval(doc, lmms_kwargs):
    kwargs = lmms_kwargs("mmmu", "mmmu_val.yaml")
    assert task.prompt(doc, "lmms") == official_lmms.mmmu_doc_to_text(doc, kwargs)


def test_paper_prompt_is_the_form_of_llava15s_settings():
    """mmmu/configs/llava1.5.yaml of MMMU; YAML folds an empty line of a text into a line break."""
    forms = yaml.safe_load(
        f'choice: "{{}}\n\n{{}}\n\n{OPTION_LETTER}"\nopen: "{{}}\n\n{SHORT_ANSWER}"'
    )
    listed = "(A) a cat\n(B) <image 2>\n"
    assert task.prompt(DOC, "paper") == forms["choice"].format(DOC["question"], listed)
    assert task.prompt(OPEN, "paper") == forms["open"].format(OPEN["question"])


def test_images_are_those_that_question_and_options_name():
    doc = DOC | {f"image_{n}": f"picture {n}" for n in range(1, 8)}

    def cells(doc: dict, protocol: str = "lmms") -> list:
        return task.image_cells(doc, protocol)

    assert cells(doc) == ["picture 1", "picture 2"]
    assert cells(OPEN | {"image_1": "picture 1", "image_2": None}) == ["picture 1"]
    assert cells(doc | {"image_2": None}) == ["picture 1", None]
    assert cells(doc | {"question": "What?", "options": "[]"}) == ["picture 1"]
    third = doc | {"question": "<image 3> or <image 1>?", "options": "['x']"}
    assert cells(third) == ["picture 1", "picture 3"]
    # mmmu/utils/data_utils.py: 'image': data['image_1'], whatever the question names
    assert cells(third, "paper") == cells(doc, "paper") == ["picture 1"]
    assert set(task.without_image(doc)) == set(DOC)


@pytest.mark.parametrize(
    ("doc", "truth"),
    [
        (DOC, "B"),
        (DOC | {"answer": "?"}, None),
        (DOC | {"answer": "C"}, None),
        (OPEN, "24"),
        (OPEN | {"answer": "['24/7', '3.429']"}, ["24/7", "3.429"]),
        (OPEN | {"answer": "[0, 1]"}, "[0, 1]"),
        (OPEN | {"answer": "?"}, None),
        (OPEN | {"answer": " "}, None),
    ],
)
def test_truth(doc, truth):
    assert task.reference(doc) == truth


def test_a_run_of_lmms_eval_shows_what_the_protocol_does():
    pictures = {f"image_{n}": Image.new("RGB", (n, 1)) for n in range(1, 8)}
    doc = DOC | pictures | {"question": "<image 3> or <image 1>?", "options": "['x']"}
    assert [i.size for i in mmmu.paper_doc_to_visual(doc)] == [(1, 1)]
    assert [i.size for i in mmmu.lmms_doc_to_visual(doc)] == [(1, 1), (3, 1)]


def test_a_note_says_what_a_draw_would_give():
    """Of two options each: half a question for each answer that names none."""
    docs, answers = [DOC] * 4, ["B", "A", "?", ""]
    report = task.evaluate(docs, answers, "paper")
    assert report.metrics["accuracy"] == 0.25 and report.n_unparsed == 2
    assert "2 answers name no option" in report.notes[-1] and "50.0%" in report.notes[-1]
    assert task.evaluate(docs, ["B"] * 4, "paper").notes == []


def test_hidden_answers_are_left_out_and_counted():
    report = task.evaluate([DOC, DOC | {"answer": "?"}], ["B", "B"], "paper")
    assert report.metrics == {"accuracy": 1.0, "Art and Design/accuracy": 1.0}
    assert report.excluded == {"no reference answer": 1}


def test_submission():
    docs = [DOC, OPEN | {"id": "test_Art_2"}, DOC | {"id": "test_Art_3"}]
    sent = task.submission(docs, ["(A)\n", " 24 V", "hm"])
    assert sent == {"validation_Art_Theory_1": "A", "test_Art_2": "24 V", "test_Art_3": ""}


def test_a_copy_of_the_hubs_repository_with_a_config_a_subject(tmp_path):
    from harness.data.sources import Source

    for subject in ("Math", "Art_Theory", "Art"):
        for split in ("dev", "validation"):
            file = tmp_path / "MMMU" / subject / f"{split}-00000-of-00001.parquet"
            row = DOC | {"id": f"{split}_{subject}_1", "image_1": None}
            write_parquet([row], file)
    rows = Source.parse(str(tmp_path)).rows(task)
    assert rows["id"] == [f"validation_{name}_1" for name in ("Art", "Art_Theory", "Math")]


def write_parquet(rows, file):
    file.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows).to_parquet(file)


def test_an_upload_is_compared_as_it_stands():
    """main_eval_only.py: `parsed_pred = parsed_pred` of a question with options."""
    sent = task.of_uploads()
    for answer, right in (("B", 1.0), ("B.", 0.0), ("The answer is (B)", 0.0)):
        assert sent.score_case(DOC, answer, "paper").score == right
        assert task.score_case(DOC, answer, "paper").score == 1.0
    assert sent.evaluate([DOC], ["?"], "paper").notes == []
