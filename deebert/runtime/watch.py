"""What a classifier in use does: the layers at which texts exit, the labels they get, and how long calls take."""

from collections import Counter, deque
from collections.abc import Iterable
from threading import Lock

import numpy as np

WINDOW = 10_000  # the last calls, of which percentiles are computed


class Watch:
    """Counts texts by exit layer and by label, and times calls. Safe from several threads. layers: N."""

    def __init__(self, layers: int):
        self.layers, self.lock = layers, Lock()
        self.exits, self.labels, self.counts = Counter(), Counter(), Counter(truncated=0, audited=0, changed=0)
        self.seconds: deque[float] = deque(maxlen=WINDOW)

    def record(
        self, exits: Iterable[int] = (), labels: Iterable[str] = (), seconds: Iterable[float] = (), **counts: int
    ) -> None:
        """Adds the exit layers and the labels of texts, the seconds of calls, and other counts (see `stats`)."""
        with self.lock:
            self.exits.update(exits)
            self.labels.update(labels)
            self.counts.update(counts)
            self.seconds.extend(seconds)

    def stats(self) -> dict:
        """The counts since the start, and percentiles of the last 10,000 calls.

        texts, truncated, audited, changed: numbers of texts. exits, labels: texts by exit layer and by label.
        latency_ms: percentiles of the calls, None before the first.
        """
        with self.lock:
            exits, labels, counts, seconds = Counter(self.exits), dict(self.labels), dict(self.counts), [*self.seconds]
        percentiles = (1000 * np.percentile(seconds, [50, 95, 99])).tolist() if seconds else [None] * 3
        return {
            "texts": exits.total(),
            **counts,
            "exits": {layer: exits[layer] for layer in sorted({*range(1, self.layers + 1), *exits})},
            "labels": labels,
            "latency_ms": dict(zip(("p50", "p95", "p99"), percentiles, strict=True)),
        }
