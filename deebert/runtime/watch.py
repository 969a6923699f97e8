"""What a model in use does: the layers at which texts exit, the labels they get, and how long calls take."""

import math
from collections import Counter, deque
from collections.abc import Sequence
from threading import Lock

import numpy as np

WINDOW = 10_000  # the last calls, that percentiles are computed of


class Watch:
    """Counts texts by exit layer and by label, and times calls. Safe from several threads. layers: N."""

    def __init__(self, layers: int):
        self.layers, self.lock = layers, Lock()
        self.exits: Counter[int] = Counter()
        self.labels: Counter[str] = Counter()
        self.truncated = self.audited = self.changed = 0
        self.recent_seconds: deque[float] = deque(maxlen=WINDOW)

    def record_texts(self, exit_layers: Sequence[int], labels: Sequence[str], truncated: int) -> None:
        """Texts that were classified, and their labels: none of a regression model, of others any number a text."""
        with self.lock:
            self.exits.update(exit_layers)
            self.labels.update(labels)
            self.truncated += truncated

    def record_seconds(self, seconds: float) -> None:
        """The time of one call."""
        with self.lock:
            self.recent_seconds.append(seconds)

    def record_audit(self, audited: int, changed: int) -> None:
        """Texts that ran through all layers, too, and how many of them then got another label."""
        with self.lock:
            self.audited += audited
            self.changed += changed

    def stats(self) -> dict:
        """The counts since the start, and percentiles of the last 10,000 calls.

        texts, truncated, audited, changed: numbers of texts. exits, labels: texts by exit layer and by label.
        latency_ms: percentiles of the calls, None before the first.
        """
        with self.lock:
            exits, labels, seconds = Counter(self.exits), dict(self.labels), list(self.recent_seconds)
            counts = {"truncated": self.truncated, "audited": self.audited, "changed": self.changed}
        percentiles = np.percentile(seconds, [50, 95, 99]) if seconds else [math.nan] * 3
        latency = zip(("p50", "p95", "p99"), percentiles, strict=True)
        return {
            "texts": exits.total(),
            **counts,
            "exits": {layer: exits[layer] for layer in sorted({*range(1, self.layers + 1), *exits})},
            "labels": labels,
            "latency_ms": {name: 1000 * float(value) if seconds else None for name, value in latency},
        }
