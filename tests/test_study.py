"""The controlled study: its plan, its data, a small one for real, and every number of its page."""

from __future__ import annotations

import functools
import gzip
import json
import random
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest

from harness import run as harness_run
from harness import study
from harness.ablation import jobs
from harness.controlled import cost, data, design, page, plan, predictions, rate, records
from harness.controlled.design import SCALES, Lesson, Stage
from harness.controlled.outcomes import THRESHOLD
from vlmamba.config import VLMambaConfig
from vlmamba.models.vlm import VLMambaForConditionalGeneration
from vlmamba_core.errors import UserError
from vlmamba_core.launcher import Launcher

RESULTS = Path(__file__).resolve().parents[1] / "results"
STEPS = (10, 20, 30, 40)
UNITS = {"pope": "fraction", "gqa": "fraction", "textvqa": "fraction", "mme": "points"}


# --- a page from known records


def synthetic_cell(
    family: str, connector: str, seed: int, order: str = "", start: str = ""
) -> dict:
    """A cell whose scores, gains and costs are drawn from its name and its text model's."""
    rng = random.Random(f"{family} {connector} {seed} {order} {start}".rstrip())
    skill = {"mamba": 0.4, "mamba2": 0.45, "attention": 0.8, "hybrid": 0.7}[family]

    def answers(count: int, share: float) -> dict:
        scores = [float(rng.random() < share) for _ in range(count)]
        return {
            "metric": "accuracy",
            "unit": "fraction",
            "value": fmean(scores),
            "n": count,
            "digest": str(count),
            "scores": scores,
        }

    tasks = {task: answers(24, 0.6) | {"unit": unit} for task, unit in UNITS.items()}
    tasks["pope"]["scores"][3] = None
    tasks["retrieval"] = answers(200, skill)
    tasks["retrieval_blind"] = answers(100, 0.07)
    ready = {"mamba": 2, "mamba2": 1, "attention": 3, "hybrid": 9}[family]
    gains = [
        [step, [round(rng.gauss(0.3 if at >= ready else 0.0, 0.02), 4) for _ in range(8)]]
        for at, step in enumerate(STEPS)
    ]
    tuned = {
        "steps": 40,
        "loss": [[20, 2.0], [40, 1.5]],
        "tokens": 1000,
        "tokens_per_s": 900.0 + seed,
        "peak_mem_bytes": 2**30,
        "held_out": [[step, 2 - step / 50] for step in STEPS],
        "picture_gains": gains,
    }
    return {
        "kind": "cell",
        "family": family,
        "connector": connector,
        "seed": seed,
        "order": order,
        "started_from": start and f"{start} {family}",
        "hyperparameters": {"lr": 1e-3},
        "training": {"pretrain": tuned, "finetune": tuned},
        "tasks": tasks,
        "cost": {
            "language_model_parameters": 3_676_928,
            "connector_parameters": 393_728,
            "flops_per_token": {"64": 5.3e6, "256": 5.4e6},
            "connector_flops": 1e6,
            "device": "cpu",
            "points": [
                {"tokens": n, "prefill_s": n / 1e4, "decode_s": 0.002, "state_bytes": 8192 * n}
                for n in (64, 256)
            ],
        },
        "questions_per_s": 20.0 + seed,
        "seconds": {},
        "settings": {},
    }


def write_synthetic(folder: Path) -> Path:
    """Two connectors, two seeds, one order of one family; attention's second seed is missing."""
    for family in ("mamba", "mamba2", "attention", "hybrid"):
        for connector in ("mlp", "vss_l2"):
            for seed in (0, 1) if family != "attention" else (0,):
                cell = synthetic_cell(family, connector, seed)
                records.write(folder, f"{family}+{connector}+s{seed}", cell)
        if family in ("mamba", "mamba2"):  # a connector whose other seeds are still to come
            records.write(folder, f"{family}+msc+s0", synthetic_cell(family, "msc", 0))
        for number, tried in enumerate((1e-3, 3e-3)):
            found = {"kind": "rate", "family": family, "rate": tried, "seconds": {}}
            lost = None if (family, number) == ("mamba", 1) else 2.0 - number / 8
            records.write(folder, f"rate+{family}+{tried:g}", found | {"loss": lost})
    order = synthetic_cell("mamba", "mlp", 0, "question_first")
    records.write(folder, "mamba+mlp+question_first+s0", order)
    rows = [
        {"kind": kind, "k": k, "distance": distance, "chance_in_view": round(1 / k, 5)}
        for scene, k in enumerate((1, 2, 4, 8, 16) * 2)
        for distance in ("near", "text64", "text256", "pictures2", "pictures4")
        for kind in ("word", "color", "existence", "existence")
    ]
    questions = {"retrieval": {name: [row[name] for row in rows] for name in rows[0]}}
    questions["retrieval"]["picture"] = [at // 20 for at in range(200)]
    questions |= {task: {"picture": [at // 2 for at in range(24)]} for task in UNITS}
    records.write(folder, records.QUESTIONS, questions)
    return folder


def write_begun_anew(folder: Path) -> Path:
    """The study of write_synthetic from other text models: two families, three seeds of mlp."""
    for family in ("mamba", "attention"):
        for connector, seeds in (("mlp", 3), ("vss_l2", 2)):
            for seed in range(seeds):
                cell = synthetic_cell(family, connector, seed, start="anew")
                records.write(folder, f"{family}+{connector}+s{seed}", cell)
        lesson = {"loss": [[10, 2.0], [20, 1.25 if family == "mamba" else 1.5]]}
        text = {"kind": "text", "family": family, "stages": {"copies": lesson}}
        records.write(folder, f"text+{family}", text)
    found = {"kind": "rate", "family": "mamba", "rate": 1e-3, "seconds": {}, "loss": 2.0}
    records.write(folder, "rate+mamba+0.001", found)
    return folder


class Plain:
    """The records read again, without the code that made the page."""

    def __init__(self, *folders: Path):
        self.questions: dict = {}
        self.cells, self.rates, self.texts = [], [], []
        homes = {"cell": self.cells, "rate": self.rates, "text": self.texts}
        for start, folder in enumerate(folders, 1):
            for file in folder.glob("*.json.gz"):
                record = json.loads(gzip.decompress(file.read_bytes()))
                if file.name == "questions.json.gz":
                    self.questions = record
                else:
                    homes[record["kind"]].append(record | {"start": start})

    def of(self, family: str, connector: str, order: str, start: str | int = 1) -> list[dict]:
        wanted = family, connector, "" if order == "usual" else order, int(start)
        names = ("family", "connector", "order", "start")
        found = [cell for cell in self.cells if tuple(cell[name] for name in names) == wanted]
        return sorted(found, key=lambda cell: cell["seed"])

    def mean(
        self, cells: list[dict], task: str, wanted: Callable[[dict], bool], source: str = ""
    ) -> float:
        """Over all questions that every one of the cells has a score of."""
        columns = self.questions[task]
        lists = [cell["tasks"][source or task]["scores"] for cell in cells]
        rows = [
            {name: values[at] for name, values in columns.items()}
            for at in range(min(len(lists[0]), len(columns["picture"])))
        ]
        told = [
            fmean(scores[at] for scores in lists)
            for at, row in enumerate(rows)
            if wanted(row) and all(scores[at] is not None for scores in lists)
        ]
        return 100 * fmean(told)


def tables_in(text: str) -> dict[str, list[dict[str, str]]]:
    """Title -> rows of the page's Markdown tables."""
    found = {}
    for block in text.split("\n## ")[1:]:
        title, _, rest = block.partition("\n")
        lines = [line for line in rest.splitlines() if line.startswith("|")]
        cells = [
            [c.strip().replace("\\|", "|") for c in line.strip("|").split("|")] for line in lines
        ]
        if cells:
            found[title] = [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]
    return found


def first(cell: str) -> float:
    """The number that a cell of a table begins with."""
    return float(re.match(r"[+-]?[0-9.]+", cell)[0])


def check_page(text: str, *folders: Path) -> int:
    """Compute every mean, difference and count of the page again; how many were compared."""
    plain, tables, checked = Plain(*folders), tables_in(text), 0
    signs = lambda row: row["kind"] != "existence"  # noqa: E731
    shown = {"POPE": "pope", "GQA": "gqa", "TextVQA": "textvqa", "MME": "mme"}
    for row in tables["Benchmarks"]:
        cells = plain.of(row["language model"], row["connector"], row["order"], row.get("start", 1))
        assert row["seeds"] == str(len(cells))
        for title, task in shown.items():
            if title not in row:
                continue
            scale = 1 if cells[0]["tasks"][task]["unit"] == "points" else 100
            values = [scale * cell["tasks"][task]["value"] for cell in cells]
            expected = f"{fmean(values):.1f}"
            if len(values) > 1:
                expected += f" ({min(values):.1f} to {max(values):.1f})"
            assert row[title] == expected
            checked += 1
    for column in ("k", "distance"):
        for row in tables[f"Retrieval by {column}"]:
            for header, shown_value in row.items():
                if not header.startswith(f"{column} ") or shown_value == "-":
                    continue
                value = header.removeprefix(f"{column} ")
                order, _, existence = row["order"].partition(", ")
                here = lambda r, c=column, v=value: str(r[c]) == v  # noqa: E731
                if row["language model"] == "a random sign in view":
                    columns = plain.questions["retrieval"]
                    names = (column, "chance_in_view", "kind")
                    pairs = zip(*(columns[name] for name in names), strict=True)
                    chances = [100 * c for v, c, k in pairs if str(v) == value and k != "existence"]
                    expected = fmean(chances)
                elif row["language model"] == "all, without pictures":
                    wanted = lambda r, h=here: h(r) and signs(r)  # noqa: E731
                    expected = plain.mean(plain.cells, "retrieval", wanted, "retrieval_blind")
                else:
                    wanted = lambda r, h=here, e=existence: h(r) and signs(r) != bool(e)  # noqa: E731
                    named = row["language model"], row["connector"], order
                    cells = plain.of(*named, row.get("start", 1))
                    expected = plain.mean(cells, "retrieval", wanted)
                assert first(shown_value) == pytest.approx(expected, abs=0.051)
                checked += 1
    for row in tables["Updates until the picture is used"]:
        cells = plain.of(row["language model"], row["connector"], row["order"], row.get("start", 1))
        begun = [begin_by_hand(cell["training"]["finetune"]["picture_gains"]) for cell in cells]
        assert row["by seed"] == ", ".join("never" if b is None else str(b) for b in begun)
        assert row["never"] == f"{begun.count(None)}/{len(begun)}"
        checked += 2
    for title in ("Language models", "Connectors", "Text pretrainings"):
        checked += check_differences(plain, tables.get(f"{title} compared", []), title)
    crossed = tables.get("Does a connector help one language model more than another?", [])
    checked += check_interactions(plain, crossed)
    for row in tables.get("Text pretraining", []):
        key = row["language model"], int(row.get("start", 1))
        own = next(r for r in plain.texts if (r["family"], r["start"]) == key)
        for lesson, run in own["stages"].items():
            assert row[lesson] == f"{run['loss'][-1][1]:.4f}"
            checked += 1
    for row in tables["Learning rates"]:
        for header, loss in row.items():
            for r in plain.rates:
                of = r["family"] + (f", start {r['start']}" if r["start"] > 1 else "")
                if of == row["language model"] and header == f"{r['rate']:g}":
                    assert loss == ("diverged" if r["loss"] is None else f"{r['loss']:.4f}")
                    checked += 1
    for row in tables["Cost"]:
        cells = plain.of(row["language model"], row["connector"], "usual", row.get("start", 1))
        speed = fmean(cell["training"]["finetune"]["tokens_per_s"] for cell in cells)
        assert row["training tokens/s"] == f"{speed:.0f}"
        assert first(row["questions/s"]) == pytest.approx(
            fmean(cell["questions_per_s"] for cell in cells), abs=0.051
        )
        for header, shown_value in row.items():
            if header.startswith("state KiB"):
                tokens = int(header.split()[-1])
                points = [p for p in cells[0]["cost"]["points"] if p["tokens"] == tokens]
                assert first(shown_value) == pytest.approx(
                    points[0]["state_bytes"] / 1024, rel=1e-2
                )
                checked += 1
    return checked


def begin_by_hand(gains: list) -> int | None:
    """The first update from which on the mean gain stays at the threshold."""
    begun = None
    for step, row in gains:
        if fmean(g for g in row if g is not None) < THRESHOLD:
            begun = None
        elif begun is None:
            begun = step
    return begun


def check_interactions(plain: Plain, rows: list[dict[str, str]]) -> int:
    """What a connector gains over another with one family, minus what with another one."""
    for row in rows:
        named = re.fullmatch(r"\((\S+) - (\S+)\) on (\S+) - on (\S+)", row["comparison"])
        a, b, one, other = named.groups()
        models = [(f, c) for f in (one, other) for c in (a, b)]
        had = [plain.of(*model, "usual", row.get("start", 1)) for model in models]
        seeds = set.intersection(*({cell["seed"] for cell in cells} for cells in had))
        assert row["seeds"] == str(len(seeds))
        task, wanted = part_of(row["outcome"])
        means = [plain.mean([c for c in x if c["seed"] in seeds], task, wanted) for x in had]
        expected = means[0] - means[1] - means[2] + means[3]
        assert first(row["difference"]) == pytest.approx(expected, abs=0.051)
    return len(rows)


PARTS: dict[str, Callable[[dict], bool]] = {
    "retrieval: what is on the sign": lambda r: r["kind"] != "existence",
    "retrieval, k 1 to 4": lambda r: r["kind"] != "existence" and r["k"] <= 4,
    "retrieval, k 8 and 16": lambda r: r["kind"] != "existence" and r["k"] >= 8,
    "existence, same scenes": lambda r: r["kind"] == "existence",
}


def part_of(outcome: str) -> tuple[str, Callable[[dict], bool]]:
    """The task whose questions an outcome is of, and which of them."""
    return "retrieval" if outcome in PARTS else outcome, PARTS.get(outcome, lambda _: True)


def check_differences(plain: Plain, rows: list[dict[str, str]], title: str) -> int:
    """Differences between families over connectors, connectors over families, or two starts."""
    families = list(dict.fromkeys(cell["family"] for cell in plain.cells))
    every = list(dict.fromkeys(cell["connector"] for cell in plain.cells))
    for row in rows:
        if title == "Text pretrainings":
            (a, b), connectors = row["start"].split(" - "), False
            model = (*row["comparison"].split(", "), "usual")
            had = [(plain.of(*model, a), plain.of(*model, b))]
        else:
            (a, b), connectors = row["comparison"].split(" - "), title == "Connectors"
            pairs = (
                [((f, a), (f, b)) for f in families]
                if connectors
                else [((a, c), (b, c)) for c in every]
            )
            start = row.get("start", 1)
            had = [
                (plain.of(*one, "usual", start), plain.of(*other, "usual", start))
                for one, other in pairs
            ]
        had = [(x, y) for x, y in had if x and y]
        if not connectors:
            common = [len({c["seed"] for c in x} & {c["seed"] for c in y}) for x, y in had]
            had = [pair for pair, count in zip(had, common, strict=True) if count == max(common)]
        seeds = set.intersection(*({cell["seed"] for cell in x} for pair in had for x in pair))
        assert row["seeds"] == str(len(seeds))
        task, wanted = part_of(row["outcome"])
        differences = []
        for one, other in had:
            kept = [[cell for cell in x if cell["seed"] in seeds] for x in (one, other)]
            differences.append(
                plain.mean(kept[0], task, wanted) - plain.mean(kept[1], task, wanted)
            )
        assert first(row["difference"]) == pytest.approx(fmean(differences), abs=0.051)
        low, high = (float(end) for end in row["95 % interval"].split(" to "))
        assert low - 0.06 <= first(row["difference"]) <= high + 0.06
        assert float(row["p"].lstrip("<")) <= float(row["p corrected"].lstrip("<")) + 1e-9
    return len(rows)


def test_every_number_of_the_page_follows_from_its_records(tmp_path, monkeypatch):
    kept = write_synthetic(tmp_path / "records")
    file = tmp_path / "STUDY.md"
    assert study.main(["--records", str(kept), "--page", str(file)]) == 0
    text = file.read_text()
    assert check_page(text, kept) > 300
    pictures = {path.name: path.read_bytes() for path in (tmp_path / "study").iterdir()}
    assert sorted(pictures) == ["loss.svg", "pareto.svg", "picture_use.svg", "retrieval.svg"]
    assert all(f"(study/{name})" in text for name in pictures)
    assert study.main(["--records", str(kept), "--page", str(file)]) == 0
    assert file.read_text() == text
    for name, content in pictures.items():
        assert (tmp_path / "study" / name).read_bytes() == content
    rows = {row["prediction"]: row for row in tables_in(text)["Predictions"]}
    found = rows["Attention finds one sign among 8 or 16 better than Mamba."]
    assert found["verdict"] == "held" and found["seeds"] == "1"
    assert rows["Row separators do not matter to Mamba on GQA."]["verdict"] == "not run yet"
    later = rows["Attention needs more updates than Mamba until it uses its picture."]
    assert (later["difference"], later["verdict"]) == ("+10.0", "held")
    sentence = next(line for line in text.splitlines() if "cells are finished" in line)
    assert f"among 8 or 16, attention {found['difference']} points (" in sentence
    hybrid = next(
        row["difference"]
        for row in tables_in(text)["Language models compared"]
        if row["comparison"] == "hybrid - mamba" and row["outcome"] == "retrieval, k 8 and 16"
    )
    assert f"), hybrid {hybrid} points (" in sentence


def test_a_study_begun_anew_stands_beside_the_first(tmp_path):
    """Compared within each; a prediction by the one with most seeds; the same cells between."""
    folders = write_synthetic(tmp_path / "a"), write_begun_anew(tmp_path / "b")
    file = tmp_path / "STUDY.md"
    assert study.main(["--records", *map(str, folders), "--page", str(file)]) == 0
    text = file.read_text()
    assert check_page(text, *folders) > 400
    tables = tables_in(text)
    rows = {row["prediction"]: row for row in tables["Predictions"]}
    found = rows["Attention finds one sign among 8 or 16 better than Mamba."]
    assert (found["start"], found["seeds"]) == ("2", "3")
    assert rows["Mamba-2 finds signs as well as Mamba."]["start"] == "1"
    compared = {
        (row["comparison"], row["start"]): row["seeds"] for row in tables["Connectors compared"]
    }
    assert compared == {
        ("vss_l2 - mlp", "1"): "1",
        ("vss_l2 - mlp", "2"): "2",
        ("msc - mlp", "1"): "1",
    }
    between = tables["Text pretrainings compared"]
    assert {(row["comparison"], row["start"], row["seeds"]) for row in between} == {
        ("mamba, mlp", "2 - 1", "2"),
        ("mamba, vss_l2", "2 - 1", "2"),
        ("attention, mlp", "2 - 1", "1"),
        ("attention, vss_l2", "2 - 1", "1"),
    }
    copies = {row["language model"]: row["copies"] for row in tables["Text pretraining"]}
    assert copies == {"mamba": "1.2500", "attention": "1.5000"}
    assert "From text pretraining 2 signs among 8 or 16 are attention +" in text
    assert "vss_l2 in place of mlp, on mamba and attention, 2 seeds: signs " in text


def test_folders_of_one_start_or_of_other_questions_are_not_compared(tmp_path, capsys):
    one = write_begun_anew(tmp_path / "a")
    again = shutil.copytree(one, tmp_path / "b")
    arguments = ["--records", str(one), str(again), "--page", str(tmp_path / "x.md")]
    assert study.main(arguments) == 2
    assert "started from one text model; they belong in one folder" in capsys.readouterr().err
    other = write_synthetic(tmp_path / "c")
    records.write(one, records.QUESTIONS, {"gqa": {"picture": [0]}})
    arguments[2] = str(other)
    assert study.main(arguments) == 2
    assert "has other questions than" in capsys.readouterr().err
    assert study.main(["--records", str(one), str(other)]) == 2
    assert "only --page takes several" in capsys.readouterr().err


def test_the_sentence_says_where_a_model_reads_no_sign_at_all():
    """Judged by the table's own cells: an only thing's sign against a random one in view."""
    text = (RESULTS / "STUDY.md").read_text()
    rows = {row["language model"]: row for row in reversed(tables_in(text)["Retrieval by k"])}
    chance = float(rows["a random sign in view"]["k 1"])
    mean, high = re.fullmatch(r"(\S+) \[\S+ to (\S+)\]", rows["hybrid"]["k 1"]).groups()
    sentence = next(line for line in text.splitlines() if "cells are finished" in line)
    caveat = f"with one thing it named {mean} %, a random sign in view would be right in {chance}"
    assert (caveat in sentence) == (float(high) < chance)


def test_the_committed_page_is_what_the_committed_records_give(tmp_path):
    folders, file = sorted(RESULTS.glob("runs/study*")), RESULTS / "STUDY.md"
    made = tmp_path / "STUDY.md"
    page.write(records.read(*folders), made)
    assert made.read_text() == file.read_text(), "run `make tables plots`"
    if records.read(*folders).cells:
        assert check_page(file.read_text(), *folders) > 0
        for picture in (tmp_path / "study").iterdir():
            assert picture.read_bytes() == (RESULTS / "study" / picture.name).read_bytes()
        files = [path for folder in folders for path in folder.iterdir()]
        assert sum(path.stat().st_size for path in files) < 10_000_000


def test_a_page_without_a_cell_shows_the_predictions(tmp_path):
    page.write(records.read(tmp_path / "none"), tmp_path / "STUDY.md")
    text = (tmp_path / "STUDY.md").read_text()
    assert "Nothing has been run yet" in text
    assert text.count("not run yet") == len(predictions.PREDICTIONS)
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    ("claim", "margin", "low", "high", "word"),
    [
        ("above", 0.0, 0.01, 0.2, "held"),
        ("above", 0.0, -0.01, 0.2, "undecided"),
        ("above", 0.0, -0.2, -0.01, "failed"),
        ("above", -0.03, -0.02, 0.1, "held"),
        ("within", 0.05, -0.04, 0.04, "held"),
        ("within", 0.05, -0.04, 0.06, "undecided"),
        ("within", 0.05, -0.2, 0.2, "undecided"),
        ("within", 0.05, 0.06, 0.2, "failed"),
        ("within", 0.05, -0.2, -0.06, "failed"),
        ("within", 0.05, 0.0, 0.0, "undecided"),
    ],
)
def test_the_rule(claim, margin, low, high, word):
    assert predictions.judged(claim, margin, low, high) == word


def test_records_are_equal_bytes_and_broken_ones_are_told(tmp_path):
    cell = synthetic_cell("mamba", "mlp", 0)
    one = records.write(tmp_path, "a", cell).read_bytes()
    assert records.write(tmp_path, "a", cell).read_bytes() == one
    assert records.read(tmp_path).cells == {"a": cell | {"start": 1}}
    (tmp_path / "a.json.gz").write_bytes(one[:-20])
    with pytest.raises(UserError, match="is no record of a study"):
        records.read(tmp_path)


@pytest.mark.parametrize("whole_family", [False, True])
def test_cells_that_were_asked_other_questions_are_not_compared(whole_family, tmp_path, capsys):
    """One seed's, or all of the one model and none of the other."""
    kept = write_synthetic(tmp_path / "records")
    for seed in (0, 1) if whole_family else (1,):
        for connector in ("mlp", "vss_l2") if whole_family else ("mlp",):
            other = synthetic_cell("mamba", connector, seed)
            other["tasks"]["retrieval"]["digest"] = "another"
            records.write(kept, f"mamba+{connector}+s{seed}", other)
    assert study.main(["--records", str(kept), "--page", str(tmp_path / "x.md")]) == 2
    assert "were not asked the same questions of retrieval" in capsys.readouterr().err


# --- the plan and its data


def test_scores_are_those_that_the_metric_covers():
    """ScienceQA's counts questions with a picture alone, whatever else was asked."""
    kept = records.read(*sorted(RESULTS.glob("runs/study*")))
    for name, cell in kept.cells.items():
        for task in ("scienceqa", "gqa", "textvqa", "vqav2"):
            found = cell["tasks"][task]
            told = [score for score in found["scores"] if score is not None]
            assert found["n"] == len(told), (name, task)
            assert found["value"] == pytest.approx(fmean(told), abs=1e-4), (name, task)


def sample(picture: str | list[str] | None, text: str) -> dict:
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "yes"}]
    return ({"image": picture} if picture else {}) | {"id": text, "conversations": turns}


def test_no_picture_is_in_training_and_held_out(tmp_path):
    samples = [sample(f"{n // 2}.png", f"q{n}") for n in range(40)] + [sample(None, "text")]
    samples.append(sample(["0.png", "99.png"], "two"))
    left, aside = data.split(samples, 5)
    assert len(aside) == 5
    taken = {picture for one in aside for picture in data.pictures(one)}
    assert not any(taken & set(data.pictures(one)) for one in left)
    assert samples[40] in left
    with pytest.raises(UserError, match="too few to put 5 of them aside"):
        data.split(samples[:3], 5)


def test_ocr_tokens_move_before_their_question():
    asked = "<image>\nWhat does it say?\nReference OCR token: cafe\nAnswer shortly."
    moved = data.ocr_first(sample("a.png", asked))["conversations"][0]["value"]
    assert moved == "<image>\nReference OCR token: cafe\nWhat does it say?\nAnswer shortly."
    plain = sample("a.png", "<image>\nIs it?")
    assert data.ocr_first(plain) == plain


def test_what_a_job_does_is_the_same_in_every_folder():
    found = set()
    for out in ("out", "data", "runs/study", "/tmp/a b"):
        made = plan.Study(SCALES["demo"], Path(out), Path(out) / "pictures", 1)
        jobs_ = [j for p in PHASES for j in plan.phase_jobs(made, p, dict.fromkeys(FAMILIES, 1e-3))]
        found.add(tuple(plan.fingerprint(made, job) for job in jobs_))
    assert len(found) == 1


def test_a_refused_text_model_leaves_the_record_of_the_one_before(tmp_path, monkeypatch):
    """Cells are on record, and the text was trained again elsewhere: to other weights."""
    kept, made = tmp_path / "kept", plan.Study(SCALES["demo"], tmp_path, tmp_path / "d", 1)
    records.write(kept, "text+mamba", {"kind": "text", "family": "mamba", "weights": "a"})
    cell = synthetic_cell("mamba", "mlp", 0) | {"started_from": "a"}
    records.write(kept, "mamba+mlp+s0", cell)
    plan.text_model(made, "mamba").mkdir(parents=True)
    before = {file: file.read_bytes() for file in kept.iterdir()}
    job = plan.text_job(made, made.chosen_families[0])
    with pytest.raises(UserError, match="started from another text model"):
        study._keep(made, "text", job, 0, kept)
    assert {file: file.read_bytes() for file in kept.iterdir()} == before


def test_a_loss_that_is_no_number_is_a_rate_that_diverged(tmp_path):
    made = plan.Study(SCALES["demo"], tmp_path, tmp_path / "data", 1)
    job = plan.rate_job(made, made.chosen_families[0], SCALES["demo"].rates[0])
    job.folder.mkdir(parents=True)
    (job.folder / "loss.json").write_text('{"loss": NaN}')
    assert plan.rate_loss(job) == float("inf")


def test_the_plan_has_whole_comparisons_first():
    made = plan.Study(SCALES["demo"], Path("out"), Path("data"), 3)
    cells = plan.cells(made)
    assert len(cells) == 36 + 12 == len({cell.name for cell in cells})
    connectors = ["mlp"] * 12 + ["vss_l2"] * 12 + ["msc"] * 12
    assert [cell.connector for cell in cells[:36]] == connectors
    assert [cell.seed for cell in cells[:12]] == [0] * 4 + [1] * 4 + [2] * 4
    assert {cell.order for cell in cells[:36]} == {""}
    assert {cell.order for cell in cells[36:]} == {order.name for order in design.ORDERS}
    jobs_ = [len(plan.phase_jobs(made, phase, dict.fromkeys(FAMILIES, 1e-3))) for phase in PHASES]
    assert jobs_ == [1, 4, 12, 48]


def test_lessons_follow_each_other_at_the_familys_pace():
    made = plan.Study(SCALES["demo"], Path("out"), Path("data"), 3)
    rates, before = {}, {}
    for family in SCALES["demo"].families:
        for step in plan.text_job(made, family).steps:
            flags = dict(zip(step.arguments, step.arguments[1:], strict=False))
            rates.setdefault(family.name, []).append(float(flags["--lr"]))
            assert flags.get("--init") == before.get(family.name)
            before[family.name] = str(step.done)
    full = [lesson.rate for lesson in SCALES["demo"].lessons]
    assert rates["mamba"] == rates["mamba2"] == rates["hybrid"] == full
    assert rates["attention"] == pytest.approx([rate / 3 for rate in full], rel=1e-3)


PHASES = plan.PHASES
FAMILIES = [family.name for family in SCALES["demo"].families]


@pytest.mark.parametrize("family", SCALES["demo"].families, ids=lambda family: family.name)
def test_language_models_have_equal_parameters_and_connectors(family):
    from vlmamba.config import VLMambaConfig
    from vlmamba.models.assemble import hollow
    from vlmamba.training.arguments import RunArguments
    from vlmamba.training.plan import resolve

    flags = family.arguments("vss_l2", "efficientnet-lite0")
    config = resolve(*RunArguments.parse([*flags, "--stage", "finetune"], None)).config
    usual = VLMambaConfig.preset("nano+vss_l2")
    sizes = [
        [sum(p.numel() for p in part.parameters()) for part in (m.language_model, m.connector)]
        for m in (hollow(config), hollow(usual))
    ]
    assert sizes[0][0] == pytest.approx(sizes[1][0], rel=0.03)
    assert sizes[0][1] == sizes[1][1]
    assert config.connector_layer_config(256).mixer == "mamba"


def test_the_plan_tells_hours_and_what_is_finished(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(study.hours, "probe", lambda: 1 / 5000)
    command = ["--plan", "--out", str(tmp_path / "out"), "--workers", "2"]
    assert study.main(command) == 0
    shown = capsys.readouterr().out
    assert "65 jobs, 65 left: about" in shown
    assert "with 2 jobs at a time" in shown
    assert not (tmp_path / "out").exists()
    asked = [*command, "--families", "mamba,attention", "--connectors", "mlp", "--seeds", "2"]
    assert study.main(asked) == 0
    shown = capsys.readouterr().out
    assert "19 jobs, 19 left" in shown  # data, 2 texts, 6 rates, 4 cells, 6 orders


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scale", "dmo"], "unknown scale 'dmo'; known, nearest first: demo"),
        (["--families", "mamba3"], "unknown language model 'mamba3'"),
        (["--connectors", "mpl"], "unknown connector 'mpl'; known, nearest first: mlp"),
        (["--workers", "0"], "--workers is 0; expected at least 1"),
        (["--scale", "paper"], "--scale paper needs --data FOLDER with LLaVA's pretrain.json"),
        (["--train-args", "'"], '--train-args "\'": No closing quotation'),
    ],
)
def test_a_mistake_is_one_line(arguments, message, capsys, tmp_path):
    assert study.main([*arguments, "--out", str(tmp_path / "never")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "never").exists()


# --- a small study for real

SMALL = replace(
    SCALES["quick"],
    families=SCALES["demo"].families[:1],
    connectors=("mlp",),
    order_families=(),
    lessons=(
        Lesson("words", ("text.txt", "facts.txt"), Stage(1, 2, ("--max-length", "32")), 2e-3),
        Lesson("near", ("recall-1.txt",), Stage(1, 2, ("--max-length", "32")), 1e-3),
        Lesson("talk", ("dialogue.json",), Stage(1, 2), 1e-3),
    ),
    pretrain=Stage(1, 2),
    finetune=Stage(2, 2),
    rate_pretrain=Stage(1, 2),
    rate_finetune=Stage(1, 2),
    look_every=1,
    held_out=3,
    limit=4,
    retrieval=20,
    blind=4,
    tasks="pope",
    state_lengths=(8, 16),
)


def in_this_process(done: list[str], module: str, arguments: list[str], log: Path | None) -> int:
    """A command without the seconds that a new process takes to load torch."""
    from accelerate.state import AcceleratorState

    from vlmamba import train

    done.append(module)
    commands = {"vlmamba.train": train.main, "harness.run": harness_run.main}
    commands |= {module.__name__: module.main for module in (cost, data, rate)}
    try:
        return commands[module](list(arguments)) or 0
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def world(tmp_path) -> Path:
    """What vlmamba.demo draws, a few samples of it."""
    from PIL import Image

    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(12):
        Image.new("RGB", (40, 40), (20 * number, 90, 10)).save(folder / f"{number}.png")
    asked = [sample(f"{n}.png", f"<image>\nIs it {n}?") for n in range(12)]
    told = [sample(None, f"Is it {n}?") for n in range(12)]
    for name, samples in {"pretrain": asked, "finetune": asked, "dialogue": told}.items():
        (folder / f"{name}.json").write_text(json.dumps(samples))
    for name in ("text", "facts", "recall-1"):
        (folder / f"{name}.txt").write_text("a dog is an animal that barks at night\n" * 20)
    return folder


def test_a_small_study_for_real(world, tmp_path, monkeypatch, capsys):
    """Data, text, rates and cells; an interruption; the same command goes on; the page."""
    from vlmamba.generation import GroupedGenerator

    generate = GroupedGenerator.generate
    short = lambda self, asked, longest, *rest: generate(self, asked, min(longest, 2), *rest)  # noqa: E731
    monkeypatch.setattr(GroupedGenerator, "generate", short)
    monkeypatch.setitem(SCALES, "quick", SMALL)
    ran: list[str] = []
    monkeypatch.setattr(jobs, "execute", functools.partial(in_this_process, ran))
    small = "--tiny --cpu --dtype fp32 --micro-batch 2"
    command = ["--scale", "quick", "--out", str(tmp_path / "out"), "--data", str(world)]
    command += ["--train-args", small]
    real = cost.main
    monkeypatch.setattr(cost, "main", lambda argv: 3)
    assert study.main(command) == 2
    assert "harness.controlled.cost" in capsys.readouterr().err
    kept = tmp_path / "out" / "records"
    assert not list(kept.glob("*+s0.json.gz")) and len(list(kept.glob("rate+*"))) == 2
    monkeypatch.setattr(cost, "main", real)
    ran.clear()
    assert study.main(command) == 0
    assert ran == ["harness.controlled.cost"]
    found = records.read(kept)
    assert list(found.cells) == ["mamba+mlp+s0"]
    assert list(found.texts) == ["text+mamba"]
    assert list(found.texts["text+mamba"]["stages"]) == ["words", "near", "talk"]
    cell = found.cells["mamba+mlp+s0"]
    gains = cell["training"]["finetune"]["picture_gains"]
    assert [(step, len(row)) for step, row in gains] == [(1, 3), (2, 3)]
    assert set(found.questions["retrieval"]["kind"]) == {"word", "color", "existence"}
    assert {len(cell["tasks"]["retrieval"]["scores"]), cell["tasks"]["pope"]["n"]} == {20, 4}
    states = [point["state_bytes"] for point in cell["cost"]["points"]]
    assert states[0] == states[1] > 0
    rates = {r["rate"]: r["loss"] for r in found.rates.values() if r["family"] == cell["family"]}
    assert rates[cell["hyperparameters"]["lr"]] == min(rates.values())
    text = (tmp_path / "out" / "STUDY.md").read_text()
    assert "**1 cell is finished.**" in text
    assert check_page(text, kept) > 20
    ran.clear()
    assert study.main(command) == 0
    assert ran == []
    assert not list((tmp_path / "out").rglob("checkpoints"))

    elsewhere = [*command, "--records", str(kept.rename(tmp_path / "kept")), "--seeds", "2"]
    shutil.rmtree(tmp_path / "out")
    assert study.main([*elsewhere, "--plan"]) == 0
    told = capsys.readouterr().out
    assert "6 jobs, 3 left" in told  # data, the text and the second seed
    assert "Text models of recorded cells are not in" in told and ": mamba. Trained" in told
    assert study.main(elsewhere) == 0
    assert ran.count("harness.controlled.rate") == 0 and ran.count("harness.run") == 3
    again = records.read(tmp_path / "kept")
    assert again.cells.pop("mamba+mlp+s1")["seed"] == 1
    assert again.cells == found.cells and again.rates == found.rates

    cell = again.cells["mamba+mlp+s0"] | {"started_from": "another"}
    records.write(tmp_path / "kept", "mamba+mlp+s0", cell)
    assert study.main(elsewhere) == 0  # nothing is left
    assert study.main([*elsewhere, "--plan"]) == 0
    assert "Text models of recorded cells" not in capsys.readouterr().out
    assert study.main([*elsewhere[:-1], "3"]) == 2
    assert "started from another text model" in capsys.readouterr().err
    assert again.texts["text+mamba"]["weights"] == found.texts["text+mamba"]["weights"]
    assert again.cells["mamba+mlp+s0"]["started_from"] == again.texts["text+mamba"]["weights"]
    shutil.rmtree(tmp_path / "out")
    recorded = records.read(tmp_path / "kept").cells
    moved = {"data": {"pretrain": ["another"]}}
    moved["started_from"] = recorded["mamba+mlp+s1"]["started_from"]
    for name, cell in recorded.items():
        records.write(tmp_path / "kept", name, cell | moved)
    assert study.main([*elsewhere[:-1], "3"]) == 2
    assert "learned from another pretrain.json than" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "out")
    other = [*elsewhere[:-1], "3", "--train-args", f"{small} --lora 2"]
    assert study.main(other) == 2
    assert not (tmp_path / "out" / "text").exists()
    assert "was made with other settings" in capsys.readouterr().err


def test_a_labs_commands_are_whole(world, tmp_path, capsys):
    """Every vlmamba.train of the paper's scale makes an update with shrunk models."""
    from vlmamba import train

    out = tmp_path / "out"
    command = ["--scale", "paper", "--data", str(world), "--out", str(out)]
    assert study.main(command) == 0
    script = (out / "commands.sh").read_text()
    assert "run the same" not in script and "# the cells follow" in script
    lines = [shlex.split(line) for line in script.splitlines() if line.startswith("python -m ")]
    assert sum(line[2] == "harness.controlled.data" for line in lines) == 1
    assert sum(line[2] == "harness.controlled.rate" for line in lines) == 9
    made = plan.Study(SCALES["paper"], out, world, 1)
    for family in made.chosen_families:
        for tried in SCALES["paper"].rates:
            folder = plan.rate_job(made, family, tried).folder
            folder.mkdir(parents=True)
            (folder / "loss.json").write_text(json.dumps({"loss": abs(tried - 2e-5)}))
    (out / "data").mkdir()
    assert data.main(["--data", str(world), "--out", str(out / "data"), "--held-out", "3"]) == 0
    assert study.main([*command, "--seeds", "1"]) == 0
    assert "18 jobs are left" in capsys.readouterr().out  # 9 cells, 9 orders
    script = (out / "commands.sh").read_text()
    assert "--lr 2e-05" in script and "--eval-data" in script
    lines = [shlex.split(line) for line in script.splitlines() if line.startswith("python -m ")]
    training = [line[3:] for line in lines if line[2] == "vlmamba.train"]
    assert len(training) == 36
    for arguments in training[::9]:
        flags = drop(arguments, "--out", "--init", "--eval-every")
        small = [
            "--tiny",
            "--cpu",
            "--dtype=fp32",
            "--dry-run",
            "--batch-size=2",
            "--micro-batch=2",
        ]
        assert train.main([*flags, *small]) in (0, None)


def test_a_labs_finished_study_is_kept_and_gets_its_page(world, tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(study, "commands", lambda *_: ("#!/bin/bash\n", 0))
    monkeypatch.setattr(study, "run", lambda *arguments: ran.append(arguments))
    out = tmp_path / "out"
    assert study.main(["--scale", "paper", "--data", str(world), "--out", str(out)]) == 0
    assert len(ran) == 1 and (out / "STUDY.md").is_file()


def drop(arguments: list[str], *names: str) -> list[str]:
    """Flags without some of them and their values."""
    at = [place for place, word in enumerate(arguments) if word in names]
    return [w for place, w in enumerate(arguments) if place not in at and place - 1 not in at]


def test_what_a_cluster_had_finished_is_kept_under_its_own_name(tmp_path, monkeypatch):
    """Its finished jobs come before the others, and every record is of its own cell."""
    pytest.importorskip("submitit")
    made = plan.Study(SCALES["demo"], tmp_path, tmp_path / "pictures", 1)

    def execute(module: str, arguments: list[str], log: Path | None = None) -> int:
        if module == "harness.controlled.rate":
            out = Path(arguments[arguments.index("--out") + 1])
            rate_ = float(arguments[arguments.index("--lr") + 1])
            out.write_text(json.dumps({"loss": None if rate_ > 2e-3 else rate_}))
        return 0

    monkeypatch.setattr(jobs, "execute", execute)
    monkeypatch.setattr(plan, "PHASES", ("rates",))
    last = plan.phase_jobs(made, "rates", {})[-2]
    last.run()
    study.run(made, 1, Launcher("debug", tmp_path / "jobs"), tmp_path / "kept")
    kept = records.read(tmp_path / "kept").rates
    assert len(kept) == 12
    for name, record in kept.items():
        assert name == f"rate+{record['family']}+{record['rate']:g}"
        assert record["loss"] == (None if record["rate"] > 2e-3 else record["rate"])


def test_the_cost_of_a_model_with_few_words():
    config = VLMambaConfig(d_model=16, n_layer=2, vocab_size=64)
    found = cost.measure(VLMambaForConditionalGeneration(config).eval(), [4, 8])
    assert [point["tokens"] for point in found["points"]] == [4, 8]
