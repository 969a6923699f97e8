"""Reads tables of any columns: CSV, TSV, JSONL and Parquet files. What cannot be read is an error that names the line.

Python's csv and json do the reading, because they change no value: pandas makes a missing value of texts such as "NA"
and "null", and a number of "007", unless it is told otherwise, and it does not name lines. Parquet needs pandas.
"""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deebert.utils.cli import InputError

LONGEST_FIELD = 2**31 - 1  # characters; the csv module's own limit is 131,072


@dataclass(frozen=True)
class Table:
    """columns: in the file's order. rows: for each the line where it begins (from 1) and its values by column."""

    path: Path
    columns: tuple[str, ...]
    rows: list[tuple[int, Mapping[str, Any]]]


def read_table(path: Path, column_names: Sequence[str] = ()) -> Table:
    """Reads a file by its ending.

    .csv: quoted as spreadsheets do it, separated by commas, or by semicolons if the first line has no comma.
    .tsv: never quoted, a quote character is text. .jsonl, .json: an object in each line. .parquet: with pandas.
    All are UTF-8; a byte order mark, line ends of any system and blank lines do not matter.

    column_names: of a CSV or TSV file without a header line. Raises InputError.
    """
    kind = path.suffix.lower()
    if kind not in (".csv", ".tsv", ".jsonl", ".json", ".parquet"):
        raise InputError(f"{path}: a file that ends in .csv, .tsv, .jsonl or .parquet is needed")
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if column_names and kind not in (".csv", ".tsv"):
        raise InputError(f"{path}: --column_names is for CSV and TSV files without a header line; leave it out")
    if kind == ".parquet":
        table = _read_parquet(path)
    elif kind in (".csv", ".tsv"):
        table = _read_delimited(path, column_names)
    else:
        table = _read_json_lines(path)
    if not table.rows:
        raise InputError(f"{path}: no lines of data in it")
    return table


def read_text(path: Path) -> str:
    """A UTF-8 file without its byte order mark. Raises InputError, which names the line."""
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: not UTF-8 text ({error.reason}); save the file as UTF-8") from None


def _read_delimited(path: Path, column_names: Sequence[str]) -> Table:
    rows = _records(path)
    first = next(rows, None)
    if first is None:
        raise InputError(f"{path}: no lines of data in it")
    columns = tuple(column_names or (name.strip() for name in first[1]))
    repeated = sorted({name for name in columns if columns.count(name) > 1})
    if repeated:
        raise InputError(f"{path}: more than one column is named {repeated[0]!r}; rename one of them")
    if column_names and first[1] == list(columns):
        raise InputError(f"{path}: its first line is a header line; leave --column_names out")
    records = [first, *rows] if column_names else list(rows)
    for line, fields in records:
        if len(fields) != len(columns):
            advice = (
                "text with a tab or a line end" if path.suffix.lower() == ".tsv" else "unquoted text with a separator"
            )
            raise InputError(
                f"{path}, line {line}: {len(fields)} columns where {len(columns)} are expected; is there {advice}?"
            )
    return Table(path, columns, [(line, dict(zip(columns, fields, strict=True))) for line, fields in records])


def _records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The line where a record begins, and its fields; blank lines are skipped."""
    text = read_text(path)
    if path.suffix.lower() == ".tsv":
        options = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    else:
        first_line = text.partition("\n")[0]
        options = {"delimiter": ";" if "," not in first_line and ";" in first_line else ","}
    csv.field_size_limit(LONGEST_FIELD)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, **options)
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            reason = "a quote is opened and never closed" if "unexpected end" in str(error) else str(error)
            raise InputError(f"{path}, line {line}: not a CSV record: {reason}") from None
        if fields is None:
            return
        if fields:
            yield line, fields


def _read_json_lines(path: Path) -> Table:
    rows = []
    for line, text in enumerate(read_text(path).split("\n"), 1):
        if not text.strip():
            continue
        try:
            values = json.loads(text)
            json.dumps(values, ensure_ascii=False).encode()  # no half of a surrogate pair
        except (RecursionError, ValueError) as error:
            raise InputError(f"{path}, line {line}: not JSON ({error}); each line has to be an object") from None
        if not isinstance(values, dict):
            raise InputError(f'{path}, line {line}: not an object, such as {{"text": "...", "label": "..."}}')
        rows.append((line, values))
    return Table(path, tuple(rows[0][1]) if rows else (), rows)


def _read_parquet(path: Path) -> Table:
    try:
        import pandas

        frame = pandas.read_parquet(path)
    except ImportError:
        raise InputError(f"{path}: Parquet needs more packages: pip install pandas pyarrow") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a Parquet file ({error})") from None
    columns = {str(name): [_plain(value) for value in frame[name].tolist()] for name in frame.columns}
    rows = zip(*columns.values(), strict=True)
    return Table(path, tuple(columns), [(i, dict(zip(columns, row, strict=True))) for i, row in enumerate(rows, 1)])


def _plain(value: Any) -> Any:
    """A value of a pandas column as JSON has it: arrays are lists, what is missing is None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return None if value != value else value  # NaN is not equal to itself
