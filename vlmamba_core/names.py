"""Names that a person types: in any case, and the usual short ones of numeric types.

choose("protocol", "Paper", PROTOCOLS)      # -> "paper"
choose_dtype("BF16", ("float32", "bfloat16"))   # -> "bfloat16"
"""

from __future__ import annotations

from collections.abc import Iterable

from vlmamba_core.errors import unknown

SCAN_BACKENDS = ("auto", "reference", "torch", "cpu", "cuda", "triton")
QUANTIZED = ("int8", "int4")  # kinds of vlmamba.models.quantized
SAME_DTYPE = (
    ("float32", "fp32", "f32", "float"),
    ("bfloat16", "bf16"),
    ("float16", "fp16", "f16", "half"),
)


def match(name: str, known: Iterable[str]) -> str | None:
    """The one of `known` that `name` spells, in any case; None where that is none, or several."""
    names = list(known)
    if name in names:
        return name
    spelled = str(name).strip().casefold()
    found = [one for one in names if one.casefold() == spelled]
    return found[0] if len(found) == 1 else None


def choose(kind: str, name: str, known: Iterable[str]) -> str:
    """The one of `known` that `name` spells, in any case.

    Raises UserError, which lists the known ones, nearest first, where there is none.
    """
    names = list(known)
    found = match(name, names)
    if found is None:
        raise unknown(kind, str(name), names)
    return found


def choose_dtype(name: str, known: Iterable[str]) -> str:
    """The one of `known` that means the numeric type `name`: bf16 is bfloat16, half is float16.

    Raises UserError as `choose` does.
    """
    names = list(known)
    for same in SAME_DTYPE:
        if match(name, same):
            meant = [one for one in names if one in same]
            if meant:
                return meant[0]
    return choose("dtype", name, names)
