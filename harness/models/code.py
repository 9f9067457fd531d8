"""What makes answers beside the weights: the code of this project's own models, the processor.

Old answers stand for new ones only where it is the same.  Of `vlmamba` everything counts but what
trains, converts, draws or serves: a new file counts until it is named here.  What is left out is
never imported by what answers (`tests/test_code_digest.py`).
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SUFFIXES = (".py", ".cpp", ".h")
COMMANDS = ("__main__.py", "ask.py", "experts.py", "quantize.py", "serve.py", "train.py")
LEFT_OUT = ("convert", "data", "demo", "serving", "training", *COMMANDS)  # of vlmamba
COUNTED = (  # all the same
    "vlmamba/data/decode.py",  # the pixels that a model is shown
    "vlmamba_core/tokens.py",
)


@functools.cache
def code_sha256() -> str:
    """A digest of the sources that answers depend on: the model's code, not the harness's."""
    total = hashlib.sha256()
    for path in sorted(_sources()):
        total.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return total.hexdigest()


def processor_sha256(processor: Any, generation: Any = None) -> str:
    """A digest of how text and pictures become a model's inputs.

    generation: the model's GenerationConfig, where decoding follows it.  What a tokenizer remembers
    of the text that it cut or padded last does not count.
    """
    tokenizer = getattr(processor, "tokenizer", None) or processor
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        read = json.loads(backend.to_str())
        words: Any = {name: read[name] for name in read.keys() - {"truncation", "padding"}}
    else:
        words = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else None
    parts = {
        "words": words,
        "pictures": _settings(getattr(processor, "image_processor", None)),
        "generation": _settings(generation),
        # its own few: how many tokens a picture has, which place
        "own": {name: v for name, v in vars(processor).items() if isinstance(v, str | int | float)},
    }
    text = json.dumps(parts, sort_keys=True, default=lambda value: type(value).__name__)
    return hashlib.sha256(text.encode()).hexdigest()


def _settings(part: Any) -> dict[str, Any] | None:
    """A configuration's values, without where it came from and what wrote it."""
    if not hasattr(part, "to_dict"):
        return None
    left_out = {"_name_or_path", "name_or_path", "transformers_version", "_commit_hash"}
    return {str(name): v for name, v in part.to_dict().items() if name not in left_out}


def plain_config(config: Any) -> dict[str, Any]:
    """A transformers configuration for a record: JSON, infinite numbers as it writes them."""
    return json.loads(config.to_json_string(use_diff=False))


def _sources() -> Iterator[Path]:
    package = ROOT / "vlmamba"
    for path in package.rglob("*"):
        if path.suffix in SUFFIXES and path.relative_to(package).parts[0] not in LEFT_OUT:
            yield path
    for name in COUNTED:
        yield ROOT / name
