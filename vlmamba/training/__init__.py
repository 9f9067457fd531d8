"""Training: stages (what is trainable), schedule, optimizer, loop, trainer state."""
