"""What record.json and samples_TASK.jsonl must hold before anything is made of them.

    check_record(record, path)      # of a known kind
    check_samples(samples, path)

A record may come from somebody else, or be cut, or edited: what does not fit is named here, once,
so that tables, plots and reports need not doubt it. One pydantic model stands for each kind of
record; entries that no model names are free. Import this where a record is read, not before:
pydantic takes a moment to load.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    InstanceOf,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from harness.runs.schema import Sample
from vlmamba_core.errors import UserError

TASK_NAME = re.compile(r"\w[\w.-]*")  # it becomes part of a file's name
TOO_LARGE = 2**63  # no array holds such an integer, and no amount here comes near


def _task_name(name: str) -> str:
    if not TASK_NAME.fullmatch(name):
        raise ValueError("no name for a file")
    return name


def _number(value: Any) -> Any:
    """JSON's numbers, which true and false are not, in a range that every reader can take."""
    if type(value) not in (int, float) or not abs(value) < TOO_LARGE:
        raise ValueError("no number")
    return value


# Not `str`: pydantic refuses half of a surrogate pair, which a cut answer may end in.
Text = InstanceOf[str]
TaskName = Annotated[Text, AfterValidator(_task_name)]
Number = Annotated[float, BeforeValidator(_number)]
Amount = Annotated[Number, Field(ge=0)]
Positive = Annotated[Number, Field(gt=0)]
Count = Annotated[int, Field(ge=0, lt=TOO_LARGE)]
Length = Annotated[Count, Field(gt=0)]
Times = Annotated[list[Positive], Field(min_length=1)]
Mapped = dict[Text, Any]


class Part(BaseModel):
    """A part of a record: every entry of the very type that JSON gives it."""

    model_config = ConfigDict(strict=True, from_attributes=True)


class Arguments(Part):
    """What `harness.run` was asked for, as far as readers use it."""

    model: Text
    data: Text
    style: Text | None = None
    split: Text | None = None
    data_id: Text | None = None
    data_revision: Text | None = None


class ModelConfig(Part):
    """Of the model's configuration what stands in the paper's tables."""

    vision_config: Mapped | None = None


class Template(Part):
    """What stood around the questions."""

    name: Text


class Model(Part):
    """The model that answered."""

    config: ModelConfig = ModelConfig()
    template: Template | None = None
    parameters: Count | None = None


class Cost(Part):
    """What one question costs; a figure that was not measured is absent or null."""

    parameters: Count | None = None
    questions_per_s: Amount | None = None
    device: Text | None = None
    first_token_s: Amount | None = None
    new_tokens: Count | None = None
    tokens_per_s: Amount | None = None
    peak_mem_bytes: Amount | None = None


class Metric(Part):
    """A score with its interval, or with why there is none."""

    value: Number
    n: Count = 0
    low: Number | None = None
    high: Number | None = None
    method: Text | None = None
    no_interval: Text | None = None

    @model_validator(mode="after")
    def _whole_interval(self) -> Self:
        if "low" in self.model_fields_set and None in (self.low, self.high, self.method):
            raise ValueError("half an interval")
        return self


class Task(Part):
    """One benchmark's scores."""

    n: Count
    n_unparsed: Count
    unit: Literal["fraction", "points"]
    notes: list[Text]
    excluded: dict[Text, Count]
    metrics: dict[Text, Metric]


class Evaluation(Part):
    """A record of `harness.run` or `harness.score`."""

    label: Text | None = None
    arguments: Arguments
    protocol: Text
    model: Model = Model(config=ModelConfig())
    cost: Cost = Cost()
    tasks: dict[TaskName, Task]


class Machine(Part):
    """What a profile's bounds are computed from."""

    copy_bytes_per_s: Positive
    read_bytes_per_s: Positive
    gemm_flops_per_s: Positive


class Measured(Part):
    """What was measured of one point."""

    prefill_s: Times
    ttft_s: Times
    decode_s: Times
    decode_tok_per_s: Positive
    state_bytes: Positive
    loaded_mem_bytes: Amount
    peak_mem_bytes: Positive
    decode_peak_mem_bytes: Amount
    weight_bytes: Amount
    prefill_flops: Positive


class Point(Part):
    """One model at one length and batch size, and what came of it."""

    model_config = ConfigDict(extra="forbid")

    model: Text
    seq_len: Length
    batch_size: Length
    image_tokens: Count
    status: Text
    detail: Text | None
    result: Measured | None


class WholeCost(Part):
    """What a question with an image costs, measured."""

    parameters: Count | None
    first_token_s: Positive
    new_tokens: Count | None
    total_s: Positive
    total_s_spread: Annotated[list[Positive], Field(min_length=2, max_length=2)]
    peak_mem_bytes: Amount | None
    tokens_per_s: Positive | None


class WholeModel(Part):
    """A model with its image encoder, and what came of measuring it."""

    model: Text
    template: Text | None
    status: Text
    detail: Text | None
    cost: WholeCost | None = None


class Profile(Part):
    """A record of `harness.profile`."""

    label: Text | None = None
    machine: Machine
    settings: Mapped
    whole: list[WholeModel] = []  # before the points, whose check looks at it
    points: list[Point]

    @field_validator("points")
    @classmethod
    def _something_measured(cls, points: list[Point], info: ValidationInfo) -> list[Point]:
        if not points and not info.data.get("whole"):
            raise ValueError("expected a point or a whole model")
        return points


class Seeds(Part):
    """The arguments of a study, as far as readers use them."""

    seeds: list[Any]


class Cell(Part):
    """One variant with one seed."""

    variant: Text
    metrics: dict[Text, Number]


class Test(Part):
    """A variant against the final model on one task."""

    variant: Text
    task: Text
    method: Text
    difference: Number
    p_value: Number
    low: Number | None = None
    high: Number | None = None
    n: Count
    clusters: Count
    better: Count
    worse: Count
    seeds_alike: Count
    seed_differences: list[Number]

    @model_validator(mode="after")
    def _whole_interval(self) -> Self:
        if (self.low is None) != (self.high is None):
            raise ValueError("half an interval")
        return self


class Ablation(Part):
    """A record of `harness.ablate`."""

    label: Text | None = None
    axis: Text
    final: Text
    arguments: Seeds
    cells: Annotated[list[Cell], Field(min_length=1)]
    tests: list[Test]


class Answer(Part):
    """A line of samples_TASK.jsonl; `reference` may be anything."""

    doc_id: Count
    question: Text
    prediction: Text | None
    parsed: Text | None
    score: Number | None
    image: Text | None
    excluded: Text | None


KINDS: dict[str, type[Part]] = {
    "evaluation": Evaluation,
    "profile": Profile,
    "ablation": Ablation,
}


def check_record(record: Mapping[str, Any], file: Path) -> None:
    """Raise UserError naming what is missing or of a wrong kind in a record."""
    try:
        KINDS[record["kind"]].model_validate(record)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        raise UserError(
            f"{file} is not a whole record: {_place(first['loc'])} is missing or wrong"
        ) from error


def _place(path: Sequence[str | int]) -> str:
    """Where an entry is: tasks.pope.n, points[0].model; a key by what it is."""
    if path[-1] == "[key]":
        return f"the task name {path[-2]!r}" if path[0] == "tasks" else f"a name in {path[0]}"
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in path]
    return "".join(parts).removeprefix(".")


def check_samples(samples: Sequence[Sample], file: Path) -> None:
    """Raise UserError naming the first answer that is of a wrong kind or comes twice."""
    seen: set[int] = set()
    for number, sample in enumerate(samples, 1):
        try:
            Answer.model_validate(sample)
        except ValidationError as error:
            raise UserError(f"{file} line {number} is not an answer of harness.run") from error
        if sample.doc_id in seen:
            raise UserError(f"{file} line {number}: row {sample.doc_id + 1} comes twice")
        seen.add(sample.doc_id)
