"""Classifies texts: `deebert predict --model DIR < texts.txt`.

One text a line, or a tab-separated pair. For each, as soon as its batch is done, comes a line with label, probability
and exit layer, tab separated or as JSON.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch

from deebert.modeling.checkpoints import load_config, load_model, load_tokenizer, max_tokens, quiet_transformers
from deebert.modeling.exit_rules import EXIT_RULES
from deebert.runtime.continuous_batching import classify_refilled
from deebert.runtime.onnx_runtime import OnnxDeeBert, is_exported
from deebert.utils.cli import ArgumentParser, InputError, positive


@dataclass(frozen=True)
class Prediction:
    """label: the class, or the value of a regression model as text; probability: of that class, None for regression."""

    label: str
    probability: float | None
    exit_layer: int


class Predictor:
    """A saved or exported model with its tokenizer. Raises InputError for what is no trained DeeBERT."""

    def __init__(
        self,
        folder: str,
        exit_threshold: float | None = None,
        max_seq_length: int = 128,
        exit_rule: str | None = None,
    ):
        quiet_transformers()
        config = load_config(folder)
        if exit_rule is not None:
            if exit_threshold is None:
                raise InputError(f"--exit_rule {exit_rule}: give --exit_threshold, too; each rule has its own units")
            config.exit_rule = exit_rule
        self.max_seq_length = min(max_seq_length, max_tokens(config))
        self.tokenizer = load_tokenizer(folder)
        if is_exported(folder):
            self.model = OnnxDeeBert(folder)
        else:
            self.model = load_model(folder, config).eval().to("cuda" if torch.cuda.is_available() else "cpu")
        if exit_threshold is not None:
            try:
                self.model.set_exit_rule(config.exit_rule, exit_threshold)
            except ValueError as error:
                rule = "" if exit_rule is None else f"--exit_rule {exit_rule} "
                raise InputError(f"{rule}--exit_threshold {exit_threshold}: {error}") from None

    def __call__(self, texts: list[tuple[str, ...]]) -> list[Prediction]:
        """Classifies one batch of texts or pairs, all of the same kind."""
        with torch.inference_mode():
            return self._predictions(self.model(**self._inputs(texts).to(self.model.device)))

    def refilled(self, texts: list[tuple[str, ...]], batch_size: int) -> list[Prediction]:
        """Classifies any number of texts in batches of similar length that are filled up as samples leave."""
        order = sorted(range(len(texts)), key=lambda i: sum(map(len, texts[i])))
        chunks = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        batches = (self._inputs([texts[i] for i in chunk]).to(self.model.device) for chunk in chunks)
        found = self._predictions(classify_refilled(self.model, batches, batch_size))
        return [prediction for _, prediction in sorted(zip(order, found, strict=True), key=lambda pair: pair[0])]

    def _inputs(self, texts: list[tuple[str, ...]]):
        columns = [list(column) for column in zip(*texts, strict=True)]
        return self.tokenizer(
            *columns, truncation="longest_first", max_length=self.max_seq_length, padding=True, return_tensors="pt"
        )

    def _predictions(self, output) -> list[Prediction]:
        layers = output.exit_layer.tolist()
        if self.model.config.num_labels == 1:
            values = output.logits[:, 0].tolist()
            return [Prediction(f"{value:.4f}", None, layer) for value, layer in zip(values, layers, strict=True)]
        probability, label = output.logits.float().softmax(dim=-1).max(dim=-1)
        names = [self.model.config.id2label[i] for i in label.tolist()]
        return [Prediction(*fields) for fields in zip(names, probability.tolist(), layers, strict=True)]


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
        help="threshold in the exit rule's units; up to 0 nothing leaves early; default: the model's own",
    )
    parser.add_argument("--exit_rule", choices=EXIT_RULES, help="what is held against it; default: the model's own")
    parser.add_argument("--batch_size", type=positive, default=32, help="1 answers each line before it reads the next")
    parser.add_argument("--refill", action="store_true", help="read all, and keep batches full as samples leave")
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
            if args.refill and (batch := list(texts)):
                print("\n".join(map(show, predict.refilled(batch, args.batch_size))), flush=True)
            while batch := list(islice(texts, args.batch_size)):
                print("\n".join(map(show, predict(batch))), flush=True)
        except BrokenPipeError:  # the reader, `head` say, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout once more at exit
        except UnicodeDecodeError as error:
            raise InputError(f"--file {args.file}: not UTF-8 text ({error.reason})") from None
