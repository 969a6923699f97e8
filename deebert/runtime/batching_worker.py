"""Texts of many callers, classified together: one thread runs the model on plain batches.

What arrives while a batch runs is the next batch, so that a single text never waits for others.
"""

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import islice
from threading import Condition, Thread

from deebert.data.encoding import EncodedTexts
from deebert.runtime.classifier import Classifier, Prediction


class QueueFullError(Exception):
    """More texts are waiting than the queue holds."""


@dataclass(eq=False)
class Request:
    """The texts of one call, the options of the model for them, and the predictions so far, by position."""

    encoded: EncodedTexts
    options: dict
    future: Future = field(default_factory=Future)
    predictions: dict[int, Prediction] = field(default_factory=dict)
    arrival: float = field(default_factory=time.perf_counter)


Item = tuple[Request, int]  # a request and the position of a text in it


class BatchingWorker:
    """Owns the thread and the queue. Used as a context: at its end, all that has arrived is finished.

    max_queue: texts that may be waiting or in the model; more are refused.
    """

    def __init__(self, classifier: Classifier, max_queue: int = 1024):
        self.classifier, self.max_queue = classifier, max_queue
        self.changed = Condition()  # guards what follows
        self.queue: deque[Item] = deque()
        self.pending = 0  # texts without a prediction
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
        request = Request(encoded, self.classifier.options(exit_threshold))
        with self.changed:
            if self.closing or self.pending + len(encoded) > self.max_queue:
                raise QueueFullError(f"{self.pending} texts are waiting")
            self.pending += len(encoded)
            self.queue.extend((request, row) for row in range(len(encoded)))
            self.changed.notify()
        return request.future

    def _run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.queue or self.closing)
                if not self.queue:
                    return
                batch = self._next_batch()
            try:
                self._classify(batch)
            except Exception:  # of one text or of several: each gets its own
                for item in batch:
                    self._classify_alone(item)

    def _next_batch(self) -> list[Item]:
        """The first texts of the queue that have the same options as the very first; they leave the queue."""
        options = self.queue[0][0].options
        alike = (item for item in self.queue if item[0].options == options)
        batch = list(islice(alike, self.classifier.batch_size))
        taken = {(id(request), row) for request, row in batch}
        self.queue = deque(item for item in self.queue if (id(item[0]), item[1]) not in taken)
        return batch

    def _classify(self, batch: list[Item]) -> None:
        encoded = EncodedTexts.joined([(request.encoded, row) for request, row in batch])
        predictions = self.classifier.classify(encoded, batch[0][0].options)
        for (request, row), prediction in zip(batch, predictions, strict=True):
            request.predictions[row] = prediction
            if len(request.predictions) == len(request.encoded):
                self._finish(request)
        self.classifier.run_audit(encoded, predictions)  # after the callers have their predictions

    def _classify_alone(self, item: Item) -> None:
        request, row = item
        if request.future.done() or row in request.predictions:
            return
        try:
            self._classify([item])
        except Exception as error:  # whatever it is, this caller gets it, and the service goes on
            with self.changed:
                self.queue = deque(other for other in self.queue if other[0] is not request)
            self._finish(request, error)

    def _finish(self, request: Request, error: Exception | None = None) -> None:
        with self.changed:
            self.pending -= len(request.encoded)
        if not request.future.set_running_or_notify_cancel():  # the caller has gone
            return
        if error is not None:
            request.future.set_exception(error)
            return
        self.classifier.watch.record_seconds(time.perf_counter() - request.arrival)
        request.future.set_result([request.predictions[row] for row in range(len(request.encoded))])
