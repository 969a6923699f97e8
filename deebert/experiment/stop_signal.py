"""How a training stops so that it can go on: at the next step, after Ctrl-C or SIGTERM."""

import signal
import sys
import threading


class StopSignal:
    """While entered, a first Ctrl-C or SIGTERM only asks to stop (`self()` is True); a second one ends the process."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.number = 0
        self.before = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():  # others cannot have handlers
            self.before = {number: signal.signal(number, self.ask) for number in self.SIGNALS}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number: int, frame) -> None:
        self.number = number
        self.__exit__()
        print("\nstopping at the next step, with a checkpoint; once more to stop at once", file=sys.stderr, flush=True)

    def __call__(self) -> bool:
        return self.number != 0
