"""Texts to classify: lines, or the rows of a table of which one or two columns are read and all are passed on."""

import csv
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from deebert.utils.cli import InputError

FORMATS = ("lines", "csv", "tsv", "jsonl")


@dataclass(frozen=True)
class TextRow:
    """A text, or a pair, and the columns of its row by name; a line has none."""

    texts: tuple[str, ...]
    columns: dict = field(default_factory=dict)


def read_rows(lines: Iterable[str], file_format: str, columns: Sequence[str] = ()) -> Iterator[TextRow]:
    """The rows of a text stream, one by one. file_format: of FORMATS. columns: of the text, or of both texts of a pair.

    A csv or tsv file has a header; the fields of a tsv file are never quoted. Raises InputError with the line's number.
    """
    if file_format == "lines":
        return _lines(lines)
    return _json_lines(lines, columns) if file_format == "jsonl" else _table(lines, file_format, columns)


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


def _table(lines: Iterable[str], file_format: str, columns: Sequence[str]) -> Iterator[TextRow]:
    csv.field_size_limit(sys.maxsize)
    unquoted = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    reader = csv.reader(lines, **unquoted if file_format == "tsv" else {"strict": True})
    try:
        names = next(reader, None)
        if names is None:
            return
        if len(set(names)) < len(names):
            raise InputError(f"line 1: a column's name occurs twice in {', '.join(names)}")
        _check_columns(names, columns, 1)
        for fields in reader:
            if not fields and len(names) > 1:
                continue  # a line without anything, at the end of the file for one
            if len(fields or [""]) != len(names):
                raise InputError(f"line {reader.line_num}: {len(fields)} fields; the header has {len(names)}")
            row = dict(zip(names, fields or [""], strict=True))
            yield TextRow(tuple(row[name] for name in columns), row)
    except csv.Error as error:
        raise InputError(f"line {reader.line_num}: {error}") from None


def _json_lines(lines: Iterable[str], columns: Sequence[str]) -> Iterator[TextRow]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            line.encode(), json.dumps(row, ensure_ascii=False).encode()  # no half of a surrogate pair
        except (ValueError, RecursionError) as error:
            raise InputError(f"line {number}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise InputError(f"line {number}: not a JSON object")
        _check_columns(row, columns, number)
        texts = tuple(row[name] for name in columns)
        if not all(isinstance(text, str) for text in texts):
            raise InputError(f"line {number}: {', '.join(columns)}: not a text")
        yield TextRow(texts, row)


def _check_columns(names: Iterable[str], columns: Sequence[str], line: int) -> None:
    missing = [name for name in columns if name not in names]
    if missing:
        raise InputError(f"line {line}: no column {missing[0]}; there are {', '.join(names)}")
