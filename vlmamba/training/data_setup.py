"""A stage's training examples: the data file read and indexed, pictures or their cached features.

What several processes share is written by the main one: the token file of plain text, the index of
a LLaVA file, the cache of features.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from vlmamba.data import examples, feature_cache, index, llava, text
from vlmamba.data.examples import ConversationExamples
from vlmamba.data.images import ImageSource, PixelImages
from vlmamba.training.evaluation import Evaluation
from vlmamba.training.plan import Plan
from vlmamba.training.resume import data_digests
from vlmamba_core.errors import UserError


def build_examples(
    plan: Plan,
    model: Any,
    processor: Any,
    accelerator: Accelerator,
    digests: list[str],
    resuming: bool,
) -> examples.Examples:
    """The stage's training examples; files that they need are written by the main process."""
    args, stage = plan.args, plan.stage
    if stage.template is None:
        tokens = args.folder / "tokens.u32"
        with accelerator.main_process_first():
            if accelerator.is_main_process:
                text.tokenize_documents(args.data, processor, tokens)
        return text.PackedText(tokens, plan.hyper.max_length)
    settings = index_settings(plan, processor, digests[0])
    file, found = index_once(plan, processor, settings, accelerator, resuming)
    accelerator.print(found.describe())
    source = image_source(plan, file, found, model, processor, accelerator)
    template, length = stage.template, plan.hyper.max_length
    return examples.ConversationExamples(file, found, processor, template, length, source)


def first_examples(
    plan: Plan, model: Any, processor: Any, accelerator: Accelerator
) -> examples.Examples:
    """Examples for a dry run: no token file, no index and no cache of features is written."""
    args, template, length = plan.args, plan.stage.template, plan.hyper.max_length
    if template is None:
        wanted = plan.hyper.batch_size * length
        return text.PackedText(text.first_tokens(args.data, processor, wanted), length)
    file, main = llava.LlavaFile(one_file(plan)), accelerator.is_main_process
    most = image_tokens(processor)
    found = llava.index_samples(
        file,
        args.images,
        most,
        args.strict,
        main,
        template,
        drop_repetitive=args.drop_repetitive,
    )
    accelerator.print(found.describe())
    seed = plan.hyper.seed if args.jpeg_augmentation else None
    source = PixelImages(args.images, processor, jpeg_seed=seed) if args.images else None
    return examples.ConversationExamples(file, found, processor, template, length, source)


def one_file(plan: Plan) -> Path:
    """The data file of a stage that takes one; UserError for several."""
    if len(plan.args.data) != 1:
        raise UserError(f"--stage {plan.stage.name} takes one --data FILE.json")
    return plan.args.data[0]


def held_out(plan: Plan, model: Any, processor: Any, accelerator: Accelerator) -> Evaluation | None:
    """What --eval-data and --eval-command measure; None where neither is asked for.

    --drop-repetitive and --jpeg-augmentation are of the training's samples alone.
    """
    args = plan.args
    if not (args.eval_data or args.eval_command):
        return None
    examples = None
    if args.eval_data:
        home = args.folder / "eval"
        if accelerator.is_main_process:
            home.mkdir(exist_ok=True)
        images = args.eval_images or args.images
        # what alters or thins out training is not for what it is measured on
        as_they_are = replace(args, drop_repetitive=False, jpeg_augmentation=False)
        of_eval = replace(as_they_are, data=args.eval_data, images=images, out=home)
        digests = data_digests(args.eval_data, accelerator)
        held = replace(plan, args=of_eval)
        examples = build_examples(held, model, processor, accelerator, digests, resuming=False)
    shown = None
    if args.eval_other_pictures:
        if not isinstance(examples, ConversationExamples):
            raise UserError(f"--eval-other-pictures: --stage {plan.stage.name} has no pictures")
        shown = examples
    return Evaluation(args.eval_every or plan.hyper.save_every, examples, args.eval_command, shown)


def image_source(
    plan: Plan,
    file: llava.LlavaFile,
    found: llava.SampleIndex,
    model: Any,
    processor: Any,
    accelerator: Accelerator,
) -> ImageSource | None:
    """Pictures as they are needed, or the encoder's output of all of them, kept in a cache."""
    images, root = plan.args.images, plan.args.features_cache
    if images is None:
        return None
    if root is None:
        seed = plan.hyper.seed if plan.args.jpeg_augmentation else None
        return PixelImages(images, processor, jpeg_seed=seed)
    opened: list[Any] = [None]
    if accelerator.is_main_process:  # under FSDP it alone has the encoder's weights
        opened = [feature_cache.open_cache(root, images, model, processor)]
        wanted = (image for i in found.usable for image in file[int(i)].images)
        if broken := feature_cache.fill_cache(opened[0], wanted, model, processor):
            tqdm.write(f"{broken} broken image files: their samples are left out")
    return broadcast_object_list(opened)[0]


def image_tokens(processor: Any) -> int:
    """How many tokens a picture becomes, at most."""
    return processor.num_image_tokens * processor.most_tiles


def index_settings(plan: Plan, processor: Any, digest: str) -> dict[str, Any]:
    """What the samples that can be used depend on, under the names that older runs wrote."""
    return {
        "data": digest,
        "images": str(plan.args.images),
        "patches": image_tokens(processor),
        "template": plan.stage.template,
        **({"drop_repetitive": True} if plan.args.drop_repetitive else {}),
    }


def index_once(
    plan: Plan,
    processor: Any,
    settings: dict[str, Any],
    accelerator: Accelerator,
    resuming: bool,
) -> tuple[llava.LlavaFile, llava.SampleIndex]:
    """The data file and its usable samples, looked for by the main process alone.

    A run that starts looks anew; one that is resumed has the samples that it began with.
    """
    data, target, strict = one_file(plan), plan.args.folder / "samples.npz", plan.args.strict
    with accelerator.main_process_first():
        known = index.read(target, data, settings) if resuming else None
        if accelerator.is_main_process and (known is None or (strict and known[1].skipped)):
            file, tokens = llava.LlavaFile(data), settings["patches"]
            template = settings["template"]
            count = partial(processor.text_lengths, template=template)
            found = llava.index_samples(
                file,
                plan.args.images,
                tokens,
                strict,
                template=template,
                count=count,
                drop_repetitive=plan.args.drop_repetitive,
            )
            # workers are forked now, which a tokenizer that has used threads complains about
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
            index.write(target, file, found, settings)
    known = index.read(target, data, settings)
    if known is None:
        raise UserError(f"cannot read {target}, which the main process wrote; is --out shared?")
    return known
