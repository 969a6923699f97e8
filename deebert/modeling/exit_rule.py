"""What every exit rule has: an uncertainty, thresholds that become cut-offs, and which off-ramps it consults.

After each off-ramp the rule computes an uncertainty; a sample exits at the first off-ramp whose uncertainty is below
the cut-off. Users set a threshold. For most rules it is the cut-off itself; patience converts a count into one. A
threshold <= 0 disables exits. The rules are in exit_rules.py.

Arrays are tensors or, for exported models, numpy's. Shapes: B batch, E exits, of which E-1 are off-ramps, C labels;
b <= B samples are still active.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import ClassVar

from deebert.utils.arrays import Array, functions_of

NO_EXIT = -1.0  # the default threshold: no uncertainty is below it
EXIT_ALL = 0.001  # above the largest uncertainty: all are below it


def plain_threshold(threshold: float | Sequence[float]) -> float | list[float]:
    """A threshold, or one per off-ramp, of any kind of numbers (numpy's, a tensor's) as floats. Raises ValueError."""
    if isinstance(threshold, str):
        raise ValueError(f"exit_threshold is the string {threshold!r}; give a number")
    if getattr(threshold, "ndim", None) == 0:  # an array or a tensor of one number
        threshold = threshold.item()
    try:
        return float(threshold) if isinstance(threshold, Real) else [float(v) for v in threshold]
    except TypeError:
        raise ValueError(f"exit_threshold is {threshold!r}; give a number, or one for each off-ramp") from None


@dataclass(frozen=True)
class ExitRule:
    """A rule for models of `num_labels` labels. A new one subclasses this and takes a place in EXIT_RULES."""

    num_labels: int
    tolerance: float = 0.5  # patience with one label: values that differ by no more than this agree

    name: ClassVar[str]
    regression: ClassVar[bool] = False  # whether the rule is defined for a single label
    stateful: ClassVar[bool] = False  # whether it depends on earlier off-ramps too, so that none may be skipped
    learned: ClassVar[bool] = False  # whether it needs the learning-to-exit head

    @property
    def supported(self) -> bool:
        """Whether samples can exit by it: the softmax of a single label is always certain."""
        return self.regression or self.num_labels > 1

    @property
    def max_uncertainty(self) -> float:
        """The largest uncertainty that the rule gives."""
        return 1.0

    def check_head(self, present: bool) -> None:
        """Raises ValueError where the rule needs a learning-to-exit head and the model has none."""
        if self.learned and not present:
            raise ValueError(
                f"the exit rule {self.name} needs a model trained with it: there is no learning-to-exit head"
            )

    def uncertainty(self, logits: Array, certainty: Array | None, state: Array | None) -> tuple[Array, Array | None]:
        """The uncertainty (b,) after one off-ramp, and the rule's state (b, ...) for the next one.

        logits: (b, C) of the off-ramp. certainty: (b,) of the learning-to-exit head, None without one.
        state: the one returned after the previous off-ramp, None after the first.
        """
        raise NotImplementedError

    def uncertainty_alone(
        self, logits: Array, certainty: Array | None, state: Array | None
    ) -> tuple[float, Array | None]:
        """`uncertainty` of a single sample (b = 1), as a number. It leaves the device once."""
        uncertainty, state = self.uncertainty(logits, certainty, state)
        return uncertainty.item(), state

    def uncertainties(self, all_logits: Array, certainties: Array | None = None) -> Array:
        """(B, E-1) of all off-ramps, from the logits (B, E, C) of all exits and the certainties (B, E-1), if any."""
        columns, state = [], None
        for i in range(all_logits.shape[1] - 1):
            certainty = None if certainties is None else certainties[:, i]
            column, state = self.uncertainty(all_logits[:, i], certainty, state)
            columns.append(column)
        return functions_of(all_logits).stack(columns, axis=1) if columns else all_logits[:, :0, 0]

    def consults(self, cutoffs: Sequence[float], i: int) -> bool:
        """Whether off-ramp i, from 0, has to run: not where nothing can exit and no state needs it.

        cutoffs: (E-1,) of all off-ramps.
        """
        if i >= len(cutoffs):  # the final classifier is no off-ramp
            return False
        return cutoffs[i] > 0 or (self.stateful and any(0 < c < math.inf for c in cutoffs[i:]))

    def cutoff(self, threshold: float) -> float:
        """The cut-off of this threshold: samples exit where their uncertainty is below it. Raises ValueError."""
        return threshold

    def cutoffs(self, threshold: float | Sequence[float], num_exits: int) -> list[float]:
        """A cut-off for each off-ramp, (E-1,), from one threshold or one for each. Raises ValueError."""
        threshold = plain_threshold(threshold)
        per_layer = [threshold] * (num_exits - 1) if isinstance(threshold, float) else threshold
        if len(per_layer) not in (num_exits - 1, num_exits):
            raise ValueError(
                f"exit_threshold has {len(per_layer)} values; a model of {num_exits} exits takes one number, "
                f"or {num_exits - 1}: one for each off-ramp"
            )
        per_layer = per_layer[: num_exits - 1]
        if any(math.isnan(v) for v in per_layer):
            raise ValueError("exit_threshold is NaN; give a number")
        if not self.supported and any(v > 0 for v in per_layer):
            raise ValueError(
                f"the exit rule {self.name} needs at least two labels: with one (regression) every sample would exit "
                "at the first off-ramp. Use the rule patience or learned, or -1"
            )
        return [self.cutoff(v) for v in per_layer]

    def grid(self, points: int, num_exits: int) -> list[float]:
        """Thresholds that do not depend on data, safest first: evenly spaced, up to the largest uncertainty."""
        return [self.max_uncertainty * i / points for i in range(1, points + 1)]

    def exit_all_threshold(self) -> float:
        """A threshold at which all samples exit at the first off-ramp."""
        return self.max_uncertainty + EXIT_ALL

    def decision_margin(self, all_logits: Array, uncertainties: Array, cutoffs: Sequence[float]) -> Array:
        """(B, E-1) how far each decision is from its opposite: the rounding error that would turn it."""
        return abs(uncertainties - functions_of(uncertainties).asarray(cutoffs))
