"""Tells lmms-eval about the model (entry-point group `lmms_eval.models`); imports no torch.

With the package installed, `lmms-eval --model vlmamba --model_args pretrained=nano ...` works, and
`--model vlmamba_chat` for tasks that bring chat messages.  They are two names because lmms-eval
runs a model that has both classes under one name as a chat model, which no multiple_choice task
can be asked of.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

MODEL_ID = "vlmamba"
CLASSES = "harness.models.lmms.VLMamba", "harness.models.lmms.VLMambaChat"


def vlmamba() -> list[ModelManifest]:
    """The manifests that lmms-eval's model registry collects from the entry point."""
    # not above: lmms-eval reads the entry point while it is imported, and would find half a module
    from lmms_eval.models.registry_v2 import ModelManifest

    simple, chat = CLASSES
    return [
        ModelManifest(model_id=MODEL_ID, simple_class_path=simple),
        ModelManifest(f"{MODEL_ID}_chat", simple_class_path=simple, chat_class_path=chat),
    ]
