"""Which processor this is, as the system calls it."""

from __future__ import annotations

from pathlib import Path


def processor_name(info: Path = Path("/proc/cpuinfo")) -> str:
    """The model's name; "unknown" where the system does not say it."""
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown"
