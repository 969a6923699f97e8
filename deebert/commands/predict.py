"""`deebert predict --model DIR < texts.txt`: classifies texts.

One text a line, or a tab-separated pair. For each, as soon as its batch is done, comes a line with label, probability
and exit layer, tab separated or as JSON.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from itertools import islice
from pathlib import Path

from deebert.modeling.exit_rules import EXIT_RULES
from deebert.runtime.predictor import Prediction, Predictor
from deebert.utils.cli import ArgumentParser, InputError, positive


def read_texts(lines: Iterable[str]) -> Iterator[tuple[str, ...]]:
    """Each line's text or pair. Raises InputError where the lines are not all of one kind."""
    kind = None
    for number, line in enumerate(lines, 1):
        fields = tuple(line.rstrip("\r\n").split("\t"))
        kind = kind or len(fields)
        if len(fields) > 2 or len(fields) != kind:
            raise InputError(
                f"line {number}: {len(fields)} tab-separated fields; give one text in each line, or one pair in each"
            )
        yield fields


def tsv(prediction: Prediction) -> str:
    probability = "" if prediction.probability is None else f"{prediction.probability:.4f}"
    return f"{prediction.label}\t{probability}\t{prediction.exit_layer}"


def jsonl(prediction: Prediction) -> str:
    return json.dumps(asdict(prediction), ensure_ascii=False)


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(
        prog="deebert predict",
        description=__doc__.split("\n\n")[1],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="folder of a trained or an exported model")
    parser.add_argument("--file", default="-", help="the texts, UTF-8; -: standard input")
    parser.add_argument(
        "--exit_threshold",
        "--early_exit_entropy",
        type=float,
        help="threshold in the exit rule's units; 0 or less: nothing exits early; default: the model's own",
    )
    parser.add_argument(
        "--exit_rule", choices=EXIT_RULES, help="which uncertainty is compared with it; default: the model's own"
    )
    parser.add_argument("--batch_size", type=positive, default=32, help="1 prints each result before it reads on")
    parser.add_argument(
        "--continuous_batching",
        "--refill",
        action="store_true",
        help="read all texts first, and keep batches full as samples exit",
    )
    parser.add_argument("--max_seq_length", type=positive, default=128, help="longer texts are cut")
    parser.add_argument("--format", choices=("tsv", "jsonl"), default="tsv")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.file != "-" and (not Path(args.file).exists() or Path(args.file).is_dir()):
        raise InputError(f"--file {args.file}: no such file")
    predict = Predictor(args.model, args.exit_threshold, args.max_seq_length, args.exit_rule)
    show = {"tsv": tsv, "jsonl": jsonl}[args.format]
    if args.file == "-":
        sys.stdin.reconfigure(encoding="utf-8-sig", newline="\n")
    with (
        nullcontext(sys.stdin)
        if args.file == "-"
        else Path(args.file).open(encoding="utf-8-sig", newline="\n") as lines
    ):
        texts = read_texts(lines)
        try:
            if args.continuous_batching and (batch := list(texts)):
                print("\n".join(map(show, predict.stream(batch, args.batch_size))), flush=True)
            while batch := list(islice(texts, args.batch_size)):
                print("\n".join(map(show, predict(batch))), flush=True)
        except BrokenPipeError:  # the reader, `head` for one, wants no more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout once more at exit
        except UnicodeDecodeError as error:
            raise InputError(f"--file {args.file}: not UTF-8 text ({error.reason})") from None
