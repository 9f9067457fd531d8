"""Training data: LLaVA-format JSON to batches, and the generated demo world."""
