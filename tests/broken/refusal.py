"""What a command may do with a broken input: one line on stderr and exit code 2."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import pytest


def refused(
    main: Callable[..., int],
    arguments: Sequence[object],
    message: str,
    capsys: pytest.CaptureFixture,
    progress: bool = False,
) -> None:
    """Run a command's `main`; it must refuse with one line that matches `message`.

    progress: it may have shown progress bars before.
    """
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    assert code == 2, printed
    lines = printed.err.strip().splitlines()
    assert lines[-1].startswith("error: "), printed.err
    assert re.search(message, lines[-1]), lines[-1]
    assert "Traceback" not in printed.err + printed.out
    if not progress:
        assert len(lines) == 1, printed.err
