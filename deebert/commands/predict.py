"""`deebert predict --model DIR < texts.txt`: classifies texts.

One text a line, or a tab-separated pair; with --text_column the rows of a CSV, TSV, JSON or Parquet file. As soon as
its batch is done, each gets a line with label, probability and exit layer, or its row with these as further columns.
A model that hands texts over adds a column that says so.
"""

import argparse
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from deebert.data.tables import ENDINGS, TableWriter, as_field, read_texts
from deebert.modeling.exit_rules import EXIT_RULES
from deebert.runtime.classifier import Classifier, Prediction
from deebert.utils.cli import ArgumentParser, positive
from deebert.utils.errors import InputError
from deebert.utils.files import printable

FORMATS = ("lines", *dict.fromkeys(ENDINGS.values()))


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.split("\n\n")[1])
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
    parser.add_argument("--max_seq_length", type=positive, help="longer texts are cut (default: as in the training)")
    parser.add_argument(
        "--format", choices=("tsv", "csv", "jsonl"), help="by default as the input; tsv for lines, jsonl for Parquet"
    )
    parser.add_argument("--top_k", type=positive, help="jsonl: probabilities of this number of labels, the most likely")
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
    if args.top_k is not None and args.format != "jsonl":
        raise InputError(f"--top_k: a {args.format} has one probability a row; give --format jsonl")
    return args


def source(args: argparse.Namespace) -> Path | Iterable[str]:
    """The file, or standard input as text. Raises InputError where that is closed."""
    if args.file != "-":
        return Path(args.file)
    if sys.stdin is None:
        raise InputError("standard input is closed; give --file")
    newline = "\n" if args.input_format == "lines" else ""
    sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape", newline=newline)
    return sys.stdin


def batches(texts: Iterator[tuple], size: int) -> Iterator[list[tuple]]:
    """The texts in batches. Raises the InputError of a wrong text after the batch of those before it."""
    batch = []
    try:
        for each in texts:
            batch.append(each)
            if len(batch) == size:
                yield batch
                batch = []
    except InputError:
        yield batch
        raise
    yield batch


def added_columns(prediction: Prediction, args: argparse.Namespace, hands_over: bool) -> dict:
    """What a row gets; a line in jsonl gets all that is known. hands_over: whether the model hands texts over."""
    if args.format == "jsonl" and args.input_format == "lines":
        return asdict(prediction)
    label, probability = prediction.label, prediction.probability
    if args.format != "jsonl":
        label, probability = as_field(label, ".6g"), as_field(probability, ".4f")
    likely = {} if args.top_k is None else {"probabilities": prediction.probabilities}
    columns = {"prediction": label, "probability": probability, "exit_layer": prediction.exit_layer} | likely
    if hands_over:
        columns["handed_over"] = prediction.handed_over if args.format == "jsonl" else int(prediction.handed_over)
    return columns


def write(text: str) -> bool:
    """Writes to standard output; False where the reader, `head` for one, wants no more. Raises InputError."""
    try:
        shown = "\n".join(map(printable, text.split("\n"))) if sys.stdout.isatty() else text
        print(shown, end="", flush=True)
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
    texts, writer = read_texts(source(args), args.input_format, columns), TableWriter(args.format)
    hands_over = classify.config.min_confidence > 0
    for batch in filter(None, batches(texts, args.batch_size)):
        predictions = classify([text for text, _ in batch], top_k=args.top_k)
        rows = [row for _, row in batch]
        lines = [writer.text(row, added_columns(x, args, hands_over)) for row, x in zip(rows, predictions, strict=True)]
        if not write("".join(lines)):
            return
    stats = classify.stats()
    if not stats["texts"]:
        print("note: there are no texts in the input", file=sys.stderr)
    if stats["truncated"]:
        more = f"{stats['truncated']} of {stats['texts']} texts have more than {classify.encode.max_tokens} tokens"
        print(f"note: {more} and were cut", file=sys.stderr)
