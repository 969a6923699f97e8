"""Reads tables record by record: CSV, TSV, JSON lines or arrays, Parquet. Values stay as they are, "NA" and "007" too.

Python's csv and json read the lines. pandas' fast reader fills up short lines and drops quotes without a word, and its
slow one, which is Python's csv, names no line of what is wrong.
"""

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import IO, Any

from deebert.utils.errors import InputError

# What a file holds, by its ending. Training and predict read the same.
ENDINGS = {".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}  # of a .csv, the likeliest first

Record = tuple[str, dict[str, Any]]  # the place where it begins, such as "x.csv, line 3", and its values by column


def read_table(path: Path, column_names: Sequence[str] = ()) -> list[Record]:
    """All records of a file. column_names: of a CSV or TSV file without a header line. Raises InputError."""
    kind = ENDINGS.get(path.suffix.lower())
    if kind is None:
        raise InputError(f"{path}: a file that ends in .csv, .tsv, .jsonl, .json or .parquet is needed")
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if column_names and kind not in ("csv", "tsv"):
        raise InputError(f"{path}: names of columns are for CSV and TSV files without a header line; leave them out")
    records = list(read_records(path, kind, column_names))
    if not records:
        raise InputError(f"{path}: no lines of data in it")
    return records


def read_records(source: Path | IO[str], kind: str, column_names: Sequence[str] = ()) -> Iterator[Record]:
    """The records of a file or of a text stream, one by one. kind: a value of ENDINGS. Raises InputError."""
    if kind == "parquet":
        return parquet_records(source)
    lines, file = read_lines(source), f"{source}, " if isinstance(source, Path) else ""
    return json_records(lines, file) if kind == "jsonl" else csv_records(lines, kind == "tsv", file, column_names)


def read_lines(source: Path | IO[str], newline: str = "") -> Iterator[str]:
    """The lines of a UTF-8 file, without its byte order mark, or of a stream that escapes what is not UTF-8.

    newline: as for `open`. Raises InputError, which names the line.
    """
    number, file = 0, source if isinstance(source, Path) else None
    try:
        opened = file.open(encoding="utf-8-sig", errors="surrogateescape", newline=newline) if file else None
        with opened or nullcontext(source) as stream:
            for line in stream:
                number += 1
                line.encode()
                yield line
    except UnicodeError:
        place = f"{file}, line {number}" if file else f"line {number}"
        raise InputError(f"{place}: not UTF-8 text; save the file as UTF-8") from None
    except OSError as error:
        raise InputError(f"{file or 'standard input'}: cannot be read ({error.strerror})") from None


def csv_records(
    lines: Iterable[str], tabs: bool, file: str = "", column_names: Sequence[str] = ()
) -> Iterator[tuple[str, dict[str, str]]]:
    """Records of lines. A header alone has none.

    tabs: separated by tabs and never quoted, a quote character is text. Else quoted as spreadsheets do it; the first
    line shows the separator, or names it, as in Excel's `sep=;`. Blank lines do not matter, but in a table of one
    column they are empty fields. file: what errors name before the line, such as "x.csv, ". Raises InputError.
    """
    lines = iter(lines)
    first = next(lines, "")
    named = None if tabs else re.fullmatch(r'"?sep=(.)"?\s*', first, re.IGNORECASE)
    unquoted = re.sub('"[^"]*"', "", first)
    mark = "\t" if tabs else named[1] if named else next((mark for mark in SEPARATORS if mark in unquoted), ",")
    columns = tuple(column_names)
    for place, fields in _fields(lines if named else chain([first], lines), mark, tabs, file, 2 if named else 1):
        if not columns:
            columns = tuple(name.strip() for name in fields)
            repeated = [name for name in columns if columns.count(name) > 1]
            if repeated:
                raise InputError(
                    f"{place}: more than one column is named {repeated[0]!r}; rename one of them, or, where this line "
                    "is no header, give the names of the columns (column_names)"
                )
        elif fields and fields == [*column_names]:
            raise InputError(f"{place}: this is a header line; leave the names of columns out")
        elif fields or len(columns) == 1:
            fields = fields or [""]
            if len(fields) != len(columns):
                advice = "text with a tab or a line end" if tabs else "unquoted text with a separator"
                raise InputError(
                    f"{place}: {len(fields)} columns where {len(columns)} are expected, separated by "
                    f"{SEPARATORS.get(mark, mark)}; is there {advice}?"
                )
            yield place, dict(zip(columns, fields, strict=True))


def _fields(lines: Iterable[str], mark: str, tabs: bool, file: str, line: int) -> Iterator[tuple[str, list[str]]]:
    """The place where each record begins, and its fields; none for a blank line. line: the number of the first."""
    csv.field_size_limit(2**31 - 1)  # characters; its own limit is 131,072
    quoting = csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
    reader, place = csv.reader(lines, strict=True, delimiter=mark, quoting=quoting), f"{file}line {line}"
    try:
        for fields in reader:
            yield place, fields
            place = f"{file}line {line + reader.line_num}"
    except csv.Error as error:
        reason = "a quote is opened and never closed" if "unexpected end" in str(error) else str(error)
        raise InputError(f"{place}: not a CSV record: {reason}") from None


def json_records(lines: Iterable[str], file: str = "") -> Iterator[Record]:
    """The objects of JSON lines, or of one array. Blank lines are skipped. Raises InputError."""
    lines, first = iter(lines), True
    for number, line in enumerate(lines, 1):
        if first and line.lstrip().startswith("["):
            for row, item in enumerate(_parsed(line + "".join(lines), file, number), 1):
                yield _object(item, f"{file}row {row}")
        elif line.strip():
            first = False
            yield _object(_parsed(line.strip(), file, number), f"{file}line {number}")


def _parsed(text: str, file: str, line: int) -> Any:
    """The value of a JSON text that begins in this line. NaN and infinity, which JSON lacks, are null."""
    try:
        return json.loads(text, parse_constant=lambda name: None)
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        reason = f"not JSON: {error.msg}, column {error.colno}"
    except (ValueError, RecursionError) as error:
        reason = f"not JSON: {error}"
    raise InputError(f"{file}line {line}: {reason}")


def _object(value: Any, place: str) -> Record:
    if not isinstance(value, dict):
        raise InputError(f'{place}: not a JSON object, such as {{"text": "...", "label": "..."}}')
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeError:
        reason = "half of a surrogate pair, such as \\ud83d alone, is no Unicode text"
        raise InputError(f"{place}: {reason}; complete or remove it") from None
    return place, value


def parquet_records(path: Path) -> Iterator[Record]:
    """The rows of a Parquet file, with values as JSON has them: dates and decimals are texts. Raises InputError."""
    number = 0
    try:
        from pyarrow import parquet

        for batch in parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                values = {name: x for name, x in row.items() if not name.startswith("__index_level_")}  # of pandas
                text = json.dumps(values, default=lambda x: x.decode() if isinstance(x, bytes) else str(x))
                yield f"{path}, row {number}", _parsed(text, f"{path}, ", number)
    except ImportError:
        raise InputError(f"{path}: Parquet needs one more package: pip install pyarrow") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}, row {number}: bytes that are not UTF-8 text") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a Parquet file ({error})") from None


def value_of(row: Mapping[str, Any], column: str, place: str) -> Any:
    """The value in a column. Raises InputError where the record has none."""
    if column not in row:
        raise InputError(f"{place}: no {column!r}; it has {', '.join(row) or 'nothing'}")
    return row[column]


def text_of(row: Mapping[str, Any], column: str, place: str) -> str:
    """The text in a column: a number as it is written, nothing for null. Raises InputError for a list or an object."""
    value = value_of(row, column, place)
    if isinstance(value, list | dict):
        raise InputError(f"{place}: {column!r} is not a text: {json.dumps(value)[:40]}")
    return "" if value is None else str(value)


def read_texts(source: Path | IO[str], kind: str, columns: Sequence[str]) -> Iterator[tuple[tuple[str, ...], dict]]:
    """Texts, or pairs, one by one, each with the record whose columns hold it.

    kind: a value of ENDINGS; or "lines", each a text or a tab-separated pair, without a record. Raises InputError.
    """
    if kind != "lines":
        for place, row in read_records(source, kind):
            yield tuple(text_of(row, name, place) for name in columns), row
        return
    size = None
    for number, line in enumerate(read_lines(source, newline="\n"), 1):
        fields = tuple(line.rstrip("\r\n").split("\t"))
        size = size or len(fields)
        if len(fields) > 2 or len(fields) != size:
            place = f"{source}, line {number}" if isinstance(source, Path) else f"line {number}"
            advice = "give one text in each line, or one pair in each"
            raise InputError(f"{place}: {len(fields)} tab-separated fields; {advice}")
        yield fields, {}
