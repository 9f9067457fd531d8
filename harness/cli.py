"""How every command of the harness shows a user's mistake: one line on stderr, exit code 2."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

from tasks.errors import UserError


def is_user_error(error: BaseException) -> bool:
    """Whether `error` is the caller's mistake, of ours or of the model package's (if loaded)."""
    model_errors = sys.modules.get("vlmamba.errors")
    kinds = (UserError, model_errors.UserError) if model_errors else (UserError,)
    return isinstance(error, kinds)


def cli(main: Callable[..., int | None]) -> Callable[..., int]:
    """Decorate a command's `main`: a user's mistake becomes one line, exit code 2."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs) -> int:
        try:
            return main(*args, **kwargs) or 0
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except Exception as error:
            if not is_user_error(error):
                raise
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2

    return wrapped
