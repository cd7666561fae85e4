"""The one exception that means "the input is wrong", as opposed to "the program is wrong"."""

from __future__ import annotations


class InputError(Exception):
    """Bad input from a user: a study file, a corpus, a checkpoint, a run directory.

    The message is one clear line that names the file, field or tensor and the remedy. The command line
    prints it without a traceback and exits with code 2.
    """


class NonFiniteError(InputError):
    """NaN or Inf where numbers were expected (hidden states, losses); raised before any weight changes."""


def is_interruption(error: BaseException | None) -> bool:
    """Whether an exception is what became of Ctrl-C or SIGTERM: raised within a lock's own code, it comes out as another."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None
