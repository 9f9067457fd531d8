"""MMBench-CN against VLMEvalKit's exact matching (stored cases) and lmms-eval's own functions."""

import math

import pytest
from lmms_eval.tasks.mmbench import cn_utils as official_lmms

from harness.data.sources import Source
from tasks import load
from vlmamba_core.errors import UserError

task = load("mmbench_cn")
DOC = {"index": 1, "question": "图中是什么？", "hint": "nan", "A": "猫", "B": "狗", "answer": "A"}
DOC |= {"category": "x", "L2-category": "l2", "source": "", "split": "dev"}
PAPER = "请直接回答选项字母。"  # model_vqa_mmbench.py of LLaVA with --lang cn


def test_paper_equals_the_official_code(official_cases):
    official_cases("mmbench_cn").check(task)


def test_lmms_equals_lmms_eval(official_cases):
    """Its evaluator's static reading: the one that its English task uses."""
    docs, answers = official_cases("mmbench_cn").docs, official_cases("mmbench_cn").predictions
    full = [doc | {"source": "", "split": "dev"} for doc in docs]
    results = [
        official_lmms.mmbench_process_results(doc, [text])["gpt_eval_score"]
        for doc, text in zip(full, answers, strict=True)
    ]
    evaluator = official_lmms.mmbench_evaluator
    overall, _, by_category = evaluator.eval_result(results, eval_method="static")
    metrics = task.evaluate(docs, answers, "lmms").metrics
    assert metrics["accuracy"] == pytest.approx(overall, abs=1e-9)
    for category, accuracy in by_category.items():
        assert metrics[f"{category}/accuracy"] == pytest.approx(accuracy, abs=1e-9)


@pytest.mark.parametrize("hint", ["nan", None, math.nan, "仔细看图。", ""])
@pytest.mark.parametrize("last", ["nan", None, math.nan, "马", ""])
def test_lmms_prompt_equals_lmms_eval(hint, last, lmms_kwargs):
    """It shows the text "nan", which the hub's copy has for an empty hint."""
    doc = DOC | {"hint": hint, "C": last}
    kwargs = lmms_kwargs("mmbench", "_default_template_mmbench_cn_yaml")
    assert task.prompt(doc, "lmms") == official_lmms.mmbench_doc_to_text(doc, kwargs)


def test_paper_prompt():
    assert task.prompt(DOC, "paper") == f"图中是什么？\nA. 猫\nB. 狗\n{PAPER}"
    hinted = DOC | {"hint": "仔细看图。"}
    assert task.prompt(hinted, "paper") == f"仔细看图。\n{task.prompt(DOC, 'paper')}"
    assert "仔细" not in task.with_prompt(hint="none").prompt(hinted, "paper")
    for protocol in ("paper", "lmms"):
        without = task.with_prompt(hint="none").prompt(hinted, protocol)
        assert without == task.prompt(DOC | {"hint": None}, protocol)


@pytest.mark.parametrize("name", ["mmbench", "mmbench_cn"])
@pytest.mark.parametrize(
    ("file", "language"),
    [
        ("MMBench/en/dev-00000-of-00001.parquet", "mmbench"),
        ("MMBench/cn/dev-00000-of-00001.parquet", "mmbench_cn"),
        ("MMBench_DEV_EN.tsv", "mmbench"),
        ("MMBench_DEV_CN.tsv", "mmbench_cn"),
        ("mmbench_dev_20230712.tsv", "mmbench"),
        ("mmbench/mmbench_dev_cn_20231003.tsv", "mmbench_cn"),
        ("mmbench_cn/dev.parquet", "mmbench_cn"),
    ],
)
def test_a_file_in_one_language_is_never_the_others(name, file, language, tmp_path):
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")
    source = Source.parse(str(tmp_path))
    assert source.has(load(name)) == (name == language)
    if name != language:
        with pytest.raises(UserError, match=f"no data for task {name!r}"):
            source.check(load(name))


def test_the_demo_has_none():
    source = Source.parse("demo")
    assert not source.has(task)
    with pytest.raises(UserError, match="the demo has no rows of mmbench_cn; give --data hub"):
        source.check(task)
