"""The training strategies: which parameters are trained in which stage, and on what loss.

STRATEGIES lists for each stage the weight of every exit's loss and which parameters are trained.
Shapes: B batch, E exits, C labels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from deebert.modeling.exit_rules import binary_logits


@dataclass(frozen=True)
class Stage:
    """backbone, highways: what is trained. weights: (number of exits, step from 1) -> weight of each exit's loss."""

    backbone: bool
    highways: bool
    weights: Callable[[int, int], list[float]]


def final_exit(exits: int, step: int) -> list[float]:
    return [0.0] * (exits - 1) + [1.0]


def off_ramps(exits: int, step: int) -> list[float]:
    return [1.0] * (exits - 1) + [0.0]


def every_exit(exits: int, step: int) -> list[float]:
    return [1.0] * exits


def mean_by_depth(exits: int, step: int) -> list[float]:
    return [i / (exits * (exits + 1) / 2) for i in range(1, exits + 1)]


def in_turn(exits: int, step: int) -> list[float]:
    return final_exit(exits, step) if step % 2 else every_exit(exits, step)


STRATEGIES: dict[str, tuple[Stage, ...]] = {
    # DeeBERT, section 3.2: first the backbone and its classifier, then the off-ramps alone
    "two_stage": (Stage(True, False, final_exit), Stage(False, True, off_ramps)),
    # all at once, on the sum of all losses
    "joint": (Stage(True, True, every_exit),),
    # PABEE (Zhou et al., 2020), section 3.3: the mean, weighted by the number of layers that an exit costs
    # (with an exit before the first layer, which would have no weight: by its place among the exits)
    "weighted": (Stage(True, True, mean_by_depth),),
    # BERxiT (Xin et al., 2021), section 3.2: the final loss and the sum of all losses in turn
    "alternating": (Stage(True, True, in_turn),),
}


def exit_losses(all_logits: Tensor, labels: Tensor) -> Tensor:
    """The loss (E,) of each exit against the labels (B,): cross-entropy, or squared error if there is one label.

    Of several labels a sample, (B, C) of 0 and 1, the mean of their binary cross-entropies.
    """
    if all_logits.shape[2] == 1:
        return (all_logits.squeeze(2) - labels.to(all_logits.dtype).unsqueeze(1)).square().mean(dim=0)
    if labels.dim() == 2:
        labels = labels.to(all_logits.dtype).unsqueeze(1).expand(all_logits.shape)
        return functional.binary_cross_entropy_with_logits(all_logits, labels, reduction="none").mean(dim=(0, 2))
    losses = functional.cross_entropy(
        all_logits.transpose(1, 2), labels.unsqueeze(1).expand(all_logits.shape[:2]), reduction="none"
    )
    return losses.mean(dim=0)


def distillation_losses(all_logits: Tensor, temperature: float, several_labels: bool = False) -> Tensor:
    """The distillation loss (E-1,) of each off-ramp: its distance from the final classifier, which gets no gradient.

    T^2 KL(softmax(z_E / T) || softmax(z_i / T)): FastBERT's self-distillation (Liu et al., 2020) with temperature and
    direction of Hinton et al. (2015); squared error if there is one label; the mean over several labels, each of them a
    prediction of no and yes.
    """
    if several_labels:
        each = binary_logits(all_logits).transpose(1, 2).flatten(0, 1)  # (B, N, C) -> (B C, N, 2)
        return distillation_losses(each, temperature)
    students, teacher = all_logits[:, :-1], all_logits[:, -1:].detach()
    if all_logits.shape[2] == 1:
        return (students - teacher).square().mean(dim=(0, 2))
    soft = functional.log_softmax(teacher / temperature, dim=-1).expand(students.shape)
    divergence = functional.kl_div(
        functional.log_softmax(students / temperature, dim=-1), soft, reduction="none", log_target=True
    )
    return temperature**2 * divergence.sum(dim=-1).mean(dim=0)


def certainty_losses(certainties: Tensor, all_logits: Tensor, labels: Tensor) -> Tensor:
    """The loss (E-1,) of the learning-to-exit head, whose certainties are (B, E-1): BERxiT, section 3.3.

    The squared distance to 1 if the off-ramp is right (about all labels) and to 0 if it is wrong; for regression to
    1 - tanh of the absolute error.
    """
    logits = all_logits[:, :-1].detach()
    if all_logits.shape[2] == 1:
        target = 1 - (logits.squeeze(2) - labels.to(logits.dtype).unsqueeze(1)).abs().tanh()
    elif labels.dim() == 2:
        target = ((logits > 0) == labels.unsqueeze(1).bool()).all(dim=-1).to(certainties.dtype)
    else:
        target = (logits.argmax(dim=-1) == labels.unsqueeze(1)).to(certainties.dtype)
    return (certainties - target).square().mean(dim=0)


def training_loss(
    output, labels: Tensor, weights: Sequence[float], distill: float = 0.0, temperature: float = 2.0
) -> tuple[Tensor, Tensor]:
    """The weighted sum of the exits' losses, and each exit's own loss against the labels (E,), without gradient.

    Args:
        output: the model's; with all_logits (B, E, C) if any off-ramp has a weight, else with logits (B, C) only.
        weights: E numbers, one for each exit's loss.
        distill: the share of an off-ramp's loss that is the distillation loss, with this temperature.

    Without all_logits the off-ramps' own losses are 0.
    """
    if output.all_logits is None:
        losses = exit_losses(output.logits.unsqueeze(1), labels)  # (1,)
        return weights[-1] * losses[0], functional.pad(losses.detach(), (len(weights) - 1, 0))
    losses = exit_losses(output.all_logits, labels)  # (E,)
    early, final = losses[:-1], losses[-1:]
    if distill > 0:
        distances = distillation_losses(output.all_logits, temperature, several_labels=labels.dim() == 2)
        early = torch.lerp(early, distances, distill)
    if output.all_certainties is not None:
        early = early + certainty_losses(output.all_certainties, output.all_logits, labels)
    return torch.cat([early, final]) @ losses.new_tensor(weights), losses.detach()
