"""The exit rules: when is a sample certain enough to exit?

After each off-ramp a rule computes an uncertainty; a sample exits at the first off-ramp whose uncertainty is below the
cut-off. Users set a threshold. For most rules it is the cut-off itself; patience converts a count into one. A
threshold <= 0 disables exits. A new rule is a class with a place in EXIT_RULES, here or in a file of yours.

Arrays are tensors or, for exported models, numpy's. Shapes: B batch, E exits, of which E-1 are off-ramps, C labels;
b <= B samples are still active.
"""

import math
from collections.abc import Sequence
from ctypes import c_float
from dataclasses import dataclass
from typing import ClassVar

from deebert.modeling.config_checks import plain_threshold
from deebert.utils.arrays import Array, at_least_float32, entr, functions_of, softmax

NO_EXIT = -1.0  # the default threshold: no uncertainty is below it
EXIT_ALL = 0.001  # added to the largest uncertainty, so that all are below


@dataclass(frozen=True)
class ExitRule:
    """A rule for models of `num_labels` labels. A new one subclasses this and takes a place in EXIT_RULES.

    Where a sample may have several labels, each label is a prediction of no and yes, and the least certain one counts:
    with `entropy` the uncertainty is then the largest binary entropy, with `patience` all labels have to agree.
    """

    num_labels: int
    tolerance: float = 0.5  # used by patience where there is one label: values that differ by no more agree
    several_labels: bool = False

    name: ClassVar[str]
    regression: ClassVar[bool] = False  # whether the rule is defined for a single label
    stateful: ClassVar[bool] = False  # whether it depends on earlier off-ramps too, so that none may be skipped

    def of_prediction(self, logits: Array, state: Array | None) -> tuple[Array, Array | None]:
        """What a rule defines: the uncertainty (b,) of predictions with logits (b, C), and the rule's next state.

        state: one array of b rows, as returned at the previous off-ramp; None at the first one.
        """
        raise NotImplementedError

    @property
    def classes(self) -> int:
        """C of a prediction: the number of labels, or 2, no and yes."""
        return 2 if self.several_labels else self.num_labels

    @property
    def supported(self) -> bool:
        """Whether samples can exit by it: the softmax of a single label is always certain."""
        return self.regression or self.classes > 1

    @property
    def max_uncertainty(self) -> float:
        return 1.0

    def uncertainty(self, logits: Array, state: Array | None = None) -> tuple[Array, Array | None]:
        """The uncertainty (b,) after an off-ramp with logits (b, C), and the state for the next one."""
        if not self.several_labels:
            return self.of_prediction(logits, state)
        size = logits.shape[:2]
        state = None if state is None else state.reshape(-1, *state.shape[2:])  # (b, C, ...) -> (b C, ...)
        each, state = self.of_prediction(binary_logits(logits).reshape(-1, 2), state)
        state = None if state is None else state.reshape(*size, *state.shape[1:])
        return functions_of(logits).amax(each.reshape(size), axis=-1), state

    def uncertainties(self, all_logits: Array) -> Array:
        """(B, E-1) of all off-ramps, from the logits (B, E, C) of all exits."""
        columns, state = [], None
        for i in range(all_logits.shape[1] - 1):
            column, state = self.uncertainty(all_logits[:, i], state)
            columns.append(column)
        return functions_of(all_logits).stack(columns, axis=1) if columns else all_logits[:, :0, 0]

    def consults(self, cutoffs: Sequence[float], i: int) -> bool:
        """Whether off-ramp i, from 0, has to run: not where nothing can exit and no state needs it."""
        if i >= len(cutoffs):  # the final classifier is no off-ramp
            return False
        return cutoffs[i] > 0 or (self.stateful and any(0 < c < math.inf for c in cutoffs[i:]))  # at inf all exit

    def cutoff(self, threshold: float) -> float:
        """The cut-off of this threshold: samples exit where their uncertainty is below it. Raises ValueError."""
        return threshold

    def cutoffs(self, threshold: float | Sequence[float], num_exits: int) -> list[float]:
        """A cut-off for each off-ramp, (E-1,), from one threshold or one for each. Raises ValueError.

        They are numbers of float32, in which the uncertainties are computed, so that all runtimes compare alike.
        """
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
                "at the first off-ramp. Use the rule patience, or the threshold -1"
            )
        return [c_float(self.cutoff(v)).value for v in per_layer]  # those that are too large for float32 are infinite

    def grid(self, points: int, num_exits: int) -> list[float]:
        """Thresholds that do not depend on data, safest first: evenly spaced, up to the largest uncertainty."""
        return [self.max_uncertainty * i / points for i in range(1, points + 1)]

    def exit_all_threshold(self) -> float:
        """A threshold at which all samples exit at the first off-ramp."""
        return self.max_uncertainty + EXIT_ALL


class Entropy(ExitRule):
    """The paper's: the entropy of the prediction, in nats, up to ln C."""

    name = "entropy"

    @property
    def max_uncertainty(self) -> float:
        return math.log(self.classes)

    def of_prediction(self, logits, state):
        return entropy(logits), None


class Confidence(ExitRule):
    """1 - the largest probability: at threshold 0.1 samples exit whose prediction has a probability above 0.9."""

    name = "confidence"

    def of_prediction(self, logits, state):
        return 1 - functions_of(logits).amax(softmax(logits), axis=-1), None


class Patience(ExitRule):
    """The threshold is a count k: a sample exits where k off-ramps in a row agree (PABEE, Zhou et al., 2020).

    PABEE counts repetitions, so that its patience is k - 1. With one label, values within `tolerance` of the previous
    one agree. The uncertainty is 1 / the number of off-ramps in a row that agree.
    """

    name = "patience"
    regression = True
    stateful = True

    def of_prediction(self, logits, state):
        xp = functions_of(logits)
        prediction = at_least_float32(logits[:, 0] if self.classes == 1 else logits.argmax(axis=-1))
        if state is None:
            count = xp.ones_like(prediction)
        else:
            before, count = state[:, 0], state[:, 1]
            same = abs(prediction - before) <= self.tolerance if self.classes == 1 else prediction == before
            count = xp.where(same, count + 1, 1)
        return 1 / count, xp.stack([prediction, count], axis=1)

    def cutoff(self, threshold: float) -> float:
        if threshold <= 0:
            return threshold
        if math.isfinite(threshold) and threshold != round(threshold):
            raise ValueError("patience counts off-ramps that agree; give 1, 2, 3, ...")
        return 1 / (threshold - 0.5)  # between 1 / k and 1 / (k - 1)

    def grid(self, points: int, num_exits: int) -> list[float]:
        return [float(k) for k in range(num_exits - 1, 0, -1)]

    def exit_all_threshold(self) -> float:
        return 1.0


EXIT_RULES = {rule.name: rule for rule in (Entropy, Confidence, Patience)}


def make_rule(name: str, num_labels: int, tolerance: float = 0.5, several_labels: bool = False) -> ExitRule:
    """The rule of that name; several_labels: a sample may have any number of them. Raises ValueError."""
    if name not in EXIT_RULES:
        raise ValueError(
            f"exit_rule is {name!r}; choose one of {', '.join(EXIT_RULES)} (0.10.0 had more), or import its file first"
        )
    return EXIT_RULES[name](num_labels, tolerance, several_labels)


def entropy(logits: Array) -> Array:
    """Entropy in nats of softmax(logits): (..., C) -> (...), in float32 or better.

    Finite for any finite logits (the original's exp overflows) and for logits of -inf; NaN logits give NaN.
    """
    return entr(softmax(logits)).sum(axis=-1)


def binary_logits(logits: Array) -> Array:
    """The logits (..., C) of labels that exclude no other, as those of C predictions of no and yes: (..., C, 2).

    A label with logit z has the logits (0, z), whose softmax is 1 - sigmoid(z) and sigmoid(z).
    """
    xp = functions_of(logits)
    return xp.stack([xp.zeros_like(logits), logits], axis=-1)


def prediction_entropy(logits: Array, several_labels: bool) -> Array:
    """The entropy (...) in nats of logits (..., C); of several labels a sample the largest binary entropy."""
    return functions_of(logits).amax(entropy(binary_logits(logits)), axis=-1) if several_labels else entropy(logits)
