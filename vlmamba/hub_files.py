"""What lets a checkpoint say, where this package is not installed, what it needs.

`save_pretrained` puts beside config.json a module that imports the installed package, named in
`auto_map`, and a README card. So a folder that was pushed to a hub loads after `import vlmamba`,
or with `trust_remote_code=True` alone; without the package transformers shows the module's error.
No code of the model is copied: a checkpoint cannot run another version of it than the package's.
"""

from __future__ import annotations

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


def write_code(folder: str | Path) -> None:
    """Write the module that `auto_map` names into a folder, which is made if need be."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, f"{MODULE}.py").write_text(CODE, encoding="utf-8")


def write_card(folder: str | Path, config: Any) -> None:
    """Write README.md about a model of `config`, unless one is there."""
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
    rows = "\n".join(f"| {name} | {value} |" for name, value in told.items())
    path.write_text(CARD.format(distribution=DISTRIBUTION, rows=rows), encoding="utf-8")
