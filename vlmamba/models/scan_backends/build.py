"""Build the C++ kernels at first use and keep them: `kernels()` is the loaded module, or None.

Sources are in `vlmamba/models/csrc`; the compiled module goes to `$VLMAMBA_CACHE` (default
`~/.cache/vlmamba`), under a key of the sources, PyTorch, Python and the instruction set, so one
cache may serve different machines. The build needs a C++20 compiler, takes about half a minute and
no network. Each process builds in a directory of its own and renames the result into place, so
processes that start together cannot disturb each other. A kept module ends with its own digest (a
loader reads what its headers name, not what follows); one that does not fit it is built anew.

The instruction set is chosen when building: the one PyTorch reports for this machine. PyTorch's own
switch picks a lower one: `ATEN_CPU_CAPABILITY=avx2` or `default`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from vlmamba_core.paths import cache_dir

DIGEST_BYTES = 32
SOURCES = Path(__file__).parents[1] / "csrc"
_AVX2 = ("-mavx2", "-mfma")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl")
INSTRUCTION_SETS = {
    "AVX512_BF16": (*_AVX512, "-mavx512bf16"),
    "AVX512": _AVX512,
    "AVX2": _AVX2,
    "DEFAULT": (),  # what the compiler assumes: SSE2 or NEON
}
# Products and sums may contract to FMA; nothing else about floating point is relaxed.
_FLAGS = ("-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")


@functools.cache
def kernels() -> Any:
    """The module for this machine; without a working compiler None, with one warning why."""
    try:
        return load_kernels(instruction_set())
    except (OSError, RuntimeError, ImportError, subprocess.CalledProcessError) as error:
        reason = " ".join(str(error).split())[:300]
        warnings.warn(
            "the C++ scan kernels could not be built, so the slower 'torch' backend runs instead; "
            f"install a C++20 compiler (g++ or clang++) and ninja to build them. Reason: {reason}",
            stacklevel=2,
        )
        return None


def instruction_set() -> str:
    """The one of INSTRUCTION_SETS that this machine has, at most the one PyTorch is told to use."""
    name = torch.backends.cpu.get_cpu_capability()
    return "AVX512_BF16" if name == "AVX512" and has_bfloat16_products() else name


def has_bfloat16_products() -> bool:
    """Whether the processor multiplies bfloat16 itself, twice as fast as float32 or faster."""
    return bool(torch.cpu._is_avx512_bf16_supported())


def load_kernels(instruction_set: str) -> ModuleType:
    """The kernels for one of INSTRUCTION_SETS ("DEFAULT" for an unknown one), built if need be."""
    flags = (*_FLAGS, *INSTRUCTION_SETS.get(instruction_set, ()))
    name = f"vlmamba_kernels_{instruction_set.lower()}"
    folder = cache_dir() / "kernels" / _key(flags)
    file = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not _intact(file):
        return _build(name, flags, file)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None  # always so for an existing file
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _intact(file: Path) -> bool:
    """Whether the module is there and ends with the digest of what comes before."""
    content = file.read_bytes() if file.exists() else b""
    return content[-DIGEST_BYTES:] == hashlib.sha256(content[:-DIGEST_BYTES]).digest()


def _key(flags: tuple[str, ...]) -> str:
    digest = hashlib.sha256(repr((torch.__version__, sys.version, flags)).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def _build(name: str, flags: tuple[str, ...], file: Path) -> ModuleType:
    from torch.utils import cpp_extension  # slow to import, and not needed once built

    file.parent.mkdir(parents=True, exist_ok=True)
    path = os.environ.get("PATH", "")
    # ninja may be installed beside a Python whose environment is not activated
    os.environ["PATH"] = os.pathsep.join((path, sysconfig.get_path("scripts")))
    try:
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            module = cpp_extension.load(
                name,
                [str(source) for source in sorted(SOURCES.glob("*.cpp"))],
                extra_cflags=list(flags),
                extra_ldflags=["-fopenmp"],
                build_directory=folder,
            )
            built = Path(folder) / f"{name}.so"
            content = built.read_bytes()
            sealed = Path(folder) / file.name  # not the loaded file itself: that is in use
            sealed.write_bytes(content + hashlib.sha256(content).digest())
            os.replace(sealed, file)
    finally:
        os.environ["PATH"] = path
    return module
