"""All that is measured on a GPU, in one command, into results/gpu: `make gpu-check`.

    python tools/gpu_check.py                          # one card with 80 GB, some 20 minutes
    python tools/gpu_check.py --device cpu --tiny --out /tmp/check      # what of it runs anywhere

The gpu-marked tests; prefill, decoding and the shapes of two benchmarks at 130M; scan, step,
prefill, decoding and an update of each training stage at 130M and 2.8B in bfloat16 beside
mamba-ssm, transformers and FlashAttention; latency and peak memory by length up to 64k tokens at
both sizes; tables and plots of it.  A step that fails or takes too long is recorded in check.json,
and the next one runs.  On a GPU: not run so far.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

LENGTHS = "1024,4096,16384,65536"
MODELS = {
    "130m": "vl-mamba-130m,transformers-mamba-130m,pythia-160m",
    "2.8b": "vl-mamba-2.8b,transformers-mamba-2.8b,pythia-2.8b",
}


def steps(device: str, tiny: bool, out: Path) -> list[tuple[str, int, list[str]]]:
    """(name, seconds it may take, arguments of Python) in order."""
    found = [("tests", 180, ["-m", "pytest", "-q", "-m", "gpu", "tests"])]
    if not tiny:
        bench = ["-m", "harness.bench", "--quick", "--device", device]
        bench += ["--only", "prefill,lengths,decode,rows,pope,mme", "--json", f"{out}/bench.json"]
        found.append(("bench", 240, bench))
    parts = ["tools/time_gpu_parts.py", "--device", device, "--out", f"{out}/parts.json"]
    found.append(("parts", 240, [*parts, *["--tiny"] * tiny]))
    for size, names in MODELS.items():
        profile = ["-m", "harness.profile", "--models", names, "--device", device]
        profile += ["--dtype", "bfloat16", "--time-limit", "30", "--out", f"{out}/profile-{size}"]
        profile += ["--seq-lens", "128" if tiny else LENGTHS]
        profile += ["--tiny", "--image-tokens", "0", "--decode", "2"] if tiny else []
        found.append((f"profile {size}", 210, profile))
    for kind in ("tables", "plots"):
        made = ["-m", f"harness.{kind}", "--from", str(out), "--out", f"{out}/{kind}"]
        found.append((kind, 60, made))
    return found


def main() -> int:
    """Run every step; 1 where one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="shrink every model, for tests")
    parser.add_argument("--out", type=Path, default=Path("results/gpu"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    record = {}
    for name, limit, command in steps(arguments.device, arguments.tiny, arguments.out):
        print(f"{name}: python {' '.join(command)}", flush=True)
        began = time.perf_counter()
        try:
            code = subprocess.run([sys.executable, *command], timeout=limit).returncode
        except subprocess.TimeoutExpired:
            code = -1
        said = "took too long" if code == -1 else f"exit code {code}"
        record[name] = {"result": said, "seconds": round(time.perf_counter() - began, 1)}
        (arguments.out / "check.json").write_text(json.dumps(record, indent=2) + "\n")
    bad = [name for name, step in record.items() if step["result"] != "exit code 0"]
    print(f"failed: {', '.join(bad)}" if bad else "all steps ran")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
