"""Runs benchmarks with lmms-eval: its evaluator and its task class, our task files and model.

lmms-eval normally indexes over a thousand task files and downloads the data that a task names.
Here a task is built straight from our YAML file, over rows that are already loaded; everything
else (requests, filters, processing of results, aggregation) is lmms-eval's own.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import datasets
import lmms_eval.api.task
import lmms_eval.evaluator
import lmms_eval.tasks
import transformers
from lmms_eval.utils import load_yaml_config
from loguru import logger
from tqdm import tqdm

from harness.data.images import UnreadableImage, image_key
from harness.data.sources import without_images
from harness.models.lmms import NO_IMAGE, UNREADABLE, VLMamba
from tasks.common import Benchmark


@dataclass(frozen=True)
class Answers:
    """What a task's run gave: documents without images, and one answer each.

    `engine` holds the aggregate of each metric that lmms-eval's evaluator got from our functions;
    `rows` are all rows as they were loaded, less their images.
    """

    task: Benchmark
    doc_ids: list[int]
    docs: list[dict[str, Any]]
    predictions: list[str]
    image_keys: list[str | None]  # None: unreadable
    engine: dict[str, float]
    rows: datasets.Dataset


class SourcedTask(lmms_eval.api.task.ConfigurableTask):
    """One of our YAML tasks, over rows that a `Source` has loaded."""

    def __init__(self, benchmark: Benchmark, rows: datasets.Dataset, protocol: str) -> None:
        self.benchmark = benchmark
        self._rows = rows
        config = load_yaml_config(str(yaml_path(benchmark.name, protocol)), mode="full")
        config["process_results"] = _readable_only(config["process_results"])
        if benchmark.prompt_marks():  # the file's own function knows the protocol's prompt alone
            config["doc_to_text"] = lambda doc, kwargs=None: benchmark.prompt(doc, protocol)
        super().__init__(config=config, model_name="vlmamba")

    def download(self, dataset_kwargs: dict | None = None) -> None:
        """lmms-eval's hook for getting the data: `dataset`, and the same without images."""
        split = self.config.test_split
        rows = self.benchmark.process_docs(self._rows)
        self.dataset = datasets.DatasetDict({split: rows})
        self.dataset_no_image = datasets.DatasetDict({split: without_images(rows)})

    def loaded_rows(self) -> datasets.Dataset:
        """The rows as the source gave them, less their images."""
        return without_images(self._rows)

    def stored_key(self, doc_id: int) -> str:
        """Content key of a row's stored image: for rows that another rank has answered."""
        value = self._rows[doc_id].get(self.benchmark.image_column)
        try:
            return NO_IMAGE if value is None else image_key(value)
        except UnreadableImage:
            return UNREADABLE


def yaml_path(task: str, protocol: str) -> Path:
    """The lmms-eval task file of a benchmark under a protocol."""
    name = f"vlmamba_{task}" if protocol == "paper" else f"vlmamba_{task}_{protocol}"
    return Path(str(files("tasks"))) / task / f"{name}.yaml"


def run(
    model: VLMamba,
    tasks: Sequence[tuple[Benchmark, datasets.Dataset]],
    protocol: str,
    *,
    limit: int | None = None,
    seed: int = 0,
) -> list[Answers] | None:
    """Evaluate all tasks on their rows in one pass; None on every rank but the first."""
    sourced = [SourcedTask(task, rows, protocol) for task, rows in tasks]
    results = lmms_eval.evaluator.simple_evaluate(
        model=model,
        tasks=sourced,
        task_manager=lmms_eval.tasks.TaskManager(include_defaults=False),
        batch_size=model.batch_size,
        device=str(model.device),
        limit=limit,
        bootstrap_iters=0,  # intervals come from harness.scoring.intervals
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
        cli_args=argparse.Namespace(process_with_media=False),
        process_docs_parallel=1,
    )
    if results is None:
        return None
    return [_answers(task, results, model) for task in sourced]


def _answers(task: SourcedTask, results: dict, model: VLMamba) -> Answers:
    name = task.config.task
    samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
    doc_ids = [sample["doc_id"] for sample in samples]
    rows = task.eval_docs_no_media
    keys = [model.image_keys.get((name, i)) or task.stored_key(i) for i in doc_ids]
    return Answers(
        task=task.benchmark,
        doc_ids=doc_ids,
        docs=[rows[doc_id] for doc_id in doc_ids],
        predictions=[sample["filtered_resps"][0] for sample in samples],
        image_keys=[None if key == UNREADABLE else key for key in keys],
        engine={
            metric: results["results"][name].get(f"{metric},none", float("nan"))
            for metric in task.benchmark.metrics
        },
        rows=task.loaded_rows(),
    )


def _readable_only(process_results: Any) -> Any:
    """The task's processing, leaving rows whose image could not be read out of every metric."""

    def process(doc: dict, results: Sequence[str]) -> dict[str, Any]:
        return {} if results[0] == UNREADABLE else process_results(doc, results)

    return process


@contextlib.contextmanager
def quiet(active: bool = True) -> Iterator[None]:
    """The libraries without their log lines and many progress bars, while `active`."""
    if not active:
        yield
        return
    logger.remove()
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    modules = (lmms_eval.evaluator, lmms_eval.api.task)
    bars = [module.tqdm for module in modules]
    for module in modules:
        module.tqdm = _NoBar
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for module, bar in zip(modules, bars, strict=True):
            module.tqdm = bar
        logging.disable(logging.NOTSET)


class _NoBar(tqdm):
    """A progress bar that shows nothing: the model's own bar is the only one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})
