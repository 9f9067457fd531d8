"""Train VL-Mamba, one stage at a time (VL-Mamba's training section, LLaVA-1.5's recipe).

    python -m vlmamba.train --preset nano --stage text --data glosses.txt finetune.json --out T
    python -m vlmamba.train --preset nano --stage pretrain --init T/final \\
        --data pretrain.json --images DIR --out P
    python -m vlmamba.train --preset nano --stage finetune --init P/final \\
        --data finetune.json --images DIR --out F

On several GPUs: `accelerate launch -m vlmamba.train ...` with the same arguments; the global
batch, and so the loss curve, stays the same.  OUT receives config.json (everything resolved),
train.jsonl (one line a step), summary.json, checkpoints/ and final/ (for from_pretrained).
The same command with `--resume auto` goes on after a kill; with `--resume longer` and more --steps
or --epochs it also trains a finished run further, from its last checkpoint.
`--eval-data` measures the loss of held-out samples every `--eval-every` steps, `--eval-command`
runs a benchmark then (vlmamba/training/evaluation.py); OUT/loss.png shows both losses.
`--estimate` prints parameters, memory and FLOPs; `--dry-run` makes one update with one micro-batch
and writes nothing.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from vlmamba_core.cli import Parser, cli
from vlmamba_core.errors import UserError

if TYPE_CHECKING:  # torch loads only once the arguments are known to be right
    from accelerate import Accelerator

    from vlmamba.config import VLMambaConfig
    from vlmamba.data.collate import Examples, ImageSource
    from vlmamba.data.llava import LlavaFile, Survey
    from vlmamba.training.evaluation import Evaluation
    from vlmamba.training.recipe import Hyperparameters
    from vlmamba.training.stages import Stage

HYPER_FLAGS: dict[str, Any] = {
    "lr": float,
    "connector_lr": float,
    "steps": int,
    "epochs": float,
    "batch_size": int,
    "micro_batch": int,
    "max_length": int,
    "warmup_ratio": float,
    "weight_decay": float,
    "clip_norm": float,
    "schedule": str,
    "dtype": str,
    "lora": int,
    "lora_alpha": float,
    "lora_dropout": float,
    "lora_targets": str,
    "seed": int,
    "save_every": int,
    "keep": int,
}
HYPER_SWITCHES = ("gradient_checkpointing", "compile")
# What a resumed run may change: how it is cut and saved, not what it computes.
FREE_ON_RESUME = ("micro_batch", "save_every", "keep", *HYPER_SWITCHES)
LENGTH = ("steps", "epochs")  # what --resume longer is for


def parser() -> Parser:
    """The command line; flags left out take the recipe's value."""
    p = Parser(
        prog="python -m vlmamba.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "--preset",
        help="e.g. nano+vss_l2+bsm, 2.8b-slimpj+siglip-so400m-384 (default: the model of --init)",
    )
    p.add_argument("--stage", required=True, help="text, dialogue, pretrain or finetune")
    p.add_argument("--data", nargs="+", default=[], type=Path, help="LLaVA JSON (text: .txt too)")
    p.add_argument(
        "--tokenizer-data",
        nargs="+",
        type=Path,
        help="what a new tokenizer is trained on (default: --data)",
    )
    p.add_argument("--images", type=Path, help="folder that the image paths are relative to")
    p.add_argument("--out", type=Path, help="folder for logs, checkpoints and the final model")
    p.add_argument("--init", help="result of the stage before: folder or hub id[@revision]")
    p.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="FIELD=VALUE",
        help="change the preset, e.g. scan_shared=false, scan_merge=mean, "
        "language_model_id=state-spaces/mamba-130m@REVISION (so vision_model_id, tokenizer_id)",
    )
    p.add_argument(
        "--image-aspect-ratio",
        choices=("pad", "resize"),
        default="pad",
        help="pad to a square, as LLaVA-1.5 does (default), or stretch",
    )
    p.add_argument("--recipe", help="recipe name or .toml file (default: by preset)")
    p.add_argument("--features-cache", type=Path, help="keep the encoder's output here")
    p.add_argument(
        "--resume",
        choices=("auto", "longer", "never"),
        default="never",
        help="auto: go on where --out stopped; longer: with more --steps or --epochs than it had",
    )
    p.add_argument("--strict", action="store_true", help="stop at the first unusable sample")
    p.add_argument("--eval-data", nargs="+", default=[], type=Path, help="held-out samples")
    p.add_argument("--eval-images", type=Path, help="their image folder (default: --images)")
    p.add_argument(
        "--eval-command",
        metavar="COMMAND",
        help="a benchmark, run with --model and --out added, e.g. "
        '"python -m harness.run --tasks pope --limit 100"',
    )
    p.add_argument("--eval-every", type=int, help="steps between (default: --save-every)")
    p.add_argument("--workers", type=int, default=0, help="data processes (default 0: none)")
    p.add_argument("--cpu", action="store_true", help="do not use a GPU")
    p.add_argument("--tensorboard", action="store_true")
    p.add_argument("--wandb", metavar="PROJECT", help="also log to Weights & Biases")
    p.add_argument("--dry-run", action="store_true", help="one micro-batch, nothing written")
    p.add_argument("--estimate", action="store_true", help="print the cost, run nothing")
    p.add_argument("--devices", type=int, default=1, help="for --estimate (default 1)")
    p.add_argument("--tiny", action="store_true", help="shrink every dimension, for tests")
    hyper = p.add_argument_group("hyperparameters (default: the recipe's)")
    for name, kind in HYPER_FLAGS.items():
        hyper.add_argument(f"--{name.replace('_', '-')}", type=kind)
    for name in HYPER_SWITCHES:
        flag = f"--{name.replace('_', '-')}"
        hyper.add_argument(flag, action=argparse.BooleanOptionalAction, default=None)
    return p


@cli
def main(argv: list[str] | None = None) -> None:
    """Parse the flags, then estimate, try one update, or train."""
    args = parser().parse_args(argv)
    limit_kernel_caches()
    hyper, config, stage = resolve(args)
    loop_packages(args, hyper)
    if args.estimate:
        if args.devices < 1:
            raise UserError(f"--devices is {args.devices}; expected at least 1")
        from vlmamba.training.estimate import estimate, table

        print(table(estimate(config, stage, hyper), hyper, args.devices))
        return
    check_paths(args)
    if args.dry_run:
        dry_run(args, hyper, config, stage)
    else:
        run(args, hyper, config, stage)


def loop_packages(args: argparse.Namespace, hyper: Hyperparameters) -> None:
    """Raise UserError at once where a flag's optional package is absent."""
    from vlmamba.training.loop import require_packages

    asked = {"tensorboard": args.tensorboard, "wandb": bool(args.wandb), "lora": bool(hyper.lora)}
    require_packages(asked)


def limit_kernel_caches() -> None:
    """Bound what torch's CPU matrix kernels keep per shape; unbounded it grew by 36 MB a step.

    Read once, when the first such kernel runs.  Changes memory, not results.
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, "256")


def resolve(args: argparse.Namespace) -> tuple[Hyperparameters, VLMambaConfig, Stage]:
    """Flags and recipe -> hyperparameters, model configuration, stage.

    The model is the preset's, of the flag or the recipe, or else that of --init.
    """
    from vlmamba.checkpoints import read_config
    from vlmamba.config import VLMambaConfig
    from vlmamba.training.recipe import default_recipe, hyperparameters, load_recipe
    from vlmamba.training.stages import get_stage

    stage, changes = get_stage(args.stage), config_fields(args.set)
    recipe = load_recipe(args.recipe) if args.recipe else {}
    args.preset = args.preset or recipe.get("preset")
    if args.preset is not None:
        config = VLMambaConfig.preset(args.preset, **changes)
    elif args.init is not None:
        config = VLMambaConfig(**(read_config(args.init).to_dict() | changes))
    else:
        raise UserError("no preset; give --preset NAME, --init MODEL or a --recipe that names one")
    recipe = recipe or load_recipe(default_recipe(config))
    flags = {name: getattr(args, name) for name in (*HYPER_FLAGS, *HYPER_SWITCHES)}
    if args.tiny:
        from vlmamba.training.init_model import tiny

        config = tiny(config)
    return hyperparameters(recipe, stage.name, flags), config, stage


def config_fields(pairs: list[str]) -> dict[str, Any]:
    """`FIELD=VALUE` flags -> fields of the model's configuration; UserError for unknown ones."""
    from vlmamba.config import MambaConfig, VLMambaConfig
    from vlmamba_core.errors import unknown

    given = [
        parameter
        for config in (MambaConfig, VLMambaConfig)
        for parameter in inspect.signature(config.__init__).parameters.values()
    ]
    defaults = {p.name: p.default for p in given if p.default is not inspect.Parameter.empty}
    fields = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if name not in defaults:
            raise unknown("configuration field", name, defaults)
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        if not equals or (isinstance(defaults[name], bool) and not isinstance(value, bool)):
            raise UserError(
                f"--set {pair}: expected FIELD=VALUE with a value like {defaults[name]!r}"
            )
        fields[name] = value
    return fields


def check_paths(args: argparse.Namespace) -> None:
    """Raise UserError for missing or contradictory folders, before anything is loaded."""
    if args.workers < 0:
        raise UserError(f"--workers is {args.workers}; expected 0 or more")
    if args.out is not None and args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out} is a file; give a folder")
    if not args.data or (args.out is None and not args.dry_run):
        raise UserError(f"--stage {args.stage} needs --data and --out")
    for path in (*args.data, *(args.tokenizer_data or ()), *args.eval_data):
        if not path.is_file():
            raise UserError(f"no data file {str(path)!r}; expected --data FILE")
    for flag, folder in (("--images", args.images), ("--eval-images", args.eval_images)):
        if folder is not None and not folder.is_dir():
            raise UserError(f"no image folder {str(folder)!r}; expected {flag} DIR")
    if args.eval_every is not None and args.eval_every < 1:
        raise UserError(f"--eval-every is {args.eval_every}; expected at least 1")
    if args.eval_every and not (args.eval_data or args.eval_command):
        raise UserError("--eval-every needs --eval-data FILE or --eval-command COMMAND")
    if args.eval_command is not None:
        from vlmamba.training.evaluation import split_command

        split_command(args.eval_command)


def run(
    args: argparse.Namespace, hyper: Hyperparameters, config: VLMambaConfig, stage: Stage
) -> None:
    """Train under the output folder's lock; the main process holds it for all."""
    from transformers.utils import logging

    from vlmamba.training import loop
    from vlmamba.training.lock import folder_lock

    logging.disable_progress_bar()  # of every saved checkpoint
    accelerator = loop.make_accelerator(hyper, args.cpu)
    with folder_lock(args.out) if accelerator.is_main_process else nullcontext():
        accelerator.print(f"model written to {train(args, hyper, config, stage, accelerator)}")


def dry_run(
    args: argparse.Namespace, hyper: Hyperparameters, config: VLMambaConfig, stage: Stage
) -> None:
    """Build everything, make one update with one micro-batch a process; print what it took."""
    from vlmamba.training import loop

    accelerator = loop.make_accelerator(hyper, args.cpu)
    at_once = hyper.micro_batch * accelerator.num_processes
    hyper = replace(hyper, batch_size=min(hyper.batch_size, at_once))
    model, processor = start(args, hyper, config, stage)
    model.to(accelerator.device)
    examples = one_look(args, stage, hyper, model, processor, accelerator)
    job = loop.Run(model, processor, examples, stage, hyper, Path(), {}, strict=args.strict)
    accelerator.print(f"dry run: {loop.try_one_update(job, accelerator)}")


def start(
    args: argparse.Namespace, hyper: Hyperparameters, config: VLMambaConfig, stage: Stage
) -> tuple[Any, Any]:
    """Model and processor before the first step."""
    from vlmamba.training import init_model

    if not args.tiny:
        init_model.check_init(config, stage, args.init)
    texts = args.tokenizer_data or args.data
    model, processor = init_model.build(config, stage, args.init, texts, hyper.seed)
    processor.image_aspect_ratio = args.image_aspect_ratio
    return model, processor


def one_look(
    args: argparse.Namespace,
    stage: Stage,
    hyper: Hyperparameters,
    model: Any,
    processor: Any,
    accelerator: Accelerator,
) -> Examples:
    """Examples for a dry run: no token file, no index and no cache of features is written."""
    from vlmamba.data import collate, llava, text

    if stage.template is None:
        wanted = hyper.batch_size * hyper.max_length
        tokens = text.first_tokens(args.data, processor, wanted)
        return text.PackedText(tokens, hyper.max_length)
    file, main = llava.LlavaFile(one_file(args.data, stage)), accelerator.is_main_process
    patches = model.config.num_image_tokens
    found = llava.survey(file, args.images, patches, args.strict, main, stage.template)
    accelerator.print(found.describe())
    source = collate.PixelImages(args.images, processor) if args.images else None
    template, length = stage.template, hyper.max_length
    return collate.ConversationExamples(file, found, processor, template, length, source)


def one_file(data: list[Path], stage: Stage) -> Path:
    """The data file of a stage that takes one; UserError for several."""
    if len(data) != 1:
        raise UserError(f"--stage {stage.name} takes one --data FILE.json")
    return data[0]


def train(
    args: argparse.Namespace,
    hyper: Hyperparameters,
    config: VLMambaConfig,
    stage: Stage,
    accelerator: Accelerator,
) -> Path:
    """Build model and data and train what is left; returns the folder of the final model."""
    from vlmamba import checkpoints
    from vlmamba.training import checkpoint, loop

    digests = data_digests(args.data, accelerator)
    if finished(args.out) and keep_finished(args, hyper, config, digests):
        return args.out / "final"
    resume_from = checkpoint_to_resume(args)
    if resume_from is not None:
        model, processor = checkpoints.load(str(resume_from), adapter=False)
        config.image_token_id = model.config.image_token_id  # from the tokenizer, as in `build`
    else:
        model, processor = start(args, hyper, config, stage)
    settings = resolved_settings(args, hyper, config, digests)
    if resume_from is not None:
        saved = checkpoint.read_state(resume_from)["settings"]
        check_same_run(saved, settings, resume_from, longer=args.resume == "longer")
    if accelerator.is_main_process:
        (args.out / "summary.json").unlink(missing_ok=True)
        (args.out / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    model.to(accelerator.device)
    resuming = resume_from is not None
    examples = build_examples(args, stage, hyper, model, processor, accelerator, digests, resuming)
    job = loop.Run(model, processor, examples, stage, hyper, args.out, settings)
    job.workers, job.strict, job.tensorboard = args.workers, args.strict, args.tensorboard
    job.wandb = args.wandb
    if args.eval_data or args.eval_command:
        job.evaluation = held_out(args, stage, hyper, model, processor, accelerator)
    return loop.train(job, accelerator, resume_from)


def finished(out: Path) -> bool:
    """Whether a run in `out` came to its end: the summary is the last file that it writes."""
    return (out / "summary.json").is_file() and (out / "final").is_dir()


def keep_finished(
    args: argparse.Namespace,
    hyper: Hyperparameters,
    config: VLMambaConfig,
    digests: list[str],
) -> bool:
    """Whether the finished run in --out is all that the command asks for; else it gets longer.

    Raises UserError where the command asks for another run.
    """
    from vlmamba.training import checkpoint

    if args.resume == "never":
        raise UserError(
            f"{args.out} holds a finished run; keep it with --resume auto, train it further with "
            "--resume longer and more --steps, or change --out"
        )
    saved = json.loads((args.out / "config.json").read_text())
    longer = args.resume == "longer"
    check_same_run(saved, resolved_settings(args, hyper, config, digests), args.out, longer)
    old = saved["hyperparameters"]
    if not longer or all(old[name] == getattr(hyper, name) for name in LENGTH):
        return True
    if not checkpoint.checkpoints(args.out):
        raise UserError(
            f"{args.out} has no checkpoint to train further from; "
            f"start another --out with --init {args.out}/final"
        )
    return False


def data_digests(paths: list[Path], accelerator: Accelerator) -> list[str]:
    """A digest of each data file; the main process reads them for all."""
    from accelerate.utils import broadcast_object_list

    from vlmamba.data.index import file_digest

    main = accelerator.is_main_process
    return broadcast_object_list([file_digest(path) if main else "" for path in paths])


def checkpoint_to_resume(args: argparse.Namespace) -> Path | None:
    """The newest checkpoint with --resume auto; UserError where one would be overwritten."""
    from vlmamba.training import checkpoint

    saved = checkpoint.checkpoints(args.out)
    if saved and args.resume == "never":
        raise UserError(
            f"{args.out} holds checkpoints; continue them with --resume auto or change --out"
        )
    return saved[-1] if saved else None


def build_examples(
    args: argparse.Namespace,
    stage: Stage,
    hyper: Hyperparameters,
    model: Any,
    processor: Any,
    accelerator: Accelerator,
    digests: list[str],
    resuming: bool,
) -> Examples:
    """The stage's training examples; files that they need are written by the main process."""
    from vlmamba.data import collate, text

    if stage.template is None:
        tokens = args.out / "tokens.u32"
        with accelerator.main_process_first():
            if accelerator.is_main_process:
                text.tokenize_documents(args.data, processor, tokens)
        return text.PackedText(tokens, hyper.max_length)
    data, terms = one_file(args.data, stage), index_terms(args.images, stage, model, digests[0])
    file, found = survey_once(
        data, args.images, args.out / "samples.npz", terms, accelerator, args.strict, resuming
    )
    accelerator.print(found.describe())
    source = image_source(args, args.images, file, found, model, processor, accelerator)
    template, length = stage.template, hyper.max_length
    return collate.ConversationExamples(file, found, processor, template, length, source)


def held_out(
    args: argparse.Namespace,
    stage: Stage,
    hyper: Hyperparameters,
    model: Any,
    processor: Any,
    accelerator: Accelerator,
) -> Evaluation:
    """What --eval-data and --eval-command measure."""
    from vlmamba.training.evaluation import Evaluation

    examples = None
    if args.eval_data:
        home = args.out / "eval"
        if accelerator.is_main_process:
            home.mkdir(exist_ok=True)
        changed = {"data": args.eval_data, "images": args.eval_images or args.images, "out": home}
        theirs = argparse.Namespace(**(vars(args) | changed))
        digests = data_digests(args.eval_data, accelerator)
        examples = build_examples(
            theirs, stage, hyper, model, processor, accelerator, digests, resuming=False
        )
    return Evaluation(args.eval_every or hyper.save_every, examples, args.eval_command)


def image_source(
    args: argparse.Namespace,
    images: Path | None,
    file: LlavaFile,
    found: Survey,
    model: Any,
    processor: Any,
    accelerator: Accelerator,
) -> ImageSource | None:
    """Pictures as they are needed, or the encoder's output of all of them, kept in a cache."""
    from vlmamba.data import collate, feature_cache

    if images is None:
        return None
    if args.features_cache is None:
        return collate.PixelImages(images, processor)
    with accelerator.main_process_first():
        cache = feature_cache.open_cache(args.features_cache, images, model, processor)
        if accelerator.is_main_process:
            wanted = (image for i in found.usable for image in file[int(i)].images)
            if broken := feature_cache.fill_cache(cache, wanted, model, processor):
                tqdm.write(f"{broken} broken image files: their samples are left out")
    return cache


def index_terms(images: Path | None, stage: Stage, model: Any, digest: str) -> dict[str, Any]:
    """What the samples that can be used depend on."""
    patches = model.config.num_image_tokens
    return {
        "data": digest,
        "images": str(images),
        "patches": patches,
        "template": stage.template,
    }


def survey_once(
    data: Path,
    images: Path | None,
    target: Path,
    terms: dict[str, Any],
    accelerator: Accelerator,
    strict: bool,
    resuming: bool,
) -> tuple[LlavaFile, Survey]:
    """The data file and its usable samples, looked for by the main process alone.

    A run that starts looks anew; one that is resumed has the samples that it began with.
    """
    from vlmamba.data import index, llava

    with accelerator.main_process_first():
        known = index.read(target, data, terms) if resuming else None
        if accelerator.is_main_process and (known is None or (strict and known[1].skipped)):
            file, patches = llava.LlavaFile(data), terms["patches"]
            found = llava.survey(file, images, patches, strict, template=terms["template"])
            index.write(target, file, found, terms)
    known = index.read(target, data, terms)
    if known is None:
        raise UserError(f"cannot read {target}, which the main process wrote; is --out shared?")
    return known


def resolved_settings(
    args: argparse.Namespace,
    hyper: Hyperparameters,
    config: VLMambaConfig,
    digests: list[str],
) -> dict[str, Any]:
    """Everything that decides the result, resolved, as JSON."""
    import torch
    import transformers

    from vlmamba import __version__
    from vlmamba.models.selective_scan import resolve_backend

    return {
        "preset": args.preset,
        "stage": args.stage,
        "data": [str(path) for path in args.data],
        "data_digests": digests,
        "images": str(args.images) if args.images else None,
        "init": args.init,
        "set": args.set,
        "image_aspect_ratio": args.image_aspect_ratio,
        "recipe": args.recipe,
        "hyperparameters": asdict(hyper),
        "model": json.loads(config.to_json_string(use_diff=False)),
        "scan_backend": resolve_backend(
            config.scan_backend, "cpu" if args.cpu or not torch.cuda.is_available() else "cuda"
        ),
        "packages": {
            "vlmamba": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def check_same_run(
    saved: dict[str, Any], now: dict[str, Any], folder: Path, longer: bool = False
) -> None:
    """Raise UserError if a resumed run differs from the one that wrote the checkpoint.

    Its length may, if `longer`.
    """
    keys = ("preset", "stage", "data", "init", "set", "image_aspect_ratio")
    pairs = [(key, saved.get(key, now[key]), now[key]) for key in keys]
    old, new = saved["hyperparameters"], now["hyperparameters"]
    free = (*FREE_ON_RESUME, *LENGTH) if longer else FREE_ON_RESUME
    pairs += [(key, old[key], new[key]) for key in old if key not in free]
    for key, before, after in pairs:
        if before != after:
            more = ", or --resume longer to train further" if key in LENGTH else ""
            raise UserError(
                f"cannot resume {folder}: {key} was {before!r} and is now {after!r}; "
                f"give the same value or another --out{more}"
            )
    digests = saved.get("data_digests", now["data_digests"])
    for path, before, after in zip(now["data"], digests, now["data_digests"], strict=True):
        if before != after:
            raise UserError(
                f"cannot resume {folder}: the data file {path} has changed since (its digest was "
                f"{before} and is now {after}); bring it back or give another --out"
            )


if __name__ == "__main__":
    raise SystemExit(main())
