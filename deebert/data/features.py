"""Examples -> token ids, cached; and batches of them, padded to their own longest."""

import hashlib
import json
import os
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from deebert.data.tasks import Example, Task, data_file, read_examples
from deebert.utils.cli import InputError
from deebert.utils.files import replacing

CACHE_FORMAT = 1  # raise it when what is stored, or how texts become features, changes
BUCKET_BATCHES = 50  # training batches are cut from shuffled runs of this many, sorted by length


@dataclass(frozen=True)
class Features:
    """A tokenized split, without padding.

    input_ids, token_type_ids: the tokens of all samples in one row (sum of lengths,).
    offsets: (samples + 1,), sample i is [offsets[i]:offsets[i + 1]].
    labels: (samples,) int64, float32 for regression; None where the file has none.
    """

    input_ids: np.ndarray
    token_type_ids: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray | None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def first(self, count: int) -> "Features":
        """The first `count` samples, or all where there are fewer."""
        count = min(count, len(self))
        end, labels = self.offsets[count], None if self.labels is None else self.labels[:count]
        return Features(self.input_ids[:end], self.token_type_ids[:end], self.offsets[: count + 1], labels)

    def __getitem__(self, i: int) -> "Sample":
        tokens = slice(self.offsets[i], self.offsets[i + 1])
        return Sample(
            i, self.input_ids[tokens], self.token_type_ids[tokens], None if self.labels is None else self.labels[i]
        )


@dataclass(frozen=True)
class Sample:
    """One sample: its index in the split, its tokens (T,) and its label."""

    index: int
    input_ids: np.ndarray
    token_type_ids: np.ndarray
    label: np.generic | None


def tokenize(examples: list[Example], tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> Features:
    """Tokenizes texts and pairs, cut to max_seq_length tokens (the longer text of a pair first)."""
    pairs = [example.text_b for example in examples] if examples[0].text_b is not None else None
    encoded = tokenizer(
        [example.text_a for example in examples],
        pairs,
        truncation="longest_first",
        max_length=max_seq_length,
        return_token_type_ids=True,
        return_attention_mask=False,
    )
    labels = [example.label for example in examples]
    return Features(
        input_ids=np.concatenate([np.asarray(ids, np.int32) for ids in encoded["input_ids"]]),
        token_type_ids=np.concatenate([np.asarray(ids, np.int8) for ids in encoded["token_type_ids"]]),
        offsets=np.cumsum([0] + [len(ids) for ids in encoded["input_ids"]]),
        labels=None
        if labels[0] is None
        else np.asarray(labels, np.float32 if isinstance(labels[0], float) else np.int64),
    )


def load_features(
    task: Task,
    data_dir: str | Path,
    split: str,
    labels: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
    overwrite_cache: bool = False,
) -> Features:
    """The features of a split, from the cache where exactly these have been made before."""
    path = data_file(data_dir, split)
    key = _cache_key(task.name, split, labels, fingerprint(tokenizer), max_seq_length, path)
    cached = cache_dir() / f"{task.name}-{split}-{max_seq_length}-{key}.npz"
    if cached.exists() and not overwrite_cache:
        with np.load(cached, allow_pickle=False) as arrays:
            return Features(**{"labels": None, **arrays})
    features = tokenize(read_examples(task, data_dir, split, labels), tokenizer, max_seq_length)
    _write_cache(cached, features)
    return features


def cache_dir() -> Path:
    """Where features are kept: never beside the data, which may be shared or read-only."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "deebert" / "features"


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of all that decides a fast tokenizer's output: vocabulary, merges, normalisation, special tokens.

    The state of truncation and padding is left out: it is that of the last call.
    """
    if not tokenizer.is_fast:
        raise InputError(f"--tokenizer_name {tokenizer.name_or_path}: it has no fast tokenizer (tokenizer.json)")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.pop("truncation", None)
    state.pop("padding", None)
    state["truncation_side"] = tokenizer.truncation_side
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _cache_key(task: str, split: str, labels: tuple[str, ...], tokenizer: str, max_seq_length: int, path: Path) -> str:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    facts = [CACHE_FORMAT, task, split, labels, tokenizer, max_seq_length, digest]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:20]


def _write_cache(path: Path, features: Features) -> None:
    """A cache that can't be written only costs time."""
    try:
        with replacing(path, "wb") as file:
            np.savez(file, **{name: array for name, array in vars(features).items() if array is not None})
    except OSError as error:
        print(f"note: features are not cached: {error}")


@dataclass(frozen=True)
class Collator:
    """Samples -> a batch of tensors: input_ids, attention_mask, token_type_ids (B, T), labels (B,), index (B,).

    T is the longest of the batch, or pad_to where that is given (the original's fixed padding).
    """

    pad_token_id: int
    token_types: int
    pad_to: int | None = None

    def __call__(self, samples: list[Sample]) -> dict[str, Tensor]:
        shape = (len(samples), self.pad_to or max(len(sample.input_ids) for sample in samples))
        input_ids = np.full(shape, self.pad_token_id, np.int64)
        token_type_ids, attention_mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for row, sample in enumerate(samples):
            length = len(sample.input_ids)
            input_ids[row, :length] = sample.input_ids
            attention_mask[row, :length] = 1
            if self.token_types > 1:  # RoBERTa has a single token type
                token_type_ids[row, :length] = sample.token_type_ids
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        if samples[0].label is not None:
            batch["labels"] = np.stack([sample.label for sample in samples])
        batch["index"] = np.asarray([sample.index for sample in samples])
        return {name: torch.from_numpy(array) for name, array in batch.items()}


def collator(config, pad_to: int | None = None) -> Collator:
    """The collator that a model of this config needs."""
    return Collator(config.pad_token_id, config.type_vocab_size, pad_to)


@dataclass(frozen=True)
class Share:
    """A part of an update: what one process sees in one forward pass.

    update: the sample indices of the whole update, over all processes. rows: those of this part.
    weight: by which its mean loss counts, so that an average over processes of sums over parts is the update's mean.
    last: whether the update is complete with it.
    """

    update: np.ndarray
    rows: list[int]
    weight: float
    last: bool


@dataclass(frozen=True)
class TrainBatches:
    """Which samples each update of a training sees: in each epoch a new order, seeded, of similar lengths.

    batch_size: samples that one process sees at a time; an update has batch_size x accumulation x processes of them,
    and is the same update however that number comes about. The last of an epoch may have fewer.
    """

    lengths: np.ndarray
    batch_size: int
    seed: int
    accumulation: int = 1
    processes: int = 1
    process: int = 0

    @property
    def update_size(self) -> int:
        return self.batch_size * self.accumulation * self.processes

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.update_size)

    def epoch(self, number: int) -> list[np.ndarray]:
        """The sample indices of each update of an epoch, which counts from 0."""
        rng, size = np.random.default_rng((self.seed, number)), self.update_size
        order = rng.permutation(len(self.lengths))
        run_size = size * BUCKET_BATCHES
        runs = [order[i : i + run_size] for i in range(0, len(order), run_size)]
        order = np.concatenate([run[np.argsort(self.lengths[run], kind="stable")] for run in runs])
        updates = [order[i : i + size] for i in range(0, len(order), size)]
        full = len(order) // size
        return [updates[i] for i in rng.permutation(full)] + updates[full:]

    def updates(self, done: int, total: int) -> Iterator[np.ndarray]:
        """The updates that follow when `done` of `total` have been made."""
        for number in range(done // len(self), -(-total // len(self))):
            first = number * len(self)
            yield from self.epoch(number)[max(done - first, 0) : total - first]

    def shares(self, done: int, total: int) -> Iterator[Share]:
        """This process's parts of them. Every process has as many; one without samples has one that weighs nothing."""
        together = self.batch_size * self.processes
        for update in self.updates(done, total):
            for i in range(0, len(update), together):
                rows = update[i : i + together][self.process :: self.processes].tolist()
                weight = len(rows) * self.processes / len(update)
                yield Share(update, rows or update[:1].tolist(), weight, last=i + together >= len(update))


def eval_batches(lengths: np.ndarray, batch_size: int) -> list[list[int]]:
    """Batches of samples of similar length; of one sample each: in the order of the file."""
    order = np.arange(len(lengths)) if batch_size == 1 else np.argsort(lengths, kind="stable")
    return [order[i : i + batch_size].tolist() for i in range(0, len(order), batch_size)]


def leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C and SIGTERM reach a whole group of processes; workers end with the one that they work for."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def data_loader(
    features: Features, batches: Iterable[list[int]], collate: Collator, workers: int = 0, pin_memory: bool = False
) -> DataLoader:
    """Batches of tensors, in the order of `batches` (lists of sample indices), whatever the number of workers."""
    own_generator = (
        torch.Generator()
    )  # a loader draws a seed: from the global state, it would change a training's dropout
    return DataLoader(
        features,
        batch_sampler=batches,
        collate_fn=collate,
        generator=own_generator,
        num_workers=workers,
        worker_init_fn=leave_signals_to_the_parent,
        pin_memory=pin_memory,
    )
