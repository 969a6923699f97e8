"""Texts to classify: lines, or the rows of a table of which one or two columns are read and all are passed on."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from deebert.data.records import delimited, json_objects
from deebert.utils.cli import InputError

FORMATS = ("lines", "csv", "tsv", "jsonl")


@dataclass(frozen=True)
class TextRow:
    """A text, or a pair, and the columns of its row by name; a line has none."""

    texts: tuple[str, ...]
    columns: dict = field(default_factory=dict)


def read_rows(lines: Iterable[str], file_format: str, columns: Sequence[str] = ()) -> Iterator[TextRow]:
    """The rows of a text stream, one by one. file_format: of FORMATS. columns: of the text, or of both texts of a pair.

    A csv or tsv file has a header. Raises InputError with the line's number.
    """
    if file_format == "lines":
        yield from _lines(lines)
        return
    tabs = file_format == "tsv"
    records = json_objects(lines, "", columns) if file_format == "jsonl" else delimited(lines, tabs, wanted=columns)
    for number, row in records:
        texts = tuple(row[name] for name in columns)
        if not all(isinstance(text, str) for text in texts):
            raise InputError(f"line {number}: {', '.join(columns)}: not a text")
        yield TextRow(texts, row)


def _lines(lines: Iterable[str]) -> Iterator[TextRow]:
    kind = None
    for number, line in enumerate(lines, 1):
        fields = tuple(line.rstrip("\r\n").split("\t"))
        kind = kind or len(fields)
        if len(fields) > 2 or len(fields) != kind:
            raise InputError(
                f"line {number}: {len(fields)} tab-separated fields; give one text in each line, or one pair in each"
            )
        yield TextRow(fields)
