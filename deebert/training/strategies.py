"""The training strategies: which parameters are trained in which stage, and on what loss.

STRATEGIES lists for each stage the weight of every exit's loss and which parameters are trained.
Shapes: B batch, E exits, C labels.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from deebert.modeling.exit_rules import binary_logits
from deebert.training.cosee import consistency_loss


@dataclass(frozen=True)
class Stage:
    """What one stage trains, and on what loss.

    backbone, highways: whether the backbone with its final classifier is trained, and whether the off-ramps are.
    weights: (number of exits, step from 1) -> weight of each exit's loss.
    simulates_exits: each sample weights the exits by their distance from where it would exit (cosee.py).
    separates_layers: a layer learns from the exit after it alone (`separate_layers`).
    """

    backbone: bool
    highways: bool
    weights: Callable[[int, int], list[float]]
    simulates_exits: bool = False
    separates_layers: bool = False


def final_exit(exits: int, step: int) -> list[float]:
    return [0.0] * (exits - 1) + [1.0]


def off_ramps(exits: int, step: int) -> list[float]:
    return [1.0] * (exits - 1) + [0.0]


def last_off_ramp(exits: int, step: int) -> list[float]:
    return [0.0] * (exits - 2) + [1.0, 0.0]


def every_exit(exits: int, step: int) -> list[float]:
    return [1.0] * exits


def mean_by_depth(exits: int, step: int) -> list[float]:
    return [i / (exits * (exits + 1) / 2) for i in range(1, exits + 1)]


def in_turn(exits: int, step: int) -> list[float]:
    return final_exit(exits, step) if step % 2 else every_exit(exits, step)


FINE_TUNING = Stage(True, False, final_exit)  # of a model without exits
STRATEGIES: dict[str, tuple[Stage, ...]] = {
    # DeeBERT, section 3.2: first the backbone and its classifier, then the off-ramps alone
    "two_stage": (FINE_TUNING, Stage(False, True, off_ramps)),
    # Kubaty et al. (2025): first the backbone and its classifier, then all at once
    "mixed": (FINE_TUNING, Stage(True, True, every_exit)),
    # all at once, on the sum of all losses
    "joint": (Stage(True, True, every_exit),),
    # PABEE (Zhou et al., 2020), section 3.3: the mean, weighted by the number of layers that an exit costs
    "weighted": (Stage(True, True, mean_by_depth),),
    # BERxiT (Xin et al., 2021), section 3.2: the final loss and the sum of all losses in turn
    "alternating": (Stage(True, True, in_turn),),
    # COSEE (He et al., 2025): exits are simulated, and an exit learns most from the samples that exit near it
    "cosee": (Stage(True, True, every_exit, simulates_exits=True),),
    # SWEET (Rotem et al., 2023): a layer learns from the exit after it alone
    "sweet": (Stage(True, True, every_exit, separates_layers=True),),
    # no early exit: the baseline, with --num_layers a smaller model
    "static": (FINE_TUNING,),
    # the same with an off-ramp as its classifier, which may read more than the first token; the last layer never runs
    "static_off_ramp": (Stage(True, True, last_off_ramp),),
}
STATIC = ("static", "static_off_ramp")


def shares_first_stage(strategy: str) -> bool:
    """Whether stage 1 of this strategy gives the same model as stage 1 of two_stage."""
    return STRATEGIES[strategy][0] is FINE_TUNING


def exit_losses(all_logits: Tensor, labels: Tensor) -> Tensor:
    """The loss (B, E) of each exit against the labels (B,): cross-entropy, or squared error if there is one label.

    Of several labels a sample, (B, C) of 0 and 1, the mean of their binary cross-entropies.
    """
    if all_logits.shape[2] == 1:
        return (all_logits.squeeze(2) - labels.to(all_logits.dtype).unsqueeze(1)).square()
    if labels.dim() == 2:
        labels = labels.to(all_logits.dtype).unsqueeze(1).expand(all_logits.shape)
        return functional.binary_cross_entropy_with_logits(all_logits, labels, reduction="none").mean(dim=2)
    labels = labels.unsqueeze(1).expand(all_logits.shape[:2])
    return functional.cross_entropy(all_logits.transpose(1, 2), labels, reduction="none")


def distillation_losses(students: Tensor, teacher: Tensor, temperature: float, several_labels: bool = False) -> Tensor:
    """The distance (B, M) of M students' logits (B, M, C) from a teacher's (B, C), which gets no gradient.

    T^2 KL(softmax(teacher / T) || softmax(student / T)), Hinton et al. (2015); squared error if there is one label; the
    mean over several labels, each of them a prediction of no and yes.
    """
    teacher = teacher.detach().unsqueeze(1)
    if students.shape[2] == 1:
        return (students - teacher).square().squeeze(2)
    if several_labels:  # (B, M, C) -> (B, M, C, 2)
        students, teacher = binary_logits(students), binary_logits(teacher)
    soft = functional.log_softmax(teacher / temperature, dim=-1).expand(students.shape)
    divergence = functional.kl_div(
        functional.log_softmax(students / temperature, dim=-1), soft, reduction="none", log_target=True
    )
    distances = temperature**2 * divergence.sum(dim=-1)
    return distances.mean(dim=-1) if several_labels else distances


def certainty_losses(certainties: Tensor, all_logits: Tensor, labels: Tensor) -> Tensor:
    """The loss (B, E-1) of the learning-to-exit head, whose certainties are (B, E-1): BERxiT, section 3.3.

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
    return (certainties - target).square()


@contextmanager
def separate_layers(layers: Sequence[nn.Module]) -> Iterator[None]:
    """SWEET: within this block no layer's gradient reaches the layers before it."""

    def detach(layer: nn.Module, arguments: tuple) -> tuple:
        return arguments[0].detach(), *arguments[1:]

    handles = [layer.register_forward_pre_hook(detach) for layer in layers[1:]]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def training_loss(
    output,
    labels: Tensor,
    weights: Sequence[float],
    distill: float = 0.0,
    temperature: float = 2.0,
    teacher_logits: Tensor | None = None,
    progress: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The weighted sum of the exits' losses, and each exit's own loss against the labels (E,), without gradient.

    Args:
        output: the model's; with all_logits (B, E, C) if any off-ramp has a weight, else with logits (B, C) only.
        weights: E numbers, one for each exit's loss.
        distill: the share of an exit's loss that is the distillation loss, with this temperature.
        teacher_logits: (B, C), from which all exits learn; without them the off-ramps learn from the final classifier
            (FastBERT's self-distillation, Liu et al., 2020).
        progress: with simulated exits, the share of the stage's steps that are done.

    Without all_logits the off-ramps' own losses are 0.
    """
    all_logits = output.logits.unsqueeze(1) if output.all_logits is None else output.all_logits  # (B, M, C)
    losses = exit_losses(all_logits, labels)  # (B, M)
    own = functional.pad(losses.detach().mean(dim=0), (len(weights) - losses.shape[1], 0))
    if distill > 0:
        teacher = all_logits[:, -1] if teacher_logits is None else teacher_logits
        students = losses.shape[1] - (teacher_logits is None)
        soft = distillation_losses(all_logits[:, :students], teacher, temperature, several_labels=labels.dim() == 2)
        losses = torch.cat([torch.lerp(losses[:, :students], soft, distill), losses[:, students:]], dim=1)
    if output.all_certainties is not None:
        added = certainty_losses(output.all_certainties, output.all_logits, labels)
        losses = losses + functional.pad(added, (0, 1))
    if progress is not None:
        return consistency_loss(losses, all_logits, labels, progress), own
    return losses.mean(dim=0) @ losses.new_tensor(weights[-losses.shape[1] :]), own
