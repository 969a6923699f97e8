"""Texts to classify: lines, or the rows of a table of which one or two columns are read and all are passed on."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deebert.data.records import ENDINGS, as_text, delimited, json_objects
from deebert.data.table_files import read_parquet
from deebert.utils.errors import InputError

FORMATS = ("lines", *dict.fromkeys(ENDINGS.values()))


@dataclass(frozen=True)
class TextRow:
    """A text, or a pair, and the columns of its row by name; a line has none."""

    texts: tuple[str, ...]
    columns: dict = field(default_factory=dict)


def read_rows(
    source: Iterable[str] | Path, file_format: str, columns: Sequence[str] = (), place: str = ""
) -> Iterator[TextRow]:
    """The rows of the lines of a text stream, or of a Parquet file, one by one.

    file_format: of FORMATS. columns: of the text, or of both texts of a pair. A csv or tsv file has a header.
    place: what errors name before the line, such as "x.csv, ". Raises InputError with the line's number.
    """
    if file_format == "lines":
        yield from _lines(source, place)
        return
    if file_format == "parquet":
        records = read_parquet(source, columns)[1]
    elif file_format == "jsonl":
        records = json_objects(source, place, columns)
    else:
        records = delimited(source, file_format == "tsv", place, wanted=columns)
    for number, row in records:
        yield TextRow(tuple(as_text(row[name], f"{place}line {number}: {name!r}") for name in columns), row)


def _lines(lines: Iterable[str], place: str) -> Iterator[TextRow]:
    kind = None
    for number, line in enumerate(lines, 1):
        fields = tuple(line.rstrip("\r\n").split("\t"))
        kind = kind or len(fields)
        if len(fields) > 2 or len(fields) != kind:
            raise InputError(
                f"{place}line {number}: {len(fields)} tab-separated fields; give one text in each line, or one pair "
                "in each"
            )
        yield TextRow(fields)
