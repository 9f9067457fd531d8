"""Column schemas of the published data sets, as lmms-eval reads them from the hub.

Column names and types follow the data sets' cards (lmms-lab/POPE, MME, VQAv2, GQA, ScienceQA,
textvqa, MMBench, COCO-Caption, MMVet).  GQA's second table, its images, is joined as a column
`image`.  easy-VQA and `retrieval` have no hub table; their columns are ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Features

STRING = "string"

# Column -> type name; a list holds the one type of its items, a dict the types of its fields.
COLUMNS: dict[str, dict] = {
    "pope": {
        **dict.fromkeys(("id", "question_id", "question", "answer", "image_source"), STRING),
        "image": "image",
        "category": STRING,
    },
    "mme": {
        "question_id": STRING,
        "image": "image",
        **dict.fromkeys(("question", "answer", "category"), STRING),
    },
    "vqav2": {
        "question_type": STRING,
        "multiple_choice_answer": STRING,
        "answers": [{"answer": STRING, "answer_confidence": STRING, "answer_id": "int64"}],
        "image_id": "int64",
        "answer_type": STRING,
        "question_id": "int64",
        "question": STRING,
        "image": "image",
    },
    "gqa": {
        **dict.fromkeys(("id", "imageId", "question", "answer", "fullAnswer"), STRING),
        "isBalanced": "bool",
        "groups": {"global": STRING, "local": STRING},
        "entailed": STRING,
        "equivalent": STRING,
        "types": {"structural": STRING, "semantic": STRING, "detailed": STRING},
        "annotations": {
            part: [{"objectId": STRING, "value": STRING}]
            for part in ("question", "answer", "fullAnswer")
        },
        "semantic": [{"operation": STRING, "argument": STRING, "dependencies": ["int32"]}],
        "semanticStr": STRING,
        "image": "image",
    },
    "scienceqa": {
        "image": "image",
        "question": STRING,
        "choices": [STRING],
        "answer": "int8",
        **dict.fromkeys(("hint", "task", "grade", "subject", "topic", "category"), STRING),
        **dict.fromkeys(("skill", "lecture", "solution"), STRING),
    },
    "textvqa": {
        "image_id": STRING,
        "question_id": "int32",
        "question": STRING,
        "question_tokens": [STRING],
        "image": "image",
        "image_width": "int32",
        "image_height": "int32",
        "flickr_original_url": STRING,
        "flickr_300k_url": STRING,
        "answers": [STRING],
        "image_classes": [STRING],
        "set_name": STRING,
        "ocr_tokens": [STRING],
    },
    "mmbench": {
        "index": "int64",
        **dict.fromkeys(("question", "hint", "answer", "A", "B", "C", "D", "category"), STRING),
        "image": "image",
        **dict.fromkeys(("source", "L2-category", "comment", "split"), STRING),
    },
    "coco_cap": {
        "question_id": STRING,
        "image": "image",
        "question": STRING,
        "answer": [STRING],
        "id": "int64",
        "license": "int8",
        **dict.fromkeys(("file_name", "coco_url"), STRING),
        "height": "int32",
        "width": "int32",
        "date_captured": STRING,
    },
    "mmvet": {
        "question_id": STRING,
        "image": "image",
        **dict.fromkeys(("question", "answer", "image_source", "capability"), STRING),
    },
    "easy_vqa": {
        "question_id": "int64",
        "image_id": "int64",
        "image": "image",
        **dict.fromkeys(("question", "answer"), STRING),
    },
    "retrieval": {
        "question_id": "int64",
        "image": ["image"],
        **dict.fromkeys(("context", "question", "answer", "kind", "distance"), STRING),
        "k": "int64",
        **dict.fromkeys(("chance_in_view", "chance_blind"), "float64"),
        "image_source": STRING,
    },
}

# Without rows in the demo:
COLUMNS["vizwiz"] = {
    "question_id": STRING,
    "image": "image",
    "question": STRING,
    "answers": [STRING],
    "category": STRING,
}
COLUMNS["seedbench"] = {
    **dict.fromkeys(("answer", "choice_a", "choice_b", "choice_c", "choice_d"), STRING),
    **dict.fromkeys(("data_id", "data_type", "question", "question_id"), STRING),
    "question_type_id": "int16",
    "image": ["image"],
    "segment": ["int64"],
}
COLUMNS["mmmu"] = {
    **dict.fromkeys(("id", "question", "options", "explanation"), STRING),
    **{f"image_{number}": "image" for number in range(1, 8)},
    **dict.fromkeys(("img_type", "answer", "topic_difficulty", "question_type"), STRING),
    "subfield": STRING,
}
COLUMNS["llava_bench"] = {
    **dict.fromkeys(("question_id", "question"), STRING),
    "image": "image",
    **dict.fromkeys(("category", "image_id", "gpt_answer", "caption"), STRING),
}
COLUMNS["mmbench_cn"] = COLUMNS["mmbench"]


def features(task: str) -> Features:
    """The task's columns as a `datasets.Features`; the image column decodes to PIL pictures."""
    from datasets import Features

    return Features({name: _feature(kind) for name, kind in COLUMNS[task].items()})


def _feature(kind: str | list | dict):
    from datasets import Image, List, Value

    if isinstance(kind, dict):
        return {name: _feature(part) for name, part in kind.items()}
    if isinstance(kind, list):
        return List(_feature(kind[0]))
    return Image() if kind == "image" else Value(kind)
