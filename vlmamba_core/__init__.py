"""What model, harness and benchmarks share, without torch: errors, commands, folders."""

__version__ = "0.1.0"  # of the distribution: pyproject.toml reads it here
