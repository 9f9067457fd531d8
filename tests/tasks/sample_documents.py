"""Two documents of every benchmark, in hub columns without the image, for tests of all tasks."""

from __future__ import annotations

import math

POPE = {"question": "Is there a dog?", "answer": "yes", "category": "random"}
MME = {"question_id": "OCR/1.jpg", "question": "Is it?", "category": "OCR"}
SCIENCEQA = {"question": "Is it?", "choices": ["no", "yes"], "answer": 1, "hint": "", "image": "x"}
MMBENCH = {"question": "What?", "hint": None, "C": math.nan, "L2-category": "l2"}
MMBENCH_CN = {"question": "图中是什么？", "hint": None, "C": math.nan, "L2-category": "l2"}
VQAV2 = {"question": "What is it?", "answer_type": "other", "image_id": 1}
TEXTVQA = {"question": "what does it say?", "image_id": "a", "ocr_tokens": ["STOP"]}
SEEDBENCH = {"question": "What?", "data_type": "image", "question_type_id": 5}
SEEDBENCH |= {"choice_a": "cat", "choice_b": "dog", "choice_c": "cow", "choice_d": "ape"}
MMMU = {"question": "What is in <image 1>?", "image_2": None}
LLAVA_BENCH = {"question": "What is it?", "category": "conv", "gpt_answer": "A cat."}
VIZWIZ = {"question": "What is it?", "category": "other"}
MMVET = {"question": "What is it?", "capability": "rec,ocr", "answer": "a <AND> b"}
RETRIEVAL = {"context": "", "k": 4, "distance": "near", "chance_in_view": 0.25}
DOCUMENTS = {
    "pope": [POPE, POPE | {"answer": "no"}],
    "mme": [MME | {"answer": "Yes"}, MME | {"answer": "No"}],
    "scienceqa": [SCIENCEQA, SCIENCEQA | {"answer": 0, "image": None}],
    "mmbench": [
        MMBENCH | {"index": 7, "answer": "A", "A": "cat", "B": "dog"},
        MMBENCH | {"index": 1_000_007, "answer": "B", "A": "dog", "B": "cat"},
    ],
    "mmbench_cn": [
        MMBENCH_CN | {"index": 7, "answer": "A", "A": "猫", "B": "狗"},
        MMBENCH_CN | {"index": 1_000_007, "answer": "B", "A": "狗", "B": "猫"},
    ],
    "vqav2": [
        VQAV2 | {"question_id": 1, "answers": ["cat"] * 10},
        VQAV2 | {"question_id": 2, "answers": ["2,000", "dogs", *["it's a dog"] * 8]},
    ],
    "textvqa": [
        TEXTVQA | {"question_id": 1, "answers": ["stop"] * 10},
        TEXTVQA | {"question_id": 2, "answers": ["2,000", *["dog's"] * 9]},
    ],
    "gqa": [
        {"question": "What is it?", "answer": answer, "imageId": "n1", "isBalanced": True}
        for answer in ("cat", "dog")
    ],
    "easy_vqa": [
        {"question": "what color is it?", "answer": answer, "image_id": 1}
        for answer in ("red", "yes")
    ],
    "retrieval": [
        RETRIEVAL | {"question": "Which word is it?", "answer": "cat", "kind": "word"},
        RETRIEVAL | {"question": "Is it?", "answer": "yes", "kind": "existence"},
    ],
    "coco_cap": [
        {"question_id": f"COCO_val2014_{i:012}.jpg", "answer": ["a cat", "the cat sits"]}
        for i in (1, 2)
    ],
    "vizwiz": [
        VIZWIZ | {"question_id": "VizWiz_val_00000001", "answers": ["cat"] * 10},
        VIZWIZ | {"question_id": "VizWiz_val_00000002", "answers": ["2,000", *["it's a dog"] * 9]},
    ],
    "seedbench": [
        SEEDBENCH | {"question_id": "1", "answer": "A"},
        SEEDBENCH | {"question_id": "2", "answer": "B"},
    ],
    "mmmu": [
        MMMU
        | {"id": "validation_Art_1", "question_type": "multiple-choice"}
        | {"options": "['cat', 'dog']", "answer": "A"},
        MMMU | {"id": "validation_Math_2", "question_type": "open", "options": "[]", "answer": "2"},
    ],
    "llava_bench": [LLAVA_BENCH | {"question_id": n, "caption": "A cat."} for n in (0, 1)],
    "mmvet": [MMVET | {"question_id": "v1_0"}, MMVET | {"question_id": "v1_1"}],
}
