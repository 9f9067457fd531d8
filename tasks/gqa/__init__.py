"""GQA: compositional questions about real scenes, one answer each (Hudson and Manning, 2019)."""

from __future__ import annotations

from collections.abc import Sequence

from tasks.answer_files import LlavaAnswers, Upload
from tasks.common import Doc, Hub, PaperColumn, lmms_eval_functions
from tasks.exact_match import ExactMatch
from tasks.gqa import published
from tasks.gqa.images import hub_image
from tasks.official import EXACT_MATCH, Official

UNBALANCED = (False, "False", "false")  # in the column isBalanced


class GQA(ExactMatch):
    """Exact match on the balanced questions of testdev."""

    name = "gqa"
    size = "12,578 questions"
    paper_column = PaperColumn(2, "GQA")
    layout = published.layout
    llava = LlavaAnswers(id_column="id")
    upload = Upload("questionId", "prediction")
    unanswered_refused = True
    hub = Hub("lmms-lab/GQA", name="testdev_balanced_instructions", split="testdev")
    official = Official("gqa/gqa.yaml", EXACT_MATCH)
    image_hub = Hub("lmms-lab/GQA", name="testdev_balanced_images", split="testdev")
    image_id_column = "imageId"
    cluster_columns = ("imageId", "question_id")

    def images(self, doc: Doc, protocol: str) -> list:
        """The row's own image; else the one its imageId names in the hub's image table."""
        return super().images(doc, protocol) or [hub_image(self.image_hub, doc["imageId"])]

    def awaits(self, doc: Doc) -> bool:
        """eval.py asks for answers to balanced questions alone."""
        return doc.get("isBalanced") not in UNBALANCED

    def exclude(self, docs: Sequence[Doc], protocol: str) -> dict[int, str]:
        reasons = super().exclude(docs, protocol)
        if protocol == "paper":  # the official script reads the accuracy off balanced questions
            unbalanced = [row for row, doc in enumerate(docs) if not self.awaits(doc)]
            reasons |= dict.fromkeys(unbalanced, "not in the balanced set")
        return reasons


task = GQA()
globals().update(lmms_eval_functions(task))
