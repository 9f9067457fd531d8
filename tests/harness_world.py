"""Small benchmark files and a small saved model for the harness's tests."""

from __future__ import annotations

import fnmatch
import io
import re
from pathlib import Path

import datasets
from PIL import Image

CATEGORIES = ("random", "popular", "adversarial")


def unexplained(folder: Path) -> list[str]:
    """Names in an output folder that its README.md does not explain."""
    told = re.findall(r"^\| `(.+?)` \|", (folder / "README.md").read_text(), re.MULTILINE)
    found = {path.name for path in folder.iterdir()} - {"README.md"}
    return sorted(name for name in found if not any(fnmatch.fnmatch(name, t) for t in told))


def png(color: tuple[int, int, int], size: tuple[int, int] = (32, 24)) -> bytes:
    """A picture of one color."""
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


def pope_rows(images: int = 4, questions: int = 2) -> list[dict]:
    """Rows in lmms-lab/POPE's schema: every image in every category."""
    return [
        {
            "id": str(n),
            "question_id": str(n),
            "question": f"Is there a {('dog', 'cat')[n % 2]} in the image?",
            "answer": ("yes", "no")[n % 2],
            "image_source": f"image_{i}",
            "image": {"bytes": png((60 * i, 255 - 40 * i, 90)), "path": f"{i}.png"},
            "category": category,
        }
        for category in CATEGORIES
        for i in range(images)
        for n in range(questions)
    ]


def mme_rows(subtasks: tuple[str, ...] = ("existence", "color"), images: int = 2) -> list[dict]:
    """Rows in lmms-lab/MME's schema: two questions an image."""
    return [
        {
            "question_id": f"{subtask}/{i}.png",
            "image": {"bytes": png((200, 60 * i, 30)), "path": f"{i}.png"},
            "question": f"Is this {answer} a dog? Please answer yes or no.",
            "answer": answer,
            "category": subtask,
        }
        for subtask in subtasks
        for i in range(images)
        for answer in ("Yes", "No")
    ]


def write_parquet(rows: list[dict], path: Path) -> Path:
    """Rows as the hub stores them, `image` as an Image column."""
    table = datasets.Dataset.from_dict({key: [row[key] for row in rows] for key in rows[0]})
    table.cast_column("image", datasets.Image()).to_parquet(path)
    return path
