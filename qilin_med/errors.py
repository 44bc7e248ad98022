"""The one exception that users meet."""

import os
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A mistake that the user can correct. The message says in one line what was found, what was expected and what to do."""


def in_one_line(error: Exception) -> str:
    """A library's error as part of our own line: its first 200 characters, after its type if it is a single word."""
    text = " ".join(str(error).split())
    return textwrap.shorten(text if " " in text else f"{type(error).__name__}: {text}", 200, placeholder=" ...")


@contextmanager
def user_errors_end_with_one_line() -> Iterator[None]:
    """Turn a UserError into one line on stderr and exit code 2. Any other error is ours and keeps its traceback."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped by the user; run the same command to continue", file=sys.stderr, flush=True)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of a pipe (`... | head`) left; the rest of the output has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
