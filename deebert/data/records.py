"""Records of CSV, TSV and JSON lines, one by one from the lines of a file or of a stream. Errors name the line.

Python's csv and json do the reading, because they change no value: pandas makes a missing value of texts such as "NA"
and "null", and a number of "007", unless its options turn that off, and it does not name lines.
"""

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

from deebert.utils.errors import InputError

# What a file holds, by its ending. Training and predict read the same.
ENDINGS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
LONGEST_FIELD = 2**31 - 1  # characters; the csv module's own limit is 131,072


def delimited(
    lines: Iterable[str], tabs: bool, place: str = "", column_names: Sequence[str] = (), wanted: Sequence[str] = ()
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yields the line where each record begins (from 1), and its fields by column. A header alone yields nothing.

    tabs: separated by tabs and never quoted, a quote character is text. Else quoted as spreadsheets do it, separated
    by commas, or by semicolons if the first line has no comma. Blank lines do not matter, but in a table of one column
    they are empty fields. place: what errors name before the line, such as "x.csv, ". column_names: of a table without
    a header line. wanted: columns that have to be there. Raises InputError.
    """
    records = _records(lines, tabs, place)
    first = next((record for record in records if record[1]), None)
    if first is None:
        return
    columns = tuple(column_names or (name.strip() for name in first[1]))
    repeated = sorted({name for name in columns if columns.count(name) > 1})
    if repeated:
        raise InputError(f"{place}line {first[0]}: more than one column is named {repeated[0]!r}; rename one of them")
    if column_names and first[1] == list(columns):
        raise InputError(f"{place}line {first[0]}: this is a header line; leave --column_names out")
    check_columns(columns, wanted, place, first[0])
    for line, fields in chain([first], records) if column_names else records:
        if not fields and len(columns) > 1:
            continue
        fields = fields or [""]
        if len(fields) != len(columns):
            advice = "text with a tab or a line end" if tabs else "unquoted text with a separator"
            raise InputError(
                f"{place}line {line}: {len(fields)} columns where {len(columns)} are expected; is there {advice}?"
            )
        yield line, dict(zip(columns, fields, strict=True))


def _records(lines: Iterable[str], tabs: bool, place: str) -> Iterator[tuple[int, list[str]]]:
    """The line where a record begins, and its fields; none for a blank line."""
    lines = iter(lines)
    first = next(lines, "")
    comma = ";" if "," not in first and ";" in first else ","
    options = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"delimiter": comma}
    csv.field_size_limit(LONGEST_FIELD)
    reader = csv.reader(chain([first], lines), strict=True, **options)
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            reason = "a quote is opened and never closed" if "unexpected end" in str(error) else str(error)
            raise InputError(f"{place}line {line}: not a CSV record: {reason}") from None
        if fields is None:
            return
        yield line, fields


def json_objects(
    lines: Iterable[str], place: str = "", wanted: Sequence[str] = ()
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields each line's number (from 1) and its JSON object, which has to have the columns wanted.

    Blank lines are skipped. Raises InputError.
    """
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            line.encode(), json.dumps(values, ensure_ascii=False).encode()  # no half of a surrogate pair
        except (ValueError, RecursionError) as error:
            raise InputError(f"{place}line {number}: not JSON ({error}); each line has to be an object") from None
        if not isinstance(values, dict):
            raise InputError(f'{place}line {number}: not a JSON object, such as {{"text": "...", "label": "..."}}')
        check_columns(values, wanted, place, number)
        yield number, values


def as_text(value: Any, where: str) -> str:
    """The text in a field: a number as it is written, nothing for null.

    where: what an error names, such as "x.csv, line 3: 'text'". Raises InputError for a list or an object.
    """
    if isinstance(value, (list, dict)):
        raise InputError(f"{where} is not a text: {json.dumps(value)[:40]}")
    return "" if value is None else str(value)


def check_columns(names: Iterable[str], wanted: Sequence[str], place: str, line: int) -> None:
    """Raises InputError where a column is missing."""
    missing = [name for name in wanted if name not in names]
    if missing:
        raise InputError(f"{place}line {line}: no column {missing[0]}; there are {', '.join(names)}")
