"""Tables record by record: reads CSV, TSV, JSON lines or arrays, and Parquet; writes CSV, TSV and JSON lines.

Values stay as they are, "NA" and "007" too.
Python's csv and json read the lines. pandas' fast reader fills up short lines and drops quotes without a word, and its
slow one, which is Python's csv, names no line of what is wrong.
"""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import IO, Any

from deebert.utils.errors import InputError
from deebert.utils.files import no_formula, printable

# What a file holds, by its ending. Training and predict read the same.
ENDINGS = {".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}  # of a .csv

Source = Path | IO[str]  # a file, or a stream of text that escapes what is not UTF-8
Record = tuple[str, dict[str, Any]]  # the place where it begins, such as "x.csv, line 3", and its values by column


def place_in(source: Source, number: int, unit: str = "line") -> str:
    """A place as messages name it."""
    return f"{source}, {unit} {number}" if isinstance(source, Path) else f"{unit} {number}"


def read_table(path: Path, column_names: Sequence[str] = ()) -> list[Record]:
    """All records of a file. column_names: of a CSV or TSV file without a header line. Raises InputError."""
    kind = ENDINGS.get(path.suffix.lower())
    if kind is None:
        raise InputError(f"{path}: a file that ends in one of {', '.join(ENDINGS)} is needed")
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if column_names and kind not in ("csv", "tsv"):
        raise InputError(f"{path}: names of columns are for CSV and TSV files without a header line; leave them out")
    records = list(read_records(path, kind, column_names))
    if not records:
        raise InputError(f"{path}: no lines of data in it")
    return records


def read_records(source: Source, kind: str, column_names: Sequence[str] = ()) -> Iterator[Record]:
    """The records of a file or stream, one by one. kind: a value of ENDINGS. Raises InputError."""
    if kind in ("csv", "tsv"):
        return csv_records(source, kind == "tsv", column_names)
    return json_records(source) if kind == "jsonl" else parquet_records(source)


def read_lines(source: Source, newline: str = "") -> Iterator[str]:
    """The lines of a UTF-8 file, without byte order mark, or of a stream. Raises InputError, which names the line."""
    number, path = 0, source if isinstance(source, Path) else None
    try:
        opened = path and path.open(encoding="utf-8-sig", errors="surrogateescape", newline=newline)
        with opened or nullcontext(source) as stream:
            for line in stream:
                number += 1
                line.encode()
                yield line
    except UnicodeError:
        raise InputError(f"{place_in(source, number)}: not UTF-8 text; save the file as UTF-8") from None
    except OSError as error:
        raise InputError(f"{path or 'standard input'}: cannot be read ({error.strerror})") from None


def csv_records(source: Source, tabs: bool, column_names: Sequence[str] = ()) -> Iterator[Record]:
    """Records of CSV, or of TSV (tabs), which is never quoted. A header alone has none. Raises InputError.

    The first line of CSV shows the separator, or names it, as Excel's `sep=;`. Blank lines do not matter, but in a
    table of one column they are empty fields.
    """
    lines = read_lines(source)
    first = next(lines, "")
    named = None if tabs else re.fullmatch(r'"?sep=([^"\w \r\n])"?\s*', first, re.IGNORECASE)
    unquoted = re.sub('"[^"]*"', "", first)
    tabs_or_most = "\t" if tabs or "\t" in unquoted else max(SEPARATORS, key=unquoted.count)
    mark = named[1] if named else tabs_or_most
    columns, number = tuple(column_names), 2 if named else 1
    for line, fields in _fields(lines if named else chain([first], lines), mark, not tabs, source, number):
        place = place_in(source, line)
        if not columns:
            columns = tuple(name.strip() for name in fields)
            if repeated := [name for name in columns if columns.count(name) > 1]:
                advice = "rename one, or, where this line is no header, give the names of the columns (column_names)"
                raise InputError(f"{place}: more than one column is named {repeated[0]!r}; {advice}")
        elif fields and fields == [*column_names]:
            raise InputError(f"{place}: this is a header line; leave the names of columns out")
        elif len(fields or [""]) == len(columns):
            yield place, dict(zip(columns, fields or [""], strict=True))
        elif fields:
            expected = f"{len(columns)} are expected, separated by {SEPARATORS.get(mark, mark)}"
            advice = "is there text with a separator or a line end?"
            raise InputError(f"{place}: {len(fields)} columns where {expected}; {advice}")


def _fields(
    lines: Iterable[str], mark: str, quoted: bool, source: Source, number: int
) -> Iterator[tuple[int, list[str]]]:
    """The line where each record begins, and its fields; none for a blank line. number: of the first line."""
    csv.field_size_limit(2**31 - 1)  # characters; its own limit is 131,072
    quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    reader, line = csv.reader(lines, strict=True, delimiter=mark, quoting=quoting), number
    try:
        for fields in reader:
            yield line, fields
            line = number + reader.line_num
    except csv.Error as error:
        reason = "a quote is opened and never closed" if "unexpected end" in str(error) else str(error)
        raise InputError(f"{place_in(source, line)}: not a CSV record: {reason}") from None


def json_records(source: Source) -> Iterator[Record]:
    """The objects of JSON lines, or of one array. Blank lines are skipped. Raises InputError."""
    lines, first = read_lines(source), True
    for number, line in enumerate(lines, 1):
        if first and line.lstrip().startswith("["):
            items = _parsed(line + "".join(lines), source, number)
            yield from (_record(item, place_in(source, row, "row")) for row, item in enumerate(items, 1))
        elif line.strip():
            first = False
            yield _record(_parsed(line.strip(), source, number), place_in(source, number))


def _parsed(text: str, source: Source, number: int) -> Any:
    """The value of a JSON text that begins in this line. NaN and infinity, which JSON lacks, are null."""
    try:
        return json.loads(text, parse_constant=lambda name: None)
    except json.JSONDecodeError as error:
        number, reason = number + error.lineno - 1, f"{error.msg}, column {error.colno}"
    except (ValueError, RecursionError) as error:
        reason = str(error)
    raise InputError(f"{place_in(source, number)}: not JSON: {reason}")


def _record(value: Any, place: str) -> Record:
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
                yield place_in(path, number, "row"), _parsed(text, path, number)
    except ImportError:
        raise InputError(f"{path}: Parquet needs one more package: pip install pyarrow") from None
    except UnicodeDecodeError:
        raise InputError(f"{place_in(path, number, 'row')}: bytes that are not UTF-8 text") from None
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
        shown = json.dumps(value, ensure_ascii=False)[:40]
        raise InputError(f"{place}: {column!r} is not a text: {shown}; give one text there")
    return "" if value is None else str(value)


def read_texts(source: Source, kind: str, columns: Sequence[str]) -> Iterator[tuple[tuple[str, ...], dict]]:
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
            reason = f"{len(fields)} tab-separated fields; give one text in each line, or one pair in each"
            raise InputError(f"{place_in(source, number)}: {reason}")
        yield fields, {}


class TableWriter:
    """Records with further columns as text. kind: csv, tsv or jsonl."""

    def __init__(self, kind: str):
        self.kind, self.columns = kind, None

    def text(self, row: Mapping[str, Any], added: Mapping[str, Any]) -> str:
        """The line of a record; in a csv or tsv table the header comes before the first, unless no record has columns.

        Raises InputError where a record has a column that is added, or in a csv or tsv table other columns than before.
        """
        if taken := [name for name in added if name in row]:
            raise InputError(f"the input has a column {taken[0]} already; rename it")
        if self.kind == "jsonl":
            return json.dumps({**row, **added}, ensure_ascii=False) + "\n"
        lines = [[*row.values(), *added.values()]]
        if self.columns is None:
            self.columns = [*row]
            lines = ([[*row, *added]] if row or self.kind == "csv" else []) + lines
        if self.columns != [*row]:
            raise InputError(f"a row has other columns than the first one: {', '.join(row)}; jsonl can hold them")
        if self.kind == "tsv":
            return "".join("\t".join(printable(as_field(value)) for value in line) + "\n" for line in lines)
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(
            [no_formula(as_field(value)) for value in line] for line in lines
        )
        return text.getvalue()


def as_field(value: Any, digits: str = "") -> str:
    """A value as a field: several with commas between them, None as nothing. digits: the format of a float."""
    if isinstance(value, list):
        return ",".join(as_field(each, digits) for each in value)
    if isinstance(value, float):
        return format(value, digits)
    if isinstance(value, bool | dict):
        return json.dumps(value, ensure_ascii=False)
    return "" if value is None else str(value)
