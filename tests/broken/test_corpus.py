"""How many broken and odd inputs there are, by family; none of them is stored as a file."""

from __future__ import annotations

from pathlib import Path

import pictures
import test_broken_arguments as arguments
import test_broken_checkpoints as checkpoints
import test_broken_data as data
import test_broken_predictions as predictions
import test_broken_runs as runs
import test_broken_training as training

FAMILIES = {
    "images": [pictures.ODD, pictures.BROKEN],
    "data files": [data.REFUSED, data.READ, data.LEFT_OUT],
    "prediction files": [predictions.REFUSED, predictions.ODD],
    "training data": [training.RECORDS, training.FILES, training.RECIPES, training.STATES],
    "checkpoints": [checkpoints.REFUSED, checkpoints.LANGUAGE_MODELS],
    "run folders": [runs.EVALUATIONS, runs.ANSWERS, runs.PROFILES, runs.ABLATIONS, runs.ARGUMENTS],
    "arguments": [arguments.LINES, training.FLAGS],
}


def test_every_family_has_dozens_of_cases():
    sizes = {name: sum(map(len, tables)) for name, tables in FAMILIES.items()}
    assert min(sizes.values()) >= 50, sizes
    assert sum(sizes.values()) >= 500, sizes


def test_they_are_made_by_code():
    assert {path.suffix for path in Path(__file__).parent.iterdir() if path.is_file()} == {".py"}
