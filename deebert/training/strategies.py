"""The training strategies: for each stage, what is trained, and the weight of every exit's loss (losses.py).

This module imports no torch: the command line names the strategies before anything slow is imported.
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One stage of a training.

    trains: what is trained, as `train_stage` of a model takes it: "backbone" (with the final classifier), "off_ramps"
        (alone, all else is frozen) or "all".
    weights: (number of exits, step from 1) -> weight of each exit's loss.
    """

    trains: str
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
    "two_stage": (Stage("backbone", final_exit), Stage("off_ramps", off_ramps)),
    # Kubaty et al. (2025): first the backbone and its classifier, then all at once
    "mixed": (Stage("backbone", final_exit), Stage("all", every_exit)),
    # all at once, on the sum of all losses
    "joint": (Stage("all", every_exit),),
    # PABEE (Zhou et al., 2020), section 3.3: the mean, weighted by the number of layers that an exit costs
    "weighted": (Stage("all", mean_by_depth),),
    # BERxiT (Xin et al., 2021), section 3.2: the final loss and the sum of all losses in turn
    "alternating": (Stage("all", in_turn),),
}
