"""MME's own folder: one folder a subtask, with a text file of two questions beside every image.

`existence/000000006040.txt`, or `landmark/questions_answers_YN/NAME.txt` with `landmark/images/`;
a line is question, tab, Yes or No.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tasks.mme import scorer
from tasks.published import PICTURES, Layout, Row, walk
from vlmamba_core.errors import UserError

TEXTS = "questions_answers_YN"


def _find(folder: Path, split: str) -> list[Path]:
    """The text files of every subtask, under the highest folder that has any."""
    places = dict.fromkeys(path.parent for path in walk(folder, lambda name: name.endswith(".txt")))
    subtasks = [place.parent if place.name == TEXTS else place for place in places]
    for root in dict.fromkeys(place.parent for place in subtasks if place.name in scorer.KNOWN):
        return [text for name in sorted(scorer.KNOWN) for text in _texts(root / name)]
    return []


def _texts(subtask: Path) -> list[Path]:
    return sorted((subtask / TEXTS).glob("*.txt")) or sorted(subtask.glob("*.txt"))


def _read(paths: Sequence[Path], split: str) -> list[Row] | None:
    if not all(path.suffix == ".txt" for path in paths):
        return None
    return [row for path in paths for row in _questions(path)]


def _questions(path: Path) -> list[Row]:
    folder = path.parent.parent if path.parent.name == TEXTS else path.parent
    image = _image(path, folder)
    name = str(image.relative_to(folder.parent)) if image else f"{folder.name}/{path.stem}.jpg"
    rows = []
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} as UTF-8 text: {error}") from error
    for number, line in enumerate(filter(str.strip, lines), 1):
        question, tab, answer = line.rpartition("\t")
        if not tab:
            raise UserError(f"{path} line {number} is not a question, a tab and an answer")
        rows.append(
            {
                "question_id": f"{folder.name}/{image.name if image else path.stem}",
                "question": question.strip(),
                "answer": answer.strip(),
                "category": folder.name,
                "image": name,
            }
        )
    return rows


def _image(path: Path, folder: Path) -> Path | None:
    for place in (folder / "images", path.parent, folder):
        for suffix in PICTURES:
            if (found := place / f"{path.stem}{suffix}").is_file():
                return found
    return None


layout = Layout("the folders of MME_Benchmark_release_version", _find, _read)
