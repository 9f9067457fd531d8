"""Training data of the controlled study: held-out samples put aside, and variants of the order.

    python -m harness.controlled.data --data DIR --out FOLDER --held-out 96

DIR has finetune.json in LLaVA's format.  FOLDER gets finetune.json without the samples whose
pictures held_out.json shows, and finetune-VARIANT.json, the same samples laid out otherwise.
Held-out samples have no patch words: their loss is that of answers.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tasks.textvqa.prompt import OCR_LINE
from vlmamba_core.cli import Parser, cli
from vlmamba_core.errors import UserError
from vlmamba_core.folder import RunFolder
from vlmamba_core.tokens import IMAGE

Sample = dict[str, Any]


def split(samples: Sequence[Sample], held_out: int) -> tuple[list[Sample], list[Sample]]:
    """(training samples, held-out ones): evenly spaced, one a picture, and no picture in both.

    Raises UserError where there are too few pictures.
    """
    shown = [sample for sample in samples if pictures(sample)]
    aside: dict[tuple[str, ...], Sample] = {}
    for place in range(held_out):
        sample = shown[place * len(shown) // held_out] if shown else {}
        aside.setdefault(pictures(sample), sample)
    taken = {picture for key in aside for picture in key}
    left = [sample for sample in samples if not taken.intersection(pictures(sample))]
    if len(aside) < min(held_out, 2) or len(left) < held_out:
        raise UserError(f"{len(samples)} samples are too few to put {held_out} of them aside")
    return left, list(aside.values())


def pictures(sample: Sample) -> tuple[str, ...]:
    """The paths of a sample's pictures."""
    found = sample.get("image") or ()
    return (found,) if isinstance(found, str) else tuple(found)


def ocr_first(sample: Sample) -> Sample:
    """The same with the line of OCR tokens in front of its question."""
    turns = [turn | {"value": _ocr_first(turn["value"])} for turn in sample["conversations"]]
    return sample | {"conversations": turns}


def _ocr_first(text: str) -> str:
    lines = text.split("\n")
    tokens = [line for line in lines if line.startswith(OCR_LINE.strip())]
    others = [line for line in lines if line not in tokens]
    tags = next((at for at, line in enumerate(others) if line != IMAGE), len(others))
    return "\n".join([*others[:tags], *tokens, *others[tags:]])


VARIANTS: dict[str, Callable[[Sample], Sample]] = {"ocr_first": ocr_first}


def prepare(data: Path, out: Path, held_out: int) -> None:
    """Write the study's files. Raises UserError for data that cannot be read."""
    file = data / "finetune.json"
    try:
        samples = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    left, aside = split(samples, held_out)
    with RunFolder(out) as folder:
        for sample in aside:
            sample.pop("patch_words", None)
        folder.write("held_out.json", json.dumps(aside))
        for name, variant in VARIANTS.items():
            folder.write(f"finetune-{name}.json", json.dumps([variant(sample) for sample in left]))
        folder.write("finetune.json", json.dumps(left))


@cli
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = Parser(prog="python -m harness.controlled.data", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--held-out", type=int, required=True)
    args = parser.parse_args(argv)
    prepare(args.data, args.out, args.held_out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
