"""MME: fourteen subtasks of yes/no questions, two questions an image (Fu et al., 2023)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from tasks.common import (
    Benchmark,
    Case,
    Doc,
    Hub,
    PaperColumn,
    PerProtocol,
    lmms_eval_functions,
)
from tasks.mme import answers, published, scorer
from tasks.mme.prompt import YES_OR_NO, short_question
from tasks.official import Metric, Official, word
from tasks.published import Row


class Mme(Benchmark):
    """Totals over the perception and the cognition subtasks, in points."""

    name = "mme"
    size = "2,374 questions on 1,187 images"
    paper_column = PaperColumn(6, "MME")
    primary_metric = "perception"
    metrics = ("perception", "cognition")
    unit = "points"
    scored_alone = False
    columns = ("question_id", "question", "answer", "category")
    layout = published.layout
    llava = answers.llava
    upload = answers.upload
    hub = Hub("lmms-lab/MME", split="test")
    official = Official(
        "mme/mme.yaml",
        {
            "perception": Metric("mme_perception_score"),
            "cognition": Metric("mme_cognition_score"),
        },
        reading=word,
    )
    token_limits = PerProtocol(paper=128, lmms=16)

    def prompt(self, doc: Doc, protocol: str) -> str:
        return short_question(doc["question"], protocol)

    def asked(self, doc: Doc) -> list[str]:
        """Some prompts of lmms-eval take off the request for yes or no."""
        return [question.replace(YES_OR_NO, "") for question in super().asked(doc)]

    def reference(self, doc: Doc) -> str | None:
        """ "yes", "no", or None where the column holds something else."""
        answer = str(doc["answer"]).strip().lower().replace(".", "")
        return answer if answer in ("yes", "no") else None

    def cluster(self, doc: Doc) -> str:
        """The image: its two questions belong together."""
        return f"{doc['category']}/{doc['question_id']}"

    def maximum(self, metric: str, metrics: Iterable[str]) -> float:
        """200 points a subtask; of a total, for each subtask that the data have."""
        if metric in scorer.SUBTASKS:
            names = scorer.SUBTASKS[metric]
            present = set(metrics)
            return 200.0 * (sum(f"{name}/score" in present for name in names) or len(names))
        return 200.0 if metric.endswith("/score") else 1.0

    def exclude(self, docs: Sequence[Doc], protocol: str) -> dict[int, str]:
        """Rows without a reference or a known subtask, then what is left of their images' pairs."""
        reasons: dict[int, str] = {}
        for row, doc in enumerate(docs):
            if str(doc["category"]) not in scorer.KNOWN:
                reasons[row] = f"unknown subtask {doc['category']!r}"
            elif self.reference(doc) is None:
                reasons[row] = "no reference: answer is neither yes nor no"
        kept = {row: self.cluster(doc) for row, doc in enumerate(docs) if row not in reasons}
        questions = Counter(kept.values())
        unpaired = {
            row: f"image has {questions[image]} scorable question(s), MME needs 2"
            for row, image in kept.items()
            if questions[image] != 2
        }
        return reasons | unpaired

    def vlmevalkit(self, row: Row) -> list[Row]:
        return answers.from_vlmevalkit(row)

    def score_case(self, doc: Doc, prediction: str, protocol: str) -> Case:
        read = scorer.read_paper if protocol == "paper" else scorer.read_lmms
        label = read(prediction)
        return Case(float(label == self.reference(doc)), label)

    def aggregate(
        self, docs: Sequence[Doc], cases: Sequence[Case], protocol: str
    ) -> dict[str, float]:
        scores = scorer.subtask_scores(
            (doc["category"], self.cluster(doc), case.score == 1)
            for doc, case in zip(docs, cases, strict=True)
        )
        return scorer.totals(scores) | {
            f"{subtask}/{key}": value
            for subtask, values in scores.items()
            for key, value in values.items()
        }

    def metric_n(self, docs: Sequence[Doc]) -> dict[str, int]:
        return {
            group: sum(doc["category"] in names for doc in docs)
            for group, names in scorer.SUBTASKS.items()
        }

    def notes(self, docs: Sequence[Doc], protocol: str) -> list[str]:
        present = {doc["category"] for doc in docs}
        return [
            f"{group} is the total of {len(names) - len(absent)} of {len(names)} subtasks; "
            f"absent from the answered rows: {', '.join(absent)}"
            for group, names in scorer.SUBTASKS.items()
            if (absent := [name for name in names if name not in present])
        ]


task = Mme()
globals().update(lmms_eval_functions(task))
