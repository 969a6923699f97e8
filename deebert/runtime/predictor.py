"""A trained or exported model with its tokenizer: texts in, labels out."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deebert.modeling.checkpoints import (
    is_exported,
    load_config,
    load_model,
    load_tokenizer,
    max_tokens,
    quiet_transformers,
)
from deebert.modeling.config import has_several_labels
from deebert.runtime.continuous_batching import classify_stream
from deebert.runtime.onnx_runtime import OnnxDeeBert
from deebert.utils.cli import InputError


@dataclass(frozen=True)
class Prediction:
    """label: the class, or the value of a regression model as text; probability: of that class, None for regression.

    Of a model with several labels a text: those with a probability above 0.5, with commas, and the probability of the
    least certain decision, yes or no, about a label.
    """

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

    def __call__(self, texts: Sequence[str | tuple[str, ...]]) -> list[Prediction]:
        """Classifies one batch of texts, or of pairs (text, text). Raises ValueError for anything else."""
        texts = as_tuples(texts)
        with torch.inference_mode():
            return self._predictions(self.model(**self._inputs(texts).to(self.model.device)))

    def stream(self, texts: Sequence[str | tuple[str, ...]], batch_size: int) -> list[Prediction]:
        """Classifies any number of texts by continuous batching, in batches of texts of similar length."""
        texts = as_tuples(texts)
        order = sorted(range(len(texts)), key=lambda i: sum(map(len, texts[i])))
        chunks = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        batches = (self._inputs([texts[i] for i in chunk]).to(self.model.device) for chunk in chunks)
        predictions = self._predictions(classify_stream(self.model, batches, batch_size))
        return [prediction for _, prediction in sorted(zip(order, predictions, strict=True), key=lambda pair: pair[0])]

    def _inputs(self, texts: Sequence[str | tuple[str, ...]]):
        columns = [list(column) for column in zip(*texts, strict=True)]
        return self.tokenizer(
            *columns, truncation="longest_first", max_length=self.max_seq_length, padding=True, return_tensors="pt"
        )

    def _predictions(self, output) -> list[Prediction]:
        layers = output.exit_layer.tolist()
        if self.model.config.num_labels == 1:
            values = output.logits[:, 0].tolist()
            return [Prediction(f"{value:.4f}", None, layer) for value, layer in zip(values, layers, strict=True)]
        if has_several_labels(self.model.config):
            return [
                self._several(each, layer) for each, layer in zip(output.logits.float().sigmoid(), layers, strict=True)
            ]
        probability, label = output.logits.float().softmax(dim=-1).max(dim=-1)
        names = [self.model.config.id2label[i] for i in label.tolist()]
        return [Prediction(*fields) for fields in zip(names, probability.tolist(), layers, strict=True)]

    def _several(self, probabilities: torch.Tensor, layer: int) -> Prediction:
        """The labels above 0.5, of probabilities (C,), and the probability of the least certain decision."""
        names = [name for i, name in sorted(self.model.config.id2label.items()) if probabilities[i] > 0.5]
        return Prediction(",".join(names), torch.maximum(probabilities, 1 - probabilities).min().item(), layer)


def as_tuples(texts: Sequence[str | tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Texts as tuples of one, pairs as tuples of two. Raises ValueError for a bare string, and for mixed kinds."""
    if isinstance(texts, str):
        raise ValueError("give a list of texts, or of pairs; this is a single string")
    tuples = [(text,) if isinstance(text, str) else tuple(text) for text in texts]
    if not tuples or {len(item) for item in tuples} not in ({1}, {2}):
        raise ValueError("give at least one text; all items have to be texts, or all of them pairs")
    return tuples
