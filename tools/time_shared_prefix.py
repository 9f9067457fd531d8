"""Time a POPE-shaped run of a transformers VLM: image prefixes shared, beside one prompt at a time.

    python tools/time_shared_prefix.py                   # about 160M random parameters, minutes
    python tools/time_shared_prefix.py --images 1 --small

18 questions an image, 765 shared tokens, 24 a question, 2 an answer, float32, encoder included.
Both ways take the same requests through the same class, in turn, `--repeats` times; `--lmms` adds
lmms-eval's llava_hf on the same folder.  Ends in one JSON line.  Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from harness.models.base import EvalModel, Limits, Picture, Request
from harness.models.resumable import Resumable
from harness.models.shared_prefix import ALONE
from harness.models.transformers import TransformersModel

QUESTIONS, SHARED, QUESTION, ANSWER = 18, 765, 24, 2
GRID, PATCH = 27, 14  # 729 image tokens; the rest of the shared ones are words
WORDS = 4000
LARGE = {"width": 768, "inner": 3072, "layers": 12, "vision": 512}
SMALL = {"width": 64, "inner": 96, "layers": 2, "vision": 32}
END_OF_PROMPT = 1  # "ASSISTANT:" after the question
LMMS_TEMPLATE = "{% for turn in messages %}LEAD{{ turn.content }} ASSISTANT:{% endfor %}"


def lead() -> str:
    """The words in front of an image."""
    return "".join(f"w{n} " for n in range(SHARED - GRID * GRID))


def save_model(folder: Path, sizes: dict[str, int]) -> None:
    """A LLaVA of these sizes with random weights and a tokenizer of words."""
    names = ["<unk>", "<pad>", "<eos>", "<image>", "ASSISTANT:", *(f"w{n}" for n in range(WORDS))]
    plain = Tokenizer(models.WordLevel({name: n for n, name in enumerate(names)}, "<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = hf.PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>"
    )
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    side = GRID * PATCH
    template = (
        "{% for turn in messages %}LEAD{% for part in turn['content'] %}"
        "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %} ASSISTANT:{% endfor %}"
    )
    processor = hf.LlavaProcessor(
        image_processor=hf.CLIPImageProcessor(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        ),
        tokenizer=words,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template.replace("LEAD", lead()),
    )
    common = {"num_hidden_layers": sizes["layers"]}
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(
            hidden_size=sizes["vision"],
            intermediate_size=4 * sizes["vision"],
            num_attention_heads=sizes["vision"] // 32,
            image_size=side,
            patch_size=PATCH,
            **common,
        ),
        text_config=hf.LlamaConfig(
            hidden_size=sizes["width"],
            intermediate_size=sizes["inner"],
            num_attention_heads=sizes["width"] // 32,
            vocab_size=len(words),
            **common,
        ),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=GRID * GRID,
    )
    torch.manual_seed(0)
    model = hf.LlavaForConditionalGeneration(config)
    # no end token: every answer has as many tokens as it may
    model.generation_config = hf.GenerationConfig(pad_token_id=words.pad_token_id)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def requests(images: int) -> list[Request]:
    """The questions, those of an image together."""
    found = []
    for image in range(images):
        color = (60 * image % 256, 200 - 40 * image % 200, 90)
        picture = Picture(f"image {image}", lambda c=color: Image.new("RGB", (640, 480), c))
        for n in range(QUESTIONS):
            words = (f"w{(97 * n + k) % WORDS}" for k in range(QUESTION - END_OF_PROMPT))
            found.append(Request("pope", len(found), " ".join(words), (picture,), Limits(ANSWER)))
    return found


def lmms_class(folder: str) -> EvalModel:
    """lmms-eval's llava_hf on the same weights; the video reader it imports is not needed."""
    if importlib.util.find_spec("decord") is None:
        sys.modules["decord"] = types.SimpleNamespace(VideoReader=None, cpu=None)  # type: ignore[assignment]
    from harness.models.lmms_models import LmmsModel

    settings = {
        "pretrained": folder,
        "dtype": "float32",
        "device": "cpu",
        "device_map": "cpu",
        "batch_size": 1,
        "chat_template": LMMS_TEMPLATE.replace("LEAD", lead()),
    }
    return LmmsModel("llava_hf", settings)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="a model of no size: does it run?")
    parser.add_argument("--lmms", action="store_true", help="time lmms-eval's class too")
    args = parser.parse_args(argv)
    asked = requests(args.images)
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), SMALL if args.small else LARGE)
        shared = TransformersModel(folder, dtype="float32", device="cpu", agreement=0)
        contenders: dict[str, EvalModel] = {
            "shared": shared,
            "alone": TransformersModel(
                folder, dtype="float32", device="cpu", mode=ALONE, agreement=0
            ),
        }
        if args.lmms:
            contenders["lmms"] = lmms_class(folder)
        prompt = shared.prompt(asked[0])
        answers: dict[str, list[str | None]] = {}
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(args.repeats + 1):  # the first is not counted
            for name, model in contenders.items():
                began = time.perf_counter()
                answers[name] = Resumable(model).answer(asked)
                times[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(spent[1:] or spent) for name, spent in times.items()}
    found = {
        "parameters": shared.parameters,
        "mode": shared.mode,
        "shared_tokens": prompt.shared,
        "question_tokens": len(prompt.question),
        "questions": len(asked),
        "seconds": times,
        "different_answers": sum(
            len(set(same)) > 1 for same in zip(*answers.values(), strict=True)
        ),
        "times_faster": {n: medians[n] / medians["shared"] for n in medians if n != "shared"},
    }
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
