"""The bundled models: their files, their ways of loading, runs of them."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

from harness import run
from vlmamba.chat_template import CHAT_TEMPLATE
from vlmamba.checkpoints import BUNDLED, load
from vlmamba.models.vlm import VLMambaForConditionalGeneration

FOLDER = BUNDLED["nano"]
EACH = pytest.mark.parametrize("name", BUNDLED)
QUESTION = "Is there a cat in the image?\nAnswer the question using a single word or phrase."
GRAY = Image.new("RGB", (224, 224), "gray")


@EACH
def test_it_is_small_safetensors_without_the_encoder(name):
    folder = BUNDLED[name]
    assert sum(file.stat().st_size for file in folder.iterdir()) < 10e6
    assert not [*folder.glob("*.bin"), *folder.glob("*.pt")]
    model, _ = load(name)
    assert model.dtype == torch.float32
    assert (folder / "chat_template.jinja").read_text() == CHAT_TEMPLATE


def test_the_demo_model_is_the_papers_and_its_twin_of_equal_size_has_attention():
    demo, twin = (load(name)[0] for name in ("nano", "nano-attention"))
    assert demo.config.connector == "vss_l2" and demo.config.scan == "bsm"
    assert demo.config.text_config.mixer == "mamba"
    assert twin.config.text_config.mixer == "attention,mlp"
    sizes = [sum(p.numel() for p in m.language_model.parameters()) for m in (demo, twin)]
    assert abs(sizes[0] / sizes[1] - 1) < 0.03


@EACH
def test_auto_classes_and_a_round_trip(name, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(BUNDLED[name])
    processor = AutoProcessor.from_pretrained(BUNDLED[name])
    assert isinstance(model, VLMambaForConditionalGeneration)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, same = load(str(tmp_path))
    inputs = processor(
        text=processor.conversation_prompt(QUESTION), images=GRAY, return_tensors="pt"
    )
    with torch.inference_mode():
        assert torch.equal(again(**inputs).logits, model.eval()(**inputs).logits)
    assert same.encode("a cat") == processor.encode("a cat")


def test_the_pipeline_answers():
    pipe = pipeline("image-text-to-text", model=str(FOLDER))
    content = [{"type": "image", "image": GRAY}, {"type": "text", "text": QUESTION}]
    outputs = pipe(
        text=[{"role": "user", "content": content}], max_new_tokens=4, return_full_text=False
    )
    assert outputs[0]["generated_text"].strip() in ("Yes", "No")


def test_a_run_gives_a_record_with_every_question(tmp_path):
    common = ["--tasks", "pope", "--style", "validation"]
    assert run.main([*common, "--out", str(tmp_path / "sees")]) == 0
    assert run.main([*common, "--blind", "--out", str(tmp_path / "blind")]) == 0
    records = {
        name: json.loads((tmp_path / name / "record.json").read_text())
        for name in ("sees", "blind")
    }
    assert records["sees"]["tasks"]["pope"]["n"] == 1296
    assert records["sees"]["label"] == "demo: not comparable with published numbers"
    scores = {name: record["tasks"]["pope"]["metrics"] for name, record in records.items()}
    assert scores["sees"]["f1"]["value"] > 0.88
    assert abs(scores["blind"]["accuracy"]["value"] - 0.5) < 0.05
