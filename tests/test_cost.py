"""The cost of a model under evaluation: the same figures for each kind."""

from __future__ import annotations

import json
import time

import pytest
import tiny_vlms
from PIL import Image
from test_eval_models import Counting

from harness import run
from harness.models.base import Limits, Picture, Request
from harness.models.cost import measure
from harness.models.transformers import TransformersModel
from harness.models.vlmamba import VLMambaModel
from vlmamba_core.errors import UserError

PICTURE = Picture("k", lambda: Image.new("RGB", (60, 40), (9, 99, 200)))
REQUEST = Request("t", 0, "Is there a dog?", (PICTURE,), Limits(1))


class Timed(Counting):
    """Takes 20 ms to start and 1 ms a token."""

    parameters = 7

    def generate_tokens(self, request: Request, new_tokens: int) -> int:
        self.asked.append(str(new_tokens))
        time.sleep(0.02 + 0.001 * new_tokens)
        return new_tokens


def test_what_is_measured():
    model = Timed()
    cost = measure(model, REQUEST, new_tokens=50, repeats=3)
    assert model.asked == ["2", *["1", "50"] * 3]
    assert (cost.parameters, cost.new_tokens, cost.peak_mem_bytes) == (7, 50, None)
    assert 0.02 < cost.first_token_s < cost.total_s
    assert cost.tokens_per_s == pytest.approx(50 / cost.total_s)
    assert cost.total_s_spread[0] <= cost.total_s <= cost.total_s_spread[1]
    json.dumps(cost.record())


def test_models_make_all_tokens_past_their_end(tmp_path):
    hf = TransformersModel(str(tiny_vlms.save("llava", tmp_path)), agreement=0)
    made = []
    for model in (hf, VLMambaModel("nano")):
        calls: list[int] = []
        model.model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        cost = measure(model, REQUEST, new_tokens=12, repeats=1)
        made.append((cost.new_tokens, len(calls)))
        assert cost.peak_mem_bytes > 1000 and cost.parameters == model.parameters
    assert made == [(12, 2 + 1 + 12)] * 2


def test_a_model_without_a_way_is_one_line():
    with pytest.raises(UserError, match="cost of counting cannot be measured"):
        measure(Counting(), REQUEST)


def test_the_record_has_it(tmp_path, capsys):
    folder = tiny_vlms.save("llava", tmp_path / "model")
    command = ["--tasks", "pope", "--limit", "4", "--model", f"hf:{folder}", "--cost"]
    assert run.main([*command, "--out", str(tmp_path / "out")]) == 0
    cost = json.loads((tmp_path / "out" / "record.json").read_text())["cost"]
    assert cost["new_tokens"] == 256 and cost["tokens_per_s"] > 0
    assert cost["questions_per_s"] > 0 and cost["parameters"] > 0
    assert "256 new tokens" in capsys.readouterr().out
