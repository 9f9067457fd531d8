"""Joules of a GPU by NVML's counter (package nvidia-ml-py); None where there is none."""

from __future__ import annotations

from typing import Any


class EnergyMeter:
    """Reads the counter of `device`."""

    def __init__(self, device: str) -> None:
        self._read = _nvml_counter(device) if device.startswith("cuda") else None

    def joules(self) -> float | None:
        """The counter now."""
        return self._read() if self._read else None

    def since(self, before: float | None, runs: int) -> float | None:
        """Joules for each of `runs` since the counter stood at `before`."""
        now = self.joules()
        return None if now is None or before is None else (now - before) / runs


def _nvml_counter(device: str) -> Any:
    try:
        import pynvml
        import torch

        pynvml.nvmlInit()
        # NVML numbers the cards of the machine, CUDA those that it may see, and in another order
        uuid = torch.cuda.get_device_properties(device).uuid
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # no package, no driver, a card without a counter: each its own class
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
