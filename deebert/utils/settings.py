"""Fields of settings that may be flags, too, and checks that dataclasses of settings make of themselves.

Messages name the field.
"""

import dataclasses
import math
from collections.abc import Collection
from typing import Any

from deebert.utils.errors import InputError


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


def check_choice(settings, name: str, choices: Collection[str]) -> None:
    """Raises InputError where the field is none of the choices. None is allowed."""
    value = getattr(settings, name)
    if value is not None and value not in choices:
        raise InputError(f"{name} {value}: choose one of {', '.join(choices)}")
