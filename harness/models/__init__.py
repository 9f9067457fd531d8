"""Models under evaluation.

base        what the harness asks of any model: `EvalModel`, a `Request`, its `Picture`s
resumable   journal, unreadable images, batches that do not fit, timing: around any model
cost        what one question costs, measured the same way for every kind of model
ranks       processes of one run: whose question is whose, and what one does when another dies
registry    models by kind: `--model KIND:NAME`
vlmamba     this project's checkpoints: grouped by image, one prefill shared by its questions
transformers  any image-text-to-text model of transformers, its prompts in `templates`
shared_prefix one image prefix for all questions of a picture, in exact batches, for any such model
api         a model behind an OpenAI-compatible endpoint, its client in `endpoint`
lmms        all that is lmms-eval's: its model class around ours, its own tasks as a check
lmms_models any of lmms-eval's model classes
"""

DTYPES = ("float32", "bfloat16", "float16")
# vlmamba.checkpoints knows them too, but comes with torch
BUNDLED_MODELS = ("nano", "demo", "nano-attention")
