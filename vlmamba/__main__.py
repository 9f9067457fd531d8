"""VL-Mamba: the model: `python -m vlmamba` lists its commands."""

from collections.abc import Sequence

from vlmamba_core.cli import Parser, cli

COMMANDS = {
    "train": "train a model, one stage at a time",
    "ask": "ask a model about your own pictures",
    "serve": "a local page to ask a model, and an OpenAI-compatible endpoint",
    "convert": "make a checkpoint of a published Mamba VLM (Cobra, ML-Mamba, Mamba-VL, Pythia-VL)",
    "demo": "generate the demo world: training data and benchmark files",
    "quantize": "save a model with int8 or int4 weights, rounded or with learned gains",
    "experts": "which experts of a model see pictures and which see words",
    "training.plot": "plot the losses of training runs",
}


@cli
def main(argv: Sequence[str] | None = None) -> int:
    """Print the commands."""
    Parser(prog="python -m vlmamba", description=__doc__).parse_args(argv)
    width = max(map(len, COMMANDS))
    for name, what in COMMANDS.items():
        print(f"python -m vlmamba.{name:<{width}}  {what}")
    print("\n--help of each shows examples.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
