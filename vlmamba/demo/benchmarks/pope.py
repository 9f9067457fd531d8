"""The demo world's POPE: is an object there, with random, popular and adversarial absent ones.

As in the original (Li et al., 2023): per picture and category three questions on objects that are
there, the same in each category, and three on objects that are not - drawn at random, from the
split's most frequent classes, or from the classes seen most often with those in the picture.
Among the classes that qualify, those asked with "yes" most are denied first, so that a model
without eyes has as little to go by as possible.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator

from vlmamba.demo.benchmarks.source import Source
from vlmamba.demo.questions import absent
from vlmamba.demo.vocabulary import CLASSES, with_article
from vlmamba.demo.world import Scene

CATEGORIES = ("random", "popular", "adversarial")
ASKED = 3  # objects present, and as many absent, per picture and category
POPULAR = 30  # the most frequent classes, about half
RELATED = 9  # classes most often seen with those of a picture
POPE_IMAGES = 72  # times 18 questions
RELATION_SCENES = 2000  # scenes that POPE's statistics are counted on


def pope(source: Source) -> list[dict]:
    """Three categories, six questions a picture each, category by category."""
    rng = source.rng()
    everyday = source.take(RELATION_SCENES, classes=(3, 3, 4, 4, 5))
    scenes = [scene for scene in everyday if len(scene.counts) >= 3][:POPE_IMAGES]
    rows: list[dict] = []
    numbers: dict[str, int] = {}
    for category, number, name, answer in pope_questions(scenes, Statistics(everyday), rng):
        numbers[category] = numbers.get(category, 0) + 1
        rows.append(
            {
                "id": str(len(rows)),
                "question_id": str(numbers[category]),
                "question": question_text(name),
                "answer": answer,
                "image_source": f"demo_{source.split}_{number:06d}",
                "image": scenes[number],
                "category": category,
            }
        )
    return rows


class Statistics:
    """How often classes, and pairs of them, occur in scenes of a split."""

    def __init__(self, scenes: Iterable[Scene]) -> None:
        self.frequency: Counter[str] = Counter()
        self.together: dict[str, Counter[str]] = {name: Counter() for name in CLASSES}
        for scene in scenes:
            names = list(scene.counts)
            self.frequency.update(names)
            for name in names:
                self.together[name].update(other for other in names if other != name)

    def popular(self) -> list[str]:
        """The most frequent classes."""
        return [name for name, _ in self.frequency.most_common(POPULAR)]

    def related(self, scene: Scene) -> list[str]:
        """Absent classes, those seen most often with the scene's classes first."""
        score = sum((self.together[name] for name in scene.counts), Counter())
        return sorted(absent(scene), key=lambda name: (-score[name], name))


def pope_questions(
    scenes: list[Scene], statistics: Statistics, rng: random.Random
) -> Iterator[tuple[str, int, str, str]]:
    """(category, scene number, class, "yes" | "no") of all questions, category by category.

    Every scene needs at least ASKED classes.
    """
    asked = _present_classes(scenes, statistics)
    for category in CATEGORIES:
        due = Counter(name for names in asked for name in names)  # yes minus no so far
        denied: list[list[str]] = [[] for _ in scenes]
        for number in rng.sample(range(len(scenes)), len(scenes)):
            pool = _absent_classes(category, scenes[number], statistics)
            for _ in range(ASKED):
                left = [name for name in pool if name not in denied[number]]
                name = max(left, key=lambda name: (due[name], rng.random()))
                due[name] -= 1
                denied[number].append(name)
        for number, (yes, no) in enumerate(zip(asked, denied, strict=True)):
            for present_name, absent_name in zip(yes, no, strict=True):
                yield category, number, present_name, "yes"
                yield category, number, absent_name, "no"


def _present_classes(scenes: list[Scene], statistics: Statistics) -> list[list[str]]:
    """Of each scene the classes to affirm: its more popular ones, which are denied more, too."""
    rank = {name: place for place, (name, _) in enumerate(statistics.frequency.most_common())}
    return [
        sorted(scene.counts, key=lambda name: rank.get(name, len(rank)))[:ASKED] for scene in scenes
    ]


def _absent_classes(category: str, scene: Scene, statistics: Statistics) -> list[str]:
    """The classes that the category may deny."""
    if category == "random":
        return absent(scene)
    if category == "popular":
        allowed = set(absent(scene))
        return [name for name in statistics.popular() if name in allowed]
    return statistics.related(scene)[:RELATED]


def question_text(name: str) -> str:
    """POPE's wording."""
    return f"Is there {with_article(name)} in the image?"
