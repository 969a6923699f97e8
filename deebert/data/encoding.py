"""From texts to tokens, for any number of threads at once. Shapes: B texts, T tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from deebert.utils.errors import InputError, one_line

UNFIT = "the tokenizer cannot encode the texts", "give the one of the training"
MIN_TOKENS = 8  # the special tokens of a pair, and something between them


@dataclass(frozen=True)
class EncodedTexts:
    """The tokens of texts or pairs, and which of them were cut.

    token_types: of each token which text of a pair it belongs to; None where the model does not read it.
    """

    ids: list[list[int]]
    token_types: list[list[int]] | None
    truncated: list[bool]
    pad_id: int

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def joined(cls, parts: Sequence[tuple["EncodedTexts", int]]) -> "EncodedTexts":
        """Single texts, of several or of the same, one after the other. Each is given by its position."""
        types = None if parts[0][0].token_types is None else [texts.token_types[row] for texts, row in parts]
        ids, truncated = [texts.ids[row] for texts, row in parts], [texts.truncated[row] for texts, row in parts]
        return cls(ids, types, truncated, parts[0][0].pad_id)

    def padded(self, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """A model's inputs (B, T) for these texts, padded to the longest of them."""
        width = max(len(self.ids[row]) for row in rows)
        inputs = {"input_ids": padded([self.ids[row] for row in rows], width, self.pad_id)}
        inputs["attention_mask"] = padded([[1] * len(self.ids[row]) for row in rows], width, 0)
        if self.token_types is not None:
            inputs["token_type_ids"] = padded([self.token_types[row] for row in rows], width, 0)
        return inputs


def eval_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Batches of samples of similar length, so of little padding. With batch size 1 they keep their order."""
    order = np.arange(len(lengths)) if batch_size == 1 else np.argsort(lengths, kind="stable")
    return [order[i : i + batch_size].tolist() for i in range(0, len(order), batch_size)]


def padded(rows: Sequence[Sequence[int]], width: int, value: int) -> np.ndarray:
    """Rows of numbers as rows of an array (B, width)."""
    array = np.full((len(rows), width), value, np.int64)
    for i, row in enumerate(rows):
        array[i, : len(row)] = row
    return array


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, name: str) -> None:
    """Raises InputError where a tokenizer has tokens without embeddings in the model of this name and vocab_size."""
    number, token = max((number, token) for token, number in tokenizer.get_vocab(with_added_tokens=True).items())
    if number >= vocab_size:
        raise InputError(
            f"{name}: the tokenizer gives {token!r} the number {number}, but the model has embeddings for {vocab_size} "
            "tokens, from 0; use the tokenizer of its training, or add embeddings (resize_token_embeddings)"
        )


def as_tuples(texts: Sequence[str | tuple[str, str]]) -> list[tuple[str, ...]]:
    """Texts as tuples of one, pairs as tuples of two. Raises InputError for anything else."""
    if isinstance(texts, str | Mapping):
        raise InputError(f"give a list of texts, or of pairs; this is a {type(texts).__name__}")
    tuples = [tuple(item) if isinstance(item, tuple | list) else (item,) for item in texts]
    if not tuples or {len(item) for item in tuples} not in ({1}, {2}):
        raise InputError("give at least one text; all items have to be texts, or all of them pairs")
    try:
        "".join(text for item in tuples for text in item).encode()
    except TypeError:
        raise InputError('texts have to be strings; give "" where one is missing') from None
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold
        raise InputError("a text is not valid Unicode") from None
    return tuples


class TextEncoder:
    """Tokenizes texts and pairs, and cuts the longer text of a pair first, as transformers' tokenizers do.

    It keeps its own tokenizer, whose settings never change: transformers changes truncation and padding in every call,
    which is not safe with threads. transformers also stores every overflowing combination of a pair: two texts of
    20,000 words take it a minute.
    Raises InputError where max_tokens leaves no room for text.
    """

    def __init__(
        self, tokenizer: Tokenizer, max_tokens: int, pad_id: int, has_token_types: bool, truncation_side: str = "right"
    ):
        if max_tokens < MIN_TOKENS:
            raise InputError(f"max_seq_length {max_tokens}: give at least {MIN_TOKENS} tokens")
        self.tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.max_tokens, self.pad_id, self.has_token_types = max_tokens, pad_id, has_token_types
        self.truncation_side = truncation_side
        with one_line(*UNFIT):
            self.templates = {1: self._template("a"), 2: self._template("a", "a")}

    def __call__(self, texts: Sequence[tuple[str, ...]]) -> EncodedTexts:
        """Encodes texts, as tuples of one, or pairs, as tuples of two. Raises InputError where the tokenizer cannot."""
        size = len(texts[0])
        flat = [text for item in texts for text in item]
        with one_line(*UNFIT):
            ids = [encoding.ids for encoding in self.tokenizer.encode_batch_fast(flat, add_special_tokens=False)]
        ids_and_types, truncated = [], []
        for i in range(0, len(ids), size):
            parts = self._cut(ids[i : i + size])
            truncated.append(any(len(cut) < len(part) for cut, part in zip(parts, ids[i : i + size], strict=True)))
            ids_and_types.append(self._with_special_tokens(parts))
        token_types = [types for _, types in ids_and_types] if self.has_token_types else None
        return EncodedTexts([ids for ids, _ in ids_and_types], token_types, truncated, self.pad_id)

    def _template(self, *texts: str) -> list[tuple[int | None, int, int]]:
        """Where the special tokens are: for each (None, its id, its type), for each text (its number, 0, its type)."""
        encoding = self.tokenizer.encode(*texts)
        template: list[tuple[int | None, int, int]] = []
        for sequence, token, kind in zip(encoding.sequence_ids, encoding.ids, encoding.type_ids, strict=True):
            entry = (sequence, token if sequence is None else 0, kind)
            if sequence is None or entry not in template:  # a text of several tokens is one entry
                template.append(entry)
        return template

    def _cut(self, parts: Sequence[list[int]]) -> list[list[int]]:
        """The tokens of a text, or of a pair, that fit beside the special tokens: of a pair the longer is cut first."""
        room = self.max_tokens - (len(self.templates[len(parts)]) - len(parts))
        sizes = [room]
        if len(parts) == 2:
            first, second = map(len, parts)
            shorter = min(first, second, room // 2)
            sizes = [shorter, room - shorter] if first <= second else [room - shorter, shorter]
        if self.truncation_side == "left":
            return [tokens[max(0, len(tokens) - size) :] for tokens, size in zip(parts, sizes, strict=True)]
        return [tokens[:size] for tokens, size in zip(parts, sizes, strict=True)]

    def _with_special_tokens(self, parts: Sequence[list[int]]) -> tuple[list[int], list[int]]:
        """Token ids and types."""
        ids, types = [], []
        for sequence, token, kind in self.templates[len(parts)]:
            tokens = [token] if sequence is None else parts[sequence]
            ids += tokens
            types += [kind] * len(tokens)
        return ids, types
