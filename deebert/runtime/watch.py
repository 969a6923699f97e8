"""What a model in use does: where texts exit, how long calls take, and whether that has changed since the dev set."""

import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from threading import Lock

import numpy as np

WINDOW = 10_000  # the last texts, and the last calls, that shares and percentiles are computed of
ENOUGH = 100  # texts: with fewer the index is noise
SMALLEST_SHARE = 1e-4  # stands for an empty exit, whose logarithm would be infinite


class Watch:
    """Counts texts by exit layer, times calls, and compares with the dev set. Safe from several threads.

    layers: N. reference: the dev set's texts by exit layer at the model's own threshold, None where it is not known.
    """

    def __init__(self, layers: int, reference: Mapping[int, int] | None = None):
        self.layers, self.reference = layers, reference
        self.lock = Lock()
        self.exits: Counter[int] = Counter()
        self.truncated = self.audited = self.changed = 0
        self.recent_exits: deque[int] = deque(maxlen=WINDOW)
        self.recent_seconds: deque[float] = deque(maxlen=WINDOW)

    def record_texts(self, exit_layers: Sequence[int], truncated: int, comparable: bool) -> None:
        """Texts that were classified. comparable: whether at the model's own threshold, as the dev set was."""
        with self.lock:
            self.exits.update(exit_layers)
            self.truncated += truncated
            if comparable:
                self.recent_exits.extend(exit_layers)

    def record_seconds(self, seconds: float) -> None:
        """The time of one call."""
        with self.lock:
            self.recent_seconds.append(seconds)

    def record_audit(self, audited: int, changed: int) -> None:
        """Texts that went through all layers, too, and how many of them then got another label."""
        with self.lock:
            self.audited += audited
            self.changed += changed

    def stats(self) -> dict:
        """The counts since the start, and what follows from the last 10,000 texts and calls.

        texts, truncated, audited, changed: numbers of texts. exits: texts by exit layer. latency_ms: percentiles of the
        calls, None before the first. population_stability_index: see there, None where it cannot be computed.
        """
        with self.lock:
            exits, recent = Counter(self.exits), Counter(self.recent_exits)
            seconds, counts = list(self.recent_seconds), (self.truncated, self.audited, self.changed)
        percentiles = np.percentile(seconds, [50, 95, 99]) if seconds else [math.nan] * 3
        known = self.reference is not None and recent.total() >= ENOUGH
        return {
            "texts": exits.total(),
            **dict(zip(("truncated", "audited", "changed"), counts, strict=True)),
            "exits": {layer: exits[layer] for layer in sorted({*range(1, self.layers + 1), *exits})},
            "latency_ms": {
                name: 1000 * float(value) if seconds else None
                for name, value in zip(("p50", "p95", "p99"), percentiles, strict=True)
            },
            "population_stability_index": population_stability_index(self.reference, recent) if known else None,
        }


def population_stability_index(expected: Mapping[int, int], observed: Mapping[int, int]) -> float:
    """How far two histograms are apart: the sum of (o - e) ln(o / e) over the shares o and e of each class.

    It is 0 for equal shares. By custom (Siddiqi, Credit Risk Scorecards, 2006) up to 0.1 is no change, and above 0.25
    is a large one. A class that is empty on one side counts as a share of 0.0001.
    """
    classes = sorted({*expected, *observed})
    e, o = (np.array([counts.get(key, 0) for key in classes], float) for counts in (expected, observed))
    e, o = (np.maximum(counts / counts.sum(), SMALLEST_SHARE) for counts in (e, o))
    return float(((o - e) * np.log(o / e)).sum())
