"""Texts of many callers, classified together: one thread runs the model by continuous batching.

What arrives while a batch runs is the next batch. When nothing more is waiting, all that are active run to the end, so
that a single text never waits for others.
"""

import random
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Condition, Thread

import numpy as np

from deebert.data.encoding import EncodedTexts
from deebert.modeling.config import config_cutoffs
from deebert.modeling.exit_rules import NO_EXIT
from deebert.runtime.classifier import Classifier, Prediction
from deebert.runtime.continuous_batching import ContinuousBatcher, layer_steps
from deebert.utils.arrays import Array, as_floats, to_numpy

LONGEST_WAIT = 0.05  # seconds after which samples that wait at deep layers run, however few they are


class QueueFullError(Exception):
    """More texts are waiting than the queue holds."""


@dataclass
class Request:
    """The texts of one call, and what is known about them so far."""

    encoded: EncodedTexts
    cutoffs: list[float]  # (E-1,)
    own_threshold: bool  # whether the cut-offs are the model's own
    before: list[Prediction] | None = None  # an audit: what these texts got with early exit
    audited: int = 0  # an audit: the number of audited texts, with those that had run through all layers already
    future: Future = field(default_factory=Future)
    predictions: dict[int, Prediction] = field(default_factory=dict)
    arrival: float = field(default_factory=time.perf_counter)


class BatchingWorker:
    """Owns the thread, the queue and the batcher. Used as a context: at its end, all that has arrived is finished.

    max_queue: clients' texts that may be waiting or active; more are refused. Audits take what is left of it.
    """

    def __init__(self, classifier: Classifier, max_queue: int = 1024):
        self.classifier, self.watch, self.max_queue = classifier, classifier.watch, max_queue
        self.rule, self.own_cutoffs = config_cutoffs(classifier.config)
        self.changed = Condition()  # guards what follows
        self.queue: deque[tuple[Request, int]] = deque()  # a request and the position of a text in it
        self.pending = self.auditing = 0  # texts without a prediction: of clients, of audits
        self.closing = False
        self.thread = Thread(target=self._run, name="deebert", daemon=True)

    def __enter__(self) -> "BatchingWorker":
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        with self.changed:
            self.closing = True
            self.changed.notify()
        self.thread.join()

    @property
    def alive(self) -> bool:
        """Whether texts are taken."""
        return self.thread.is_alive() and not self.closing

    def submit(self, encoded: EncodedTexts, exit_threshold: float | Sequence[float] | None = None) -> Future:
        """A future with the list of predictions. Raises QueueFullError, and ValueError for an unusable threshold."""
        cutoffs = config_cutoffs(self.classifier.config, exit_threshold)[1]
        request = Request(encoded, cutoffs, exit_threshold is None)
        with self.changed:
            if self.closing or self.pending + len(encoded) > self.max_queue:
                raise QueueFullError(f"{self.pending} texts are waiting")
            self._enqueue(request)
            self.changed.notify()
        return request.future

    def _enqueue(self, request: Request) -> None:
        self._count(request, 1)
        self.queue.extend((request, row) for row in range(len(request.encoded)))

    def _count(self, request: Request, sign: int) -> None:
        """A request comes, 1, or goes, -1."""
        if request.before is None:
            self.pending += sign * len(request.encoded)
        else:
            self.auditing += sign * len(request.encoded)

    def _run(self) -> None:
        self._new_batcher()
        last_flush = time.perf_counter()
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.queue or self.closing)
                if not self.queue:
                    return
                size = min(len(self.queue), self.classifier.batch_size)
                batch = [self.queue.popleft() for _ in range(size)]
                more = bool(self.queue)
            try:
                self._classify(batch)
                if not more or time.perf_counter() - last_flush > LONGEST_WAIT:
                    self.batcher.flush()
                    last_flush = time.perf_counter()
            except Exception as error:  # whatever it is, the callers get it, and the service goes on
                self._fail(error)

    def _new_batcher(self) -> None:
        steps, exit_layers = layer_steps(self.classifier.runtime), self.classifier.config.exit_layers
        self.batcher = ContinuousBatcher(
            steps, self.rule, self.own_cutoffs, exit_layers, self.classifier.batch_size, exited=self
        )
        self.active: dict[int, tuple[Request, int]] = {}  # by the batcher's number of the sample

    def _classify(self, batch: list[tuple[Request, int]]) -> None:
        """Adds one batch. Its samples have numbers in the order in which they come in."""
        self.active |= dict(enumerate(batch, self.batcher.samples))
        encoded = EncodedTexts.joined([(request.encoded, row) for request, row in batch])
        cutoffs = as_floats([request.cutoffs for request, _ in batch])
        self.batcher.add(**encoded.padded(range(len(batch))), cutoffs=cutoffs)

    def add(self, index: np.ndarray, logits: Array, layer: int) -> None:
        """Samples (b,) exit after this layer with logits (b, C): the batcher calls this. See `ExitedSamples.add`."""
        items = [self.active[number] for number in index.tolist()]
        truncated = [request.encoded.truncated[row] for request, row in items]
        predictions = self.classifier.predictions(to_numpy(logits), [layer] * len(items), truncated)
        for number, (request, row), prediction in zip(index.tolist(), items, predictions, strict=True):
            request.predictions[row] = prediction
            del self.active[number]
            if len(request.predictions) == len(request.encoded):
                self._finish(request)

    def _finish(self, request: Request) -> None:
        predictions = [request.predictions[row] for row in range(len(request.encoded))]
        with self.changed:
            self._count(request, -1)
        if request.before is not None:
            changed = sum(a.label != b.label for a, b in zip(request.before, predictions, strict=True))
            self.watch.record_audit(request.audited, changed)
            return
        self.watch.record_texts(
            [prediction.exit_layer for prediction in predictions],
            sum(prediction.truncated for prediction in predictions),
            comparable=request.own_threshold,
        )
        self.watch.record_seconds(time.perf_counter() - request.arrival)
        if request.future.set_running_or_notify_cancel():  # the caller may have gone
            request.future.set_result(predictions)
        self._audit(request, predictions)

    def _audit(self, request: Request, predictions: list[Prediction]) -> None:
        """Queues the audited share once more, to run through all layers, as far as the queue has room.

        Texts that have run through all layers need no second run, but count as audited only while there is room:
        otherwise a full queue would drop only the texts that exited early, and the share of changed labels would be too
        low.
        """
        rows = [row for row in range(len(predictions)) if random.random() < self.classifier.audit]
        with self.changed:
            room = 0 if self.closing else max(0, self.max_queue - self.pending - self.auditing)
            rows = rows[:room]
            early = [row for row in rows if predictions[row].exit_layer < self.classifier.config.num_hidden_layers]
            if early:
                encoded = EncodedTexts.joined([(request.encoded, row) for row in early])
                never, before = [NO_EXIT] * len(request.cutoffs), [predictions[row] for row in early]
                self._enqueue(Request(encoded, never, False, before, len(rows)))
                return
        self.watch.record_audit(len(rows), 0)

    def _fail(self, error: Exception) -> None:
        """All that are active get the error, and their batcher is given up."""
        requests = {id(request): request for request, _ in self.active.values()}
        with self.changed:
            waiting = [item for item in self.queue if id(item[0]) not in requests]
            self.queue = deque(waiting)
            for request in requests.values():
                self._count(request, -1)
        for request in requests.values():
            if request.before is None and request.future.set_running_or_notify_cancel():
                request.future.set_exception(error)
        self._new_batcher()
