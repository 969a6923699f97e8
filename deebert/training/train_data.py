"""What a stage of training takes: tokenized texts, or for the off-ramps alone what each of them pools of the texts.

Cached features differ from the paper: the frozen backbone runs once, without dropout, so that a sample's features are
the same in every epoch. Shapes: S samples, B batch, E exits, H hidden, C labels.
"""

import errno
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from deebert.data.batching import Collator, Features, map_batches
from deebert.modeling.classifier import HighwayClassifierOutput
from deebert.modeling.exit_rules import NO_EXIT
from deebert.modeling.off_ramps import mean_weights
from deebert.utils.errors import InputError

IN_MEMORY = 2**30  # bytes; larger caches are a memory-mapped file


@dataclass(frozen=True)
class TokenData:
    """Tokenized texts, for the full model.

    lengths: (S,) in tokens, by which batches are formed. trainee: the module that takes the batches of `load`.
    """

    features: Features
    collate: Collator

    @property
    def lengths(self) -> np.ndarray:
        return self.features.lengths

    def load(self, batches: Iterable[list[int]]) -> Iterable[dict[str, Tensor]]:
        return (self.collate(self.features, rows) for rows in batches)

    def trainee(self, model) -> nn.Module:
        return model


@dataclass(frozen=True)
class CachedFeatures:
    """Pooled states, for the off-ramps alone, in the same batches as the tokens.

    pooled: (S, E-1, H), the pooled state of each off-ramp. final_logits: (S, C). labels, lengths: (S,).
    """

    pooled: np.ndarray
    final_logits: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray

    def load(self, batches: Iterable[list[int]]) -> Iterator[dict[str, Tensor]]:
        arrays = {"pooled": self.pooled, "final_logits": self.final_logits, "labels": self.labels}
        for rows in batches:
            yield {name: torch.from_numpy(array[rows]) for name, array in arrays.items()}

    def trainee(self, model) -> nn.Module:
        return OffRamps(model)


TrainData: TypeAlias = TokenData | CachedFeatures


class OffRamps(nn.Module):
    """A model's off-ramps without their poolings. Its output is that of the full model with all exits."""

    def __init__(self, model):
        super().__init__()
        self.off_ramps = nn.ModuleList(model.base_model.encoder.off_ramps)

    def forward(self, pooled: Tensor, final_logits: Tensor, **_) -> HighwayClassifierOutput:
        """(B, E-1, H), (B, C) -> all_logits (B, E, C). Ignores the full model's switches."""
        early = [ramp.classify(state) for ramp, state in zip(self.off_ramps, pooled.unbind(dim=1), strict=True)]
        all_logits = torch.stack([*early, final_logits.to(early[0].dtype)], dim=1)
        return HighwayClassifierOutput(logits=final_logits, all_logits=all_logits)


@contextmanager
def cached_features(
    model, features: Features, collate: Collator, accelerator: Accelerator, folder: Path
) -> Iterator[CachedFeatures]:
    """Runs the backbone once over the features. A large cache is a file in `folder`, deleted when the block ends."""
    model.eval()
    config, off_ramps = model.config, model.base_model.encoder.off_ramps

    def pool_states(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        with accelerator.autocast():
            output = model(**batch, output_hidden_states=True, exit_threshold=NO_EXIT)
        weights = mean_weights(batch["attention_mask"], output.hidden_states[0].dtype)
        states = [output.hidden_states[layer] for layer in config.exit_layers[:-1]]  # 0: the embeddings
        pooled = [off_ramp.pooled_state(hidden, weights) for off_ramp, hidden in zip(off_ramps, states, strict=True)]
        return torch.stack(pooled, dim=1), output.logits

    final_logits = np.empty((len(features), config.num_labels), np.float32)
    with _array((len(features), len(off_ramps), config.hidden_size), folder) as pooled:
        batches = map_batches(pool_states, features, collate, model.device, accelerator, "caching features")
        for index, states, logits in batches:
            pooled[index], final_logits[index] = states, logits
        yield CachedFeatures(pooled, final_logits, features.labels, features.lengths)


@contextmanager
def _array(shape: tuple[int, ...], folder: Path) -> Iterator[np.ndarray]:
    """An array in memory, or a large one in a temporary file of this process. Raises InputError on a full disk."""
    size = 4 * int(np.prod(shape))
    if size <= IN_MEMORY:
        yield np.empty(shape, np.float32)
        return
    with tempfile.TemporaryFile(prefix=".features-", dir=folder) as file:
        if hasattr(os, "posix_fallocate"):  # without it a disk that fills up would end the process with SIGBUS
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # the file system cannot do it
                    raise InputError(f"{folder}: {size:,} bytes cannot be written there ({error.strerror})") from None
        yield np.memmap(file, np.float32, "r+", shape=shape)
