"""What lets a checkpoint say, where this package is not installed, what it needs.

`save_pretrained` puts beside config.json a module that imports the installed package, named in
`auto_map`, and a README card. So a folder that was pushed to a hub loads after `import vlmamba`,
or with `trust_remote_code=True` alone; without the package transformers shows the module's error.
No code of the model is copied: a checkpoint cannot run another version of it than the package's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

DISTRIBUTION = "vlmamba-harness"  # as in pyproject.toml
MODULE = "modeling_vlmamba"
CONFIG_MAP = {
    "AutoConfig": f"{MODULE}.VLMambaConfig",
    "AutoModel": f"{MODULE}.VLMambaForConditionalGeneration",
    "AutoModelForImageTextToText": f"{MODULE}.VLMambaForConditionalGeneration",
}
PROCESSOR_MAP = {"AutoProcessor": f"{MODULE}.VLMambaProcessor"}

# transformers looks for the imports of such a module and names what is missing after the import,
# which is not what our distribution is called; it does not look into a try.
CODE = f'''"""Finds the code of this checkpoint: the installed package {DISTRIBUTION}."""

try:
    from vlmamba import VLMambaConfig, VLMambaForConditionalGeneration, VLMambaProcessor
except ImportError as error:
    raise ImportError(
        "this checkpoint is a VL-Mamba model; its code is the package {DISTRIBUTION}: "
        "pip install {DISTRIBUTION} (or pip install . in its source tree)"
    ) from error

__all__ = ["VLMambaConfig", "VLMambaForConditionalGeneration", "VLMambaProcessor"]
'''

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

## Scores

None were measured when this was written. `python -m harness.run --tasks all --model FOLDER`
measures them, with intervals, and its `record.json` says under which settings.
"""


def write_code(folder: str | Path) -> None:
    """Write the module that `auto_map` names into a folder, which is made if need be."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, f"{MODULE}.py").write_text(CODE, encoding="utf-8")


def keep_card(source: str, folder: str | Path) -> None:
    """Copy the card of the local folder `source`, if it has one, unless `folder` has one."""
    card, target = Path(source, "README.md"), Path(folder, "README.md")
    if source and card.is_file() and not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(card.read_bytes())


def write_card(folder: str | Path, config: Any, training: Mapping[str, Any] | None = None) -> None:
    """Write README.md about a model of `config`, unless one is there.

    training: the settings of the run that made the weights, as OUT/config.json has them.
    """
    path = Path(folder, "README.md")
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
    path.write_text(text + (_training(training) if training else ""), encoding="utf-8")


def _rows(told: Mapping[str, Any]) -> str:
    """Lines of a Markdown table; what comes from a command line cannot end a cell."""
    cells = ([" ".join(str(part).replace("|", "\\|").split()) for part in p] for p in told.items())
    return "\n".join(f"| {name} | {value} |" for name, value in cells)


def _training(run: Mapping[str, Any]) -> str:
    """The card's part on how the weights were trained: data, recipe, settings.

    Of a data file the name and digest: its folder is nobody else's business.
    """
    files = [Path(path).name for path in run.get("data") or ()]
    digests = [str(digest)[:16] for digest in run.get("data_digests") or ()]
    start = run.get("init")
    told = {
        "stage": run.get("stage"),
        "started from": Path(start).name if start and Path(start).is_absolute() else start,
        "preset": run.get("preset"),
        "recipe": run.get("recipe"),
        "data": ", ".join(files),
        "SHA-256 of the data, first 16 digits": ", ".join(digests),
        **{f"packages: {name}": version for name, version in (run.get("packages") or {}).items()},
        **(run.get("hyperparameters") or {}),
    }
    known = {name: value for name, value in told.items() if value not in (None, "")}
    return TRAINING.format(rows=_rows(known))
