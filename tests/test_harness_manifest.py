"""lmms-eval finds the model by its entry point, and finding it loads no torch."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points

from harness.models.manifest import vlmamba


def test_entry_point_names_the_manifest():
    found = [ep for ep in entry_points(group="lmms_eval.models") if ep.name == "vlmamba"]
    assert [ep.value for ep in found] == ["harness.models.manifest:vlmamba"]


def test_registry_resolves_to_the_class():
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    from harness.models.lmms import VLMamba, VLMambaChat

    registry = ModelRegistryV2()
    for manifest in vlmamba():
        registry.register_manifest(manifest)
    assert registry.get_model_class("vlmamba") is VLMamba
    assert registry.get_model_class("vlmamba_chat") is VLMambaChat
    assert registry.get_model_class("vlmamba_chat", force_simple=True) is VLMamba


def test_checking_arguments_loads_no_torch():
    code = (
        "import sys; from harness.run import main; code = main(['--tasks', 'popr'])\n"
        "assert code == 2 and 'torch' not in sys.modules and 'lmms_eval' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_whoever_imports_the_manifest_first_keeps_lmms_eval_whole():
    code = (
        "import harness.models.manifest\n"
        "from lmms_eval.models import MODEL_REGISTRY_V2\n"
        "assert 'vlmamba' in MODEL_REGISTRY_V2.list_model_names()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
