"""Shared by the benchmarks' tests: stored cases of official evaluators, lmms-eval's settings."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

CASES = Path(__file__).parent / "cases"


@dataclass
class OfficialCases:
    """Rows with the per-case score and reading, and the metrics, that official code gave."""

    rows: list[dict]
    metrics: dict[str, float]

    @property
    def docs(self) -> list[dict]:
        return [row["doc"] for row in self.rows]

    @property
    def predictions(self) -> list[str]:
        return [row["prediction"] for row in self.rows]

    def check(self, task) -> None:
        """Assert that `task` under `paper` equals the official values, to 1e-9.

        The official scripts read these answers as they are, so the cases are made without
        `evaluate`, which strips an answer first, as the scripts that write answers do.
        """
        assert len(set(self.predictions)) >= 100
        assert not task.exclude(self.docs, "paper")
        cases = [task.score_case(row["doc"], row["prediction"], "paper") for row in self.rows]
        for row, case in zip(self.rows, cases, strict=True):
            assert case.score == pytest.approx(row["score"], abs=1e-9), row
            assert case.parsed == row["parsed"], row
        metrics = task.aggregate(self.docs, cases, "paper")
        for name, value in self.metrics.items():
            assert metrics[name] == pytest.approx(value, abs=1e-9), name


@pytest.fixture(scope="session")
def official_cases():
    """name -> OfficialCases, from cases/NAME.json."""

    def read(name: str) -> OfficialCases:
        return OfficialCases(**json.loads((CASES / f"{name}.json").read_text()))

    return read


class _TaskFile(yaml.SafeLoader):
    """Reads an lmms-eval task file and leaves its functions out."""


_TaskFile.add_constructor("!function", lambda loader, node: None)


@pytest.fixture(scope="session")
def lmms_kwargs():
    """(folder, file) -> the default `lmms_eval_specific_kwargs` of lmms-eval's own task file."""

    def read(folder: str, file: str | None = None) -> dict:
        import lmms_eval.tasks

        path = Path(lmms_eval.tasks.__file__).parent / folder / (file or f"{folder}.yaml")
        return yaml.load(path.read_text(), Loader=_TaskFile)["lmms_eval_specific_kwargs"]["default"]

    return read
