"""Progress of a training where there is no terminal, such as in a log file: a line now and then, in place of a bar."""

import time

from tqdm import tqdm

FIRST_LINES = 10  # half a minute apart; the later ones are also a share of the steps apart
SECONDS, SHARE = 30.0, 0.05


class ProgressLines:
    """Prints step, loss, samples per second and the time that is left, for half a minute each and then every 5 %.

    It is used as a bar of tqdm is. total: steps of the stage; done: those of before, in a training that is resumed.
    """

    def __init__(self, stage: int, total: int, done: int = 0):
        self.stage, self.total, self.first_step, self.last_step = stage, total, done, done
        self.samples, self.lines = 0, 0
        self.started = self.last_time = time.monotonic()

    def __enter__(self) -> "ProgressLines":
        return self

    def __exit__(self, *error) -> None:
        pass

    def update(self, samples: int) -> None:
        self.samples += samples

    def set_postfix(self, loss: str, step: int, refresh: bool = False) -> None:
        """After each step, which counts from 1."""
        now = time.monotonic()
        far = self.lines < FIRST_LINES or step - self.last_step >= SHARE * self.total
        if now - self.last_time < SECONDS or not far:
            return
        self.last_time, self.last_step, self.lines = now, step, self.lines + 1
        seconds = now - self.started
        left = tqdm.format_interval(seconds / (step - self.first_step) * (self.total - step))
        print(
            f"stage {self.stage}: step {step:,} of {self.total:,} ({step / self.total:.0%}), loss {loss}, "
            f"{self.samples / seconds:.1f} samples/s, {left} left",
            flush=True,
        )
