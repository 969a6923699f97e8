"""Temperatures correct over-confident exits and change no prediction."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from deebert.evaluation.all_exits import AllExits
from deebert.evaluation.calibration import LIMITS, calibrated, fit_temperatures, negative_log_likelihood, report
from deebert.utils.cli import InputError


def over_confident(n: int, factors=(3.0, 0.4, 1.0)) -> AllExits:
    """Labels drawn from the probabilities of logits that are then multiplied: the true temperatures are the factors."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, n)
    logits = []
    for factor in factors:
        z = rng.normal(size=(n, 3)) + 2 * np.eye(3)[labels]  # calibrated: log-odds of equal Gaussians, times their mean
        logits.append(factor * 2 * z)
    return AllExits(np.stack(logits, axis=1).astype(np.float32), labels)


def test_true_temperatures_are_recovered():
    exits = over_confident(20_000)
    temperatures = fit_temperatures(exits)
    np.testing.assert_allclose(temperatures, [3.0, 0.4, 1.0], rtol=0.05)
    after = calibrated(exits, temperatures)
    np.testing.assert_allclose(after.logits, exits.logits / np.array(temperatures)[:, None], rtol=1e-5)
    assert (after.logits.argmax(-1) == exits.logits.argmax(-1)).all()
    assert report(exits, after).startswith("negative log-likelihood of the exits on 20000 other samples: ")


def test_fitted_temperature_is_the_best():
    exits = over_confident(300)
    for layer, temperature in enumerate(fit_temperatures(exits)):
        logits = torch.from_numpy(exits.logits[:, layer]).double()
        labels = torch.from_numpy(exits.labels)
        best = functional.cross_entropy(logits / temperature, labels).item()
        assert negative_log_likelihood(exits.logits[:, layer], exits.labels, temperature) == pytest.approx(best)
        for other in np.geomspace(0.06, 19, 60):
            assert functional.cross_entropy(logits / other, labels).item() >= best - 1e-6


def test_exit_that_is_always_right_keeps_a_finite_temperature():
    labels = np.array([0, 1, 1, 0])
    exits = AllExits((np.eye(2)[labels][:, None] * 5).repeat(2, axis=1).astype(np.float32), labels)
    assert all(LIMITS[0] <= t <= 1 for t in fit_temperatures(exits))


def test_regression_and_unlabelled_samples_are_refused():
    with pytest.raises(InputError, match="regression"):
        fit_temperatures(AllExits(np.zeros((4, 3, 1), np.float32), np.zeros(4)))
    with pytest.raises(InputError, match="labels"):
        fit_temperatures(AllExits(np.zeros((4, 3, 2), np.float32), None))
