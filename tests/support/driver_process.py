"""The real driver as a process of its own. It is forked from this one, with all imports done: that is cheap."""

import atexit
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from accelerate.state import AcceleratorState
from support.helpers import ROOT

import deebert.experiment.run  # noqa: F401  the processes have imported it, too

SECONDS = 120


class DriverProcess:
    """run_glue_deebert.py with these arguments, begun in the folder. Its output goes to a temporary file.

    before: called in the new process first. environment: what torchrun sets, for one of several processes.
    """

    def __init__(
        self,
        folder: Path,
        argv: Sequence[str],
        before: Callable[[], None] = lambda: None,
        environment: dict[str, str] | None = None,
    ):
        self.folder, self.argv, self.before, self.environment = folder, argv, before, environment or {}
        self.output = tempfile.TemporaryFile()  # noqa: SIM115  not in the folder, whose disk may be full
        self.process = multiprocessing.get_context("fork").Process(target=self.run)
        self.process.start()

    def run(self) -> None:
        os.chdir(self.folder)
        os.environ.update(self.environment)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(self.output.fileno(), number)
            setattr(sys, name, os.fdopen(number, "w", buffering=1, closefd=False))
        sys.stderr.isatty = lambda: True  # so that there are progress bars, which tests wait for
        AcceleratorState._reset_state(reset_partial_state=True)  # of tests before this one
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        sys.argv = ["run_glue_deebert.py", *self.argv]
        atexit._clear()  # what libraries register from here on runs at the end, as in a process of its own
        self.before()
        try:
            runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
        finally:
            atexit._run_exitfuncs()

    def send(self, number: int) -> None:
        os.kill(self.process.pid, number)

    @property
    def running(self) -> bool:
        return self.process.is_alive()

    def wait(self, seconds: float = SECONDS) -> int:
        """The exit code, negative where a signal ended the process."""
        self.process.join(seconds)
        if self.running:
            self.process.kill()
            self.process.join()
            raise AssertionError(f"the process hangs: {self.log[-500:]}")
        return self.process.exitcode

    def wait_for(self, happened: Callable[[], bool]) -> bool:
        """Waits until it happened, or the process has ended. Returns whether it happened."""
        while self.running:
            if happened():
                return True
            time.sleep(0.001)
        return happened()

    @property
    def log(self) -> str:
        return os.pread(self.output.fileno(), 1 << 24, 0).decode()


def start(folder: Path, argv: Sequence[str], processes: int, before=lambda: None) -> list[DriverProcess]:
    """That many processes of one training, with the environment that torchrun gives them."""
    if processes == 1:
        return [DriverProcess(folder, argv, before)]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    shared |= {"LOCAL_WORLD_SIZE": str(processes), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "none"}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    return [DriverProcess(folder, argv, before if not i else lambda: None, shared | own) for i, own in enumerate(ranks)]


def finish(processes: list[DriverProcess]) -> list[int]:
    """Waits for all. When one is killed, the others get SIGTERM, as from torchrun, and soon SIGKILL."""
    while any(process.running for process in processes):
        codes = [process.process.exitcode for process in processes]
        if any(code not in (None, 0) for code in codes):
            for number in (signal.SIGTERM, signal.SIGKILL):
                for process in processes:
                    if process.running:
                        process.send(number)
                        process.process.join(0.5)
        time.sleep(0.005)
    return [process.wait() for process in processes]
