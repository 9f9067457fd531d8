"""The words of the demo world: classes, themes, places, colors, sign texts.

67 of the 80 COCO classes have a picture in every emoji style.  Themes say which classes are seen
together; they give POPE's popular and adversarial negatives their meaning.
"""

from __future__ import annotations

TRAINING_STYLES = ("noto", "fluent")
HELDOUT_STYLES = ("twemoji",)

THEMES: dict[str, tuple[str, ...]] = {  # most frequent class first
    "street": (
        *("car", "person", "traffic light", "bus", "bicycle", "truck", "motorcycle", "stop sign"),
        *("dog", "umbrella", "handbag", "backpack"),
    ),
    "farm": ("horse", "cow", "sheep", "dog", "bird", "cat", "truck", "person", "apple", "carrot"),
    "safari": ("elephant", "zebra", "giraffe", "bear", "bird", "backpack", "car"),
    "journey": (
        *("train", "airplane", "boat", "suitcase", "person", "bus", "backpack", "umbrella"),
        *("clock", "bird", "kite"),
    ),
    "sports": (
        *("sports ball", "person", "bicycle", "skateboard", "tennis racket", "kite", "frisbee"),
        *("skis", "snowboard", "surfboard", "bottle", "backpack"),
    ),
    "kitchen": (
        *("bottle", "cup", "bowl", "knife", "wine glass", "fork", "spoon", "banana", "apple"),
        *("carrot", "broccoli", "orange", "chair"),
    ),
    "meal": (
        *("pizza", "cup", "sandwich", "cake", "hot dog", "donut", "wine glass", "bottle"),
        *("fork", "orange", "chair"),
    ),
    "home": (
        *("couch", "tv", "cat", "potted plant", "chair", "book", "clock", "vase", "teddy bear"),
        *("bed", "dog"),
    ),
    "bath": ("toilet", "toothbrush", "bed", "scissors", "tie", "handbag", "clock", "teddy bear"),
    "office": (
        *("laptop", "chair", "cell phone", "keyboard", "mouse", "book", "cup", "clock"),
        *("potted plant", "tie", "scissors"),
    ),
}
CLASSES = tuple(sorted({name for theme in THEMES.values() for name in theme}))

GROUPS: dict[str, tuple[str, ...]] = {  # for questions of common sense
    "animal": (
        *("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe"),
    ),
    "vehicle": (*("bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat"),),
    "food": (
        *("banana", "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza"),
        *("donut", "cake"),
    ),
    "furniture": ("chair", "couch", "bed", "toilet"),
    "toy": ("teddy bear", "kite", "frisbee", "sports ball", "skateboard"),
    "tool": ("scissors", "knife", "fork", "spoon", "toothbrush"),
    "device": ("tv", "laptop", "mouse", "keyboard", "cell phone", "clock"),
}
GROUP_OF = {name: group for group, names in GROUPS.items() for name in names}

# Classes whose pictures show another class too: asking for that one would be unfair.
SHOWN_WITH = {
    "snowboard": ("person", "skis"),
    "surfboard": ("person",),
    "fork": ("knife",),
    "bowl": ("spoon",),
    "laptop": ("keyboard",),
    "tennis racket": ("sports ball",),
    "wine glass": ("cup",),
}

PLACES = ("grass", "gravel", "bricks", "stars", "wood", "sea", "sky", "sand", "snow")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (205, 30, 30),
    "orange": (245, 135, 15),
    "yellow": (250, 220, 40),
    "green": (30, 145, 55),
    "blue": (30, 70, 200),
    "purple": (120, 40, 160),
    "pink": (250, 150, 195),
    "brown": (110, 65, 30),
    "black": (20, 20, 20),
    "white": (250, 250, 250),
}
WORDS = (
    *("bank", "cafe", "city", "east", "exit", "farm", "fire", "fish", "free", "gold"),
    *("home", "hotel", "jazz", "king", "lake", "milk", "moon", "music", "north", "open"),
    *("park", "post", "rose", "sale", "shop", "soap", "taxi", "west", "wind", "zoo"),
)
SUMS = tuple(f"{a}+{b}" for a in range(1, 6) for b in range(1, 6))
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

PAIR_WORDS = ("scissors", "skis")
_PLURALS = {"person": "people", "sheep": "sheep", "knife": "knives"}


def with_article(noun: str) -> str:
    """ "an apple", "a dog", "a pair of skis"."""
    if noun in PAIR_WORDS:
        return f"a pair of {noun}"
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plural(noun: str) -> str:
    """ "dogs", "knives", "buses", "pairs of skis"."""
    if noun in PAIR_WORDS:
        return f"pairs of {noun}"
    if noun in _PLURALS:
        return _PLURALS[noun]
    return f"{noun}es" if noun.endswith(("s", "ch", "sh")) else f"{noun}s"


def counted(noun: str, number: int) -> str:
    """ "a dog", "two dogs"."""
    return with_article(noun) if number == 1 else f"{NUMBERS[number]} {plural(noun)}"
