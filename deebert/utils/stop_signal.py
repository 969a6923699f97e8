"""Ctrl-C and SIGTERM stop a training after its current step, so that it can be resumed."""

import signal
import sys
import threading


class StopSignal:
    """In the block of `with`, the first Ctrl-C or SIGTERM requests a stop (`self()` is True); a second one ends the
    process."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.number = 0  # of the signal, 0 before one comes
        self.before = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():  # other threads cannot have handlers
            self.before = {number: signal.signal(number, self.request_stop) for number in self.SIGNALS}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def request_stop(self, number: int, frame) -> None:
        """The signal handler. It restores the handlers before it."""
        self.number = number
        self.__exit__()
        print(
            "\nstopping after this step, with a checkpoint; a second signal stops at once", file=sys.stderr, flush=True
        )

    def __call__(self) -> bool:
        return self.number != 0
