"""`harness.run` in a test's process: tells what the model is asked, and dies where it is told.

Each question that the model itself is asked is a line of asked.txt in the current folder; requests
to a server carry a token of that folder.  The environment's DIE_AFTER is the number of kept answers
after which the process kills itself (SIGKILL).
"""

from __future__ import annotations

import os
import signal
import sys
import types
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import run
from harness.models.base import Request
from vlmamba_core.folder import AnswerJournal

TOKEN = Path("token.txt")


def main(arguments: list[str]) -> int:
    """Run the command line with the counting in place."""
    if not TOKEN.exists():
        TOKEN.write_text(uuid.uuid4().hex)
    os.environ["FOLDER_TOKEN"] = TOKEN.read_text()
    sys.modules.setdefault("decord", types.SimpleNamespace(VideoReader=None, cpu=None))  # type: ignore[arg-type]
    from lmms_eval.models.simple.llava_hf import LlavaHf

    from harness.models.transformers import TransformersModel
    from harness.models.vlmamba import VLMambaModel

    _before(VLMambaModel, "_question", lambda model, request: _tell(request))
    _before(TransformersModel, "prompt", lambda model, request: _tell(request))
    _before(TransformersModel, "alone", lambda model, *_: _tell_alone())
    _before(LlavaHf, "generate_until", _tell_instances)
    _die_after(int(os.environ.get("DIE_AFTER", "0")))
    return run.main(arguments)


def _before(owner: type, name: str, call: Callable[..., None]) -> None:
    method = getattr(owner, name)

    def both(self: Any, *arguments: Any) -> Any:
        call(self, *arguments)
        return method(self, *arguments)

    setattr(owner, name, both)


def _tell(request: Request) -> None:
    if request.task != "check":  # of the model as it is loaded
        _write(f"{request.task} {request.row}")


def _tell_alone() -> None:
    """The question told last is asked by itself: it is not one of the run's batches."""
    _write("alone")


def _write(line: str) -> None:
    with open("asked.txt", "a") as file:
        file.write(f"{line}\n")


def _tell_instances(model: Any, instances: list[Any]) -> None:
    for instance in instances:
        _, _, _, number, task, split = instance.args
        _tell(model.task_dict[task][split][number])


def _die_after(answers: int) -> None:
    add = AnswerJournal.add
    kept = 0

    def counted(journal: AnswerJournal, key: str, value: str) -> None:
        nonlocal kept
        add(journal, key, value)
        kept += 1
        if kept == answers:
            os.kill(os.getpid(), signal.SIGKILL)

    AnswerJournal.add = counted  # type: ignore[method-assign]
