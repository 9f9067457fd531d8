"""Models under evaluation.

base        what the harness asks of any model: `EvalModel`, a `Request`, its `Picture`s
resumable   journal, unreadable images, batches that do not fit, ranks, timing: around any model
vlmamba     this project's checkpoints: grouped by image, one prefill shared by its questions
transformers  any image-text-to-text model of transformers, its prompts in `templates`
shared_prefix one image prefix for all questions of a picture, in exact batches, for any such model
api         a model behind an OpenAI-compatible endpoint, its client in `endpoint`
lmms        the same model as an lmms-eval model class, for lmms-eval's own command
"""

BUNDLED_MODELS = ("nano", "demo")  # vlmamba.checkpoints knows them too, but comes with torch
