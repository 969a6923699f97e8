"""Tokenizes the examples of a data set."""

import hashlib
import json
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from deebert.data.encoding import TextEncoder
from deebert.data.tasks import Example


@dataclass(frozen=True)
class Features:
    """A tokenized split, without padding.

    input_ids, token_type_ids: the tokens of all samples in one row (sum of lengths,).
    offsets: (samples + 1,), sample i is [offsets[i]:offsets[i + 1]].
    labels: (samples,) int64, float32 for regression; (samples, labels) float32, 0 or 1, where a line may have several
        labels; None for a file without labels.
    cut: how many of the texts were longer than the limit.
    """

    input_ids: np.ndarray
    token_type_ids: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray | None
    cut: int = 0

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def first(self, count: int) -> "Features":
        """The first `count` samples, or all if there are fewer."""
        count = min(count, len(self))
        end, labels = self.offsets[count], None if self.labels is None else self.labels[:count]
        return Features(self.input_ids[:end], self.token_type_ids[:end], self.offsets[: count + 1], labels)

    def cut_note(self) -> str | None:
        """A line about the texts that were cut, None where none was."""
        share = f"{self.cut} of {len(self)} texts ({100 * self.cut / len(self):.0f} %)"
        return f"{share} have more than {self.lengths.max()} tokens and were cut" if self.cut else None


def tokenize(examples: list[Example], tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> Features:
    """Tokenizes texts and pairs, cut to max_seq_length tokens (the longer text of a pair first)."""
    encode = TextEncoder(
        tokenizer.backend_tokenizer,
        max_seq_length,
        pad_id=tokenizer.pad_token_id,
        has_token_types=True,
        truncation_side=tokenizer.truncation_side,
    )
    encoded = encode([(e.text_a,) if e.text_b is None else (e.text_a, e.text_b) for e in examples])
    labels = [example.label for example in examples]
    dtype = np.int64 if isinstance(labels[0], int) else np.float32
    return Features(
        input_ids=np.concatenate([np.asarray(ids, np.int32) for ids in encoded.ids]),
        token_type_ids=np.concatenate([np.asarray(types, np.int8) for types in encoded.token_types]),
        offsets=np.cumsum([0] + [len(ids) for ids in encoded.ids]),
        labels=None if labels[0] is None else np.asarray(labels, dtype),
        cut=sum(encoded.truncated),
    )


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of all that decides a fast tokenizer's output: vocabulary, merges, normalisation, special tokens.

    It excludes the settings of truncation and padding, because they depend on the last call.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.pop("truncation", None)
    state.pop("padding", None)
    state["truncation_side"] = tokenizer.truncation_side
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
