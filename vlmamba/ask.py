"""Ask a model about your own pictures; the answer appears as it is made.

    python -m vlmamba.ask photo.jpg "What is on the left?"
    python -m vlmamba.ask before.jpg after.jpg "What differs?" --model runs/finetune/final
    python -m vlmamba.ask photo.jpg --chat                # several rounds, a question a line
    cat questions.txt | python -m vlmamba.ask photo.jpg   # one answer a line
    cat photo.jpg | python -m vlmamba.ask - "What is it?"

Pictures first (a file, or - for one picture on the standard input), then one question. Without a
question they are read from the standard input, one a line: with --chat as rounds of one
conversation, else each by itself. Answers go to the standard output and everything else to stderr.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmamba_core.cli import Parser, cli
from vlmamba_core.errors import UserError, first_line
from vlmamba_core.names import QUANTIZED, choose, choose_dtype

if TYPE_CHECKING:  # torch loads only once the arguments are known to be right
    from PIL import Image

STDIN = "-"
DTYPES = ("auto", "float32", "bfloat16", "float16")


def build_parser() -> Parser:
    """The command line of `vlmamba.ask`."""
    parser = Parser(
        prog="python -m vlmamba.ask",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("inputs", nargs="+", metavar="PICTURE ... [QUESTION]", help="pictures, then one question")
    add("--model", default="nano", help="nano (bundled), a checkpoint folder or a hub id")
    add("--chat", action="store_true", help="several rounds about the same pictures")
    add("--max-new-tokens", type=int, default=128, help="of an answer (default: 128)")
    add("--temperature", type=float, default=0.0, help="0 (default): the likeliest token each time")
    add("--seed", type=int, default=0, help="of sampling (default: 0)")
    add("--dtype", default="auto", help="auto (as stored), fp32, bf16 or fp16")
    add("--quantize", help=f"weights of the language model: {', '.join(QUANTIZED)} (default: none)")
    add("--device", help="cpu, cuda, ... (default: a GPU where there is one)")
    add("--stats", action="store_true", help="tokens a second and the state's size, on stderr")
    return parser


@cli
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    args = build_parser().parse_args(argv)
    paths, question = pictures_and_question(args.inputs)
    _check(args, paths, question)
    pictures = [read_picture(path) for path in paths]
    conversation = Conversation(args, pictures)
    for text in [question] if question is not None else lines(args.chat):
        conversation.ask(text)
        if not args.chat:
            conversation.clear()
    return 0


def pictures_and_question(inputs: Sequence[str]) -> tuple[list[str], str | None]:
    """The pictures' paths, and the question: the last argument where that is no file."""
    *before, last = inputs
    if last == STDIN or os.path.isfile(last):  # a long question is no name of a file
        return list(inputs), None
    return list(before), last


def _check(args: argparse.Namespace, paths: Sequence[str], question: str | None) -> None:
    if not paths:
        raise UserError(f"no picture given, only {question!r}; expected PICTURE ... QUESTION")
    args.dtype = choose_dtype(args.dtype, DTYPES)
    args.quantize = args.quantize and choose("kind of quantized weights", args.quantize, QUANTIZED)
    if args.max_new_tokens < 1 or args.temperature < 0:
        raise UserError("--max-new-tokens must be at least 1 and --temperature at least 0")
    if STDIN in paths and (question is None or paths.count(STDIN) > 1):
        raise UserError("- reads one picture from the standard input; give the question with it")


def read_picture(path: str) -> Image.Image:
    """The decoded picture. Raises UserError where there is none."""
    from vlmamba.data.decode import BrokenPicture, decode_picture

    try:
        return decode_picture(sys.stdin.buffer.read() if path == STDIN else Path(path).read_bytes())
    except FileNotFoundError:
        raise UserError(f"no picture {path!r}") from None
    except (OSError, ValueError, BrokenPicture) as error:
        reason = first_line(error)
        raise UserError(f"{path} is no picture that can be read: {reason}") from None


def lines(chat: bool) -> Iterator[str]:
    """The questions on the standard input, with a prompt where a person types them."""
    person = sys.stdin.isatty()
    while True:
        if person:
            print("> " if chat else "question> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


class Conversation:
    """Some pictures, and the rounds about them so far."""

    def __init__(self, args: argparse.Namespace, pictures: Sequence[Image.Image]) -> None:
        """Load the model. Raises UserError where it cannot be."""
        import torch
        from transformers.utils import logging

        from vlmamba import checkpoints
        from vlmamba.models.quantized import quantize

        if not sys.stderr.isatty():
            logging.disable_progress_bar()
        device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model, self.processor = checkpoints.load(args.model, dtype=args.dtype, device=device)
        if args.quantize:
            quantize(self.model.language_model, args.quantize)
        self.model.eval()
        torch.manual_seed(args.seed)
        self._args = args
        self._pictures = list(pictures)
        self._rounds: list[dict[str, Any]] = []

    def clear(self) -> None:
        """Forget the rounds, keep the pictures."""
        self._rounds.clear()

    def ask(self, question: str) -> str:
        """Answer one more round, printing the words as they come."""
        import torch

        pictures = [] if self._rounds else [{"type": "image"} for _ in self._pictures]
        content = [*pictures, {"type": "text", "text": question}]
        self._rounds.append({"role": "user", "content": content})
        text = self.processor.apply_chat_template(self._rounds, add_generation_prompt=True)
        inputs = self.processor(text=text, images=self._pictures, return_tensors="pt")
        inputs = inputs.to(self.model.device)
        sampling = {"do_sample": True, "temperature": self._args.temperature}
        streamer = _streamer(self.processor.tokenizer)
        started = time.perf_counter()
        with torch.inference_mode():
            made = self.model.generate(
                **inputs,
                max_new_tokens=self._args.max_new_tokens,
                streamer=streamer,
                **(sampling if self._args.temperature > 0 else {"do_sample": False}),
            )
        new = made[0, inputs["input_ids"].shape[1] :]
        if self._args.stats:
            self._print_stats(len(new), time.perf_counter() - started)
        answer = self.processor.tokenizer.decode(new, skip_special_tokens=True).strip()
        self._rounds.append({"role": "assistant", "content": answer})
        return answer

    def _print_stats(self, tokens: int, seconds: float) -> None:
        state = self.model.language_model.new_cache(1).nbytes
        size = f"; state {state / 1024:.0f} KiB at every length" if state else ""
        rate = f"{tokens / seconds:.1f} tokens/s, picture and question included"
        print(f"{tokens} tokens in {seconds:.2f} s ({rate}){size}", file=sys.stderr)


def _streamer(tokenizer: Any) -> Any:
    """Prints the answer's words as they come, without the space in front of the first."""
    from transformers import TextStreamer

    class Words(TextStreamer):
        begun = False

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            text = text if self.begun else text.lstrip()
            self.begun = self.begun or bool(text)
            super().on_finalized_text(text, stream_end)

    return Words(tokenizer, skip_prompt=True, skip_special_tokens=True)


if __name__ == "__main__":
    sys.exit(main())
