"""GQA's images on the hub: a table of their own, which questions point into by imageId."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from PIL import Image

from tasks.common import Hub
from vlmamba_core.errors import UserError


def hub_image(table: Hub, image_id: str) -> Image.Image:
    """The image called `image_id`, RGB. The table is fetched once a process, at first use.

    Raises UserError when the table has no such image.
    """
    rows, read = _open(table)
    if image_id not in rows:
        raise UserError(
            f"gqa: image {image_id!r} is not among the {len(rows)} images of "
            f"{table.path}/{table.name}; give rows an 'image' column, or use the data set's own ids"
        )
    return read(rows[image_id]).convert("RGB")


@lru_cache(maxsize=1)
def _open(table: Hub) -> tuple[dict[str, int], Callable[[int], Image.Image]]:
    from datasets import load_dataset

    images = load_dataset(table.path, table.name, split=table.split, revision=table.revision)
    rows = {image_id: row for row, image_id in enumerate(images["id"])}
    return rows, lambda row: images[row]["image"]
