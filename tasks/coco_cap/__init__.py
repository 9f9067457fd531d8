"""COCO captions: one sentence about a photo, five people's sentences each (Chen et al., 2015)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tasks.answer_files import LlavaAnswers, Upload
from tasks.coco_cap import published, scorer
from tasks.common import Benchmark, Case, Doc, Hub, PerProtocol, Report, lmms_eval_functions
from tasks.official import Metric, Official
from tasks.published import Row
from vlmamba_core.errors import UserError


class CocoCaptions(Benchmark):
    """Corpus-level caption metrics; both protocols prompt and score alike."""

    name = "coco_cap"
    size = "5,000 images"
    primary_metric = "CIDEr"
    metrics = ("CIDEr", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE_L")
    columns = ("answer",)
    list_columns = ("answer",)
    text_lists = True  # one reference may stand alone
    layout = published.layout
    llava = LlavaAnswers(identifier=lambda name: str(_image_number(name)))
    upload = Upload("image_id", "caption")
    hub = Hub("lmms-lab/COCO-Caption2017", split="val")
    official = Official(  # the headline alone: each metric starts two Java programs
        "coco_cap/coco2017_cap_val.yaml",
        {"CIDEr": Metric("coco_CIDEr")},
        prepare=lambda row: {"id": 0, **row},
        same_in_both=True,
    )
    cluster_columns = ("question_id",)
    token_limits = PerProtocol(paper=64, lmms=64)
    submission_suffix = ".json"

    def prompt(self, doc: Doc, protocol: str) -> str:
        return "Provide a one-sentence caption for the provided image."

    def reference(self, doc: Doc) -> list[str] | None:
        """The reference captions; None where they are hidden: absent, not text, or all blank."""
        answer = doc["answer"]
        if isinstance(answer, Mapping) or not isinstance(answer, Iterable):
            return None
        texts = [answer] if isinstance(answer, str) else list(answer)
        if not all(isinstance(text, str) for text in texts) or not any(map(str.strip, texts)):
            return None
        return texts

    def maximum(self, metric: str, metrics: Iterable[str]) -> float:
        """CIDEr is ten times a mean cosine; the others are shares."""
        return 10.0 if metric == "CIDEr" else 1.0

    def exclude(self, docs: Sequence[Doc], protocol: str) -> dict[int, str]:
        return {
            row: "no reference captions"
            for row, doc in enumerate(docs)
            if self.reference(doc) is None
        }

    def score_case(self, doc: Doc, prediction: str, protocol: str) -> Case:
        """The caption alone: its numbers need all the others, see `evaluate`."""
        return Case(None, prediction.strip() or None)

    def aggregate(
        self, docs: Sequence[Doc], cases: Sequence[Case], protocol: str
    ) -> dict[str, float]:
        if all(case.detail is not None for case in cases):
            return scorer.aggregate([case.detail for case in cases])
        return scorer.aggregate(self._measure(docs, cases).details)

    def evaluate(self, docs: Sequence[Doc], predictions: Sequence[str], protocol: str) -> Report:
        """As the base class does; each case's detail then holds the caption's own numbers."""
        report = super().evaluate(docs, predictions, protocol)
        kept = [(row, case) for row, case in enumerate(report.cases) if case is not None]
        if not kept:
            return report
        measured = self._measure([docs[row] for row, _ in kept], [case for _, case in kept])
        cases = list(report.cases)
        for (row, case), detail in zip(kept, measured.details, strict=True):
            cases[row] = replace(case, detail=detail)
        not_run = [f"{metric} not run: {reason}" for metric, reason in measured.not_run.items()]
        return replace(report, cases=cases, notes=[*report.notes, *not_run])

    def _measure(self, docs: Sequence[Doc], cases: Sequence[Case]) -> scorer.Measured:
        references = tuple(tuple(self.reference(doc) or ()) for doc in docs)
        return scorer.measure(references, tuple(case.parsed or "" for case in cases))

    def vlmevalkit(self, row: Row) -> list[Row]:
        return [{"question_id": row.get("image_path") or row["index"], "answer": row["answer"]}]

    def submission_id(self, doc: Doc) -> int:
        return _image_number(doc.get("question_id"))

    def submission(self, docs: Sequence[Doc], predictions: Sequence[str]) -> list[dict[str, Any]]:
        """The list of {image_id, caption} that the COCO caption server takes."""
        return [
            {"image_id": self.submission_id(doc), "caption": prediction.strip()}
            for doc, prediction in zip(docs, predictions, strict=True)
        ]


def _image_number(name: object) -> int:
    """The number at the end of a COCO file name (COCO_val2014_000000203564.jpg: 203564)."""
    stem = str(name).rsplit("_", 1)[-1].split(".")[0]
    if not stem.isdecimal():
        raise UserError(
            f"coco_cap: question_id {name!r} does not end in an image number; "
            "expected a COCO file name such as COCO_val2014_000000203564.jpg"
        )
    return int(stem)


task = CocoCaptions()
globals().update(lmms_eval_functions(task))
