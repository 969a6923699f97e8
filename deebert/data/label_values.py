"""From the values of a label column to labels: what kind of problem they are, their names, and their order."""

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deebert.data.table_files import read_text
from deebert.utils.errors import InputError

# Hugging Face's names of problem types
SINGLE_LABEL, MULTI_LABEL, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
PROBLEM_TYPES = (SINGLE_LABEL, MULTI_LABEL, REGRESSION)
SHOWN = 10  # labels that a message lists


def guess_problem_type(values: Sequence[Any], separator: str | None) -> str:
    """Several labels a line where there is a separator, or where the values are lists; else a single one."""
    filled = [value for value in values if value not in (None, "")]
    lists = [isinstance(value, list) or looks_like_list(value) for value in filled]
    several = separator is not None or any(isinstance(value, list) for value in filled) or (filled and all(lists))
    return MULTI_LABEL if several else SINGLE_LABEL


def looks_like_list(value: Any) -> bool:
    return isinstance(value, str) and value.strip().startswith("[") and value.strip().endswith("]")


def parse(value: Any, problem_type: str, separator: str | None) -> str | tuple[str, ...] | float:
    """A value as a label, the labels of a line, or a number. Raises ValueError with a message that names neither file
    nor line.
    """
    if problem_type == MULTI_LABEL:
        return tuple(dict.fromkeys(label_name(item) for item in items(value, separator)))
    if problem_type == SINGLE_LABEL:
        return label_name(value, f"; several need --problem_type {MULTI_LABEL}")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{value!r} is not a number")
    return number


def label_name(value: Any, advice: str = "") -> str:
    """The name of a label without the space around it; numbers and truth values as JSON writes them.

    Raises ValueError, with the advice where the value is a list or an object.
    """
    if isinstance(value, (list, dict)):
        raise ValueError(f"{json.dumps(value)[:40]} is not one label{advice}")
    name = "" if value is None else value.strip() if isinstance(value, str) else json.dumps(value)
    if not name:
        raise ValueError("there is no label")
    return name


def items(value: Any, separator: str | None) -> list:
    """The labels of one line: a list, a JSON list as text, or text with a separator; nothing is no label."""
    if isinstance(value, list):
        return value
    if looks_like_list(value):
        try:
            return json.loads(value)
        except ValueError:
            raise ValueError(f'{value} is not a JSON list, such as ["a", "b"]') from None
    if not isinstance(value, str):
        return [] if value is None else [value]
    parts = value.split(separator) if separator else [value]
    return [part for part in parts if part.strip()]


def read_label_names(path: Path) -> tuple[str, ...]:
    """The names of a file with one label in each line: line 1 names label 0. Raises InputError."""
    if not path.is_file():
        raise InputError(f"--label_names {path}: no such file")
    names = tuple(line.strip() for line in read_text(path).splitlines() if line.strip())
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated or len(names) < 2:
        reason = f"{repeated[0]!r} occurs more than once" if repeated else f"{len(names)} names; two are needed"
        raise InputError(f"--label_names {path}: {reason}")
    return names


def named(label: str, names: Sequence[str]) -> str:
    """The name of a label that is a number in the file. Raises ValueError."""
    if not label.isdecimal() or int(label) >= len(names):
        raise ValueError(f"label {label!r} is no number from 0 to {len(names) - 1}, which --label_names has names for")
    return names[int(label)]


def sorted_labels(labels: set[str]) -> tuple[str, ...]:
    """In the order of numbers where all are whole numbers, else of the alphabet."""
    numbers = all(re.fullmatch(r"-?[0-9]{1,18}", label) for label in labels)
    return tuple(sorted(labels, key=(lambda label: (int(label), label)) if numbers else None))


def listing(labels: Sequence[str]) -> str:
    """The first labels, and how many more there are."""
    more = f" and {len(labels) - SHOWN} more" if len(labels) > SHOWN else ""
    return ", ".join(labels[:SHOWN]) + more


def hidden_separator(labels: Sequence[str]) -> str | None:
    """A separator that seems to stand between several labels: the parts of one label are labels themselves."""
    known = set(labels)
    for label in labels:
        for separator in ",;|":
            parts = [part.strip() for part in label.split(separator)]
            if len(parts) > 1 and known.issuperset(parts):
                return separator
    return None


def doubts(labels: Sequence[str], lines: int) -> list[str]:
    """What labels that are taken for classes may be instead; lines: how many have one."""
    notes = []
    if separator := hidden_separator(labels):
        notes.append(f"labels with {separator!r} seem to be several labels: add --label_separator '{separator}'")
    if any("." in label for label in labels) and all(is_number(label) for label in labels):
        notes.append(
            f"labels such as {labels[0]!r} are classes here: to predict numbers, add --problem_type {REGRESSION}"
        )
    elif 2 * len(labels) > lines > 2 * SHOWN:
        notes.append(f"{len(labels)} labels in {lines} lines: is --label_column the right one?")
    return notes


def is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
