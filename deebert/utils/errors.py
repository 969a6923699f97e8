"""Errors that a user can correct, those of libraries in one line, and the end of a run by a signal."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

MISTAKES = (ArithmeticError, AssertionError, AttributeError, LookupError, NameError, TypeError)
MOST_WORDS = 200  # characters of a library's message in ours


class InputError(ValueError):
    """Bad input from the user. Its message is one line and complete; no traceback is needed to understand it."""


class Interrupted(Exception):  # noqa: N818  not an error
    """A signal ended the work, and nothing is lost. Its message is one line that says how to continue."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number  # the shell's convention


@contextmanager
def one_line(problem: str, fix: str) -> Iterator[None]:
    """Turns whatever a library raises about a file into an InputError: the problem, the library's words, the fix.

    A fault of our own stays as it is, and so does memory that runs out. Libraries in Rust, such as tokenizers, raise a
    PanicException, which is no Exception and cannot be imported. PyTorch's OutOfMemoryError is told by its name, too.
    """
    try:
        yield
    except (InputError, MemoryError):
        raise
    except BaseException as error:
        name, words = type(error).__name__, " ".join(str(error).split())
        memory = name == "OutOfMemoryError" or "allocate memory" in words
        if not (isinstance(error, Exception) or name == "PanicException") or memory or is_our_fault(error):
            raise
        words = words or name
        if "weights_only" in words:  # PyTorch's advice is to run the file's code
            words = "a pickle that holds more than tensors, which is not read"
        words = f"{words[:MOST_WORDS]} ..." if len(words) > MOST_WORDS else words
        raise InputError(f"{problem}: {words}; {fix}") from error


def is_our_fault(error: BaseException) -> bool:
    """Whether a line of this package made a mistake. Extensions in other languages have no lines of their own."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return isinstance(error, MISTAKES) and frame.f_globals.get("__name__", "").startswith("deebert.")
