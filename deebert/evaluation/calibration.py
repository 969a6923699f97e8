"""Temperature scaling of every exit (Guo et al., 2017, section 4.2): each exit's logits are divided by its temperature.

Some off-ramps are over-confident and others are not. Once calibrated, a threshold means the same after every layer.
"""

from dataclasses import replace

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch.nn import functional

from deebert.evaluation.all_exits import AllExits
from deebert.utils.cli import InputError

LIMITS = (0.05, 20.0)  # range of a temperature: for an exit that is always right the optimum is 0


def negative_log_likelihood(logits: np.ndarray, labels: np.ndarray, temperature: float = 1.0) -> float:
    """The mean over samples, in nats, for logits (S, C) / temperature and labels (S,).

    Of several labels a sample, (S, C), the mean over the labels, too.
    """
    scaled = torch.from_numpy(logits).double() / temperature
    if labels.ndim == 2:
        return functional.binary_cross_entropy_with_logits(scaled, torch.from_numpy(labels).double()).item()
    return functional.cross_entropy(scaled, torch.from_numpy(labels)).item()


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature within LIMITS with the smallest negative log-likelihood, for logits (S, C) and labels (S,).

    The likelihood is convex in 1 / temperature, so that there is one minimum; it is searched on a logarithmic scale.
    """
    result = minimize_scalar(
        lambda log_temperature: negative_log_likelihood(logits, labels, np.exp(log_temperature)), bounds=np.log(LIMITS)
    )
    return float(np.exp(result.x))


def fit_temperatures(exits: AllExits) -> list[float]:
    """The temperature of each exit, (E,). Raises InputError for regression and for samples without labels."""
    if exits.logits.shape[2] == 1:
        raise InputError("--calibrate scales probabilities, and a regression model has none")
    if exits.labels is None:
        raise InputError("--calibrate needs samples with labels")
    return [fit_temperature(exits.logits[:, i], exits.labels) for i in range(exits.num_exits)]


def calibrated(exits: AllExits, temperatures: list[float]) -> AllExits:
    """The exits with their logits divided by these temperatures (E,)."""
    return replace(exits, logits=exits.logits / np.array(temperatures, np.float32)[:, None])


def report(before: AllExits, after: AllExits) -> str:
    """One line: the likelihood of each exit, without and with temperatures, on samples not used to fit them."""
    losses = [
        " ".join(f"{negative_log_likelihood(exits.logits[:, i], exits.labels):.3f}" for i in range(exits.num_exits))
        for exits in (before, after)
    ]
    title = f"negative log-likelihood of the exits on {len(before.logits)} other samples"
    return f"{title}: {losses[0]}; calibrated: {losses[1]}"
