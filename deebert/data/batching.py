"""Batches of features: for training, for evaluation, and a function mapped over all of them."""

import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from deebert.data.features import Features, Sample

BUCKET_BATCHES = 50  # training batches are cut from shuffled runs of this many, sorted by length


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


def map_batches(
    ask: Callable[[dict[str, Tensor]], tuple[Tensor, ...]],
    features: Features,
    collate: Collator,
    batch_size: int,
    device: torch.device,
    accelerator: Accelerator | None = None,
    progress: str | None = None,
) -> Iterator[tuple[np.ndarray, ...]]:
    """What `ask` gives for each batch, float32, behind the samples' indices; all of them, in every process.

    ask: a batch of the collator's tensors, on the device and without labels, -> tensors (B, ...). The batches are the
    same for any number of processes. accelerator: None where this process is alone. progress: the bar's name.
    """
    batches = eval_batches(features.lengths, batch_size)
    processes, process = (1, 0) if accelerator is None else (accelerator.num_processes, accelerator.process_index)
    own = iter(data_loader(features, batches[process::processes], collate))
    bar = tqdm(total=len(batches), desc=progress, unit="batch", disable=progress is None or process > 0, leave=False)
    for first in range(0, len(batches), processes):
        found = []
        if first + process < len(batches):
            batch = next(own)
            index, _ = batch.pop("index").numpy(), batch.pop("labels", None)
            with torch.inference_mode():
                given = ask({name: tensor.to(device) for name, tensor in batch.items()})
            found.append((index, *(tensor.float().cpu().numpy() for tensor in given)))
        yield from found if processes == 1 else gather_object(found)
        bar.update(min(processes, len(batches) - first))
    bar.close()
