"""--cache_features: the frozen backbone is run once, and the off-ramps are trained on what they read in it.

A deviation from the paper: there is no dropout in the frozen backbone, so that a sample looks alike in every epoch.
Shapes: S samples, B batch, N layers, H hidden, C labels.
"""

import math
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from deebert.data.batching import Collator, map_batches
from deebert.data.features import Features
from deebert.modeling.classifier import HighwayClassifierOutput
from deebert.modeling.exit_rules import NO_EXIT
from deebert.modeling.off_ramps import mean_weights
from deebert.utils.files import check_room

IN_MEMORY = 2**30  # bytes of reads up to which they are kept in memory, beyond in a file that is mapped
BATCH_SIZE = 32


@dataclass(frozen=True)
class CachedFeatures:
    """What the off-ramps are trained on (see `training.TrainData`).

    reads: (S, N-1, H), what each off-ramp's pooling gives. final_logits: (S, C). labels: (S,).
    lengths: (S,) of the texts, so that the batches are those of a training without a cache.
    """

    reads: np.ndarray
    final_logits: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray

    def load(self, batches: Iterable[list[int]]) -> Iterator[dict[str, Tensor]]:
        for rows in batches:
            arrays = {"reads": self.reads, "final_logits": self.final_logits, "labels": self.labels}
            yield {name: torch.from_numpy(array[rows]) for name, array in arrays.items()}

    def trainee(self, model) -> nn.Module:
        return OffRamps(model)


class OffRamps(nn.Module):
    """A model's off-ramps behind their poolings, answering for all exits."""

    def __init__(self, model):
        super().__init__()
        self.highway, self.learn_to_exit = model.base_model.encoder.highway, model.base_model.encoder.learn_to_exit

    def forward(self, reads: Tensor, final_logits: Tensor, **_) -> HighwayClassifierOutput:
        """(B, N-1, H), (B, C) -> all_logits (B, N, C), all_certainties (B, N-1). Takes the whole model's switches."""
        read = reads.unbind(dim=1)
        early = [highway.answer(x) for highway, x in zip(self.highway, read, strict=True)]
        head = self.learn_to_exit
        return HighwayClassifierOutput(
            logits=final_logits,
            all_logits=torch.stack([*early, final_logits.to(early[0].dtype)], dim=1),
            all_certainties=None if head is None else torch.stack([head(x) for x in read], dim=1),
        )


@contextmanager
def cached_features(
    model, features: Features, collate: Collator, accelerator: Accelerator, folder: Path
) -> Iterator[CachedFeatures]:
    """Runs the backbone once over the features. Large reads lie in a file in `folder` until the block ends."""
    model.eval()
    config, encoder = model.config, model.base_model.encoder

    def ask(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        with accelerator.autocast():
            output = model(**batch, output_hidden_states=True, exit_threshold=NO_EXIT)
        weights = mean_weights(batch["attention_mask"], output.hidden_states[0].dtype)
        states = output.hidden_states[1:-1]  # the first are the embeddings
        reads = [highway.pool(hidden, weights) for highway, hidden in zip(encoder.highway, states, strict=True)]
        return torch.stack(reads, dim=1), output.logits

    final_logits = np.empty((len(features), config.num_labels), np.float32)
    shape = (len(features), len(encoder.highway), config.hidden_size)
    with _array(shape, folder, accelerator.num_processes) as reads:
        batches = map_batches(
            ask, features, collate, BATCH_SIZE, model.device, accelerator, progress="caching features"
        )
        for index, read, logits in batches:
            reads[index], final_logits[index] = read, logits
        yield CachedFeatures(reads, final_logits, features.labels, features.lengths)


@contextmanager
def _array(shape: tuple[int, ...], folder: Path, processes: int) -> Iterator[np.ndarray]:
    """An array in memory, or a large one in a file that is gone afterwards; each process has its own."""
    size = 4 * math.prod(shape)
    if size <= IN_MEMORY:
        yield np.empty(shape, np.float32)
        return
    check_room(folder, size * processes, "the features of --cache_features")
    with tempfile.TemporaryDirectory(prefix=".features-", dir=folder) as place:
        yield np.lib.format.open_memmap(Path(place, "reads.npy"), "w+", np.float32, shape)
