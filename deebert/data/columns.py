"""Which columns of a table hold the text and the label, as the flags say or as their names make plain."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deebert.data.records import ENDINGS, as_text
from deebert.data.table_files import Table
from deebert.utils.errors import InputError

# Names of columns that are taken for what they are called. In a file of two columns the other one follows.
TEXT_NAMES = ("text", "sentence", "content", "body", "message", "review", "comment", "tweet", "question", "utterance")
PAIR_NAMES = (
    ("text", "text_pair"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
)
LABEL_NAMES = ("label", "labels", "category", "categories", "class", "target", "intent", "topic", "sentiment", "score")


@dataclass(frozen=True)
class Columns:
    """pair: of the second text, None where each line has a single text."""

    text: str
    pair: str | None
    label: str

    def __str__(self) -> str:
        texts = f"text from {self.text!r}" if self.pair is None else f"pairs from {self.text!r} and {self.pair!r}"
        return f"{texts}, label from {self.label!r}"


@dataclass(frozen=True)
class Line:
    """One line of a table: its number, its text or pair, and the value of its label column."""

    number: int
    text_a: str
    text_b: str | None
    value: Any

    @property
    def text(self) -> tuple[str, str | None]:
        return self.text_a, self.text_b


def choose_columns(table: Table, text: str | None, pair: str | None, label: str | None) -> Columns:
    """The columns that are given, or else plain by their names. Raises InputError, which lists the file's columns."""
    has = f"the file has {', '.join(table.columns)}"
    if ENDINGS[table.path.suffix.lower()] in ("csv", "tsv"):
        has += " (a file without a header line needs --column_names)"
    given = {"text_column": text, "text_pair_column": pair, "label_column": label}
    given = {flag: name for flag, name in given.items() if name is not None}
    for flag, name in given.items():
        if name not in table.columns:
            raise InputError(f"{table.path}: --{flag} {name}: no such column; {has}")
        if same := [other for other in given if other != flag and given[other] == name]:
            raise InputError(f"{table.path}: --{flag} {name}: --{same[0]} is the same column; {has}")
    if text is None and pair is None:
        text, pair = guess_texts(table.columns, label)
    elif text is None:
        raise InputError(f"{table.path}: --text_pair_column {pair} needs --text_column; {has}")
    if label is None:
        label = guess(table.columns, LABEL_NAMES, (text, pair))
    if text is None and label is not None:
        text = guess(table.columns, (), (label,))
    for flag, name, what in (("text_column", text, "text"), ("label_column", label, "label")):
        if name is None:
            raise InputError(f"{table.path}: which column holds the {what}? Give --{flag}; {has}")
    return Columns(text, pair, label)


def guess_texts(columns: Sequence[str], label: str | None) -> tuple[str | None, str | None]:
    """The columns of a text or a pair whose names say so, None where none does."""
    by_name = {name.lower(): name for name in columns if name != label}
    for first, second in PAIR_NAMES:
        if first in by_name and second in by_name:
            return by_name[first], by_name[second]
    return guess(columns, TEXT_NAMES, (label,)), None


def guess(columns: Sequence[str], names: Sequence[str], taken: Sequence[str | None]) -> str | None:
    """The one column with one of these names; else, in a file of two columns, the one beside the taken one."""
    free = [name for name in columns if name not in taken]
    named = [name for name in free if name.lower() in names]
    if len(named) == 1:
        return named[0]
    return free[0] if not named and len(columns) == 2 and len(free) == 1 else None


def read_lines(table: Table, columns: Columns) -> list[Line]:
    """The lines of a table. Raises InputError where a line lacks a column, or a text is none."""
    return [
        Line(
            number,
            text_of(table, number, values, columns.text),
            text_of(table, number, values, columns.pair) if columns.pair else None,
            value_of(table, number, values, columns.label),
        )
        for number, values in table.rows
    ]


def value_of(table: Table, number: int, values: dict, column: str) -> Any:
    if column not in values:
        raise InputError(f"{table.path}, line {number}: no {column!r}; it has {', '.join(values) or 'nothing'}")
    return values[column]


def text_of(table: Table, number: int, values: dict, column: str) -> str:
    return as_text(value_of(table, number, values, column), f"{table.path}, line {number}: {column!r}")
