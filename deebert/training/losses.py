"""The losses of the exits: against the labels, against the final classifier's logits, and their weighted sum.

Shapes: B batch, E exits, C labels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from deebert.modeling.exit_rules import binary_logits

TEMPERATURE = 2.0  # softens both logits of distillation


def exit_losses(all_logits: Tensor, labels: Tensor) -> Tensor:
    """The loss (B, E) of each exit: cross-entropy against labels (B,), or squared error if there is one label.

    Of several labels a sample, (B, C) of 0 and 1, the mean of their binary cross-entropies.
    """
    if all_logits.shape[2] == 1:
        return (all_logits.squeeze(2) - labels.to(all_logits.dtype).unsqueeze(1)).square()
    if labels.dim() == 2:
        labels = labels.to(all_logits.dtype).unsqueeze(1).expand(all_logits.shape)
        return functional.binary_cross_entropy_with_logits(all_logits, labels, reduction="none").mean(dim=2)
    labels = labels.unsqueeze(1).expand(all_logits.shape[:2])
    return functional.cross_entropy(all_logits.transpose(1, 2), labels, reduction="none")


def distillation_losses(students: Tensor, teacher: Tensor, several_labels: bool = False) -> Tensor:
    """The distance (B, M) of M off-ramps' logits (B, M, C) from the final ones (B, C), which get no gradient.

    T^2 KL(softmax(teacher / T) || softmax(student / T)), Hinton et al. (2015); squared error if there is one label; the
    mean over several labels, each of them a prediction of no and yes.
    """
    teacher = teacher.detach().unsqueeze(1)
    if students.shape[2] == 1:
        return (students - teacher).square().squeeze(2)
    if several_labels:  # (B, M, C) -> (B, M, C, 2)
        students, teacher = binary_logits(students), binary_logits(teacher)
    soft = functional.log_softmax(teacher / TEMPERATURE, dim=-1).expand(students.shape)
    divergence = functional.kl_div(
        functional.log_softmax(students / TEMPERATURE, dim=-1), soft, reduction="none", log_target=True
    )
    distances = TEMPERATURE**2 * divergence.sum(dim=-1)
    return distances.mean(dim=-1) if several_labels else distances


def training_loss(output, labels: Tensor, weights: Sequence[float], distill: float = 0.0) -> tuple[Tensor, Tensor]:
    """The weighted sum of the exits' losses, and each exit's own loss against the labels (E,), without gradient.

    output: the model's; with all_logits (B, E, C) if any off-ramp has a weight, else with logits (B, C) only: then the
        off-ramps' own losses are 0.
    weights: E numbers, one for each exit's loss.
    distill: the share of an off-ramp's loss that is its distance from the final classifier (Liu et al., 2020).
    """
    all_logits = output.logits.unsqueeze(1) if output.all_logits is None else output.all_logits  # (B, M, C)
    losses = exit_losses(all_logits, labels)  # (B, M)
    own = functional.pad(losses.detach().mean(dim=0), (len(weights) - losses.shape[1], 0))
    if distill > 0:
        soft = distillation_losses(all_logits[:, :-1], all_logits[:, -1], several_labels=labels.dim() == 2)
        losses = torch.cat([torch.lerp(losses[:, :-1], soft, distill), losses[:, -1:]], dim=1)
    return losses.mean(dim=0) @ losses.new_tensor(weights[-losses.shape[1] :]), own
