"""Writes records with predictions as lines of TSV, CSV or JSON."""

import csv
import io
import json
from collections.abc import Mapping
from typing import Any

from deebert.utils.errors import InputError
from deebert.utils.text import no_formula, printable


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
