"""Older runs in today's words: what a record or an answer called by another name.

    record = older.record(json.loads(text))
    sample = Sample(**older.answer(row))

CHANGELOG.md has the whole table of old and new names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RECORD = {"terms": "settings"}
ANSWER = {"truth": "reference"}


def renamed(content: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Keys in their order, old ones replaced; a new name that is there already stays."""
    return {names.get(key, key): value for key, value in content.items()}


def record(content: Any) -> Any:
    """A record.json; what is no record is returned as it is, for its reader to refuse."""
    if not isinstance(content, Mapping):
        return content
    found = renamed(content, RECORD)
    model = content.get("model")
    if isinstance(model, Mapping) and "template" not in model and _is_own(model.get("config")):
        found["model"] = {**model, "template": {"name": "vicuna_v1"}}  # there was no other
    if content.get("kind") == "evaluation" and isinstance(content.get("tasks"), Mapping):
        found["tasks"] = {name: _result(entry) for name, entry in content["tasks"].items()}
    return found


def answer(row: Mapping[str, Any]) -> dict[str, Any]:
    """A line of samples_TASK.jsonl."""
    return renamed(row, ANSWER)


def _is_own(config: Any) -> bool:
    """Whether a model's configuration is one of this project's checkpoints."""
    return isinstance(config, Mapping) and config.get("model_type") == "vlmamba"


def _result(entry: Any) -> Any:
    """A task's scores: whether they are points was a flag of its own."""
    if not isinstance(entry, Mapping) or not isinstance(entry.get("points"), bool):
        return entry
    unit = "points" if entry["points"] else "fraction"
    return {**renamed(entry, {"points": "unit"}), "unit": unit}
