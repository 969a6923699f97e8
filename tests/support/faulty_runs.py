"""What the tests of faults share: trainings, what a run that nothing disturbs leaves, and hooks into file operations.

A training has 2 epochs of 4 steps in each stage, with a checkpoint after each step, of which two are kept.
"""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from support.driver_process import DriverProcess, finish, start

from deebert.training.checkpointing import newest_checkpoint

COMMON = "--model_type bert --task_name SST-2 --output_dir out --plot_data_dir results --max_seq_length 32 --no_cuda"
TRAIN = (
    f"{COMMON} --do_train --do_eval --eval_each_highway --learning_rate 3e-3 --num_train_epochs 2 --logging_steps 3 "
    "--per_gpu_train_batch_size 12 --save_steps 1 --save_total_limit 2"
)
SETTINGS = {
    "one process": (1, ""),
    "best weights, cached features": (1, "--evaluate_during_training --load_best_model_at_end --recipe fast"),
    "distilled": (1, "--distill 0.5 --train_strategy mixed"),
    "two processes": (2, "--per_gpu_train_batch_size 6"),
}
ON_FILES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir")


@dataclass(frozen=True)
class Result:
    """What a finished training in a folder leaves: weights, and the logits of all exits."""

    weights: dict[str, torch.Tensor]
    exits: dict[str, np.ndarray]

    @classmethod
    def read(cls, folder: Path) -> "Result":
        (file,) = folder.glob("results/**/all_exits.npz")
        with np.load(file) as arrays:
            return cls(load_file(folder / "out/model.safetensors"), dict(arrays))

    def check_same(self, other: "Result") -> None:
        """Bit for bit."""
        assert self.weights.keys() == other.weights.keys()
        assert [name for name in self.weights if not torch.equal(self.weights[name], other.weights[name])] == []
        assert [name for name in self.exits if not np.array_equal(self.exits[name], other.exits[name])] == []


def before_operations(call: Callable[[str], None]) -> None:
    """Calls call(path) before each operation of this process that writes, renames, makes or removes a file."""

    def hook(event: str, arguments: tuple) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event in ON_FILES or writes:
            call(str(arguments[0]))

    sys.addaudithook(hook)


def at_operation(count: int | None, call: Callable[[int], None]) -> None:
    """Calls call(n) before the n-th of these operations after the first checkpoint; None: before each."""
    made = 0

    def operation(_: str) -> None:
        nonlocal made
        if made or has_checkpoint(Path.cwd()):
            made += 1
            if count in (None, made):
                call(made)

    before_operations(operation)


@dataclass(frozen=True)
class Uninterrupted:
    """A training that nothing disturbs; after its first checkpoint: how long it runs, its operations on files."""

    folder: Path
    result: Result
    seconds: float
    operations: int

    @classmethod
    def train(cls, folder: Path, argv: list[str], processes: int) -> "Uninterrupted":
        counts = folder / "operations"
        counts.touch()

        def count() -> None:
            descriptor = os.open(counts, os.O_WRONLY)
            at_operation(None, lambda n: os.pwrite(descriptor, b"%9d" % n, 0))

        first, *others = start(folder, argv, processes, count)
        assert first.wait_for(lambda: has_checkpoint(folder)), first.log
        begun = time.perf_counter()
        assert set(finish([first, *others])) == {0}, first.log
        return cls(folder, Result.read(folder), time.perf_counter() - begun, int(counts.read_text()))


def has_checkpoint(folder: Path) -> bool:
    return newest_checkpoint(folder / "out") is not None


def leftovers(folder: Path) -> list[str]:
    """The names of temporary files."""
    return [path.name for place in ("out", "results") for path in (folder / place).rglob(".*")]


def run(folder: Path, argv: list[str], before: Callable[[], None] = lambda: None) -> DriverProcess:
    """One process, to its end."""
    process = DriverProcess(folder, argv, before)
    process.wait()
    return process


def run_to_the_end(folder: Path, argv: list[str], processes: int = 1) -> str:
    """Returns the output of the first process."""
    running = start(folder, argv, processes)
    assert set(finish(running)) == {0}, running[0].log
    return running[0].log


def stopped_after_a_checkpoint(folder: Path, argv: list[str], number: int) -> int:
    """Sends a signal to a training after its first checkpoint. Returns the exit code."""
    process = DriverProcess(folder, argv)
    assert process.wait_for(lambda: has_checkpoint(folder)), process.log
    process.send(number)
    return process.wait()
