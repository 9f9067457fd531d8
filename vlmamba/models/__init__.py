"""The boxes of the paper's figure, one file each: vision, connector (2D scan), Mamba, the whole."""
