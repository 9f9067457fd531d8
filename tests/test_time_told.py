"""What `harness.run` tells of time: a forecast after the first batch, and where it went."""

from __future__ import annotations

import json
import re
import time

import pytest
import tiny_vlms
from PIL import Image
from test_api_models import Server, said

from harness import run
from harness.models.base import EvalModel, Limits, Picture, Request
from harness.models.resumable import Forecast, Resumable, duration
from harness.runs.evaluation import say_where_the_time_went
from vlmamba import checkpoints, generation
from vlmamba_core.folder import AnswerJournal


def test_a_forecast_is_said_once_after_the_first_batch_of_new_answers(monkeypatch):
    now, said = [100.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    forecast = Forecast(100, 4, said.append)
    for _ in range(20):
        forecast.done()  # kept from an earlier run
    forecast.start()
    for second in range(10):
        now[0] += 2.0
        forecast.start()  # more pictures: the clock goes on
        forecast.answered()
        forecast.done()
        assert bool(said) == (second >= 3)
    assert said == ["about 3 min for 76 more questions"]  # 76 at 2 s each: 152 s


def test_a_forecast_of_nothing_left_is_not_said():
    said = []
    forecast = Forecast(2, 2, said.append)
    forecast.start()
    for _ in range(2):
        forecast.answered()
        forecast.done()
    assert said == []


def test_durations_as_a_person_says_them():
    told = [duration(s) for s in (0.01, 42.4, 99.0, 100.0, 3540.0, 6000.0, 12000.0)]
    assert told == ["1 s", "42 s", "99 s", "2 min", "59 min", "1 h 40 min", "3 h 20 min"]


class Slow(EvalModel):
    """Tells of one part of its time."""

    name, batch_size = "slow", 2

    def __init__(self) -> None:
        self.seconds = {"decode": 5.0}  # of what was asked before

    def provenance(self):
        return {}

    def answer(self, requests, limits, batch_size, on_done):
        for index, _ in enumerate(requests):
            self.seconds["decode"] += 0.25
            on_done(index, "yes")


def test_seconds_of_parts_are_those_of_this_run(tmp_path):
    image = Image.new("RGB", (4, 4))
    requests = [
        Request("pope", row, "?", (Picture("k", lambda: image),), Limits(4)) for row in range(6)
    ]
    model = Resumable(Slow(), AnswerJournal(tmp_path))
    model.answer(requests)
    assert model.timing["decode_s"] == 1.5
    again = Resumable(Slow(), AnswerJournal(tmp_path))
    again.answer(requests)
    assert again.timing["decode_s"] == 0.0 and again.timing["resumed_answers"] == 6


def test_the_generators_parts_add_up_to_less_than_its_time():
    model, processor = checkpoints.load("nano")
    generator = generation.GroupedGenerator(model, processor)
    prompt = processor.conversation_prompt("Is there a dog?", 1)
    question = generation.Request(prompt, "a", Image.new("RGB", (64, 48), "red"))
    started = time.perf_counter()
    generator.generate([question], 4)
    whole = time.perf_counter() - started
    assert set(generator.seconds) == {"encode", "prefill", "decode"}
    assert all(seconds > 0 for seconds in generator.seconds.values())
    assert sum(generator.seconds.values()) <= whole


def test_a_run_ends_with_where_its_time_went(tmp_path, capsys):
    arguments = ["--tasks", "pope", "--limit", "6", "--batch-size", "2", "--out", str(tmp_path)]
    assert run.main(arguments) == 0
    shown = capsys.readouterr()
    found = re.search(
        r"^([\d.]+) questions/s; decoding images ([\d.]+) s, encode ([\d.]+) s, "
        r"prefill ([\d.]+) s, decode ([\d.]+) s, "
        r"other answering ([\d.]+) s, scoring ([\d.]+) s, loading ([\d.]+) s$",
        shown.out,
        re.MULTILINE,
    )
    assert found, shown.out
    timing = json.loads((tmp_path / "record.json").read_text())["timing"]
    assert abs(sum(map(float, found.groups()[1:])) - timing["total_s"]) < 0.5  # rounded to 0.1
    assert re.search(r"about \d+ s for \d more question", shown.err)


def seconds_said(text: str) -> dict[str, float]:
    """The last line of a run: seconds by what they were spent on."""
    [line] = re.findall(r"^[\d.]+ questions/s; (.*)$", text, re.MULTILINE)
    parts = (part.removesuffix(" s").rpartition(" ") for part in line.split(", "))
    return {what: float(spent) for what, _, spent in parts}


PART_OF_HF = ["processor", "encode and prefill", "decode"]


@pytest.mark.parametrize(("family", "alone"), [("llava", ["some also alone"]), ("paligemma", [])])
def test_a_library_models_time_is_parted_as_far_as_it_tells(family, alone, tmp_path, capsys):
    """paligemma is answered one by one: generate()'s first token parts reading from decoding."""
    folder = tiny_vlms.save(family, tmp_path / "vlm")
    arguments = ["--tasks", "pope", "--limit", "6", "--model", f"hf:{folder}"]
    assert run.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    told = ["decoding images", *PART_OF_HF, "other answering", *alone, "scoring", "loading"]
    assert list(seconds_said(capsys.readouterr().out)) == told
    timing = json.loads((tmp_path / "out" / "record.json").read_text())["timing"]
    parts = [timing[f"{part}_s"] for part in ("processor", "encode_prefill", "decode")]
    assert all(seconds > 0 for seconds in parts)
    assert sum(parts) <= timing["generate_s"] - timing["decode_images_s"]


def test_of_a_model_behind_a_server_all_its_time_is_told(tmp_path, capsys):
    server = Server()

    def reply(body, number):
        time.sleep(0.2)
        return said("Yes")

    server.reply = reply
    try:
        model = f"api:{server.url},model=m,concurrency=1"
        arguments = ["--tasks", "pope", "--limit", "3", "--model", model]
        assert run.main([*arguments, "--out", str(tmp_path)]) == 0
    finally:
        server.http.shutdown()
        server.http.server_close()
    assert 0.6 <= seconds_said(capsys.readouterr().out)["model"] < 2
    timing = json.loads((tmp_path / "record.json").read_text())["timing"]
    assert timing["model_s"] <= timing["generate_s"]


def test_what_this_process_does_with_an_answer_is_not_the_models_time(tmp_path):
    class Quick(EvalModel):
        name = "quick"

        def provenance(self):
            return {}

        def answer(self, requests, limits, batch_size, on_done):
            for index, _ in enumerate(requests):
                on_done(index, "yes")

    class Journal(AnswerJournal):
        def add(self, key, value):
            time.sleep(0.05)

    image = Image.new("RGB", (4, 4))
    requests = [
        Request("pope", row, "?", (Picture("k", lambda: image),), Limits(4)) for row in range(6)
    ]
    model = Resumable(Quick(), Journal(tmp_path))
    model.answer(requests)
    assert model.timing["generate_s"] >= 0.3 > 5 * model.timing["model_s"]
    line = say_where_the_time_went(model.timing | {"total_s": model.timing["generate_s"]})
    assert "model 0.0 s, other answering 0.3 s" in line
