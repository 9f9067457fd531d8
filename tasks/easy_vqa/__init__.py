"""easy-VQA: questions about one colored shape, 13 possible answers (Zhou, 2019).

A real public set that ships inside a Python package, so it runs on any machine.
"""

from __future__ import annotations

from tasks.common import Hub, lmms_eval_functions
from tasks.exact_match import ExactMatch
from tasks.official import EXACT_MATCH, Official


class EasyVQA(ExactMatch):
    """Exact match by the rules that GQA has under each protocol."""

    name = "easy_vqa"
    size = "9,673 questions on 1,000 images"
    hub = Hub("easy-vqa", split="test")  # not on the hub: a package of that name on PyPI
    official = Official("gqa/gqa.yaml", EXACT_MATCH)  # which scores by the same rules
    cluster_columns = ("image_id", "question_id")


task = EasyVQA()
globals().update(lmms_eval_functions(task))
