"""What model, harness and benchmarks share, without torch: errors, commands, folders."""
