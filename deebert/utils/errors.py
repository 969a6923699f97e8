"""The errors of the package that a user can correct, and the end of a run by a signal."""


class InputError(ValueError):
    """Bad input from the user. Its message is one line and complete; no traceback is needed to understand it."""


class Interrupted(Exception):  # noqa: N818  not an error
    """A signal ended the work, and nothing is lost. Its message is one line that says how to continue."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number  # the shell's convention


def is_panic(error: BaseException) -> bool:
    """Whether a library in Rust, such as tokenizers, gave up. Its class is no Exception, and cannot be imported."""
    return type(error).__name__ == "PanicException"
