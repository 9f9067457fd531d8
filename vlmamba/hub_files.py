"""What lets a checkpoint say, where this package is not installed, what it needs.

`save_pretrained` puts beside config.json a module that imports the installed package, named in
`auto_map`, and a README card (`vlmamba.model_card`). So a folder that was pushed to a hub loads
after `import vlmamba`, or with `trust_remote_code=True` alone; without the package transformers
shows the module's error.
No code of the model is copied: a checkpoint cannot run another version of it than the package's.
"""

from __future__ import annotations

from pathlib import Path

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


def write_code(folder: str | Path) -> None:
    """Write the module that `auto_map` names into a folder, which is made if need be."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, f"{MODULE}.py").write_text(CODE, encoding="utf-8")
