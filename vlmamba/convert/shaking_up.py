"""What Mamba-VL and Pythia-VL share ("Shaking up VLMs", 2409.05395; gpantaz/vl_mamba).

    ### patches && patches ... ### QUESTION\\n ANSWER <|endoftext|>

EVA-02-CLIP's normed patches, a two-layer MLP, and separators after the rows of patches; all
weights are in the checkpoint, as safetensors of transformers' Trainer.  In training a question for
a short answer was written "Answer the question using a single word or phrase.", line break,
"Question: ...", line break, "Answer: "; a question that ends with LLaVA's such sentence is written
so, every other one as in their conversations.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vlmamba.config import VLMambaConfig
from vlmamba.convert.encoders import EVA02_RULES, eva02_fields
from vlmamba.convert.rules import Absent, Rule
from vlmamba.convert.system import Parts
from vlmamba.weight_files import language_model_files, read_object, tensors
from vlmamba_core.errors import UserError

ENCODER = "timm/eva02_large_patch14_clip_336"
CONNECTOR = [Rule(r"connector\.mlp\.(\d)\.(.+)", r"vision_embed_tokens.\1.\2")]
SHORT = "Answer the question using a single word or phrase."

CHAT_TEMPLATE = (
    "{% for message in messages %}{% set turn = namespace(text='', images=0) %}"
    "{% if message['content'] is string %}{% set turn.text = message['content'] %}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{% set turn.images = turn.images + 1 %}"
    "{% elif part['type'] == 'text' %}{% set turn.text = turn.text + part['text'] %}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% set turn.images = turn.images + turn.text.split('<image>')|length - 1 %}"
    "{% set turn.text = turn.text.replace('<image>', '').strip() %}"
    "{{ '<image>' * turn.images }}"
    "{% if message['role'] == 'user' and turn.text.endswith('\n" + SHORT + "') %}"
    "{{ '" + SHORT + "\nQuestion: ' + turn.text[:-" + str(len(SHORT) + 1) + "] + '\nAnswer: ' }}"
    "{% else %}{{ turn.text + '\n' }}{% endif %}{% endfor %}"
)


def folder_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a saved model. Raises UserError."""
    if not path.is_dir():
        raise UserError(f"{path} is no folder; expected one with config.json and *.safetensors")
    return dict(tensors(language_model_files(path)))


def settings(path: Path) -> dict[str, Any]:
    """Its config.json. Raises UserError, also for another encoder than EVA-02."""
    found = read_object(path / "config.json")
    encoder = found.get("vision_encoder_name", ENCODER)
    if "eva02" not in str(encoder):
        raise UserError(
            f"{path}: vision_encoder_name is {encoder!r} in its config.json; expected {ENCODER}"
        )
    return found


def parts(
    path: Path,
    found: Mapping[str, Tensor],
    language: Mapping[str, Any],
    rules: list[Rule],
    aside: tuple[str, ...] = (),
) -> Parts:
    """Language model and its rules, with the encoder and the connector of both."""
    config = VLMambaConfig(
        **language,
        connector="mlp",
        vision_config=eva02_fields(found, str(path)),
        vision_feature_layer=-1,
    )
    everything: list[Rule | Absent] = [*rules, *CONNECTOR, *EVA02_RULES]
    return Parts(
        config,
        found,
        everything,
        aside,
        CHAT_TEMPLATE,
        image_layout="row_separators",
    )
