"""The driver is killed with SIGKILL after its first checkpoint; what is resumed ends bit for bit as if it had not been.

Half of the kills come after a random time, from outside. The others come before a random one of the operations on
files (open, rename, remove, mkdir, rmdir) that the process makes after its first checkpoint.
"""

import json
import os
import random
import shutil
import signal
from pathlib import Path

from support.driver_process import finish, start
from support.faulty_runs import SETTINGS, Result, at_operation, has_checkpoint, leftovers, run_to_the_end

from deebert.training.checkpointing import saved_steps


def kill_by_time(folder: Path, argv: list[str], processes: int, generator: random.Random, seconds: float) -> list[int]:
    """Kills one process within these seconds after the first checkpoint. Returns the exit codes."""
    running, victim = start(folder, argv, processes), generator.randrange(processes)
    running[0].wait_for(lambda: has_checkpoint(folder))
    running[victim].process.join(generator.uniform(0, seconds))
    if running[victim].running:
        running[victim].send(signal.SIGKILL)
    return finish(running)


def kill_at_operation(folder: Path, argv: list[str], processes: int, count: int) -> list[int]:
    """Kills the first process before this operation on files. Returns the exit codes."""

    def kill(_: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    return finish(start(folder, argv, processes, lambda: at_operation(count, kill)))


def test_a_killed_training_ends_as_if_it_had_not_been(training, uninterrupted, tmp_path, trial, record_property):
    settings, generator = list(SETTINGS)[trial // 2 % len(SETTINGS)], random.Random(trial)
    argv, expected, processes = training(settings), uninterrupted(settings), SETTINGS[settings][0]
    seconds = expected.seconds
    for _ in range(8):  # a time that is drawn may be later than the end, on a machine that is faster now
        for name in ("out", "results"):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
        if trial % 2:
            codes = kill_at_operation(tmp_path, argv, processes, generator.randint(1, expected.operations))
        else:
            codes = kill_by_time(tmp_path, argv, processes, generator, seconds)
            seconds *= 0.8
        if -signal.SIGKILL in codes and saved_steps(tmp_path / "out"):
            break
    assert -signal.SIGKILL in codes, "no process was killed after its first checkpoint"
    record_property("killed", f"{settings}; {saved_steps(tmp_path / 'out')[-1].name}; {leftovers(tmp_path)}")

    log = run_to_the_end(tmp_path, [*argv, "--resume"], processes)
    assert "resuming from out/checkpoint" in log or "nothing to resume" in log
    expected.result.check_same(Result.read(tmp_path))
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith((".", "best"))] == []
    record = json.loads((tmp_path / "out/run.json").read_text())
    assert record["finished"]
    assert record["stages"].keys() == {"1", "2"}
