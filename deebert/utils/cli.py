"""Commands: their errors in one line, what Ctrl-C and SIGTERM do, and flags, also as fields of settings.

Errors that the user can correct are InputErrors, which name the file, the flag or the field, and what to do.
"""

import argparse
import dataclasses
import io
import math
import re
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from copy import copy
from typing import Any, NoReturn

from deebert.utils.errors import InputError, Interrupted
from deebert.utils.files import printable

# The packages without which a command cannot run, by the names that Python imports
REQUIREMENTS = "torch transformers accelerate numpy sklearn scipy tqdm matplotlib tensorboardX pandas"


class ArgumentParser(argparse.ArgumentParser):
    """A parser whose --help shows defaults, and whose errors are InputErrors: one line, without the list of all flags.

    Values such as -inf and -1e-3 are numbers, not flags.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{"formatter_class": DefaultsHelp, "prog": sys.argv[0]} | kwargs)
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$|-inf(inity)?$", re.IGNORECASE)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} ({self.prog} --help lists the flags)")


class DefaultsHelp(argparse.ArgumentDefaultsHelpFormatter):
    """--help with the defaults, where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.required or action.default is None or action.default is False or action.default == []
        return action.help if silent else super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """Without what HfArgumentParser adds: a second spelling of each flag, and a value of each switch."""
        action = copy(action)
        action.nargs = 0 if action.const is True else action.nargs
        action.option_strings = [name for name in action.option_strings if "-" not in name[2:]]
        return super()._format_action_invocation(action)


def run(main: Callable[[], None]) -> None:
    """Calls a command's main function; an InputError becomes one line on stderr and exit code 2.

    Ctrl-C and SIGTERM, which schedulers send, end it with one line, too, and with the shell's code, 128 + signal.
    """

    def interrupt(number: int, frame) -> NoReturn:  # as Ctrl-C does: temporary files are removed
        raise KeyboardInterrupt(number)

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # whatever the terminal has: names of labels may be in any script
    signal.signal(signal.SIGTERM, interrupt)
    try:
        main()
    except (InputError, ModuleNotFoundError) as error:
        message = str(error) if isinstance(error, InputError) else missing_package(error)
        print(f"error: {printable(' '.join(message.split()))}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(stop.exit_code)
    except KeyboardInterrupt as stop:
        print("\ninterrupted", file=sys.stderr)  # a line of its own, not the rest of a progress bar's
        sys.exit(128 + (stop.args[0] if stop.args else signal.SIGINT))
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class StopSignal:
    """In the block of `with`, a first Ctrl-C or SIGTERM requests a stop (`self()` is True), a second one stops."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.number = 0  # of the signal, 0 before one comes
        self.before = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():  # other threads cannot have handlers
            self.before = {number: signal.signal(number, self.request_stop) for number in self.SIGNALS}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def request_stop(self, number: int, frame) -> None:
        """The signal handler. It restores the handlers before it."""
        self.number = number
        self.__exit__()
        text = "\nstopping after this step, with a checkpoint; a second signal stops at once"
        print(text, file=sys.stderr, flush=True)

    def __call__(self) -> bool:
        return self.number != 0


def missing_package(error: ModuleNotFoundError) -> str:
    """What to do about a package that is not installed, as one line. Raises it where it is a fault of our own."""
    if error.name is None or error.name.split(".")[0] not in REQUIREMENTS.split():
        raise error
    install = "in a checkout of DeeBERT pip install -r requirements.txt"
    return f"{error.name} is missing: activate your environment, or {install}"


def number(kind: type, words: str, allowed: Callable[[float], bool]) -> Callable[[str], float]:
    """An argparse type: a finite number of this kind for which `allowed` is true, in words."""

    def read(text: str) -> float:
        with suppress(ValueError):
            value = kind(text)
            if math.isfinite(value) and allowed(value):
                return value
        raise argparse.ArgumentTypeError(f"{text} is not {words}")

    return read


positive = number(int, "a whole number above 0", lambda value: value > 0)
non_negative = number(int, "a whole number from 0", lambda value: value >= 0)
positive_float = number(float, "a number above 0", lambda value: value > 0)
fraction = number(float, "a number from 0 to 1", lambda value: 0 <= value <= 1)


def flag(help: str, default: Any = None, **argument: Any) -> Any:
    """A field with what `HfArgumentParser` reads of it: the help text, and arguments of `add_argument`."""
    return dataclasses.field(default=default, metadata={"help": help} | argument)


def check_numbers(
    settings, *names: str, above: float = -math.inf, at_least: float = -math.inf, at_most: float = math.inf
) -> None:
    """Raises InputError where one of these fields is not a finite number within the bounds. None is allowed."""
    for name in names:
        value = getattr(settings, name)
        if value is None or (math.isfinite(value) and above < value and at_least <= value <= at_most):
            continue
        bounds = {"above": above, "from": at_least, "up to": at_most}
        shown = " ".join(f"{word} {bound:g}" for word, bound in bounds.items() if math.isfinite(bound))
        raise InputError(f"{name} {value}: give a number{' ' * bool(shown)}{shown}")
