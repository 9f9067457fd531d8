"""A checkpoint's README.md, as a hub shows it: what it is, how it was trained, what it scores.

    write_card(folder, config, settings)   # with every saved checkpoint
    add_scores(folder, record)             # harness.run --update-card, and a training's benchmark

Scores stand twice: as `model-index` in the metadata, where a hub reads them, and as a table
between two comments, the only part of the text that is ever replaced.  An entry's name has the
settings that it was measured under, its arguments the digest of the weights: scores of others of
the same numeric type go.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import yaml

from vlmamba.hub_files import DISTRIBUTION
from vlmamba_core.errors import UserError, one_line
from vlmamba_core.folder import write_atomically

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

NAME = "README.md"
TASK = "image-text-to-text"
CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
tags:
- vl-mamba
- mamba
---

# VL-Mamba

A vision encoder, a 2D-scanning connector and a Mamba language model. The code is the package
`{distribution}`:

```bash
pip install {distribution}   # or pip install . in its source tree
```

```python
import vlmamba  # registers the model with transformers
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("FOLDER_OR_HUB_ID")
processor = AutoProcessor.from_pretrained("FOLDER_OR_HUB_ID")
```

With `trust_remote_code=True` the import is not needed; the package is.

| | |
|---|---|
{rows}
"""

TRAINING = """
## How it was trained

By `python -m vlmamba.train`; every setting is in the run's `config.json`.

| | |
|---|---|
{rows}
"""

FIRST = "<!-- scores: what stands between these two comments is replaced by --update-card -->"
LAST = "<!-- end of scores -->"
SCORES = f"""
## Scores

{FIRST}
None were measured when this was written. `python -m harness.run --tasks all --model FOLDER
--update-card` measures them and writes them here, with intervals and settings.
{LAST}
"""
# arguments of a run that set its scores apart where they are given, and how a name says them
APART = {
    "limit": "first {} questions",
    "blind": "blind",
    "style": "{} style",
    "temperature": "temperature {}",
    "split": "split {}",
}


def keep_card(source: str, folder: str | Path) -> None:
    """Copy the card of the local folder `source`, if it has one, unless `folder` has one."""
    card, target = Path(source, NAME), Path(folder, NAME)
    if source and card.is_file() and not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(card.read_bytes())


def write_card(folder: str | Path, config: Any, training: Mapping[str, Any] | None = None) -> None:
    """Write README.md about a model of `config`, unless one is there.

    training: the settings of the run that made the weights, as OUT/config.json has them.
    """
    path = Path(folder, NAME)
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    family = getattr(config.text_config, "mixer", config.text_config.model_type)
    told = {
        "language model": config.language_model_id or f"{config.n_layer} layers of {family}",
        "width": config.d_model,
        "vision encoder": config.vision_model_id or config.vision_config.model_type,
        "connector": config.connector,
        "2D scan": f"{config.scan}, directions merged by {config.scan_merge}",
        "image tokens": config.num_image_tokens,
    }
    text = CARD.format(distribution=DISTRIBUTION, rows=_rows(told))
    text += _training(training) + SCORES if training else ""
    path.write_text(text, encoding="utf-8")


def _rows(told: Mapping[str, Any]) -> str:
    """Lines of a Markdown table; what comes from a command line cannot end a cell.

    Of a folder they have the name: where it lies is nobody else's business.
    """
    return "\n".join(
        f"| {_cell(name)} | {_cell(_without_folders(str(value)))} |" for name, value in told.items()
    )


def _cell(value: object) -> str:
    return " ".join(str(value).replace("|", "\\|").split())


def _without_folders(text: str) -> str:
    """A value with names in place of absolute paths: `hf:/home/me/llm+mlp` -> `hf:llm+mlp`.

    A preset's parts are parted by `+`, encoders by `,`; neither has them inside.
    """
    return re.sub(r"(?:^|(?<=[:+,]))/[^+,]*", lambda path: Path(path[0]).name, text)


def _training(run: Mapping[str, Any]) -> str:
    """The card's part on how the weights were trained: data, recipe, settings.

    Of a data file the name and digest.
    """
    files = [Path(path).name for path in run.get("data") or ()]
    digests = [str(digest)[:16] for digest in run.get("data_digests") or ()]
    told = {
        "stage": run.get("stage"),
        "started from": run.get("init"),
        "preset": run.get("preset"),
        "recipe": run.get("recipe"),
        "data": ", ".join(files),
        "BLAKE2b of the data, first 16 digits": ", ".join(digests),
        **{f"packages: {name}": version for name, version in (run.get("packages") or {}).items()},
        **(run.get("hyperparameters") or {}),
    }
    known = {name: value for name, value in told.items() if value not in (None, "")}
    return TRAINING.format(rows=_rows(known))


def check_card(folder: Path) -> None:
    """Raise UserError where the folder's card could not be updated: before anything slow."""
    _read(folder)


def add_scores(folder: Path, record: Mapping[str, Any]) -> Path:
    """Put the scores of a record of harness.run into the folder's card; returns the card's path.

    Scores of the same benchmark, metric and settings are replaced, those of other weights removed.
    Raises UserError for a card that cannot be read or written, or a record without scores.
    """
    card = _read(folder)
    found = list(_results(record))
    if not found:
        raise UserError("the run has no score that a card could show")
    new = {_identity(one) for one in found}
    data = cast("ModelCardData", card.data)
    kept = [
        one
        for one in data.eval_results or []
        if _identity(one) not in new and not _of_other_weights(one, found[0])
    ]
    data.eval_results = [*kept, *found]
    heading = re.search("^# (.+)$", card.text, re.MULTILINE)
    data.model_name = data.model_name or (heading[1] if heading else folder.name)
    told = _table([one for one in data.eval_results if "weights" in _arguments(one)])
    start, end = card.text.find(FIRST), card.text.find(LAST)
    if not 0 <= start < end:
        card.text = f"{card.text.rstrip()}\n{SCORES}"
        start, end = card.text.find(FIRST), card.text.find(LAST)
    card.text = f"{card.text[: start + len(FIRST)]}\n{told}\n{card.text[end:]}"
    return write_atomically(folder / NAME, str(card))


def add_scores_of(folder: Path, file: Path) -> None:
    """As `add_scores`, where `file` is a record with scores; else nothing is done."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        known = list(_results(record))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return
    if known:
        add_scores(folder, record)


def _read(folder: Path) -> ModelCard:
    """The folder's card, an empty one where there is none. Raises UserError for a broken one."""
    from huggingface_hub import ModelCard

    file = folder / NAME
    try:
        text = file.read_text(encoding="utf-8") if file.exists() else f"# {folder.name}\n"
        return ModelCard(text if text.startswith("---") else f"---\n{{}}\n---\n{text}")
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise UserError(
            f"{file}: its metadata cannot be read, so no scores can be added: "
            f"{one_line(str(error))[:200]}"
        ) from error


def _results(record: Mapping[str, Any]) -> Iterator[EvalResult]:
    """The record's scores of whole benchmarks, in percent where they are shares."""
    from huggingface_hub import EvalResult

    arguments, model = record.get("arguments") or {}, record.get("model") or {}
    template = (model.get("template") or {}).get("name")
    dtype = str((record.get("settings") or {}).get("dtype") or "").removeprefix("torch.")
    for task, entry in record["tasks"].items():
        data = (record.get("data") or {}).get(task) or {}
        source = data.get("source", "data not named")
        choices = [f"{k} {v}" for k, v in ((record.get("prompts") or {}).get(task) or {}).items()]
        apart = [text.format(arguments[k]) for k, text in APART.items() if arguments.get(k)]
        votes = [f"{arguments['votes']} votes"] if (arguments.get("votes") or 1) > 1 else []
        under = [f"{record.get('protocol', 'unnamed')} protocol"]
        under += [f"template {template}"] * bool(template) + [dtype] * bool(dtype)
        share = entry.get("unit", "fraction") == "fraction"
        for metric, told in entry["metrics"].items():
            if "/" in metric:
                continue  # a part of the benchmark
            interval = [_shown(told[end], share) for end in ("low", "high") if end in told]
            yield EvalResult(
                task_type=TASK,
                dataset_type=data.get("path") or f"{task}-{source}",
                dataset_name=f"{task}, {data.get('path') or source}",
                dataset_config=data.get("name"),
                dataset_split=data.get("split"),
                dataset_revision=data.get("revision"),
                metric_type=metric,
                metric_name=f"{metric} ({', '.join([*under, *choices, *apart, *votes])})",
                metric_value=_shown(told["value"], share),
                metric_args={
                    "unit": "percent" if share else "points",
                    **({"95 % interval": interval} if interval else {}),
                    "n": told.get("n", entry.get("n")),
                    "weights": str(model.get("sha256", "not recorded"))[:16],
                    **({"dtype": dtype} if dtype else {}),
                    **({"note": record["label"]} if record.get("label") else {}),
                },
            )


def _shown(value: float, share: bool) -> float:
    return round(100 * float(value), 2) if share else round(float(value), 1)


def _identity(one: EvalResult) -> tuple[object, ...]:
    """What two entries agree in where one replaces the other."""
    return (one.unique_identifier, one.metric_type, one.metric_name)


def _arguments(one: EvalResult) -> Mapping[str, Any]:
    """What stands beside a score; of an entry that somebody else wrote, whatever they wrote."""
    return one.metric_args if isinstance(one.metric_args, Mapping) else {}


def _of_other_weights(one: EvalResult, new: EvalResult) -> bool:
    """Whether an entry is of weights that are no longer there; told under equal numeric types."""
    old, now = _arguments(one), _arguments(new)
    same_type = "weights" in old and old.get("dtype") == now.get("dtype")
    return same_type and old["weights"] != now["weights"]


def _table(results: Sequence[EvalResult]) -> str:
    """The scores as Markdown: a line each, with what it was measured under."""
    heads = ("data", "metric", "score", "95 % interval", "n", "weights", "note")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for one in results:
        found = _arguments(one)
        unit = " %" if found.get("unit") == "percent" else ""
        interval = " to ".join(map(str, found.get("95 % interval", ["none"])))
        cells = [one.dataset_name, one.metric_name, f"{one.metric_value}{unit}", interval]
        cells += [found.get("n"), found["weights"], found.get("note", "")]
        lines.append(f"| {' | '.join(_cell(cell) for cell in cells)} |")
    about = """\
Measured by `python -m harness.run`; the same is in the metadata above.  "weights": the first digits
of their SHA-256 in memory, which depends on the numeric type too.
"""
    return "\n".join([about, *lines])
