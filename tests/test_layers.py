"""The rooms of the house: arrows go down only, no circle, private names in named files only.

Imports inside functions count; those under `if TYPE_CHECKING` do not, for nothing is loaded.
"""

from __future__ import annotations

import ast
import pkgutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A room may import what stands in lines below its own; rooms of one line do not know each other.
LAYERS = (
    ("harness",),  # the commands
    ("harness.controlled",),
    ("harness.ablation",),
    ("harness.reporting",),
    ("harness.speed",),
    ("harness.runs",),
    ("harness.scoring",),
    ("harness.models",),
    ("harness.data",),
    ("tasks", "vlmamba"),
    ("vlmamba_core",),
)
LEVELS = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}


def modules() -> dict[str, Path]:
    """Name -> file of every module of ours."""
    found = {}
    for package in ("vlmamba_core", "vlmamba", "harness", "tasks"):
        for file in sorted((ROOT / package).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


MODULES = modules()


def loaded(file: Path) -> Iterator[tuple[int, str]]:
    """(line, module of ours) of every import in a file that happens at some time."""
    pending: list[ast.AST] = [ast.parse(file.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, a.name) for a in node.names if a.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            inner = [name for name in names if name in MODULES]
            yield from ((node.lineno, name) for name in inner)
            if len(inner) < len(names) and node.module in MODULES:
                yield node.lineno, node.module
        else:
            pending += ast.iter_child_nodes(node)


IMPORTS = {name: sorted(set(loaded(file))) for name, file in MODULES.items()}


def room(module: str) -> str:
    """The room a module stands in: its longest prefix that LAYERS names."""
    parts = module.split(".")
    prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next(prefix for prefix in prefixes if prefix in LEVELS)


def test_every_folder_of_the_harness_is_a_room():
    folders = {p.name for p in (ROOT / "harness").iterdir() if (p / "__init__.py").is_file()}
    assert {f"harness.{name}" for name in folders} == {
        r for r in LEVELS if r.startswith("harness.")
    }


@pytest.mark.parametrize("upper", LEVELS)
def test_arrows_go_down(upper):
    wrong = [
        f"{module}:{line} imports {target}"
        for module, targets in IMPORTS.items()
        if room(module) == upper
        for line, target in targets
        if room(target) != upper and LEVELS[room(target)] <= LEVELS[upper]
    ]
    assert not wrong, "\n".join(wrong)


def circles() -> list[list[str]]:
    """Strongly connected parts of more than one module (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for _, target in IMPORTS[name]:
            if target not in index:
                visit(target)
                low[name] = min(low[name], low[target])
            elif target in stack:
                low[name] = min(low[name], index[target])
        if low[name] == index[name]:
            part = []
            while not part or part[-1] != name:
                part.append(stack.pop())
            if len(part) > 1:
                found.append(sorted(part))

    for name in IMPORTS:
        if name not in index:
            visit(name)
    return found


def test_there_is_no_circle():
    assert circles() == []


# File -> names that transformers, lmms-eval and others do not promise to keep. A release that moves
# one breaks that file only.
PRIVATE: dict[str, set[str]] = {
    "vlmamba/models/generate.py": {
        *("_expand_inputs_for_generation", "_prefill", "_prepare_cache_for_generation"),
    },
    "vlmamba/models/vlm.py": {
        *("_init_weights", "_is_stateful", "_no_split_modules"),
        *("_supports_flash_attn", "_supports_sdpa"),
    },
    "vlmamba/processing.py": {"_defaults", "_process_images"},
}  # lmms-eval's, with those that have no underscore: tests/test_lmms_eval.py
LIBRARIES = ("transformers", "lmms_eval", "datasets", "tqdm", "accelerate", "peft", "timm")


def foreign_names(tree: ast.Module) -> dict[str, str]:
    """Name in a file -> what it is, of everything imported from LIBRARIES."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {
                (a.asname or a.name.split(".")[0]): a.name if a.asname else a.name.split(".")[0]
                for a in node.names
                if a.name.split(".")[0] in LIBRARIES
            }
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in LIBRARIES:
            found |= {(a.asname or a.name): f"{node.module}.{a.name}" for a in node.names}
    return found


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def private_names(file: Path) -> set[str]:
    """Private names of LIBRARIES that a file imports, reads off them, or overrides."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    names = foreign_names(tree)
    found = {path.rpartition(".")[2] for path in names.values()}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).split(".")[0] in names:
            found.add(node.attr)
        elif isinstance(node, ast.ClassDef):
            bases = [ast.unparse(base).split("[")[0].partition(".") for base in node.bases]
            paths = [names[root] + dot + rest for root, dot, rest in bases if root in names]
            found |= overridden(node, paths)
    return {name for name in found if is_private(name)}


def overridden(node: ast.ClassDef, bases: Sequence[str]) -> set[str]:
    """The names that a class defines, sets or reads off itself and that its foreign bases have."""
    theirs: set[str] = set()
    for path in bases:
        theirs |= set(dir(pkgutil.resolve_name(path)))
    mine = {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
    mine |= {n.name for n in ast.walk(node) if isinstance(n, ast.FunctionDef)}
    mine |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    return mine & theirs


def test_private_names_of_libraries_are_in_the_files_that_say_so():
    used = {
        str(file.relative_to(ROOT)): names
        for file in MODULES.values()
        if (names := private_names(file))
    }
    assert used == PRIVATE
