"""Where the scenes of a benchmark come from."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from vlmamba.demo.world import Scene, SceneOptions, sample_scene


@dataclass(frozen=True)
class Source:
    """Where a benchmark's scenes come from: equal sources give equal scenes."""

    task: str
    split: str
    seed: int
    styles: tuple[str, ...]

    def scenes(self, **options) -> Iterator[Scene]:
        """Scenes without end, drawn with the split's styles."""
        chosen = replace(SceneOptions(styles=self.styles), **options)
        for index in itertools.count():
            yield sample_scene(f"{self.split}/{self.task}/{self.seed}/{index}", chosen)

    def take(self, number: int, **options) -> list[Scene]:
        """The first `number` scenes."""
        return list(itertools.islice(self.scenes(**options), number))

    def rng(self) -> random.Random:
        """Chances of everything but the scenes."""
        return random.Random(f"{self.split}/{self.task}/{self.seed}/rows")
