"""Progress where there is no terminal: how often a line is printed, and what it says."""

import pytest

from deebert.training import progress
from deebert.training.progress import ProgressLines


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test moves."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_every_half_minute_then_every_five_per_cent(clock, capsys):
    progress = ProgressLines(1, 4000)
    for step in range(1, 4001):  # a step takes a second
        clock[0] += 1
        progress.update(8)
        progress.set_postfix(loss="0.5000", step=step)
    lines = capsys.readouterr().out.splitlines()
    steps = [int(line.split()[3].replace(",", "")) for line in lines]
    assert steps[:10] == list(range(30, 301, 30))
    assert steps[10:] == list(range(500, 4001, 200))
    assert lines[0] == "stage 1: step 30 of 4,000 (1%), loss 0.5000, 8.0 samples/s, 1:06:10 left"
    assert lines[-1].endswith("8.0 samples/s, 01:40 left")


def test_a_short_training_has_none(clock, capsys):
    progress = ProgressLines(2, 20)
    for step in range(1, 21):
        clock[0] += 1
        progress.update(8)
        progress.set_postfix(loss="0.5000", step=step)
    assert capsys.readouterr().out == ""


def test_a_resumed_training_knows_its_own_speed(clock, capsys):
    progress = ProgressLines(1, 100, done=60)
    clock[0] += 40
    progress.update(160)
    progress.set_postfix(loss="0.2500", step=80)
    expected = "stage 1: step 80 of 100 (80%), loss 0.2500, 4.0 samples/s, 00:40 left\n"
    assert capsys.readouterr().out == expected
