"""COSEE's loss (He et al., AAAI 2025): exits are simulated, and an exit learns most from the samples that exit near it.

Where samples exit depends on the threshold, which is chosen after training; so random ones are drawn in each step.
Shapes: B batch, E exits, C labels; K simulated thresholds.
"""

import math

import torch
from torch import Tensor

from deebert.modeling.early_exit import first_exit_layer

# The defaults of the published code
THRESHOLDS = 5  # K
DECAY = 10.0  # of the logarithm of a weight, for each layer of distance, at the end of the stage
CALIBRATION_WEIGHT, CALIBRATION_MARGIN = 0.1, 0.3


def consistency_loss(losses: Tensor, all_logits: Tensor, labels: Tensor, progress: float) -> Tensor:
    """COSEE's loss, from the loss (B, E) of each exit and the logits (B, E, C); classes only.

    The uncertainty is the normalized entropy, one of the paper's signals; its own is an energy that needs a scale.
    """
    early = all_logits[:, :-1]
    log_p = torch.log_softmax(early.float(), dim=-1)  # not `entropy`, whose gradient is infinite where p is 0
    signal = -(log_p.exp() * log_p).sum(dim=-1) / math.log(early.shape[2])
    right = early.argmax(dim=-1) == labels.unsqueeze(1)
    weighted = (losses * weights_near_exit(signal.detach(), progress)).sum(dim=1).mean()
    return weighted + CALIBRATION_WEIGHT * signal_calibration_loss(signal, right)


def weights_near_exit(signal: Tensor, progress: float) -> Tensor:
    """COSEE's weights (B, E) of the exits, from the uncertainties (B, E-1) at the off-ramps; each row sums to 1.

    Exits are simulated at random thresholds from the range of the batch's uncertainties. For a sample that exits at
    exit e, exit i has the weight softmax(-DECAY * progress * |i - e|); the mean over the thresholds is taken.

    progress: the share of the stage's steps that are done: at first all weights are equal.
    """
    low, high = (bound.item() for bound in signal.aminmax())
    thresholds = (low + (high - low) * torch.rand(THRESHOLDS)).tolist()
    chosen = torch.stack([first_exit_layer(signal, [t] * signal.shape[1], first=0) for t in thresholds])  # (K, B)
    exits = torch.arange(signal.shape[1] + 1, device=signal.device)
    distance = (exits - chosen.unsqueeze(-1)).abs()  # (K, B, E)
    return torch.softmax(-DECAY * progress * distance, dim=-1).mean(dim=0)


def signal_calibration_loss(signal: Tensor, right: Tensor) -> Tensor:
    """COSEE's calibration: at each off-ramp wrong samples shall be less certain than right ones, by a margin.

    signal: (B, E-1) uncertainties. right: (B, E-1), whether the prediction is right. Off-ramps that are right, or
    wrong, for all samples of the batch do not count.
    """

    def mean(chosen: Tensor) -> Tensor:  # (E-1,)
        return (signal * chosen).sum(dim=0) / chosen.sum(dim=0).clamp(min=1)

    both = right.any(dim=0) & ~right.all(dim=0)
    losses = (mean(right) - mean(~right) + CALIBRATION_MARGIN).clamp(min=0)
    return (losses * both).sum() / both.sum().clamp(min=1)
