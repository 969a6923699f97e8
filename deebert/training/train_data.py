"""What a stage of training takes: an interface, its form for tokenized texts, and the same with a teacher's logits.

The form for off-ramps alone is in cached_features.py.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import tee
from typing import Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from deebert.data.batching import Collator, data_loader, map_batches
from deebert.data.features import Features
from deebert.modeling.exit_rules import NO_EXIT


class TrainData(Protocol):
    """What a stage is trained on. lengths: (samples,), by which batches are formed."""

    lengths: np.ndarray

    def load(self, batches: Iterable[list[int]]) -> Iterable[dict[str, Tensor]]:
        """For each list of sample indices a batch: the arguments of the trainee, and labels (B,)."""

    def trainee(self, model) -> nn.Module:
        """The module that takes these batches: the model, or its off-ramps alone."""


@dataclass(frozen=True)
class TokenData:
    """Tokenized texts, for the full model. workers: processes that collate batches; 0: the main process does it."""

    features: Features
    collate: Collator
    workers: int = 0

    @property
    def lengths(self) -> np.ndarray:
        return self.features.lengths

    def load(self, batches: Iterable[list[int]]) -> Iterable[dict[str, Tensor]]:
        return data_loader(self.features, batches, self.collate, self.workers, pin_memory=torch.cuda.is_available())

    def trainee(self, model) -> nn.Module:
        return model


TEACHER_BATCH_SIZE = 32


@dataclass(frozen=True)
class TaughtData:
    """Data with a teacher's logits (S, C) for its S samples: batches have teacher_logits (B, C), too."""

    data: TrainData
    teacher_logits: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return self.data.lengths

    def load(self, batches: Iterable[list[int]]) -> Iterator[dict[str, Tensor]]:
        batches, indices = tee(batches)
        for batch, rows in zip(self.data.load(batches), indices, strict=True):
            yield batch | {"teacher_logits": torch.from_numpy(self.teacher_logits[rows])}

    def trainee(self, model) -> nn.Module:
        return self.data.trainee(model)


def final_logits(model, features: Features, collate: Collator, accelerator: Accelerator) -> np.ndarray:
    """The logits (S, C) of the final classifier, without dropout. All processes share the work."""
    model.eval()
    logits = np.empty((len(features), model.config.num_labels), np.float32)

    def forward_fn(batch: dict[str, Tensor]) -> tuple[Tensor]:
        with accelerator.autocast():
            return (model(**batch, exit_threshold=NO_EXIT).logits,)

    for index, values in map_batches(
        forward_fn, features, collate, TEACHER_BATCH_SIZE, model.device, accelerator, "teacher"
    ):
        logits[index] = values
    return logits
