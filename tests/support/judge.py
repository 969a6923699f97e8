"""Compares the outcome of a runtime with the brute force, and counts what was compared."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from support.brute_force import LABEL_RULES, decide, per_off_ramp, uncertainty
from support.runtimes import Outcome, Trial

# By dtype: how near an uncertainty has to be to its threshold for rounding to turn the decision, and how far logits may
# be from those of the brute force, as a share of 1 or of the largest logit.
TIE = {"float64": 1e-6, "float32": 1e-4, "bfloat16": 0.1}
LOGITS = {"float64": 1e-6, "float32": 1e-4, "bfloat16": 0.1}


@dataclass
class Tally:
    """What was compared. cases: by (runtime, encoder); ties: the distance from the threshold of each, by dtype."""

    cases: Counter = field(default_factory=Counter)
    exits: Counter = field(default_factory=Counter)
    ties: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    unreadable: int = 0

    def as_json(self) -> dict:
        """For pytest's reports, which travel between processes."""
        cases = [[runtime, encoder, count] for (runtime, encoder), count in self.cases.items()]
        return vars(self) | {"cases": cases, "exits": list(self.exits.items())}

    def add(self, other: dict) -> None:
        """What `as_json` of another tally returned."""
        self.cases.update({(runtime, encoder): count for runtime, encoder, count in other["cases"]})
        self.exits.update(dict(other["exits"]))
        self.unreadable += other["unreadable"]
        for dtype, ties in other["ties"].items():
            self.ties.setdefault(dtype, []).extend(ties)
        for dtype, error in other["errors"].items():
            self.errors[dtype] = max(error, self.errors.get(dtype, 0.0))


def judge(tally: Tally, runtime: str, dtype: str, trial: Trial, outcome: Outcome) -> None:
    """Fails unless each sample exits where the rules say, with the logits of its exit, or it is a tie."""
    config, rule, exits = trial.model.config, outcome.rule or trial.rule, outcome.exits or trial.reference
    samples, off_ramps = exits.logits.shape[0], exits.logits.shape[1] - 1
    thresholds = outcome.thresholds or [per_off_ramp(trial.threshold(rule), off_ramps)] * samples
    layers, logits = outcome.layers.tolist(), outcome.logits.detach().double().cpu().numpy()
    assert len(layers) == samples
    assert logits.shape == exits.logits[:, 0].shape
    assert np.isfinite(logits).all()
    paths = [config.exit_layers.index(layer) for layer in layers]
    decisions = decide(exits, rule, thresholds)
    real = exits.readable.tolist()
    for sample, path in enumerate(paths):
        if real[sample]:
            turned = [j for j in range(min(path + 1, off_ramps)) if decisions.exits[sample, j] != (j == path)]
            if turned:
                tie = float(max(decisions.slack[sample, j] for j in turned))
                assert tie <= TIE[dtype], (
                    f"sample {sample} left at exit {path} and should at {decisions.path(sample)}; {tie} from a tie"
                )
                tally.ties.setdefault(dtype, []).append(tie)
        else:
            follows(rule, thresholds[sample], path, logits[sample], exits.several_labels, TIE[dtype])
    tally.unreadable += trial.reference.readable.tolist().count(False)
    expected = exits.logits[range(samples), paths]
    close(tally, dtype, logits, expected, real)
    if outcome.all_logits is not None:
        close(tally, dtype, outcome.all_logits.double().numpy(), exits.logits, real)
    if outcome.entropy is not None:
        nats = [uncertainty("entropy", row, exits.several_labels) for row in logits]
        np.testing.assert_allclose(outcome.entropy.double().cpu().numpy(), nats, atol=1e-5)
    tally.cases[runtime, config.model_type] += 1
    tally.exits.update(layers)


def follows(
    rule: str, thresholds: Sequence[float], path: int, logits: np.ndarray, several_labels: bool, tie: float
) -> None:
    """Fails where an exit does not follow from its own logits (C,). Without a reference no more can be said."""
    if path == len(thresholds):
        return
    assert thresholds[path] > 0
    if rule in LABEL_RULES:
        assert uncertainty(rule, logits, several_labels) < thresholds[path] + tie


def close(tally: Tally, dtype: str, actual: np.ndarray, expected: np.ndarray, rows: Sequence[bool]) -> None:
    actual, expected = actual[list(rows)], expected[list(rows)]
    if expected.size:
        error = float(np.abs(actual - expected).max() / max(1.0, np.abs(expected).max()))
        tally.errors[dtype] = max(error, tally.errors.get(dtype, 0.0))
        assert error <= LOGITS[dtype], f"logits are {error:.1e} from those of the brute force"
