"""Training: stages (what learns), schedule, optimizer, loop, checkpoints; run by vlmamba.train."""
