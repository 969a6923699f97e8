"""Before the first step: what the frozen backbone knows of the labels, for a new final classifier.

All processes compute the same. Shapes: S samples, H hidden, C labels.
"""

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from sklearn.linear_model import RidgeCV

from deebert.data.batching import Collator, Features, eval_batches
from deebert.modeling.exit_rules import NO_EXIT
from deebert.modeling.off_ramps import CLASSIFIER_POOLINGS, mean_weights
from deebert.training.losses import exit_losses

BATCH_SIZE = 32
PROBED = 2000  # texts that choose a pooling
FEW = 1000  # texts a label
INVERSE_PENALTY = 10  # scikit-learn's C, of states whose mean length is 1


def last_states(model, features: Features, collate: Collator, rows: np.ndarray) -> tuple[dict, np.ndarray]:
    """What each of CLASSIFIER_POOLINGS reads of these samples after the last layer, (S, H) by name; their labels."""
    model.eval()
    states, labels = {name: [] for name in CLASSIFIER_POOLINGS}, []
    for part in eval_batches(features.lengths[rows], BATCH_SIZE):
        batch = collate(features, rows[part])
        labels.append(batch.pop("labels").numpy())
        inputs = {name: tensor.to(model.device) for name, tensor in batch.items() if name != "index"}
        with torch.inference_mode():
            last = model(**inputs, output_hidden_states=True, exit_threshold=NO_EXIT).hidden_states[-1]
        weights = mean_weights(inputs["attention_mask"], last.dtype)
        for name, pool in CLASSIFIER_POOLINGS.items():
            states[name].append(pool(last, weights).cpu().numpy())
    return {name: np.concatenate(parts) for name, parts in states.items()}, np.concatenate(labels)


def probe_poolings(model, features: Features, collate: Collator) -> dict[str, float]:
    """What each of CLASSIFIER_POOLINGS knows of the labels before any training: share of their variance explained.

    By ridge regression on the last layer's pooled states of up to PROBED texts, each left out once.
    """
    rows = np.random.default_rng(0).permutation(len(features))[:PROBED]
    states, targets = last_states(model, features, collate, rows)
    if targets.dtype == np.int64:
        targets = np.eye(model.config.num_labels)[targets]
    variance, explained = np.square(targets - targets.mean(axis=0)).mean(), {}
    for name, pooled in states.items():
        pooled = pooled.astype(np.float64)
        pooled = (pooled - pooled.mean(axis=0)) / (pooled.std(axis=0) + 1e-6)
        ridge = RidgeCV(alphas=len(rows) * 10.0 ** np.arange(-4, 3)).fit(pooled, targets)
        explained[name] = 1 + ridge.best_score_ / max(variance, 1e-12)  # its score is the negative squared error
    return broadcast_object_list([explained])[0]


def fit_classifier(model, features: Features, collate: Collator) -> None:
    """Fits a linear final classifier to the frozen backbone: linear probing, then fine-tuning (Kumar et al., 2022).

    Where a label has few texts, the first epochs of a classifier at random disturb a backbone that knew better.
    """
    states, labels = last_states(model, features, collate, np.arange(len(features)))
    pooled, targets = (torch.from_numpy(x).to(model.device) for x in (states[model.config.classifier_pooling], labels))
    strength = pooled.norm(dim=1).mean() ** 2 / (2 * INVERSE_PENALTY * len(pooled))
    optimizer = torch.optim.LBFGS(model.classifier.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        penalty = strength * model.classifier.weight.square().sum()
        value = exit_losses(model.classifier(pooled).unsqueeze(1), targets).mean() + penalty
        value.backward()
        return value

    optimizer.step(loss)
    optimizer.zero_grad()
