"""Reads tables of any columns: CSV, TSV, JSONL and Parquet files. An error names the file and the line."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deebert.data.records import ENDINGS, check_columns, delimited, json_objects
from deebert.utils.errors import InputError
from deebert.utils.files import read_bytes


@dataclass(frozen=True)
class Table:
    """columns: in the file's order. rows: for each the line where it begins (from 1) and its values by column."""

    path: Path
    columns: tuple[str, ...]
    rows: list[tuple[int, Mapping[str, Any]]]


def read_table(path: Path, column_names: Sequence[str] = ()) -> Table:
    """Reads a file by its ending.

    csv and tsv of `ENDINGS`: see `delimited`. jsonl: an object in each line; all are UTF-8, with or without a byte
    order mark. parquet: with pandas.

    column_names: of a CSV or TSV file without a header line. Raises InputError.
    """
    kind = ENDINGS.get(path.suffix.lower())
    if kind is None:
        raise InputError(f"{path}: a file that ends in .csv, .tsv, .jsonl or .parquet is needed")
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if column_names and kind not in ("csv", "tsv"):
        raise InputError(f"{path}: --column_names is for CSV and TSV files without a header line; leave it out")
    if kind == "parquet":
        columns, rows = read_parquet(path)
    else:
        lines, place = io.StringIO(read_text(path), newline=""), f"{path}, "
        if kind == "jsonl":
            rows = list(json_objects(lines, place))
        else:
            rows = list(delimited(lines, kind == "tsv", place, column_names))
        columns = tuple(rows[0][1]) if rows else ()
    if not rows:
        raise InputError(f"{path}: no lines of data in it")
    return Table(path, columns, rows)


def read_text(path: Path) -> str:
    """A UTF-8 file without its byte order mark. Raises InputError, which names the line."""
    data = read_bytes(path)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: not UTF-8 text ({error.reason}); save the file as UTF-8") from None


def read_parquet(path: Path, wanted: Sequence[str] = ()) -> tuple[tuple[str, ...], list[tuple[int, dict]]]:
    """The columns' names, and the rows with their numbers from 1. wanted: columns that have to be there.

    Raises InputError.
    """
    try:
        import pandas

        frame = pandas.read_parquet(path, dtype_backend="numpy_nullable")  # else 1 beside a gap is 1.0
    except ImportError:
        raise InputError(f"{path}: Parquet needs more packages: pip install pandas pyarrow") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a Parquet file ({error})") from None
    columns = {}
    for name in frame.columns:
        try:
            columns[str(name)] = [_plain(value, pandas.isna) for value in frame[name].tolist()]
        except UnicodeDecodeError:
            raise InputError(f"{path}: the column {name!r} holds bytes that are not UTF-8 text") from None
    check_columns(columns, wanted, f"{path}, ", 1)
    rows = zip(*columns.values(), strict=True)
    return tuple(columns), [(i, dict(zip(columns, row, strict=True))) for i, row in enumerate(rows, 1)]


def _plain(value: Any, is_missing: Callable[[Any], bool]) -> Any:
    """A value of a pandas column as JSON has it: arrays are lists, missing values None, dates text.

    Raises UnicodeDecodeError.
    """
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list):
        return [_plain(item, is_missing) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item, is_missing) for key, item in value.items()}
    if is_missing(value):
        return None
    if isinstance(value, bytes):
        return value.decode()
    return value if isinstance(value, str | int | float) else str(value)
