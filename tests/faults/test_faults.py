"""Signals, full disks, folders that cannot be written to, two runs at once, changed files and a clock that jumps."""

import codecs
import ctypes
import os
import shutil
import signal
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.driver_process import DriverProcess, start
from support.faulty_runs import (
    COMMON,
    Result,
    before_operations,
    has_checkpoint,
    leftovers,
    run,
    run_to_the_end,
    stopped_after_a_checkpoint,
)
from support.helpers import snapshot_files

from deebert.evaluation.plotting import read_series
from deebert.training.checkpointing import saved_steps
from deebert.utils.files import LOCK

EVALUATE = f"{COMMON} --do_eval --eval_each_highway --eval_highway --per_gpu_eval_batch_size 1"


def last_line(process: DriverProcess) -> str:
    """The last line of the output. There must be no traceback before it."""
    assert "Traceback" not in process.log
    return process.log.strip().splitlines()[-1].split("\r")[-1]


pytestmark = pytest.mark.slow


@pytest.mark.slice("number", [signal.SIGTERM, signal.SIGINT], 1)
@pytest.mark.slice("moment", ["entropy_sweep.csv", "all exits:"], 1)
def test_a_signal_in_the_evaluation(uninterrupted, tiny_data, tmp_path, number, moment):
    """In the pass over all exits, or between the repeats of the timed sweep. What was written is complete."""
    shutil.copytree(uninterrupted().folder / "out", tmp_path / "out")
    (tmp_path / "data").mkdir()
    header, *lines = (tiny_data / "SST-2/dev.tsv").read_text().splitlines(keepends=True)
    (tmp_path / "data/dev.tsv").write_text(header + "".join(lines) * (1 if "csv" in moment else 200))
    before = snapshot_files(tmp_path / "out")
    argv = f"{EVALUATE} --model_name_or_path model --data_dir data --exit_threshold 0 0.3 0.6".split()
    process = DriverProcess(tmp_path, argv)
    assert process.wait_for(lambda: moment in process.log or (tmp_path / "results/model" / moment).exists())
    process.send(number)
    assert process.wait() == 128 + number
    assert last_line(process) == "interrupted"
    assert leftovers(tmp_path) == []
    after = snapshot_files(tmp_path / "out")
    assert {path for path in after if before.get(path) != after[path]} <= {tmp_path / "out/run_eval.json"}
    if "csv" in moment:
        assert len(read_series([tmp_path / "results/model"])[0].sweep) == 3


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_two_processes(training, uninterrupted, tmp_path, number):
    argv = training("two processes")
    running = start(tmp_path, argv, 2)
    assert running[0].wait_for(lambda: has_checkpoint(tmp_path))
    for process in running:
        process.send(number)
    assert [process.wait() for process in running] == [128 + number] * 2
    assert "the same command with --resume goes on from out/checkpoint-" in last_line(running[0])
    run_to_the_end(tmp_path, [*argv, "--resume"], 2)
    uninterrupted("two processes").result.check_same(Result.read(tmp_path))


@contextmanager
def small_disk():
    """A folder on a disk of 16 MB of its own."""
    libc = ctypes.CDLL(None, use_errno=True)
    with tempfile.TemporaryDirectory() as folder:
        if libc.mount(b"none", folder.encode(), b"tmpfs", 0, b"size=16m"):
            pytest.skip(f"no file system can be mounted here: {os.strerror(ctypes.get_errno())}")
        try:
            yield Path(folder)
        finally:
            libc.umount2(folder.encode(), 2)


def fill_before(write: str) -> None:
    """Fills the disk up before the first operation on a file with this in its name."""
    filled = []

    def fill(path: str) -> None:
        if write in path and not filled:
            filled.append(path)
            with open("filler", "wb", buffering=0) as file:  # noqa: PTH123  the hook sees it, and does nothing
                try:
                    while file.write(bytes(4096)):
                        pass
                except OSError:
                    pass

    before_operations(fill)


WRITES = ["stage1-3.partial", ".entropy_sweep.csv", "/.saving-", ".run.json", "stage2-5.partial", "best-stage2"]
WRITES += ["tfevents", ".README.md", ".all_exits.npz", ".each_layer", ".entropy_0.3.npy"]
WRITES += [".eval_results.txt", ".threshold.json"]


@pytest.mark.slice("write", WRITES, 2)
def test_a_disk_that_fills_up(training, uninterrupted, write):
    """One line, the folder stays usable, and with room again --resume ends as if nothing had been."""
    settings = "best weights, cached features" if write == "best-stage2" else "one process"
    argv = training(settings, "--eval_highway --exit_threshold 0 0.3 --target_drop 0.9")
    with small_disk() as folder:
        process = run(folder, argv, lambda: fill_before(write))
        assert (folder / "filler").exists(), "nothing was written under that name"
        assert process.process.exitcode == 2, process.log
        assert last_line(process).startswith("error: ")
        assert "No space left on device" in last_line(process)
        assert leftovers(folder) == []
        (folder / "filler").unlink()
        run_to_the_end(folder, [*argv, "--resume"])
        uninterrupted(settings).result.check_same(Result.read(folder))


def become_nobody() -> None:
    codecs.lookup("utf-8-sig")  # Python's own files may be closed to others
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)


def test_a_folder_that_cannot_be_written_to(uninterrupted, training, tiny_data, tiny_checkpoints):
    """By another user than root, whom no permission stops."""
    if os.getuid():
        pytest.skip("another user is needed for that, and only root can become one")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(tiny_data / "SST-2", folder / "data")
        shutil.copytree(tiny_checkpoints["bert"], folder / "model")
        shutil.copytree(uninterrupted().folder / "out", folder / "trained")
        (folder / "closed").mkdir()
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        (folder / "results").mkdir()
        (folder / "results").chmod(0o777)
        before = snapshot_files(folder)
        train = [*training(), "--model_name_or_path", "model", "--data_dir", "data"]
        evaluate = f"{COMMON} --do_eval --model_name_or_path model --data_dir data --eval_each_highway".split()
        for argv, message in (
            ([*train, "--output_dir", "closed"], "closed: nothing can be written there"),
            ([*train, "--output_dir", "closed/new"], "closed/new: no folder can be made there"),
            ([*evaluate, "--output_dir", "trained"], "trained: nothing can be written there"),
        ):
            process = run(folder, argv, become_nobody)
            assert process.process.exitcode == 2, process.log
            assert last_line(process) == f"error: {message} (Permission denied)"
        assert {path: data for path, data in snapshot_files(folder).items() if path in before} == before
        assert not list((folder / "closed").iterdir())


def test_two_runs_in_one_folder(training, uninterrupted, tmp_path):
    """One goes on as if it were alone; the other, begun at the same moment or later, is refused."""
    running = [DriverProcess(tmp_path, training()) for _ in range(2)]
    assert any(process.wait_for(lambda: has_checkpoint(tmp_path)) for process in running)
    evaluation = [word for word in training() if word != "--do_train"]
    later = [run(tmp_path, argv) for argv in ([*training(), "--resume"], evaluation)]
    assert [process.process.exitcode for process in later] == [2, 2]
    assert sorted(process.wait() for process in running) == [0, 2]
    refused = [last_line(process) for process in (*running, *later) if process.process.exitcode]
    assert refused == ["error: out: another run uses this folder; wait for it, or choose another"] * 3
    uninterrupted().result.check_same(Result.read(tmp_path))


def test_changed_files_are_not_mixed(training, uninterrupted, tiny_data, tiny_checkpoints, tmp_path):
    """Between a training that was killed and the one that resumes it: other data of the same size or tokenizer."""
    shutil.copytree(tiny_data / "SST-2", tmp_path / "data")
    shutil.copytree(tiny_checkpoints["bert"], tmp_path / "model")
    argv = [*training(), "--model_name_or_path", "model", "--data_dir", "data"]
    assert stopped_after_a_checkpoint(tmp_path, argv, signal.SIGKILL) == -signal.SIGKILL
    (tmp_path / "out" / LOCK).unlink()
    for file, old, new, message in (
        ("data/train.tsv", "good", "dull", "--resume: the training in out had another train.tsv"),
        ("model/tokenizer.json", '"film"', '"flim"', "--resume: the tokenizer in model is another one than"),
    ):
        before = (tmp_path / file).read_text()
        stat = (tmp_path / file).stat()
        assert old in before
        (tmp_path / file).write_text(before.replace(old, new, 1))
        os.utime(tmp_path / file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        kept = snapshot_files(tmp_path / "out")
        process = run(tmp_path, [*argv, "--resume"])
        assert process.process.exitcode == 2
        assert last_line(process).startswith(f"error: {message}")
        assert snapshot_files(tmp_path / "out") == kept
        (tmp_path / file).write_text(before)
    run_to_the_end(tmp_path, [*argv, "--resume"])
    uninterrupted().result.check_same(Result.read(tmp_path))


@pytest.mark.slice("jump", [-86400.0, 86400.0], 1)
def test_a_clock_that_jumps(training, uninterrupted, tmp_path, jump):
    """By a day, back or on, at every tenth look at the time; and it is resumed on the day before."""
    now, calls = time.time, []

    def jumping() -> float:
        calls.append(1)
        return now() + jump * (len(calls) // 10 % 2)

    def patch() -> None:
        time.time = jumping

    process = DriverProcess(tmp_path, training(), patch)
    assert process.wait_for(lambda: has_checkpoint(tmp_path)), process.log
    process.send(signal.SIGKILL)
    process.wait()
    assert run(tmp_path, [*training(), "--resume"], patch).process.exitcode == 0, process.log
    uninterrupted().result.check_same(Result.read(tmp_path))
    assert [folder.name for folder in saved_steps(tmp_path / "out")] == ["checkpoint-stage2-7", "checkpoint-stage2-8"]
