"""Before the first step: what the frozen backbone knows of the labels, for a new final classifier.

Shapes: S samples, H hidden, C labels.
"""

from collections.abc import Sequence

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from sklearn.linear_model import RidgeCV
from torch import Tensor

from deebert.data.batching import Collator, Features, map_batches
from deebert.modeling.exit_rules import NO_EXIT
from deebert.modeling.off_ramps import CLASSIFIER_POOLINGS, mean_weights
from deebert.training.losses import exit_losses

PROBED = 2000  # texts that choose a pooling
FEW = 1000  # texts a label, on average
INVERSE_PENALTY = 10  # scikit-learn's C, of states whose mean length is 1


def last_states(
    model, features: Features, collate: Collator, accelerator: Accelerator, poolings: Sequence[str]
) -> np.ndarray:
    """What each of these CLASSIFIER_POOLINGS reads of the samples after the last layer, (poolings, S, H)."""
    model.eval()
    states = np.empty((len(poolings), len(features), model.config.hidden_size), np.float32)

    def pool(batch: dict[str, Tensor]) -> list[Tensor]:
        last = model(**batch, output_hidden_states=True, exit_threshold=NO_EXIT).hidden_states[-1]
        weights = mean_weights(batch["attention_mask"], last.dtype)
        return [CLASSIFIER_POOLINGS[name](last, weights) for name in poolings]

    for index, *pooled in map_batches(pool, features, collate, model.device, accelerator, "probing the encoder"):
        states[:, index] = pooled
    return states


def probe_poolings(model, features: Features, collate: Collator, accelerator: Accelerator) -> dict[str, float]:
    """What each of CLASSIFIER_POOLINGS knows of the labels before any training: share of their variance explained.

    By ridge regression on the last layer's pooled states of up to PROBED texts, each left out once.
    """
    some = features.take(np.random.default_rng(0).permutation(len(features))[:PROBED])
    targets = some.labels
    if targets.dtype == np.int64:
        targets = np.eye(model.config.num_labels)[targets]
    variance, explained = np.square(targets - targets.mean(axis=0)).mean(), {}
    states = last_states(model, some, collate, accelerator, tuple(CLASSIFIER_POOLINGS))
    for name, pooled in zip(CLASSIFIER_POOLINGS, states.astype(np.float64), strict=True):
        pooled = (pooled - pooled.mean(axis=0)) / (pooled.std(axis=0) + 1e-6)
        ridge = RidgeCV(alphas=len(some) * 10.0 ** np.arange(-4, 3)).fit(pooled, targets)
        explained[name] = 1 + ridge.best_score_ / max(variance, 1e-12)  # its score is the negative squared error
    return broadcast_object_list([explained])[0]


def fit_classifier(model, features: Features, collate: Collator, accelerator: Accelerator) -> None:
    """Fits a linear final classifier to the frozen backbone: linear probing, then fine-tuning (Kumar et al., 2022).

    With few texts a label, the first epochs of a classifier at random change the backbone for the worse.
    """
    (states,) = last_states(model, features, collate, accelerator, [model.config.classifier_pooling])
    pooled, targets = (torch.from_numpy(array).to(model.device) for array in (states, features.labels))
    strength = pooled.norm(dim=1).mean() ** 2 / (2 * INVERSE_PENALTY * len(pooled))
    optimizer = torch.optim.LBFGS(model.classifier.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        penalty = strength * model.classifier.weight.square().sum()
        value = exit_losses(model.classifier(pooled).unsqueeze(1), targets).mean() + penalty
        value.backward()
        return value

    optimizer.step(loss)
    optimizer.zero_grad()
