"""What record.json and samples_TASK.jsonl must hold before anything is made of them.

    check_record(record, path)      # of a known kind
    check_samples(samples, path)

A record may come from somebody else, or be cut, or edited: what does not fit is named here, once,
so that tables, plots and reports need not doubt it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.runs.schema import Sample
from harness.speed.sweep.points import Row
from vlmamba_core.errors import UserError

TASK_NAME = re.compile(r"\w[\w.-]*")  # it becomes part of a file's name
CHOICES = ("style", "split", "data_id", "data_revision")
SERIES = ("prefill_s", "ttft_s", "decode_s")
AMOUNTS = (
    *("decode_tok_per_s", "state_bytes", "loaded_mem_bytes", "peak_mem_bytes"),
    *("decode_peak_mem_bytes", "weight_bytes", "prefill_flops"),
)
TOO_LARGE = 2**63  # no array holds such an integer, and no amount here comes near
RATES = ("copy_bytes_per_s", "read_bytes_per_s", "gemm_flops_per_s")


def check_record(record: Mapping[str, Any], file: Path) -> None:
    """Raise UserError naming what is missing or of a wrong kind in a record."""
    checks = {"evaluation": _evaluation, "profile": _profile, "ablation": _ablation}
    try:
        _need(_is_text(record.get("label"), True), "label")
        checks[record["kind"]](record)
    except (_Wrong, KeyError) as error:
        what = str(error.args[0])
        raise UserError(f"{file} is not a whole record: {what} is missing or wrong") from error


def check_samples(samples: Sequence[Sample], file: Path) -> None:
    """Raise UserError naming the first answer that is of a wrong kind or comes twice."""
    seen: set[int] = set()
    for number, sample in enumerate(samples, 1):
        texts = (sample.prediction, sample.parsed, sample.image, sample.excluded)
        fits = _is_count(sample.doc_id) and _is_text(sample.question)
        fits = fits and all(_is_text(text, True) for text in texts)
        if not fits or not (sample.score is None or _is_number(sample.score)):
            raise UserError(f"{file} line {number} is not an answer of harness.run")
        if sample.doc_id in seen:
            raise UserError(f"{file} line {number}: row {sample.doc_id + 1} comes twice")
        seen.add(sample.doc_id)


class _Wrong(Exception):
    """The name of an entry that does not fit."""


def _need(fits: bool, name: str) -> None:
    if not fits:
        raise _Wrong(name)


def _is_text(value: Any, or_none: bool = False) -> bool:
    return isinstance(value, str) or (or_none and value is None)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < TOO_LARGE


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < TOO_LARGE


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _mapping(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    _need(isinstance(record.get(name), Mapping), name)
    return record[name]


def _evaluation(record: Mapping[str, Any]) -> None:
    arguments = _mapping(record, "arguments")
    _need(_is_text(record.get("protocol")), "protocol")
    for name in ("model", "data"):
        _need(_is_text(arguments.get(name)), f"arguments.{name}")
    for name in CHOICES:
        _need(_is_text(arguments.get(name), True), f"arguments.{name}")
    config = _mapping(record, "model").get("config", {}) if "model" in record else {}
    _need(isinstance(config, Mapping), "model.config")
    _need(isinstance(config.get("vision_config") or {}, Mapping), "model.config.vision_config")
    for name, entry in _mapping(record, "tasks").items():
        _need(bool(TASK_NAME.fullmatch(name)), f"the task name {name!r}")
        _need(isinstance(entry, Mapping), f"tasks.{name}")
        _task(entry, f"tasks.{name}")


def _task(entry: Mapping[str, Any], where: str) -> None:
    for name in ("n", "n_unparsed"):
        _need(_is_count(entry.get(name)), f"{where}.{name}")
    _need(isinstance(entry.get("points"), bool), f"{where}.points")
    _need(_texts(entry.get("notes")), f"{where}.notes")
    _need(all(map(_is_count, _mapping(entry, "excluded").values())), f"{where}.excluded")
    for name, found in _mapping(entry, "metrics").items():
        here = f"{where}.metrics.{name}"
        _need(isinstance(found, Mapping) and _is_number(found.get("value")), here)
        _need(_is_count(found.get("n", 0)), f"{here}.n")
        if "low" in found:
            whole = _is_number(found["low"]) and _is_number(found.get("high"))
            _need(whole and _is_text(found.get("method")), here)
        _need(_is_text(found.get("no_interval"), True), here)


def _profile(record: Mapping[str, Any]) -> None:
    machine = _mapping(record, "machine")
    _mapping(record, "terms")
    for name in RATES:
        _need(_is_number(machine.get(name)) and machine[name] > 0, f"machine.{name}")
    points = record.get("points")
    _need(isinstance(points, list) and bool(points), "points")
    for number, point in enumerate(record["points"]):
        where = f"points[{number}]"
        _need(isinstance(point, Mapping), where)
        _need(point.keys() == Row.__dataclass_fields__.keys(), where)
        _need(_is_text(point["model"]) and _is_text(point["status"]), where)
        _need(_is_text(point["detail"], True) and _is_count(point["image_tokens"]), where)
        for name in ("seq_len", "batch_size"):
            _need(_is_count(point[name]) and point[name] > 0, f"{where}.{name}")
        if point["result"] is not None:
            _result(_mapping(point, "result"), f"{where}.result")


def _result(result: Mapping[str, Any], where: str) -> None:
    for name in SERIES:
        times = result.get(name)
        fits = isinstance(times, list) and bool(times)
        _need(fits and all(_is_number(t) and t > 0 for t in result[name]), f"{where}.{name}")
    for name in AMOUNTS:
        _need(_is_number(result.get(name)) and result[name] >= 0, f"{where}.{name}")
    for name in ("decode_tok_per_s", "prefill_flops", "peak_mem_bytes", "state_bytes"):
        _need(result[name] > 0, f"{where}.{name}")


def _ablation(record: Mapping[str, Any]) -> None:
    for name in ("axis", "final"):
        _need(_is_text(record.get(name)), name)
    _need(isinstance(_mapping(record, "arguments").get("seeds"), list), "arguments.seeds")
    for name in ("cells", "tests"):
        _need(isinstance(record.get(name), list), name)
    _need(bool(record["cells"]), "cells")
    for number, cell in enumerate(record["cells"]):
        where = f"cells[{number}]"
        _need(isinstance(cell, Mapping) and _is_text(cell.get("variant")), where)
        metrics = _mapping(cell, "metrics")
        _need(all(map(_is_number, metrics.values())), f"{where}.metrics")
    for number, test in enumerate(record["tests"]):
        where = f"tests[{number}]"
        _need(isinstance(test, Mapping), where)
        _need(all(_is_text(test.get(name)) for name in ("variant", "task", "method")), where)
        _need(all(_is_number(test.get(name)) for name in ("difference", "p_value")), where)
        ends = [test.get(name) for name in ("low", "high")]
        _need(ends == [None, None] or all(map(_is_number, ends)), where)
        counts = ("n", "clusters", "better", "worse", "seeds_alike")
        _need(all(_is_count(test.get(name)) for name in counts), where)
        seeds = test.get("seed_differences")
        _need(isinstance(seeds, list) and all(map(_is_number, seeds)), where)
