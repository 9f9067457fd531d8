"""The benchmark harness: `python -m harness` lists its commands."""

from collections.abc import Sequence

from vlmamba_core.cli import Parser, cli

COMMANDS = {
    "run": "evaluate a model on benchmarks",
    "score": "score answers that another program made",
    "compare": "two runs question by question, with paired tests",
    "report": "one HTML page about some runs",
    "tables": "every table of a folder of runs",
    "plots": "every plot of a folder of runs",
    "profile": "latency and memory against sequence length",
    "bench": "speed against other implementations on this machine",
    "ablate": "train and evaluate the variants of one part",
    "study": "language models and connectors under equal terms",
}


@cli
def main(argv: Sequence[str] | None = None) -> int:
    """Print the commands."""
    Parser(prog="python -m harness", description=__doc__).parse_args(argv)
    width = max(map(len, COMMANDS))
    for name, what in COMMANDS.items():
        print(f"python -m harness.{name:<{width}}  {what}")
    print("\n--help of each shows examples.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
