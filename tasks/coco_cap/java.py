"""The Java programs behind the caption metrics, each started once for a whole set of captions.

All come with pycocoevalcap: Stanford's PTB tokenizer, METEOR 1.5 and, where its language models
have been installed beside it, SPICE 1.0.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from vlmamba_core.errors import UserError

LINE_BREAK = re.compile("[\n\v\f\r\u2028\u2029]")  # what the tokenizer ends a line at
SPICE_MODELS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


def why_not() -> str | None:
    """Why no caption metric can run here; None when all programs are in place."""
    if find_spec("pycocoevalcap") is None:
        return "the package pycocoevalcap is not installed"
    return None if shutil.which("java") else "it needs Java, and there is no `java` on the PATH"


def why_no_spice() -> str | None:
    """Why SPICE cannot run here. Its package would download 400 MB at first use; this does not."""
    folder = _package() / "spice" / "lib"
    absent = [name for name in SPICE_MODELS if not (folder / name).is_file()]
    return f"{' and '.join(absent)} not in pycocoevalcap/spice/lib" if absent else None


def tokenize(captions: Sequence[str]) -> list[str]:
    """Each caption in lower case, its tokens joined by spaces, without punctuation tokens."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS

    lines = _run(
        ["-cp", "stanford-corenlp-3.4.1.jar", "edu.stanford.nlp.process.PTBTokenizer"],
        ["-preserveLines", "-lowerCase"],
        _package() / "tokenizer",
        [LINE_BREAK.sub(" ", caption) for caption in captions],
    )
    return [
        " ".join(w for w in line.rstrip().split(" ") if w not in PUNCTUATIONS) for line in lines
    ]


def meteor_statistics(
    references: Sequence[Sequence[str]], captions: Sequence[str]
) -> list[list[float]]:
    """METEOR's counts of every (tokenized) caption against the reference that it fits best."""
    lines = _run(
        ["-Xmx2G", "-Dfile.encoding=UTF-8", "-jar", "meteor-1.5.jar"],
        ["-", "-", "-stdio", "-l", "en", "-norm"],
        _package() / "meteor",
        [_meteor_request(refs, cap) for refs, cap in zip(references, captions, strict=True)],
    )
    return [[float(count) for count in line.split()] for line in lines]


def _meteor_request(references: Sequence[str], caption: str) -> str:
    caption = caption.replace("|||", "").replace("  ", " ")
    return " ||| ".join(("SCORE", *references, caption))


def spice_scores(references: Sequence[Sequence[str]], captions: Sequence[str]) -> list[float]:
    """SPICE's F score of every (tokenized) caption."""
    from pycocoevalcap.spice.spice import Spice

    everyone = {i: list(refs) for i, refs in enumerate(references)}
    try:
        _, scores = Spice().compute_score(everyone, {i: [c] for i, c in enumerate(captions)})
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"SPICE failed: {error}") from error
    return [float(score["All"]["f"]) for score in scores]


def _package() -> Path:
    spec = find_spec("pycocoevalcap")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("caption metrics need pycocoevalcap: pip install pycocoevalcap")
    return Path(next(iter(spec.submodule_search_locations)))


def _run(program: list[str], options: list[str], folder: Path, lines: list[str]) -> list[str]:
    """One answer line for each input line. Raises UserError when the program does not give it."""
    done = subprocess.run(
        ["java", *program, *options],
        cwd=folder,
        input="".join(f"{line}\n" for line in lines).encode("utf-8", "replace"),
        capture_output=True,
        check=False,
    )
    answers = done.stdout.decode("utf-8", "replace").removesuffix("\n").split("\n")
    if done.returncode != 0 or len(answers) != len(lines):
        complaint = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:] or [
            "no output"
        ]
        raise UserError(
            f"`java {program[-1]}` failed (exit code {done.returncode}, {len(answers)} lines for "
            f"{len(lines)}): {complaint[0]}"
        )
    return answers
