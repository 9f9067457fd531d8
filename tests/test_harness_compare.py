"""Two runs compared: known statistics (against scipy), clusters, mismatched data."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from harness import compare as compare_command
from harness import report, tables
from harness.reporting import compare, paper, render
from harness.runs.store import EvaluationRun, distinct_names, marks
from harness.scoring.paired import holm, paired


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, []),
        ({"split": "val"}, ["split val"]),
        ({"data_id": "org/gqa"}, ["data org/gqa"]),
        ({"temperature": 0.7}, ["temperature 0.7"]),
        ({"temperature": 0.7, "votes": 4}, ["4 votes"]),
        ({"temperature": 0.0, "votes": 1, "style": "seen"}, []),
        ({"style": "validation", "blind": True}, ["blind", "validation style"]),
    ],
)
def test_what_sets_a_run_apart_is_said(arguments, said):
    assert marks(arguments, "gqa") == said


def test_one_question_an_image_is_the_paired_t_interval():
    generator = np.random.default_rng(0)
    a, b = generator.random(40), generator.random(40)
    found = paired(a, b, range(40))
    theirs = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high))
    assert found.difference == pytest.approx((a - b).mean())


@pytest.mark.parametrize(("better", "worse"), [(9, 2), (3, 3), (30, 11), (1, 0)])
def test_right_and_wrong_answers_are_mcnemars_exact_test(better, worse):
    a = [1] * better + [0] * worse + [1] * 20
    b = [0] * better + [1] * worse + [1] * 20
    found = paired(a, b, range(len(a)))
    theirs = stats.binomtest(better, better + worse, 0.5).pvalue
    assert found.p_value == pytest.approx(theirs)
    assert (found.better, found.worse) == (better, worse)
    assert "exact" in found.method


def test_clusters_are_flipped_whole_as_scipys_permutation_test_does():
    generator = np.random.default_rng(1)
    clusters = np.repeat(np.arange(9), 4)
    a, b = generator.integers(0, 2, 36), generator.integers(0, 2, 36)
    sums = np.bincount(clusters, a - b)
    theirs = stats.permutation_test(
        (sums, np.zeros(9)),
        lambda x, y, axis: (x - y).sum(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf,
    )
    assert paired(a, b, clusters).p_value == pytest.approx(theirs.pvalue)


def test_drawn_flips_agree_with_the_exact_ones():
    generator = np.random.default_rng(2)
    a, b = generator.choice([0, 0.3, 0.6, 1.0], 14), generator.choice([0, 0.3, 0.6, 1.0], 14)
    found = paired(a, b, range(14))
    theirs = stats.permutation_test(
        (a - b, np.zeros(14)),
        lambda x, y, axis: (x - y).sum(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf,
    )
    assert found.p_value == pytest.approx(theirs.pvalue, abs=0.02)
    assert found == paired(a, b, range(14))  # same seed, same p


def test_questions_of_one_image_count_as_one():
    right = np.random.default_rng(3).random(60) < 0.5
    a = np.repeat(right, 9)
    b = np.zeros(540)
    wide = paired(a, b, np.repeat(np.arange(60), 9))
    narrow = paired(a, b, range(540))
    assert wide.high - wide.low > 2.5 * (narrow.high - narrow.low)
    assert wide.clusters == 60


def test_equal_runs_and_a_single_image():
    same = paired([1, 0, 1] * 5, [1, 0, 1] * 5, range(15))
    bound = 1.959964**2 / (15 + 1.959964**2)  # Wilson's of none of 15
    assert (same.difference, same.p_value) == (0, 1)
    assert (same.low, same.high) == pytest.approx((-bound, bound))
    few = paired([1, 0, 1], [0, 0, 0], "abc")
    assert (few.low, few.high) == (None, None)
    alone = paired([1, 0], [0, 0], "aa")
    assert (alone.low, alone.p_value) == (None, 1.0)


def test_an_interval_ends_at_the_largest_difference():
    found = paired([1] * 12, [0] * 11 + [0.9], range(12))
    assert 0.7 < found.low < found.difference < found.high == 1


def write_run(folder: Path, scores: list[float | None], **sample: object) -> Path:
    """A run's folder with just what comparing and reporting read."""
    folder.mkdir(parents=True)
    n = sum(score is not None for score in scores)
    entry = {"n": n, "n_unparsed": 0, "excluded": {}, "unit": "fraction", "notes": []}
    entry["metrics"] = {"accuracy": {"value": 0.5, "low": 0.4, "high": 0.6, "method": "test"}}
    record = {
        "schema": 1,
        "kind": "evaluation",
        "label": None,
        "arguments": {"model": "nano", "data": "demo", "tasks": "pope"},
        "protocol": "paper",
        "tasks": {"pope": entry},
    }
    (folder / "record.json").write_text(json.dumps(record))
    lines = [
        {
            "doc_id": row,
            "question": f"Is there a dog in image {row // 2}?",
            "prediction": "yes" if score else "no",
            "parsed": "yes" if score else "no",
            "reference": "yes",
            "score": score,
            "image": f"image {row // 2}",
            "excluded": None,
            **sample,
        }
        for row, score in enumerate(scores)
    ]
    (folder / "samples_pope.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return folder


def test_the_command_compares_what_both_scored(tmp_path, capsys):
    a = write_run(tmp_path / "a", [1, 1, 1, 0, None])
    b = write_run(tmp_path / "b", [0, 0, 1, 0, 1])
    assert compare_command.main([str(a), str(b)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("A: a: model nano, protocol paper, template not recorded\nB: b:")
    assert out.splitlines()[-1].split() == (
        ["pope", "75.0", "25.0", "+50.0", "too", "few:", "2", "clusters", "1", "4", "2", "2/0"]
    )


def test_runs_are_named_by_what_tells_them_apart(tmp_path):
    folders = [tmp_path / "a" / "evaluation", tmp_path / "b" / "evaluation"]
    assert distinct_names(folders) == ["a/evaluation", "b/evaluation"]
    assert distinct_names([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
    assert len(distinct_names([tmp_path, tmp_path])) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"reference": "no"},
            "row 1 of a and b is not the same question; compare runs on the same",
        ),
        ({"doc_id": 77}, "a and b share no scored question (tasks: pope; pope)"),
    ],
)
def test_runs_on_other_data_are_refused(tmp_path, capsys, change, message):
    a = write_run(tmp_path / "a", [1, 0])
    b = write_run(tmp_path / "b", [1], **change)
    assert compare_command.main([str(a), str(b)]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_a_run_is_one_line(tmp_path, capsys):
    assert compare_command.main([str(tmp_path), str(tmp_path)]) == 2
    assert "no record.json in" in capsys.readouterr().err
    (tmp_path / "record.json").write_text('{"kind": "profile"}')
    assert compare_command.main([str(tmp_path), str(tmp_path)]) == 2
    assert "holds a profile; expected a run of harness.run" in capsys.readouterr().err


def blinded(folder: Path, **arguments: object) -> Path:
    """The same run, its record saying that it was made otherwise."""
    record = json.loads((folder / "record.json").read_text())
    record["arguments"] |= arguments
    record["tasks"]["pope"]["metrics"]["random/accuracy"] = {"value": 0.5}
    (folder / "record.json").write_text(json.dumps(record))
    return folder


def test_blind_and_held_out_rows_say_so_in_the_row(tmp_path, capsys):
    """In a run's tables, the paper's, a comparison's, and the report's."""
    plain = write_run(tmp_path / "runs" / "plain", [1, 1, 1, 0])
    blind = blinded(write_run(tmp_path / "runs" / "dark", [1, 0, 0, 0]), blind=True)
    style = {"style": "heldout", "limit": 9}
    held_out = blinded(write_run(tmp_path / "runs" / "other", [1, 0, 1, 0]), **style)
    assert compare_command.main([str(plain), str(blind)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("pope (B blind) ")
    assert compare_command.main([str(held_out), str(blind)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].endswith("template not recorded, held-out style, first 9 questions")
    assert out[-1].startswith("pope (A held-out style, B blind) ")
    results = EvaluationRun.read(blind).results()
    text = re.sub(" +", " ", render.report(results, "t"))
    assert "pope (blind) accuracy" in text and "random (blind) 50.0%" in text
    names = {"pope (blind)", "pope (held-out style)", "pope"}
    assert tables.main(["--from", str(tmp_path / "runs"), "--out", str(tmp_path / "t")]) == 0
    rows = [(tmp_path / "t" / f"{name}.csv").read_text() for name in ("dark", "other", "plain")]
    assert {row.splitlines()[1].split(",")[0] for row in rows} == names
    _, paper_rows = paper.table("main", [EvaluationRun.read(f) for f in (blind, held_out)])
    assert [row[0] for row in paper_rows[-2:]] == [
        "dark (blind)",
        "other (held-out style, first 9 questions)",
    ]
    page = tmp_path / "report.html"
    folders = [str(folder) for folder in (plain, blind, held_out)]
    assert report.main([*folders, "--out", str(page)]) == 0
    html = page.read_text()
    assert "n 4, blind</span>" in html and "n 4, held-out style</span>" in html
    assert ">pope (B held-out style)</th>" in html
    assert '"runs":["plain","dark (blind)","other (held-out style, first 9 questions)"]' in html
    assert ">dark (blind)</th>" in html  # its column of settings


def test_holms_correction_by_hand():
    """Sorted 0.005, 0.01, 0.03, 0.04: times 4, 3, 2, 1, and never below the one before."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


THREE = {  # one image each: McNemar's exact test
    "a": [1.0] * 10 + [0.0] * 10,
    "b": [1.0] * 4 + [0.0] * 16,
    "c": [0.0] * 20,
}


def three_runs(folder: Path) -> list[str]:
    for name, scores in THREE.items():
        spread = [score for score in scores for _ in range(2)]  # two questions an image
        write_run(folder / name, spread)
    return [str(folder / name) for name in THREE]


def test_many_runs_are_a_matrix_with_corrected_p_values(tmp_path, capsys):
    folders = three_runs(tmp_path)
    files = [tmp_path / "pairs.json", tmp_path / "pairs.csv"]
    options = ["--json", str(files[0]), "--csv", str(files[1])]
    assert compare_command.main([*folders, *options]) == 0
    single = {"ab": 2 * 0.5**6, "ac": 2 * 0.5**10, "bc": 2 * 0.5**4}  # 6, 10 and 4 images to none
    corrected = {"ac": 3 * single["ac"], "ab": 2 * single["ab"], "bc": single["bc"]}
    shown = capsys.readouterr().out
    assert "A: a: model nano" in shown
    assert f"A +30.0 (p {corrected['ab']:.2g}) +50.0" in re.sub(" +", " ", shown)
    assert f"-50.0 (p {corrected['ac']:.2g})" in shown
    assert "by Holm's method over 3 comparisons" in shown
    found = json.loads(files[0].read_text())
    assert [(one["a"], one["b"]) for one in found] == [("a", "b"), ("a", "c"), ("b", "c")]
    for one in found:
        pair = one["a"] + one["b"]
        assert one["p_value"] == pytest.approx(single[pair])
        assert one["p_holm"] == pytest.approx(corrected[pair])
        expected = np.mean(THREE[one["a"]]) - np.mean(THREE[one["b"]])
        assert one["difference"] == pytest.approx(expected)
        assert one["mean_a"] - one["mean_b"] == pytest.approx(expected)
    with files[1].open() as file:
        rows = list(csv.DictReader(file))
    assert [{k: str(v) for k, v in one.items()} for one in found] == rows


def test_two_runs_print_as_before_and_are_written_too(tmp_path, capsys):
    a, b, _ = three_runs(tmp_path)
    assert compare_command.main([a, b]) == 0
    plain = capsys.readouterr().out
    assert compare_command.main([a, b, "--json", str(tmp_path / "x.json")]) == 0
    assert capsys.readouterr().out == plain
    (one,) = json.loads((tmp_path / "x.json").read_text())
    assert one["p_holm"] == one["p_value"]


def test_many_runs_that_cannot_be_compared(tmp_path, capsys):
    folders = three_runs(tmp_path)
    assert compare_command.main(folders[:1]) == 2
    assert "one run is no comparison" in capsys.readouterr().err
    other = write_run(tmp_path / "other", [1.0] * 40, reference="no")
    assert compare_command.main([*folders, str(other)]) == 2
    assert "is not the same question" in capsys.readouterr().err
    empty = [str(write_run(tmp_path / f"none{n}", [None] * 4)) for n in range(3)]
    assert compare_command.main(empty) == 2
    assert "share a scored question" in capsys.readouterr().err
    assert compare_command.main([*folders, "--csv", str(tmp_path)]) == 2
    assert "cannot write to" in capsys.readouterr().err


def test_more_runs_than_letters_have_names():
    assert compare.letters(28)[24:] == ["Y", "Z", "R27", "R28"]


def test_text_only_questions_are_not_compared_where_the_headline_leaves_them_out(tmp_path):
    """ScienceQA's accuracy is over its questions with an image: so are its paired tests."""
    from harness.runs.schema import samples_text

    runs = []
    for name, scores in (("a", [1.0, 1.0, 1.0]), ("b", [0.0, 1.0, 0.0])):
        folder = write_run(tmp_path / name, scores)
        record = json.loads((folder / "record.json").read_text())
        record["tasks"]["scienceqa"] = record["tasks"]["pope"]
        (folder / "record.json").write_text(json.dumps(record))
        run = EvaluationRun.read(folder, name)
        kept = [replace(s, image="none" if n else "k0") for n, s in enumerate(run.samples("pope"))]
        for task in ("pope", "scienceqa"):
            (folder / f"samples_{task}.jsonl").write_text(samples_text(kept))
        runs.append(run)
    assert len(runs[0].samples("scienceqa")) == 3
    assert [s.doc_id for s in runs[0].primary_metric_samples("scienceqa")] == [0]
    assert len(runs[0].primary_metric_samples("pope")) == 3
    found = {one.task: one for one in compare.compare(*runs)}
    assert (found["scienceqa"].paired.n, found["pope"].paired.n) == (1, 3)
