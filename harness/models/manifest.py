"""Tells lmms-eval about the model (entry-point group `lmms_eval.models`); imports no torch.

With the package installed, `lmms-eval --model vlmamba --model_args pretrained=nano ...` works.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

MODEL_ID = "vlmamba"


def vlmamba() -> ModelManifest:
    """The manifest that lmms-eval's model registry collects from the entry point."""
    # not above: lmms-eval reads the entry point while it is imported, and would find half a module
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=MODEL_ID, simple_class_path="harness.models.lmms.VLMamba")
