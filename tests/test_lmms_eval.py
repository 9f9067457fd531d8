"""What the harness uses of lmms-eval is where it was; else the name that has moved is printed.

`harness/models/lmms*.py` override and read things that lmms-eval does not promise to keep.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
USERS = {
    "harness/models/lmms.py",
    "harness/models/lmms_models.py",
    "harness/models/lmms_rows.py",
    "harness/models/lmms_tasks.py",
    "harness/models/manifest.py",
}
MOVED = "lmms-eval has moved: {} is no longer in {}; harness/models/lmms*.py use it"

# Module -> names of it, with the parameters that are given to them by name
NAMES = {
    "lmms_eval.api.instance": {
        "Instance": ("request_type", "arguments", "idx", "metadata", "resps"),
        "GenerationResult": ("text",),
        "unwrap_generation_output": (),
    },
    "lmms_eval.api.metrics": {},
    "lmms_eval.api.model": {"lmms": ()},
    "lmms_eval.api.task": {"ConfigurableTask": ("config", "model_name")},
    "lmms_eval.models": {},
    "lmms_eval.models.registry_v2": {
        "ModelManifest": ("model_id", "simple_class_path", "chat_class_path"),
    },
    "lmms_eval.tasks": {"TaskManager": ()},
    "lmms_eval.utils": {"load_yaml_config": ("mode",), "simple_parse_args_string": ()},
}
# Class -> methods that are overridden or called, and attributes that are set or read
MEMBERS = {
    "lmms_eval.api.instance:Instance": {"args", "filtered_resps", "metadata"},
    "lmms_eval.api.model:lmms": {
        *("generate_until", "generate_until_multi_round", "loglikelihood", "is_simple"),
        *("task_dict",),
    },
    "lmms_eval.api.task:ConfigurableTask": {
        *("download", "process_results", "aggregation", "dataset", "dataset_no_image"),
        *("eval_docs_no_media", "construct_requests", "fewshot_context", "_filters", "VERSION"),
        *("doc_to_choice", "doc_to_target"),
    },
    "lmms_eval.models.registry_v2:ModelRegistryV2": {"get_model_class", "list_model_names"},
    "lmms_eval.api.task:TaskConfig": {
        *("test_split", "validation_split", "num_fewshot", "repeats", "doc_to_choice", "task"),
        *("process_results_use_image", "reasoning_tags", "auto_strip_thinking", "output_type"),
    },
    "lmms_eval.tasks:TaskManager": {"all_subtasks", "task_index"},
}
# Texts of lmms-eval's source: keys and shapes of what it passes
WRITTEN = {
    "lmms_eval.models": ["MODEL_REGISTRY_V2 ="],
    "lmms_eval.api.task": [
        *('"__padding_only__"', "self.doc_to_visual, doc_id, self.config.task"),
        "(ctx, self.doc_to_messages, copy.deepcopy(self.config.generation_kwargs), doc_id",
        "return (None, True, prev_out, prev_info)",
        "pred = np.argmin(lls)",  # a likelihood is given as a loss
        "lls_unconditional = lls[1::2]",
    ],
    "lmms_eval.api.filter": ["inst.filtered_resps[self.name] = resp"],
    "lmms_eval.evaluator": [
        "instances.sort(key=lambda x: x.idx)",
        '"__padding_only__"',
        "lm.task_dict[task_name] = task_obj.dataset",
    ],
}


@pytest.mark.parametrize("module", NAMES)
def test_names_and_parameters(module):
    loaded = importlib.import_module(module)
    for name, parameters in NAMES[module].items():
        assert hasattr(loaded, name), MOVED.format(name, module)
        known = inspect.signature(getattr(loaded, name)).parameters
        for parameter in parameters:
            assert parameter in known, MOVED.format(f"{name}({parameter}=)", module)


@pytest.mark.parametrize("owner", MEMBERS)
def test_members(owner):
    module, _, name = owner.partition(":")
    loaded = getattr(importlib.import_module(module), name)
    source = inspect.getsource(loaded)
    for member in MEMBERS[owner]:
        known = hasattr(loaded, member) or any(f"{x}{member}" in source for x in ("self.", "    "))
        assert known, MOVED.format(member, owner)


@pytest.mark.parametrize("module", WRITTEN)
def test_keys_and_shapes(module):
    source = inspect.getsource(importlib.import_module(module))
    for text in WRITTEN[module]:
        assert text in source, MOVED.format(text, module)


def test_the_model_class_overrides_all_that_lmms_eval_asks_for():
    from harness.models.lmms import VLMamba

    assert not VLMamba.__abstractmethods__, MOVED.format("an abstract method", "lmms")


def test_only_these_files_of_the_harness_know_lmms_eval():
    users = set()
    for path in (ROOT / "harness").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "lmms_eval" for name in names):
                users.add(str(path.relative_to(ROOT)))
    assert users == USERS
