"""Progress where there is no terminal: how often a line is printed, and what it says."""

import pytest
import tqdm.std

from deebert.training.stage import ProgressLines


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test moves."""
    now = [1000.0]
    monkeypatch.setattr(tqdm.std, "time", lambda: now[0])
    return now


def steps(clock, count: int, done: int = 0) -> None:
    """A training of `count` steps of 8 samples, a second each, of which some were done before."""
    with ProgressLines(total=8 * count, initial=8 * done, desc="stage 1", unit=" samples", leave=False) as bar:
        for step in range(done + 1, count + 1):
            clock[0] += 1
            bar.set_postfix(loss="0.5000", step=step, refresh=False)
            bar.update(8)


def test_a_line_every_half_minute_then_every_five_per_cent(clock, capsys):
    steps(clock, 4000)
    printed, errors = capsys.readouterr()
    lines = printed.splitlines()
    samples = [int(line.split()[2].replace(",", "")) for line in lines]
    assert samples[:10] == list(range(240, 2401, 240))
    assert samples[10:] == list(range(4000, 32001, 1600))
    assert lines[0] == ("stage 1: 240 of 32,000 samples (1 %), loss=0.5000, step=30, 8.0 samples/s, 1:06:10 left")
    assert "8.0 samples/s, 01:40 left" in lines[-1]
    assert errors == ""


def test_a_short_training_has_none(clock, capsys):
    steps(clock, 20)
    assert capsys.readouterr() == ("", "")


def test_a_resumed_training_knows_its_own_speed(clock, capsys):
    steps(clock, 100, done=60)
    expected = "stage 1: 720 of 800 samples (90 %), loss=0.5000, step=90, 8.0 samples/s, 00:10 left\n"
    assert capsys.readouterr().out == expected
