"""`deebert predict --model DIR < texts.txt`: classifies texts.

One text a line, or a tab-separated pair; with --text_column the rows of a CSV, TSV, JSONL or Parquet file. As soon as
its batch is done, each gets a line with label, probability and exit layer, or its row with these as further columns.
"""

import argparse
import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import IO

from deebert.data.records import ENDINGS
from deebert.data.text_rows import FORMATS, TextRow, read_rows
from deebert.modeling.exit_rules import EXIT_RULES
from deebert.runtime.classifier import Classifier, Prediction
from deebert.utils.cli import ArgumentParser, DefaultsHelp, positive
from deebert.utils.errors import InputError

OWN_COLUMNS = ("prediction", "probability", "exit_layer")


def own_columns(prediction: Prediction) -> dict:
    """What is added to a row."""
    return dict(zip(OWN_COLUMNS, (prediction.label, prediction.probability, prediction.exit_layer), strict=True))


class Writer:
    """Writes rows with their predictions in a format: tsv, csv or jsonl. Plain lines have no header in tsv."""

    def __init__(self, file_format: str):
        self.file_format = file_format
        self.names: list[str] | None = None  # the columns of the first row

    def text(self, rows: Sequence[TextRow], predictions: Sequence[Prediction]) -> str:
        """The lines of these rows. Raises InputError where a row has a column of ours, or other columns than before."""
        lines = io.StringIO()
        for row, prediction in zip(rows, predictions, strict=True):
            if self.file_format == "jsonl":
                values = row.columns | own_columns(prediction) if row.columns else asdict(prediction)
                self._check(row.columns)
                lines.write(json.dumps(values, ensure_ascii=False) + "\n")
            else:
                self._write_fields(lines, row.columns, prediction)
        return lines.getvalue()

    def _write_fields(self, lines: IO, columns: dict, prediction: Prediction) -> None:
        first, plain = self.names is None, self.file_format == "tsv" and not columns
        self._check(columns)
        if first:
            self.names = list(columns)
        if self.names != list(columns):
            raise InputError(f"a row has other columns than the first one: {', '.join(columns)}; use --format jsonl")
        rows = [[*columns, *OWN_COLUMNS]] if first and not plain else []
        label, probability = as_field(prediction.label, ".6g"), as_field(prediction.probability, ".4f")
        rows.append([*map(as_field, columns.values()), label, probability, str(prediction.exit_layer)])
        if self.file_format == "csv":
            csv.writer(lines, lineterminator="\n").writerows(rows)
        else:
            lines.writelines("\t".join(map(escaped, row)) + "\n" for row in rows)

    def _check(self, columns: Iterable[str]) -> None:
        taken = [name for name in OWN_COLUMNS if name in columns]
        if taken:
            raise InputError(f"the input has a column {taken[0]} already; rename it")


def as_field(value, digits: str = "") -> str:
    """A value as a field: several with commas between them, None as nothing. digits: the format of a float."""
    if isinstance(value, list):
        return ",".join(as_field(each, digits) for each in value)
    if isinstance(value, float):
        return format(value, digits)
    if isinstance(value, (bool, dict)):
        return json.dumps(value, ensure_ascii=False)
    return "" if value is None else str(value)


def escaped(text: str) -> str:
    """A field of a tsv line, which has no quotes: tabs and line ends become backslash sequences."""
    return text.translate({9: r"\t", 10: r"\n", 13: r"\r"})


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(
        prog="deebert predict",
        description=__doc__.split("\n\n")[1],
        formatter_class=DefaultsHelp,
    )
    parser.add_argument("--model", required=True, help="folder of a trained or an exported model")
    parser.add_argument("--file", default="-", help="the texts, UTF-8; -: standard input")
    parser.add_argument("--text_column", help="read a table, and the texts from this column")
    parser.add_argument("--text_pair_column", help="the column of the second texts of pairs")
    parser.add_argument(
        "--input_format", choices=FORMATS, help="by default with --text_column by the file's ending or csv, else lines"
    )
    parser.add_argument(
        "--exit_threshold",
        "--early_exit_entropy",
        type=float,
        help="threshold in the exit rule's units; 0 or less: nothing exits early (default: the model's own)",
    )
    parser.add_argument(
        "--exit_rule", choices=EXIT_RULES, help="which uncertainty is compared with it (default: the model's own)"
    )
    parser.add_argument("--batch_size", type=positive, default=32, help="1 prints each result before it reads on")
    parser.add_argument(
        "--continuous_batching",
        "--refill",
        action="store_true",
        help="read all texts first, and keep batches full as samples exit",
    )
    parser.add_argument("--max_seq_length", type=positive, help="longer texts are cut (default: as in the training)")
    parser.add_argument(
        "--format", choices=("tsv", "csv", "jsonl"), help="by default as the input; tsv for lines, jsonl for Parquet"
    )
    return checked(parser.parse_args())


def checked(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments with their defaults. Raises InputError."""
    if args.file != "-" and (not Path(args.file).exists() or Path(args.file).is_dir()):
        raise InputError(f"--file {args.file}: no such file")
    ending = ENDINGS.get(Path(args.file).suffix.lower())
    if args.text_pair_column is not None and args.text_column is None:
        raise InputError("--text_pair_column: give --text_column, too")
    if args.input_format is None and args.text_column is None and ending:
        raise InputError(f"--file {args.file}: give --text_column, or --input_format lines to classify the lines")
    if args.input_format is None:
        args.input_format = "lines" if args.text_column is None else ending or "csv"
    if (args.input_format == "lines") != (args.text_column is None):
        raise InputError(f"--input_format {args.input_format}: tables need --text_column, and lines have no columns")
    if args.input_format == "parquet" and args.file == "-":
        raise InputError("--input_format parquet: give --file, a Parquet file cannot be read as a stream")
    args.format = args.format or {"lines": "tsv", "parquet": "jsonl"}.get(args.input_format, args.input_format)
    return args


@contextmanager
def source(name: str, file_format: str) -> Iterator[Iterator[str] | Path]:
    """The lines of a file, or of standard input for the name -; of a Parquet file its path.

    Raises InputError for what cannot be read as text.
    """
    newline = "\n" if file_format == "lines" else ""

    def lines(stream: IO[str]) -> Iterator[str]:
        try:
            yield from stream
        except UnicodeDecodeError as error:
            raise InputError(f"--file {name}: not UTF-8 text ({error.reason})") from None
        except OSError as error:
            raise InputError(f"--file {name}: cannot be read ({error.strerror})") from None

    if file_format == "parquet":
        yield Path(name)
        return
    if name == "-":
        if sys.stdin is None:
            raise InputError("standard input is closed; give --file")
        sys.stdin.reconfigure(encoding="utf-8-sig", newline=newline)
        yield lines(sys.stdin)
        return
    try:
        stream = Path(name).open(encoding="utf-8-sig", newline=newline)  # noqa: SIM115  closed below
    except OSError as error:
        raise InputError(f"--file {name}: cannot be read ({error.strerror})") from None
    with stream:
        yield lines(stream)


def write(text: str) -> bool:
    """Writes to standard output; False where the reader, `head` for one, wants no more. Raises InputError."""
    try:
        print(text, end="", flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout once more at exit
        if not isinstance(error, BrokenPipeError):
            raise InputError(f"standard output: {error.strerror}; the predictions are incomplete") from None
        return False
    return True


def main() -> None:
    args = parse_args()
    if sys.stdout is None:
        raise InputError("standard output is closed")
    classify = Classifier(args.model, args.exit_threshold, args.max_seq_length, args.exit_rule, args.batch_size)
    if note := classify.threshold_note(args.exit_threshold):
        print(f"note: {note}", file=sys.stderr)
    columns = [name for name in (args.text_column, args.text_pair_column) if name is not None]
    call: Callable = classify.stream if args.continuous_batching else classify
    writer = Writer(args.format)
    with source(args.file, args.input_format) as texts:
        rows = read_rows(texts, args.input_format, columns, "" if args.file == "-" else f"{args.file}, ")
        while batch := list(islice(rows, None if args.continuous_batching else args.batch_size)):
            if not write(writer.text(batch, call([row.texts for row in batch]))):
                return
    stats = classify.stats()
    if stats["truncated"]:
        limit = classify.encode.max_tokens
        print(
            f"note: {stats['truncated']} of {stats['texts']} texts have more than {limit} tokens and were cut",
            file=sys.stderr,
        )
