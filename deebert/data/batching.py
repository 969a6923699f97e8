"""Tokenizes the examples of a data set, and makes batches of them, for training and for evaluation."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from deebert.data.encoding import TextEncoder, eval_batches, padded
from deebert.data.tasks import Example

BUCKET_BATCHES = 50  # the samples of this many shuffled training batches are sorted by length, then cut into batches
UNTIMED_BATCH_SIZE = 32  # of passes that are not timed: their outputs do not depend on it


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

    def take(self, rows: Sequence[int]) -> "Features":
        """These samples."""
        tokens = np.concatenate([np.arange(*self.offsets[row : row + 2]) for row in rows])
        offsets = np.cumsum([0, *self.lengths[rows]])
        labels = None if self.labels is None else self.labels[rows]
        return Features(self.input_ids[tokens], self.token_type_ids[tokens], offsets, labels)

    def cut_note(self) -> str | None:
        """A line about the texts that were cut, None where none was."""
        share = f"{self.cut} of {len(self)} texts ({100 * self.cut / len(self):.0f} %)"
        return f"{share} have more than {self.lengths.max()} tokens and were cut" if self.cut else None


def tokenize(examples: list[Example], tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> Features:
    """Tokenizes texts and pairs, cut to max_seq_length tokens (the longer text of a pair first)."""
    backend, side = tokenizer.backend_tokenizer, tokenizer.truncation_side
    encode = TextEncoder(backend, max_seq_length, tokenizer.pad_token_id, has_token_types=True, truncation_side=side)
    encoded = encode([example.texts for example in examples])
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
    """A hash of all that decides a fast tokenizer's output: vocabulary, merges, normalisation, special tokens."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for last_call in ("truncation", "padding"):
        state.pop(last_call, None)
    state["truncation_side"] = tokenizer.truncation_side
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


Collator: TypeAlias = Callable[[Features, Sequence[int]], dict[str, Tensor]]  # makes a batch of these samples


def collator(config, pad_to: int | None = None) -> Collator:
    """For a model of this config: input_ids, attention_mask, token_type_ids (B, T), labels (B,) if any, index (B,).

    T is the longest sample's length, or pad_to if it is given (the original's fixed padding).
    """
    several = config.type_vocab_size > 1  # RoBERTa has a single type of tokens

    def collate(features: Features, rows: Sequence[int]) -> dict[str, Tensor]:
        spans = [slice(*features.offsets[row : row + 2]) for row in rows]
        ids, types = [features.input_ids[span] for span in spans], [features.token_type_ids[span] for span in spans]
        width = pad_to or max(map(len, ids))
        batch = {
            "input_ids": padded(ids, width, config.pad_token_id),
            "attention_mask": padded([np.ones_like(each) for each in ids], width, 0),
            "token_type_ids": padded([several * each for each in types], width, 0),
            "index": np.asarray(rows),
        }
        if features.labels is not None:
            batch["labels"] = features.labels[rows]
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    return collate


@dataclass(frozen=True)
class MicroBatch:
    """The samples that one process takes in one forward and backward pass.

    step_rows: sample indices of the full optimizer step, over all processes. rows: those of this micro-batch.
    weight: factor on this micro-batch's mean loss. With it, summing over micro-batches and averaging over processes
        gives the mean loss over all samples of the step.
    last: whether it is the last of its step.
    """

    step_rows: np.ndarray
    rows: list[int]
    weight: float
    last: bool


@dataclass(frozen=True)
class TrainBatches:
    """The samples of each optimizer step. Each epoch has a new seeded order; samples of similar length are together.

    batch_size: samples of one micro-batch. A step takes batch_size x accumulation x processes samples, and its samples
    depend only on this product. The last step of an epoch may take fewer.
    """

    lengths: np.ndarray
    batch_size: int
    seed: int
    accumulation: int = 1
    processes: int = 1
    process: int = 0

    @property
    def samples_per_step(self) -> int:
        return self.batch_size * self.accumulation * self.processes

    def __len__(self) -> int:
        """The number of steps in an epoch."""
        return -(-len(self.lengths) // self.samples_per_step)

    def epoch(self, number: int) -> list[np.ndarray]:
        """The sample indices of each step of an epoch, which counts from 0."""
        rng, size = np.random.default_rng((self.seed, number)), self.samples_per_step
        order = rng.permutation(len(self.lengths))
        run_size = size * BUCKET_BATCHES
        runs = [order[i : i + run_size] for i in range(0, len(order), run_size)]
        order = np.concatenate([run[np.argsort(self.lengths[run], kind="stable")] for run in runs])
        steps = [order[i : i + size] for i in range(0, len(order), size)]
        full = len(order) // size
        return [steps[i] for i in rng.permutation(full)] + steps[full:]

    def steps(self, done: int, total: int) -> Iterator[np.ndarray]:
        """The sample indices of each of the `total` steps, without the first `done`."""
        for number in range(done // len(self), -(-total // len(self))):
            first = number * len(self)
            yield from self.epoch(number)[max(done - first, 0) : total - first]

    def micro_batches(self, done: int, total: int) -> Iterator[MicroBatch]:
        """This process's micro-batches of these steps, as many as any process has: some are a sample of weight 0."""
        together = self.batch_size * self.processes
        for step_rows in self.steps(done, total):
            for i in range(0, len(step_rows), together):
                rows = step_rows[i : i + together][self.process :: self.processes].tolist()
                weight = len(rows) * self.processes / len(step_rows)
                last = i + together >= len(step_rows)
                yield MicroBatch(step_rows, rows or step_rows[:1].tolist(), weight, last)


def map_batches(
    forward_fn: Callable[[dict[str, Tensor]], tuple[Tensor, ...]],
    features: Features,
    collate: Collator,
    device: torch.device,
    accelerator: Accelerator | None = None,
    progress: str | None = None,
    batch_size: int = UNTIMED_BATCH_SIZE,
) -> Iterator[tuple[np.ndarray, ...]]:
    """For each batch the samples' indices (B,), then the outputs of forward_fn (float32); all of them in every process.

    Args:
        forward_fn: takes a batch of the collator's tensors, on the device and without labels; returns tensors (B, ...).
        accelerator: shares the batches among its processes, which changes no batch. None: a single process.
        progress: name of the progress bar; None: no bar.
    """
    batches = eval_batches(features.lengths, batch_size)
    processes, process = (1, 0) if accelerator is None else (accelerator.num_processes, accelerator.process_index)
    hidden = progress is None or process > 0 or None  # None: unless it is written to a terminal
    for first in tqdm(range(0, len(batches), processes), progress, unit="batch", disable=hidden, leave=False):
        outputs = []
        if first + process < len(batches):
            batch = collate(features, batches[first + process])
            index, _ = batch.pop("index").numpy(), batch.pop("labels", None)
            with torch.inference_mode():
                tensors = forward_fn({name: tensor.to(device) for name, tensor in batch.items()})
            outputs.append((index, *(tensor.float().cpu().numpy() for tensor in tensors)))
        yield from outputs if processes == 1 else gather_object(outputs)
