"""Rows of VQAv2, GQA and TextVQA: short answers to open questions."""

from __future__ import annotations

import random

from vlmamba.demo import questions as ask
from vlmamba.demo.benchmarks.source import Source
from vlmamba.demo.conversations import ocr_tokens
from vlmamba.demo.vocabulary import GROUP_OF, plural
from vlmamba.demo.world import SIDE, Scene

_VQA_TYPES = {  # kind of question -> (VQAv2's question_type, answer_type)
    "existence": ("is there a", "yes/no"),
    "how many": ("how many", "number"),
    "what color": ("what color is the", "other"),
    "where": ("where is the", "other"),
    "what kind": ("what", "other"),
    "what place": ("what is in the", "other"),
    "which one": ("which", "other"),
    "read": ("what does the", "other"),
    "what sum": ("what is the", "number"),
}
_GQA_TYPES = {  # kind -> (structural, semantic, detailed, operations that lead to the answer)
    "existence": ("verify", "obj", "exist", "select exist"),
    "which one": ("choose", "obj", "existChoose", "select choose"),
    "which side": ("choose", "rel", "relChooser", "select choose rel"),
    "what beside": ("query", "rel", "categoryRelS", "select relate query"),
    "what kind": ("query", "cat", "category", "select query"),
    "what color": ("query", "attr", "directOf", "select query"),
    "what place": ("query", "global", "place", "scene query"),
    "where": ("query", "attr", "positionQuery", "select query"),
}


def vqav2(source: Source) -> list[dict]:
    """Five questions a picture; ten answers each, which do not always agree."""
    rng, balance = source.rng(), ask.Existence()
    kinds = ("existence", "existence", "how many", *list(_VQA_TYPES)[2:])
    rows = []
    for number, scene in enumerate(source.take(60, sign_chance=0.45)):
        for place, question in enumerate(_questions(scene, rng, balance, 5, kinds)):
            question_type, answer_type = _VQA_TYPES[question.kind]
            truth = question.answer.lower()
            rows.append(
                {
                    "question_type": question_type,
                    "multiple_choice_answer": truth,
                    "answers": _ten_answers(truth, answer_type, rng),
                    "image_id": number + 1,
                    "answer_type": answer_type,
                    "question_id": 1000 * (number + 1) + place,
                    "question": question.text,
                    "image": scene,
                }
            )
    return rows


def _questions(
    scene: Scene, rng: random.Random, balance: ask.Existence, number: int, kinds: tuple[str, ...]
) -> list[ask.Question]:
    """`number` different questions at most, of the kinds "existence" and those in `ask.OPEN`."""
    found: dict[str, ask.Question] = {}
    for _ in range(4 * number):
        kind = rng.choice(kinds)
        if kind == "existence":
            question = balance.ask(scene, rng)
        else:
            question = ask.OPEN[kind](scene, rng)
        if question and len(found) < number:
            found.setdefault(question.text, question)
    return list(found.values())


def _ten_answers(truth: str, answer_type: str, rng: random.Random) -> list[dict]:
    """Seven to ten people agree; the others are wrong by little or put it otherwise."""
    others = {
        "yes/no": ["no" if truth == "yes" else "yes"],
        "number": [str(int(truth) + 1), "several"] if truth.isdigit() else ["several"],
        "other": [f"the {truth}", plural(truth), "not sure"],
    }[answer_type]
    agree = rng.choice((7, 8, 8, 9, 10, 10))
    said = [truth] * agree + [rng.choice(others) for _ in range(10 - agree)]
    rng.shuffle(said)
    return [
        {
            "answer": answer,
            "answer_confidence": "yes" if answer == truth else rng.choice(("maybe", "no")),
            "answer_id": number + 1,
        }
        for number, answer in enumerate(said)
    ]


def gqa(source: Source) -> list[dict]:
    """Six questions a picture, with the table's columns of structure filled."""
    rng, balance = source.rng(), ask.Existence()
    rows: list[dict] = []
    for number, scene in enumerate(source.take(50)):
        image_id = f"d{number + 1}"
        for question in _questions(scene, rng, balance, 6, ("existence", *_GQA_TYPES)):
            rows.append(_gqa_row(f"2{len(rows):07d}", image_id, question, scene))
    return rows


def _gqa_row(row_id: str, image_id: str, question: ask.Question, scene: Scene) -> dict:
    structural, semantic, detailed, operations = _GQA_TYPES[question.kind]
    argument = question.names[0] if question.names else "scene"
    program = [
        {"operation": name, "argument": argument, "dependencies": [step - 1] if step else []}
        for step, name in enumerate(operations.split())
    ]
    answer = question.answer.lower()
    return {
        "id": row_id,
        "imageId": image_id,
        "question": question.text,
        "answer": answer,
        "fullAnswer": f"The answer is {answer}.",
        "isBalanced": True,
        "groups": {"global": GROUP_OF.get(argument, ""), "local": f"{semantic}-{argument}"},
        "entailed": "[]",
        "equivalent": f"['{row_id}']",
        "types": {"structural": structural, "semantic": semantic, "detailed": detailed},
        "annotations": {part: [] for part in ("question", "answer", "fullAnswer")},
        "semantic": program,
        "semanticStr": "->".join(f"{step['operation']}: {argument}" for step in program),
        "image": scene,
    }


def textvqa(source: Source) -> list[dict]:
    """One question on a sign a picture, with the tokens that a text reader found."""
    rng = source.rng()
    rows = []
    for number, scene in enumerate(source.take(200, sign_chance=1.0, sum_chance=0.0)):
        word = ask.sign_word(scene) or ""  # every scene here has one
        text = rng.choice(ask.READ_TEXTS).lower()
        agree = rng.choice((7, 8, 9, 10))
        answers = [word] * agree + rng.choices([f"{word}.", "unanswerable"], k=10 - agree)
        rows.append(
            {
                "image_id": f"demo{number:012d}",
                "question_id": 34602 + number,
                "question": text,
                "question_tokens": text.rstrip("?").split(),
                "image": scene,
                "image_width": SIDE,
                "image_height": SIDE,
                "flickr_original_url": "",
                "flickr_300k_url": "",
                "answers": answers,
                "image_classes": list(scene.counts),
                "set_name": "val",
                "ocr_tokens": ocr_tokens(word, rng),
            }
        )
    return rows
