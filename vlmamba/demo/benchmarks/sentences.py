"""Rows of COCO captions and MM-Vet: answers in whole sentences."""

from __future__ import annotations

from vlmamba.demo import questions as ask
from vlmamba.demo.benchmarks.source import Source
from vlmamba.demo.conversations import CAPTION
from vlmamba.demo.vocabulary import with_article
from vlmamba.demo.world import SIDE, Scene


def coco_cap(source: Source) -> list[dict]:
    """Five reference captions a picture."""
    rng = source.rng()
    rows = []
    for number, scene in enumerate(source.take(120), start=1):
        name = f"DEMO_val2014_{number:012d}.jpg"
        rows.append(
            {
                "question_id": name,
                "image": scene,
                "question": CAPTION,
                "answer": ask.captions(scene, rng, 5),
                "id": number,
                "license": 0,
                "file_name": name,
                "coco_url": "",
                "height": SIDE,
                "width": SIDE,
                "date_captured": "",
            }
        )
    return rows


def mmvet(source: Source) -> list[dict]:
    """Open requests that only a judge can score; the answer column holds a reference."""
    rng = source.rng()
    rows = []
    for number, scene in enumerate(source.take(30, sign_chance=0.4)):
        question, answer, skills = rng.choice(
            [
                ("Describe the image.", ask.captions(scene, rng, 1)[0], "rec,gen"),
                ("What is shown, and where?", _placed_things(scene), "rec,spat"),
                *_sign_request(scene),
            ]
        )
        rows.append(
            {
                "question_id": f"v1_{number}",
                "image": scene,
                "question": question,
                "answer": answer,
                "image_source": "demo",
                "capability": skills,
            }
        )
    return rows


def _sign_request(scene: Scene) -> list[tuple[str, str, str]]:
    if scene.sign is None or "+" in scene.sign.text:
        return []
    answer = f"{scene.sign.text}, {scene.sign.color}"
    return [("What does the sign say, and what color is it?", answer, "ocr,rec")]


def _placed_things(scene: Scene) -> str:
    return ", ".join(
        f"{with_article(thing.name)} at the {ask.half(thing.y, 'top', 'bottom')} "
        f"{ask.half(thing.x, 'left', 'right')}"
        for thing in scene.things
    )
