"""The import rules, over the syntax trees of all sources; and that scoring starts without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Folder -> modules that nothing in it may import; a rule covers their submodules too.
FORBIDDEN = {
    "vlmamba": ("harness", "tasks", "lmms_eval", "tests", "notebooks"),
    "vlmamba/models": ("vlmamba.data", "vlmamba.processing"),
    "vlmamba/demo": ("torch",),
    "vlmamba_core": ("torch", "vlmamba", "harness", "tasks", "tests", "notebooks"),
    "tasks": ("torch", "vlmamba", "harness", "lmms_eval", "tests", "notebooks"),
    "harness": ("tests", "notebooks"),
}
TORCH_FREE = "import tasks, harness.score, harness.run; [tasks.load(name) for name in tasks.NAMES]"


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import in a file, those inside functions too.

    `from a import b` counts as both a and a.b, for b may be a module.
    """
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join((*up, *([node.module] if node.module else [])))
            yield node.lineno, module
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_import_rules(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    broken = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in files
        for line, module in imported(path)
        if any(f"{module}.".startswith(f"{name}.") for name in FORBIDDEN[folder])
    ]
    assert not broken, "\n".join(broken)


def test_a_scan_on_the_cpu_loads_no_triton_kernel():
    code = (
        "import sys, torch, vlmamba; from vlmamba.models.selective_scan import selective_scan; "
        "import vlmamba.train, vlmamba.ask; x = torch.ones(1, 2, 3); "
        "selective_scan(x, x, -torch.ones(3, 4), torch.ones(1, 2, 4), torch.ones(1, 2, 4)); "
        "sys.exit(any(m.startswith('vlmamba.models.scan_backends.triton') for m in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("package", ["torch", "pydantic", "httpx", "jinja2"])
def test_scoring_and_a_refused_command_load_nothing_slow(package):
    code = f"{TORCH_FREE}; import sys; sys.exit({package!r} in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
