"""A model behind a local page and an OpenAI-compatible endpoint: `python -m vlmamba.serve`."""
