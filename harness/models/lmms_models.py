"""Any of lmms-eval's model classes under evaluation: `--model lmms:NAME,key=value,...`.

    model = LmmsModel("llava_hf", {"pretrained": "llava-hf/llava-1.5-7b-hf", "device": "cpu"})

The settings are those of `lmms-eval --model_args`; prompts, template and batching are the class's
own.  Answers come from its `generate_until`, given greedy settings.  Many of these classes turn an
error of their model into an empty answer and a line in the log: such a question is counted as not
answered, with that line as the reason.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import lmms_eval
import torch
import transformers
from lmms_eval.api.instance import Instance, unwrap_generation_output
from lmms_eval.models import MODEL_REGISTRY_V2
from lmms_eval.utils import simple_parse_args_string
from loguru import logger
from PIL import Image

from harness.models import ranks
from harness.models.base import EvalModel, Limits, OnDone, Request
from harness.models.registry import ModelOptions
from harness.models.resumable import is_out_of_memory
from harness.models.vlmamba import choose_device
from vlmamba.weight_files import weights_sha256
from vlmamba_core.errors import UserError, one_line, unknown

SPLIT = "test"  # one for all: the class only looks documents up by it


def load(name: str, options: ModelOptions) -> EvalModel:
    """The model class NAME,key=value,... of lmms-eval. Raises UserError."""
    options.refuse("lmms", "revision", "dtype", "backend", "blind", "temperature", "quantize")
    if options.template is not None:
        raise UserError(
            "--template: a class of lmms-eval has its own template; where it takes another, it is "
            "one of its settings (llava_hf: chat_template=...)"
        )
    place = choose_device(ranks.device(options.device))
    return LmmsModel.from_spec(name, batch_size=options.batch_size, device=place)


class LmmsModel(EvalModel):
    """A model class of lmms-eval by its name there. Raises UserError where it cannot be made.

    device: for a class that takes one.
    """

    def __init__(
        self,
        name: str,
        settings: Mapping[str, Any],
        *,
        batch_size: int = 1,
        device: torch.device | None = None,
    ) -> None:
        self.name, self.settings, self.batch_size = name, dict(settings), batch_size
        known = MODEL_REGISTRY_V2.list_model_names()
        if name not in known:
            raise unknown("model class of lmms-eval", name, known)
        try:
            make = MODEL_REGISTRY_V2.get_model_class(name, force_simple=True)
        except ImportError as error:
            raise UserError(
                f"lmms-eval's model class {name} needs a package that is not installed: {error}"
            ) from error
        if not getattr(make, "is_simple", True):
            raise UserError(f"lmms-eval has {name} as a chat class only; this takes a simple one")
        # the classes do not take more than one at a time unless they are told
        takes = inspect.signature(make).parameters
        if device is not None and "device" in takes:
            self.settings.setdefault("device", str(device))
        if "batch_size" in takes:
            self.settings.setdefault("batch_size", 1)
        try:
            self.inner = make(**self.settings)
        except (OSError, ValueError, TypeError, AssertionError, ImportError, KeyError) as error:
            raise UserError(
                f"lmms-eval's {name} cannot be made of these settings: "
                f"{type(error).__name__}: {one_line(str(error))[:300]}"
            ) from error
        self.weights = getattr(self.inner, "model", None)
        self.device = getattr(self.inner, "device", None)
        if isinstance(self.weights, torch.nn.Module):
            self.parameters = sum(p.numel() for p in self.weights.parameters())

    @classmethod
    def from_spec(
        cls, text: str, *, batch_size: int = 1, device: torch.device | None = None
    ) -> LmmsModel:
        """NAME[,key=value,...], read as lmms-eval reads its --model_args."""
        name, _, rest = text.partition(",")
        try:
            settings = simple_parse_args_string(rest)
        except ValueError as error:
            raise UserError(f"{rest!r} holds no settings; expected lmms:NAME,key=value") from error
        return cls(name, settings, batch_size=batch_size, device=device)

    def provenance(self) -> dict[str, Any]:
        """Class, settings, weights where it shows them, and library versions."""
        return {
            "lmms_eval_class": self.name,
            "settings": {key: str(value) for key, value in sorted(self.settings.items())},
            "model_sha256": self._sha256(),
            "lmms_eval": getattr(lmms_eval, "__version__", None),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    def describe(self) -> dict[str, Any]:
        """The class and its settings; the template is the class's own."""
        return {
            "sha256": self._sha256(),
            "parameters": self.parameters,
            "template": {"name": f"lmms-eval's {self.name}"},
            "settings": self.provenance()["settings"],
        }

    def answer(
        self, requests: Sequence[Request], limits: Limits, batch_size: int, on_done: OnDone
    ) -> None:
        """Ask for as many at a time as the class does; where something failed, for each alone.

        The class hands on nothing before all are answered: more at once would be lost with it.
        """
        own = self.settings.get("batch_size")
        size = min(batch_size, own) if isinstance(own, int) else batch_size
        for first in range(0, len(requests), size):
            some = list(range(first, min(first + size, len(requests))))
            texts, problem = self._ask([requests[index] for index in some], limits)
            if problem is None:
                for index, text in zip(some, texts, strict=True):
                    on_done(index, text)
                continue
            alone: list[str] = texts
            why: str | None = problem
            for index in some:
                if len(some) > 1:
                    alone, why = self._ask([requests[index]], limits)
                if why is None:
                    on_done(index, alone[0])
                else:
                    on_done(index, None, why)

    def generate_tokens(self, request: Request, new_tokens: int) -> int | None:
        """Ask for up to `new_tokens`; counted by the class's tokenizer, where it shows one."""
        texts, problem = self._ask([request], Limits(new_tokens))
        if problem is not None:
            raise UserError(f"{self.name}: {problem}")
        encode = getattr(getattr(self.inner, "tokenizer", None), "encode", None)
        return len(encode(texts[0], add_special_tokens=False)) if encode else None

    def _ask(self, requests: Sequence[Request], limits: Limits) -> tuple[list[str], str | None]:
        """The answers, and what went wrong (None: nothing)."""
        self.inner.task_dict = {r.task: {SPLIT: {}} for r in requests}
        instances = []
        for number, request in enumerate(requests):
            self.inner.task_dict[request.task][SPLIT][number] = request
            instances.append(_instance(request, number, limits))
        with _logged_errors() as errors:
            try:
                found = self.inner.generate_until(instances)
            except Exception as error:  # the classes raise whatever their models do
                if is_out_of_memory(error):
                    raise
                return [], f"{type(error).__name__}: {one_line(str(error))[:300]}"
        texts = [str(unwrap_generation_output(text)[0]) for text in found]
        if errors and not all(texts):
            return texts, one_line(errors[0])[:300]
        return texts, None

    def _sha256(self) -> str | None:
        return weights_sha256(self.weights) if isinstance(self.weights, torch.nn.Module) else None


def _instance(request: Request, number: int, limits: Limits) -> Instance:
    """lmms-eval's form of a request; the class changes the settings, so each has its own."""
    settings = ({} if limits.unset else {"max_new_tokens": limits.max_new_tokens}) | {
        "until": list(limits.until),
        "do_sample": False,
        "temperature": 0,
        "num_beams": 1,
    }
    return Instance(
        request_type="generate_until",
        arguments=(request.prompt, settings, _pictures, number, request.task, SPLIT),
        idx=0,
        metadata={"task": request.task, "doc_id": number, "repeats": 1},
    )


def _pictures(request: Request) -> list[Image.Image]:
    return [picture.image.convert("RGB") for picture in request.pictures]


@contextlib.contextmanager
def _logged_errors() -> Iterator[list[str]]:
    """Collects what is logged as an error inside."""
    found: list[str] = []
    sink = logger.add(lambda message: found.append(message.record["message"]), level="ERROR")
    try:
        yield found
    finally:
        logger.remove(sink)
