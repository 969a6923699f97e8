"""Command-line flags as fields of dataclasses: `flag` declares one, `add_flags` adds those of a class to a parser."""

import argparse
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, Field
from typing import Any, Literal

Decides = Literal["first_stage", "training"] | None


def flag(
    help: str,
    *,
    decides: Decides,
    default: Any = MISSING,
    default_help: str | None = None,
    only_with: str | None = None,
    needs: Sequence[str] = (),
    alias: str | None = None,
    **argument: Any,
) -> Any:
    """A dataclass field that is a flag of the command line.

    Args:
        decides: the earliest result that depends on the flag's value. "first_stage": the model after stage 1 of
            two_stage, and so the final model too. "training": only the final model. None: neither of them. What a
            training must agree on with an earlier one follows from it (see compatibility.py), so it has no default.
        default: none for a required flag; a list is copied for each instance.
        default_help: how --help describes a default that says little by itself, such as None.
        only_with: the name of a switch; without the switch this flag decides nothing.
        needs: names of flags; without one of them this flag has no effect, and is refused.
        alias: another name on the command line.
        argument: type, choices, nargs, const for `ArgumentParser.add_argument`.
    """
    metadata = {"help": help, "decides": decides, "default_help": default_help, "only_with": only_with}
    metadata |= {"needs": needs, "alias": alias, "argument": argument}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def switch(help: str, *, decides: Decides, needs: Sequence[str] = ()) -> bool:
    """A flag without a value, which is off unless it is given."""
    return flag(help, decides=decides, default=False, default_help="off", needs=needs, action="store_true")


def number(kind: Callable[[str], float], help: str, **options: Any) -> Any:
    """A flag with a number; kind: the argparse type that reads and checks it."""
    return flag(help, type=kind, **options)


def default_of(field: Field) -> Any:
    """The field's default, MISSING for a required flag."""
    return field.default if field.default_factory is MISSING else field.default_factory()


def help_of(field: Field) -> str:
    """The help text with the default at its end."""
    default, shown = default_of(field), field.metadata["default_help"]
    if default is MISSING:
        return f"{field.metadata['help']} (required)"
    if shown is None:
        shown = " ".join(map(str, default)) if isinstance(default, list) else str(default)
    return f"{field.metadata['help']} (default: {shown})".replace("%", "%%")


def add_flags(parser: argparse.ArgumentParser, classes: Iterable[type]) -> None:
    """Adds the flags of each dataclass as one group of --help, titled by the class's docstring."""
    for kind in classes:
        title, _, text = kind.__doc__.partition("\n")
        group = parser.add_argument_group(title.rstrip("."), text.strip() or None)
        for field in dataclasses.fields(kind):
            names = [f"--{name}" for name in (field.name, field.metadata["alias"]) if name]
            default = default_of(field)
            given = {"required": True} if default is MISSING else {"default": default}
            group.add_argument(*names, help=help_of(field), **given, **field.metadata["argument"])
