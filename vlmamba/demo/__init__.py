"""The demo world: generated pictures, training conversations and benchmark files.

`build_training_data` and `build_benchmark` write them; `demo_benchmark` gives a cached file.
`python -m vlmamba.demo --help` is the command line.
"""

from vlmamba.demo.benchmarks import BENCHMARKS, build_benchmark, cache_dir, demo_benchmark
from vlmamba.demo.conversations import build_training_data

__all__ = ["BENCHMARKS", "build_benchmark", "build_training_data", "cache_dir", "demo_benchmark"]
