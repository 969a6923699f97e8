"""Texts of many callers, classified together: some threads tokenize, and one runs the model on plain batches.

What arrives while a batch runs is the next batch, so that a single text never waits for others. Texts of a cancelled
call are dropped.
"""

import logging
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Condition, Thread

from deebert.data.encoding import EncodedTexts
from deebert.runtime.classifier import Classifier, Prediction

ENCODERS = 2  # threads that tokenize, each of which may need a hundred times the memory of a text


class QueueFullError(Exception):
    """More texts are waiting than the queue holds."""


@dataclass(eq=False)
class Call:
    """The texts of one call, the options of the model for them, and the results so far, by position."""

    texts: Sequence[tuple[str, ...]]
    options: dict
    encoded: EncodedTexts | None = None
    results: dict[int, Prediction | Exception] = field(default_factory=dict)
    future: Future = field(default_factory=Future)


class BatchingWorker:
    """Owns the threads and the queue. Used as a context: at its end, all that has arrived is finished.

    max_queue: texts that may be waiting or in the model; more are refused.
    """

    def __init__(self, classifier: Classifier, max_queue: int = 1024):
        self.classifier, self.max_queue = classifier, max_queue
        self.changed = Condition()  # guards what follows
        self.queue: deque[tuple[Call, int]] = deque()  # a call and the position of a text in it
        self.pending = 0  # texts without a prediction
        self.closing = False
        self.encoders = ThreadPoolExecutor(ENCODERS)
        self.thread = Thread(target=self._run, name="deebert", daemon=True)

    def __enter__(self) -> "BatchingWorker":
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Waits until the results of all that has arrived are there."""
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
        """A future with the predictions for tuples of a text or a pair. Raises QueueFullError, ValueError."""
        call = Call(texts, self.classifier.options(exit_threshold))
        call.future.add_done_callback(lambda _: self._leave(call))
        with self.changed:
            if self.closing or self.pending + len(texts) > self.max_queue:
                raise QueueFullError(f"{self.pending} texts are waiting")
            self.pending += len(texts)
        self.encoders.submit(self._encode, call)
        return call.future

    def _encode(self, call: Call) -> None:
        try:
            call.encoded = None if call.future.cancelled() else self.classifier.encode(call.texts)
        except Exception as error:
            call.results[0] = error
            self._finish(call)
            return
        with self.changed:
            if not call.future.cancelled():
                self.queue.extend((call, row) for row in range(len(call.texts)))
                self.changed.notify()

    def _run(self) -> None:
        while batch := self._next_batch():
            encoded = EncodedTexts.joined([(call.encoded, row) for call, row in batch])
            results = self._results(encoded, batch[0][0].options)
            for (call, row), result in zip(batch, results, strict=True):
                call.results[row] = result
                if len(call.results) == len(call.texts):
                    self._finish(call)
            try:
                self.classifier.run_audit(encoded, results)
            except Exception:
                logging.getLogger(__name__).exception("an audit failed")

    def _next_batch(self) -> list[tuple[Call, int]]:
        """The first texts that have the options of the very first. They leave the queue. None are left at the end."""
        with self.changed:
            self.changed.wait_for(lambda: self.queue or (self.closing and not self.pending))
            batch, others = [], deque()
            for text in self.queue:
                fits = text[0].options == self.queue[0][0].options and len(batch) < self.classifier.batch_size
                (batch if fits else others).append(text)
            self.queue = others
            return batch

    def _results(self, encoded: EncodedTexts, options: dict) -> list[Prediction | Exception]:
        """The predictions of a batch. If it fails, its texts run one by one: an error is that of its own text only."""
        try:
            return self.classifier.classify(encoded, options)
        except Exception as error:
            if len(encoded) == 1:
                return [error]
            alone = [EncodedTexts.joined([(encoded, row)]) for row in range(len(encoded))]
            return [self._results(text, options)[0] for text in alone]

    def _finish(self, call: Call) -> None:
        if call.future.set_running_or_notify_cancel():
            errors = [result for result in call.results.values() if isinstance(result, Exception)]
            if errors:
                call.future.set_exception(errors[0])
            else:
                call.future.set_result([call.results[row] for row in range(len(call.texts))])

    def _leave(self, call: Call) -> None:
        """The call has its results, or was cancelled."""
        with self.changed:
            self.pending -= len(call.texts)
            if call.future.cancelled():
                self.queue = deque(text for text in self.queue if text[0] is not call)
            self.changed.notify()
