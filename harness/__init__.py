"""The harness: benchmarks run through lmms-eval, scored, given intervals and written as records.

Start at `harness.run` (`python -m harness.run --help`).
"""
