"""A trained or exported model with its tokenizer: texts in, labels out."""

import random
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock

import numpy as np

from deebert.data.encoding import EncodedTexts, TextEncoder, as_tuples, check_vocabulary, eval_batches
from deebert.modeling.config import config_cutoffs, has_several_labels, longest_text, set_rule
from deebert.modeling.config_checks import is_number, is_whole
from deebert.modeling.exit_rules import NO_EXIT
from deebert.runtime.exported import is_exported, read_tokenizer
from deebert.runtime.onnx_runtime import OnnxDeeBert
from deebert.utils.arrays import confidence, shares
from deebert.utils.cli import missing_package
from deebert.utils.errors import InputError

WINDOW = 10_000  # the last calls, of which percentiles are computed
Threshold = float | Sequence[float] | None
NO_THRESHOLD = (
    "this model has no exit threshold, so no text exits early; "
    "give exit_threshold, or choose one by `python -m deebert eval` with target_drop"
)


@dataclass(frozen=True)
class Prediction:
    """What a model says about one text.

    label: the class; where a text has several labels the list of those with a probability above 0.5; of a regression
        model the number. None where the text is handed over: the model is less sure than its `min_confidence`.
    probability: of that class, or of each label in the list; None for regression.
    exit_layer: the layer, from 1, after which the text exited; 0: before the first layer.
    probabilities: of every label; empty for regression.
    truncated: whether the text was too long for the model and was cut.
    handed_over: whether somebody else has to say the label.
    """

    label: str | list[str] | float | None
    probability: float | list[float] | None
    exit_layer: int
    probabilities: dict[str, float]
    truncated: bool = False
    handed_over: bool = False

    @property
    def labels(self) -> list[str]:
        """The classes: one, any number where a text may have several, none of a regression model."""
        return self.label if isinstance(self.label, list) else [self.label] if isinstance(self.label, str) else []

    def top(self, k: int | None) -> "Prediction":
        """The same with the k most probable labels in `probabilities`, the first first; None: all, as they are."""
        if k is None:
            return self
        best = sorted(self.probabilities.items(), key=lambda item: -item[1])[:k]
        return replace(self, probabilities=dict(best))


class Watch:
    """Counts texts by exit layer and by label, and times calls. Safe from several threads. layers: N."""

    def __init__(self, layers: int):
        self.layers, self.lock = layers, Lock()
        self.exits, self.labels = Counter(), Counter()
        self.counts = Counter(truncated=0, handed_over=0, audited=0, changed=0)
        self.seconds: deque[float] = deque(maxlen=WINDOW)

    def record(
        self, exits: Iterable[int] = (), labels: Iterable[str] = (), seconds: Iterable[float] = (), **counts: int
    ) -> None:
        """Adds the exit layers and the labels of texts, the seconds of calls, and other counts (see `stats`)."""
        with self.lock:
            self.exits.update(exits)
            self.labels.update(labels)
            self.counts.update(counts)
            self.seconds.extend(seconds)

    def stats(self) -> dict:
        """The counts since the start, and percentiles of the last 10,000 calls.

        texts, truncated, handed_over, audited, changed: numbers of texts. exits, labels: of texts by exit layer and
        label. latency_ms: percentiles of the calls, None before the first.
        """
        with self.lock:
            exits, labels, counts, seconds = Counter(self.exits), dict(self.labels), dict(self.counts), [*self.seconds]
        percentiles = (1000 * np.percentile(seconds, [50, 95, 99])).tolist() if seconds else [None] * 3
        return {
            "texts": exits.total(),
            **counts,
            "exits": {layer: exits[layer] for layer in sorted({*range(1, self.layers + 1), *exits})},
            "labels": labels,
            "latency_ms": dict(zip(("p50", "p95", "p99"), percentiles, strict=True)),
        }


class Classifier:
    """A saved or exported model with its tokenizer. Safe from any number of threads.

    exit_threshold, exit_rule, max_seq_length (tokens): in place of the model's own. batch_size: texts that go through
    the model at once.
    audit: the share of texts, from 0 to 1, that also run through all layers, after they were classified; `stats` counts
    how often that changes the label. A pickle holds the arguments and loads the folder again.
    Raises InputError for what is no trained DeeBERT, and for values out of range.
    """

    def __init__(
        self,
        folder: str,
        exit_threshold: float | None = None,
        max_seq_length: int | None = None,
        exit_rule: str | None = None,
        batch_size: int = 32,
        audit: float = 0.0,
    ):
        check_whole(batch_size=batch_size or 0, max_seq_length=max_seq_length)
        if not (is_number(audit) and 0 <= audit <= 1):
            raise InputError(f"audit {audit}: give a share from 0 to 1")
        self.arguments = (folder, exit_threshold, max_seq_length, exit_rule, batch_size, audit)
        if is_exported(folder):
            self.runtime = OnnxDeeBert(folder)
            tokenizer = read_tokenizer(Path(folder))
        else:
            try:
                from deebert.runtime.pytorch_runtime import PyTorchRuntime
            except ModuleNotFoundError as error:
                needs = f"not exported for ONNX Runtime, so it needs more: {missing_package(error)}"
                raise InputError(f"{folder}: {needs}") from None
            self.runtime = PyTorchRuntime(folder)
            tokenizer = self.runtime.tokenizer
        self.config, self.batch_size, self.audit = self.runtime.config, batch_size, audit
        encoding = self.runtime.encoding
        longest = min(longest_text(self.config, max_seq_length), encoding["max_tokens"])
        check_vocabulary(tokenizer, self.config.vocab_size, folder)
        self.encode = TextEncoder(tokenizer, **encoding | {"max_tokens": longest})
        try:
            if self.options(exit_threshold, exit_rule):
                set_rule(self.config, exit_rule or self.config.exit_rule, exit_threshold)
        except ValueError as error:
            given = "" if exit_threshold is None else f"exit_threshold {exit_threshold}: "
            raise InputError(f"{given}{error}") from None
        if audit and self.is_regression:
            raise InputError("an audit compares labels, and a regression model has none; leave it out")
        self.watch = Watch(self.config.num_hidden_layers)

    def __reduce__(self):
        return type(self), self.arguments

    def __call__(
        self,
        texts: Sequence[str | tuple[str, str]],
        exit_threshold: Threshold = None,
        exit_rule: str | None = None,
        top_k: int | None = None,
    ) -> list[Prediction]:
        """Classifies any number of texts, or of pairs (text, text), in batches of texts of similar length.

        exit_threshold, exit_rule: for this call only. top_k: so many labels are left in `probabilities`, the most
        probable first. Raises ValueError for anything else than texts, and for a threshold, rule or top_k that makes no
        sense here.
        """
        if len(texts) == 0 and not isinstance(texts, str):
            return []
        check_whole(top_k=top_k)
        options, start = self.options(exit_threshold, exit_rule), time.perf_counter()
        encoded = self.encode(as_tuples(texts))
        predictions = self.classify(encoded, options)
        self.watch.record(seconds=[time.perf_counter() - start])
        self.run_audit(encoded, predictions)
        return [prediction.top(top_k) for prediction in predictions]

    def options(self, exit_threshold: Threshold, exit_rule: str | None = None) -> dict:
        """What differs from the model's own threshold and rule, for one call. Raises ValueError."""
        if exit_threshold is None and exit_rule is None:
            return {}
        if exit_threshold is None:
            raise ValueError(f"exit_rule {exit_rule}: give exit_threshold, too; each rule has its own units")
        config_cutoffs(self.config, exit_threshold, exit_rule)
        return {"exit_threshold": exit_threshold, "exit_rule": exit_rule}

    def classify(self, encoded: EncodedTexts, options: dict) -> list[Prediction]:
        """Predictions for texts of `encode`, in their order, with the options of `options`."""
        by_row: dict[int, Prediction] = {}
        for rows in eval_batches([*map(len, encoded.ids)], self.batch_size):
            by_row |= zip(rows, self._run(encoded, rows, options), strict=True)
        predictions = [by_row[row] for row in range(len(encoded))]
        labels = [label for prediction in predictions for label in prediction.labels]
        counts = {"truncated": sum(encoded.truncated), "handed_over": sum(p.handed_over for p in predictions)}
        self.watch.record([p.exit_layer for p in predictions], labels, **counts)
        return predictions

    def run_audit(self, encoded: EncodedTexts, predictions: Sequence[Prediction | Exception]) -> None:
        """Runs the share `audit` of these texts through all layers, and counts the labels that change.

        Texts that have run through all layers already count, too, and cannot change. Those that failed do not count.
        """
        known = {row: prediction for row, prediction in enumerate(predictions) if isinstance(prediction, Prediction)}
        audited = [row for row in known if random.random() < self.audit]
        early = [row for row in audited if known[row].exit_layer < self.config.num_hidden_layers]
        changed = 0
        for i in range(0, len(early), self.batch_size):
            rows = early[i : i + self.batch_size]
            full = self._run(encoded, rows, {"exit_threshold": NO_EXIT})
            changed += sum(known[row].label != other.label for row, other in zip(rows, full, strict=True))
        self.watch.record(audited=len(audited), changed=changed)

    def stats(self) -> dict:
        """Counts of texts by exit layer and by label, and latency percentiles, see `Watch.stats`."""
        return self.watch.stats()

    def threshold_note(self, given: float | None) -> str | None:
        """One line where the threshold makes no text exit early, unless that was given, or makes each exit at once."""
        rule, cutoffs = config_cutoffs(self.config)
        first = next((cutoff for cutoff in cutoffs if cutoff > 0), None)
        if first is None:
            return NO_THRESHOLD if given is None else None
        if rule.stateful or first <= rule.max_uncertainty:
            return None
        return (
            f"at threshold {first:g} every text exits at the first off-ramp: the uncertainty of the rule "
            f"{rule.name} is at most {rule.max_uncertainty:.3g} here"
        )

    @property
    def is_regression(self) -> bool:
        """Whether the model predicts a number."""
        return self.config.num_labels == 1 and not has_several_labels(self.config)

    def _run(self, encoded: EncodedTexts, rows: Sequence[int], options: dict) -> list[Prediction]:
        """Predictions for these texts, as one batch."""
        output = self.runtime(**encoded.padded(rows), **options)
        facts = zip(output.exit_layer.tolist(), (encoded.truncated[row] for row in rows), strict=True)
        if self.is_regression:
            values = output.logits[:, 0].tolist()
            return [Prediction(value, None, layer, {}, cut) for value, (layer, cut) in zip(values, facts, strict=True)]
        several = has_several_labels(self.config)
        names = [self.config.id2label[i] for i in range(self.config.num_labels)]
        predicted = []
        likely = shares(output.logits, several)
        for row, sure, (layer, cut) in zip(likely.tolist(), confidence(likely, several).tolist(), facts, strict=True):
            probabilities = dict(zip(names, row, strict=True))
            label = [name for name, p in probabilities.items() if p > 0.5] if several else names[int(np.argmax(row))]
            probability = [probabilities[name] for name in label] if several else probabilities[label]
            unsure = sure < self.config.min_confidence
            predicted.append(Prediction(None if unsure else label, probability, layer, probabilities, cut, unsure))
        return predicted


def check_whole(**values: object) -> None:
    """Raises InputError for a value that is neither None nor a whole number above 0."""
    for name, value in values.items():
        if value is not None and not is_whole(value, 1):
            raise InputError(f"{name}: give a whole number above 0")
