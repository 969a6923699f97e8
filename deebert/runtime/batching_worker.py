"""Texts of many callers, classified together: some threads tokenize, and one runs the model on plain batches.

What arrives while a batch runs is the next batch, so that a single text never waits for others.
"""

import logging
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from threading import Condition, Thread

from deebert.data.encoding import EncodedTexts
from deebert.runtime.classifier import Classifier, Prediction

ENCODERS = 2  # threads that tokenize, each of which may need a hundred times the memory of a text


class QueueFullError(Exception):
    """More texts are waiting than the queue holds."""


@dataclass(eq=False)
class Request:
    """The texts of one call, the options of the model for them, and the results so far, by position."""

    texts: Sequence[tuple[str, ...]]
    options: dict
    encoded: EncodedTexts | None = None
    future: Future = field(default_factory=Future)
    results: dict[int, Prediction | Exception] = field(default_factory=dict)
    arrival: float = field(default_factory=time.perf_counter)


Item = tuple[Request, int]  # a request and the position of a text in it


class BatchingWorker:
    """Owns the threads and the queue. Used as a context: at its end, all that has arrived is finished.

    max_queue: texts that may be waiting or in the model; more are refused.
    """

    def __init__(self, classifier: Classifier, max_queue: int = 1024):
        self.classifier, self.max_queue = classifier, max_queue
        self.changed = Condition()  # guards what follows
        self.queue: deque[Item] = deque()
        self.pending = 0  # texts without a prediction
        self.closing = False
        self.encoders = ThreadPoolExecutor(ENCODERS)
        self.thread = Thread(target=self._run, name="deebert", daemon=True)

    def __enter__(self) -> "BatchingWorker":
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        with self.changed:
            self.closing = True
            self.changed.notify()
        self.thread.join()
        self.encoders.shutdown()

    @property
    def alive(self) -> bool:
        """Whether texts are taken."""
        return self.thread.is_alive() and not self.closing

    def submit(self, texts: Sequence[tuple[str, ...]], exit_threshold: float | Sequence[float] | None = None) -> Future:
        """A future with the predictions for texts, as tuples of one, or pairs.

        Raises QueueFullError, and ValueError for an unusable threshold.
        """
        request = Request(texts, self.classifier.options(exit_threshold))
        with self.changed:
            if self.closing or self.pending + len(texts) > self.max_queue:
                raise QueueFullError(f"{self.pending} texts are waiting")
            self.pending += len(texts)
        self.encoders.submit(self._encode, request)
        return request.future

    def _encode(self, request: Request) -> None:
        try:
            request.encoded = self.classifier.encode(request.texts)
        except Exception as error:
            self._finish(request, error)
            return
        with self.changed:
            self.queue.extend((request, row) for row in range(len(request.texts)))
            self.changed.notify()

    def _run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.queue or (self.closing and not self.pending))
                if not self.queue:
                    return
                batch = self._next_batch()
            self._classify(batch)

    def _next_batch(self) -> list[Item]:
        """The first texts of the queue that have the same options as the very first; they leave the queue."""
        options = self.queue[0][0].options
        alike = (item for item in self.queue if item[0].options == options)
        batch = list(islice(alike, self.classifier.batch_size))
        taken = {(id(request), row) for request, row in batch}
        self.queue = deque(item for item in self.queue if (id(item[0]), item[1]) not in taken)
        return batch

    def _classify(self, batch: list[Item]) -> None:
        encoded, options = joined(batch), batch[0][0].options
        try:
            results = self.classifier.classify(encoded, options)
        except Exception:  # of one text perhaps: it is not to be that of its neighbours
            results = [self._classify_alone(item) for item in batch]
        for (request, row), result in zip(batch, results, strict=True):
            request.results[row] = result
            if len(request.results) == len(request.texts):
                self._finish(request)
        if not any(isinstance(result, Exception) for result in results):
            self._audit(encoded, results)  # after the callers have their predictions

    def _classify_alone(self, item: Item) -> Prediction | Exception:
        try:
            return self.classifier.classify(joined([item]), item[0].options)[0]
        except Exception as error:
            return error

    def _audit(self, encoded: EncodedTexts, predictions: list[Prediction]) -> None:
        try:
            self.classifier.run_audit(encoded, predictions)
        except Exception:
            logging.getLogger(__name__).exception("an audit failed; the service goes on")

    def _finish(self, request: Request, error: Exception | None = None) -> None:
        results = [request.results[row] for row in sorted(request.results)]
        error = next((result for result in results if isinstance(result, Exception)), error)
        with self.changed:
            self.pending -= len(request.texts)
            self.changed.notify()
        if not request.future.set_running_or_notify_cancel():  # the caller has gone
            return
        if error is not None:
            request.future.set_exception(error)
            return
        self.classifier.watch.record_seconds(time.perf_counter() - request.arrival)
        request.future.set_result(results)


def joined(batch: Sequence[Item]) -> EncodedTexts:
    """The encoded texts of a batch."""
    return EncodedTexts.joined([(request.encoded, row) for request, row in batch])
