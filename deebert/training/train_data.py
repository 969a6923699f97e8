"""What a stage of training takes: an interface, and its form for tokenized texts.

The form for off-ramps alone is in cached_features.py.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from deebert.data.batching import Collator, data_loader
from deebert.data.features import Features


class TrainData(Protocol):
    """What a stage is trained on. lengths: (samples,), by which batches are formed."""

    lengths: np.ndarray

    def load(self, batches: Iterable[list[int]]) -> Iterable[dict[str, Tensor]]:
        """For each list of sample indices a batch: the arguments of the trainee, and labels (B,)."""

    def trainee(self, model) -> nn.Module:
        """The module that takes these batches: the model, or its off-ramps alone."""


@dataclass(frozen=True)
class TokenData:
    """Tokenized texts, for the full model."""

    features: Features
    collate: Collator

    @property
    def lengths(self) -> np.ndarray:
        return self.features.lengths

    def load(self, batches: Iterable[list[int]]) -> Iterable[dict[str, Tensor]]:
        return data_loader(self.features, batches, self.collate, pin_memory=torch.cuda.is_available())

    def trainee(self, model) -> nn.Module:
        return model
