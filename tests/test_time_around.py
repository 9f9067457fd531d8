"""What an evaluation costs outside the model, by the tool that measures it."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from vlmamba.configs.presets import VISION_ENCODERS

TOOL = Path(__file__).parents[1] / "tools" / "time_around.py"
_spec = importlib.util.spec_from_file_location("time_around", TOOL)
time_around = sys.modules["time_around"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(time_around)


def measured(images: int, capsys) -> dict:
    """The last line of the tool."""
    assert time_around.main(["--images", str(images)]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_every_part_of_a_run_is_told_apart(capsys):
    found = measured(2, capsys)
    parts = found["ms_per_question"]
    assert found["questions"] == 36 and found["images"] == 2
    told = ("rows", "decode_pictures", "resize", "journal", "scoring", "files", "lmms_eval_check")
    assert all(parts[part] > 0 for part in told)
    assert sum(parts.values()) == pytest.approx(found["outside_ms_per_question"], rel=0.01)
    assert found["resize_ms_by_encoder"].keys() == VISION_ENCODERS.keys()


def test_the_meter_takes_inner_calls_from_outer_ones():
    meter = time_around.Meter()

    def work() -> None:
        end = time_around.time.process_time() + 0.02
        while time_around.time.process_time() < end:
            pass

    inner = meter.around("inner", work)
    meter.around("outer", inner)()
    assert meter.seconds["inner"] >= 0.02 > 0.01 > meter.seconds["outer"]


@pytest.mark.soak
def test_a_question_costs_little_besides_the_model(capsys):
    """Twice what is aimed at: 2 ms a question, 5 ms an image, of processor time."""
    found = measured(500, capsys)
    assert found["outside_ms_per_question"] < 4
    assert found["pictures_ms_per_image"] < 10
