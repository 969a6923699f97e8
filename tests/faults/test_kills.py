"""The driver is killed with SIGKILL after its first checkpoint; what is resumed ends bit for bit as if it had not been.

Half of the kills come after a random time, from outside. The others come before a random one of the operations on
files (open, rename, remove, mkdir, rmdir) that the process makes after its first checkpoint.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from driver_process import finish, start
from safetensors.torch import load_file

from deebert.training.checkpointing import newest_checkpoint, saved_steps

# 2 epochs of 4 steps in each stage, with a checkpoint after each step and few that are kept
TRAIN = (
    "--model_type bert --task_name SST-2 --output_dir out --plot_data_dir results --do_train --do_eval "
    "--eval_each_highway --max_seq_length 32 --learning_rate 3e-3 --num_train_epochs 2 --no_cuda --logging_steps 3 "
    "--per_gpu_train_batch_size 12 --save_steps 1 --save_total_limit 2 --resume"
)
SETTINGS = {
    "one process": (1, ""),
    "best weights, cached features": (1, "--evaluate_during_training --load_best_model_at_end --cache_features"),
    "a teacher": (1, "--distill 0.5 --teacher first_stage"),
    "two processes": (2, "--per_gpu_train_batch_size 6"),
}
ON_FILES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir")


@dataclass(frozen=True)
class Uninterrupted:
    """What a training leaves, and after its first checkpoint: how long it runs, and its operations on files."""

    weights: dict[str, torch.Tensor]
    exits: dict[str, np.ndarray]
    seconds: float
    operations: int


def call_at_operation(count: int | None, call) -> None:
    """Calls call(n) before the n-th operation on files of this process after its first checkpoint; None: each."""
    made = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal made
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (event in ON_FILES or writes) and (made or newest_checkpoint(Path("out"))):
            made += 1
            if count in (None, made):
                call(made)

    sys.addaudithook(hook)


def result(folder: Path) -> tuple[dict, dict]:
    """The weights and the logits of all exits that a finished training has left."""
    (file,) = folder.glob("results/**/all_exits.npz")
    with np.load(file) as arrays:
        return load_file(folder / "out/model.safetensors"), dict(arrays)


@pytest.fixture(scope="module")
def command(tiny_data, tiny_checkpoints):
    """The arguments of a training with these settings."""
    source = f"--model_name_or_path {tiny_checkpoints['bert']} --data_dir {tiny_data / 'SST-2'}"
    return lambda settings: f"{source} {TRAIN} {SETTINGS[settings][1]}".split()


@pytest.fixture(scope="module")
def uninterrupted(command, tmp_path_factory):
    @cache
    def train(settings: str) -> Uninterrupted:
        folder = tmp_path_factory.mktemp("uninterrupted")
        counts = folder / "operations"
        counts.touch()

        def count() -> None:
            descriptor = os.open(counts, os.O_WRONLY)
            call_at_operation(None, lambda n: os.pwrite(descriptor, b"%9d" % n, 0))

        first, *others = start(folder, command(settings), SETTINGS[settings][0], count)
        assert first.wait_for(lambda: newest_checkpoint(folder / "out"))
        begun = time.perf_counter()
        assert set(finish([first, *others])) == {0}, first.log
        return Uninterrupted(*result(folder), time.perf_counter() - begun, int(counts.read_text()))

    return train


def test_a_killed_training_ends_as_if_it_had_not_been(command, uninterrupted, tmp_path, trial, record_property):
    settings = list(SETTINGS)[trial // 2 % len(SETTINGS)]
    by_time, generator = trial % 2 == 0, random.Random(trial)
    argv, expected, processes = command(settings), uninterrupted(settings), SETTINGS[settings][0]
    limit = expected.seconds if by_time else expected.operations
    for _ in range(8):  # what is drawn may be later than the end, on a machine that is faster now
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.rmtree(tmp_path / "results", ignore_errors=True)
        if by_time:
            seconds, victim = generator.uniform(0, limit), generator.randrange(processes)
            running = start(tmp_path, argv, processes)
            running[0].wait_for(lambda: newest_checkpoint(tmp_path / "out"))
            running[victim].process.join(seconds)
            if running[victim].running:
                running[victim].send(signal.SIGKILL)
        else:
            operation = generator.randint(1, limit)
            kill = lambda _: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
            running = start(tmp_path, argv, processes, lambda: call_at_operation(operation, kill))  # noqa: B023
        killed = -signal.SIGKILL in finish(running)
        if killed and saved_steps(tmp_path / "out"):
            break
        limit *= 0.8 if by_time else 1
    assert killed, "no process was killed after its first checkpoint"
    left = sorted(path.name for path in (tmp_path / "out").glob(".*"))
    record_property("killed", f"{settings}; {saved_steps(tmp_path / 'out')[-1].name}; {' '.join(left) or '-'}")

    resumed = start(tmp_path, argv, processes)
    assert set(finish(resumed)) == {0}, resumed[0].log
    assert "resuming from out/checkpoint" in resumed[0].log or "nothing to resume" in resumed[0].log
    weights, exits = result(tmp_path)
    assert weights.keys() == expected.weights.keys()
    assert [name for name in weights if not torch.equal(weights[name], expected.weights[name])] == []
    assert [name for name in exits if not np.array_equal(exits[name], expected.exits[name])] == []
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith((".", "best"))] == []
    record = json.loads((tmp_path / "out/run.json").read_text())
    assert record["finished"]
    assert record["stages"].keys() == {"1", "2"}
