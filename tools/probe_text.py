"""What language models look up in scenes told in words: the share of right answers, a row a form.

    python tools/probe_text.py runs/study/text/mamba/far/final       # one model or more
    python tools/probe_text.py MODEL --scenes 400

Scenes that no training data holds, of 1 to 16 things above signs.  Asked is for the color or the
word on a sign, and whether a thing is there, in the forms of `labeled_talks.RECALL_FORMS`, from
the bare name to the benchmark's question; once each, right behind the scene.  An answer is right
where its first token is the likeliest of all.  Who guesses finds one color of ten, one word of 30
(7 % in all), and half of what is there.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from harness.reporting.render import text_table
from vlmamba.demo.labeled import labeled_scene, words_of
from vlmamba.demo.labeled_talks import RECALL_FORMS, recalled
from vlmamba.demo.questions.labeled import Presence, is_there, sign_color_of, sign_word_of
from vlmamba.demo.vocabulary import TRAINING_STYLES
from vlmamba.models.vlm import VLMambaForConditionalGeneration
from vlmamba.processing import VLMambaProcessor

THINGS = (1, 2, 4, 8, 16)
KINDS = ("sign", "there")
BATCH = 32
Asked = tuple[tuple[str, str, int], str, str]  # (form, kind, things), text, answer


def questions(scenes: int) -> Iterator[Asked]:
    """Of so many scenes of each number of things, all forms."""
    presence = Presence()
    for number in THINGS:
        for index in range(scenes):
            rng = random.Random(f"probe/{number}/{index}")
            scene = labeled_scene(f"probe/{number}/{index}", number, TRAINING_STYLES)
            ask = rng.choice((sign_word_of, sign_color_of))
            there = rng.random() < 0.5
            name = presence.pair([scene], rng)[not there]
            of_kinds = (ask(scene, rng.randrange(number)), is_there(name, there))
            for form in RECALL_FORMS:
                for kind, question in zip(KINDS, of_kinds, strict=True):
                    text, answer = recalled(form, scene, question)
                    key = (form[KINDS.index(kind)], kind, number)
                    yield key, f"{words_of(scene, empty=False)}: {text}", answer


@torch.inference_mode()
def right(folder: Path, asked: list[Asked]) -> list[bool]:
    """Whether the likeliest token behind each text is its answer's first."""
    model = VLMambaForConditionalGeneration.from_pretrained(folder).eval()
    processor = VLMambaProcessor.from_pretrained(folder)
    ids = [processor.encode(text) for _, text, _ in asked]
    wanted = [processor.encode(f" {answer}")[0] for *_, answer in asked]
    found = [False] * len(asked)
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        longest = len(ids[rows[-1]])
        padded = torch.tensor([ids[row] + [0] * (longest - len(ids[row])) for row in rows])
        logits = model(padded).logits
        for place, row in enumerate(rows):
            found[row] = int(logits[place, len(ids[row]) - 1].argmax()) == wanted[row]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--scenes", type=int, default=40, help="of each number of things (40)")
    args = parser.parse_args()
    asked = list(questions(args.scenes))
    for folder in args.models:
        hits: dict[tuple[str, str, int], list[bool]] = {}
        for (key, *_), hit in zip(asked, right(folder, asked), strict=True):
            hits.setdefault(key, []).append(hit)
        rows = [
            [form[:40], *(f"{100 * sum(hits[form, kind, n]) / args.scenes:.0f}" for n in THINGS)]
            for kind, forms in zip(KINDS, zip(*RECALL_FORMS, strict=True), strict=True)
            for form in forms
        ]
        print(f"{folder}, % right by things in the scene")
        print(text_table(["form", *map(str, THINGS)], rows), flush=True)


if __name__ == "__main__":
    sys.exit(main())
