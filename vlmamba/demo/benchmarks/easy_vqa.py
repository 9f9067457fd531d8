"""Rows of easy-VQA, a real public set that ships in the package `easy-vqa` (MIT)."""

from __future__ import annotations

from pathlib import Path

from vlmamba.demo.benchmarks.source import Source
from vlmamba_core.errors import UserError


def easy_vqa(source: Source) -> list[dict]:
    """The test split of easy-VQA (package `easy-vqa`, MIT), whole; the same for every split."""
    try:
        import easy_vqa as package
    except ImportError as error:
        raise UserError("the package easy-vqa is missing: pip install easy-vqa") from error
    paths = package.get_test_image_paths()
    pictures = {number: Path(path).read_bytes() for number, path in paths.items()}
    return [
        {
            "question_id": number,
            "image_id": image_id,
            "image": pictures[image_id],
            "question": question,
            "answer": answer,
        }
        for number, (question, answer, image_id) in enumerate(
            zip(*package.get_test_questions(), strict=True)
        )
    ]
