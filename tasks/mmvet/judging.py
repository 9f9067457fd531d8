"""How MM-Vet's judge model is asked for a grade, and how its reply is read.

The rubric, with its seven worked examples, is a part of the benchmark. It is read from the
installed lmms-eval, not copied; the official evaluator's differs from that one by a header line.
"""

from __future__ import annotations

import ast
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from vlmamba_core.errors import UserError

LMMS_HEADER, OFFICIAL_HEADER = "\ngpt_query_prompt |", "\n\nQuestion |"

# Temperature of each attempt to get a readable grade; after the last one the grade is 0.
TEMPERATURES = {"paper": (0.0, 0.0, 0.5, 1.0, 1.5), "lmms": (0.0, 0.5, 1.0, 1.5)}
MAX_TOKENS = {"paper": 3, "lmms": 128}
REMINDER = {"paper": "\nPredict the correctness of the answer (digit): ", "lmms": ""}


@lru_cache
def rubric(protocol: str) -> str:
    """The text before the row to grade. Raises UserError when lmms-eval does not hold it."""
    text = _lmms_eval_rubric()
    return text.replace(LMMS_HEADER, OFFICIAL_HEADER, 1) if protocol == "paper" else text


def _lmms_eval_rubric() -> str:
    # Parsed, not imported: importing that module demands an API key.
    spec = find_spec("lmms_eval")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for path in (Path(folder) / "tasks/mmvet/utils.py" for folder in folders):
        if path.is_file():
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MM_VET_PROMPT":
                    return ast.literal_eval(node.value)
    raise UserError("mmvet: the judge's rubric comes with lmms-eval: pip install lmms-eval==0.7.3")


def read_grade(reply: str) -> float | None:
    """The number in 0..1 that a reply starts with; None if there is none."""
    try:
        grade = float(reply.strip().split(" ")[0])
    except ValueError:
        return None
    return grade if 0.0 <= grade <= 1.0 else None
