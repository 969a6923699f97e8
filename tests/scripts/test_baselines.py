"""Early exit beside its baselines: each number against a plain loop, and that nothing is scored where it was chosen."""

from itertools import product

import baselines
import numpy as np
import pytest
from baselines import COSTS, STATIC, Candidates, Frontier, upper_hull
from support.helpers import simulated, with_costs

from deebert.data.tasks import TASKS
from deebert.evaluation.all_exits import AllExits, dense_thresholds, sweep
from deebert.evaluation.metrics import score

SST2 = TASKS["SST-2"]


def static(n: int, seed: int, right: float, operations: float) -> AllExits:
    """A model without exits that is right for this share of the samples, at this many operations for each of them."""
    labels = simulated(n, 0).labels
    wrong = np.random.default_rng(seed).random(n) > right
    logits = np.eye(2, dtype=np.float32)[np.where(wrong, 1 - labels, labels)][:, None]
    return AllExits(logits, labels, layer_operations=np.full((n, 1), operations), off_ramp_operations=np.empty((n, 0)))


def test_the_hull_is_the_best_mixture_of_two_points():
    cost, score = np.random.default_rng(0).random((2, 30))
    corners = upper_hull(cost, score)
    for at in np.linspace(cost.min(), cost.max(), 50):
        mixtures = [
            np.interp(at, sorted((cost[i], cost[j])), score[sorted((i, j), key=lambda k: cost[k])])
            for i, j in product(range(30), repeat=2)
            if min(cost[i], cost[j]) <= at <= max(cost[i], cost[j])
        ]
        reached = score[cost <= at].max()  # the mean cost may be below what is allowed
        assert np.interp(at, cost[corners], score[corners]) == pytest.approx(max(reached, *mixtures))
    assert upper_hull(np.array([1.0, 1.0, 0.5]), np.array([0.2, 0.3, 0.3])) == [2]


@pytest.mark.parametrize("task", ["SST-2", "MRPC", "CoLA", "MNLI"])
def test_resampled_scores_are_the_metrics_of_drawn_samples(task):
    task, rng = TASKS[task], np.random.default_rng(1)
    predicted, labels = rng.integers(0, task.num_labels, (3, 40)), rng.integers(0, task.num_labels, 40)
    counts = rng.multinomial(40, np.full(40, 1 / 40), 5).astype(float)
    for r, p in product(range(5), range(3)):
        rows = np.repeat(np.arange(40), counts[r].astype(int))
        expected = score(task, task.primary_metric, labels[rows], predicted[p][rows])
        assert baselines.resampled_scores(task, predicted, labels, counts)[r, p] == pytest.approx(expected)


def test_candidates_are_what_a_sweep_says():
    exits = with_costs(simulated(200, 2))
    thresholds = dense_thresholds(exits, baselines.THRESHOLDS)
    early, chance = baselines.early_exit(exits), baselines.random_exit(exits)
    for i, row in enumerate(sweep(SST2, exits, thresholds)):
        assert (early.predictions[i] == exits.labels).mean() == pytest.approx(row.score)
        assert early.costs()[i] == pytest.approx(row.cost)
    assert chance.costs().mean() == pytest.approx(early.costs().mean(), abs=0.01)
    own = baselines.own_exits(exits)
    np.testing.assert_array_equal(own.predictions, exits.logits.argmax(-1).T)
    layers, ramps = exits.layer_operations, exits.off_ramp_operations
    assert own.costs()[1] == pytest.approx((layers[:, :2].sum() + ramps[:, 1].sum()) / layers.sum())
    assert own.costs()[-1] == 1


def test_what_is_chosen_by_chance_scores_like_chance():
    """Of 300 models that guess, the best on one half is as good as any on the other half."""
    labels = simulated(400, 0).labels
    guesses = np.random.default_rng(4).integers(0, 2, (300, 400))
    operations, full = np.full((300, 400), 0.1), np.ones(400)
    assert (guesses == labels).mean(1).max() > 0.56
    lines = Frontier(SST2, {"guesses": [Candidates(guesses, operations, full)]}, labels, resamples=0)
    assert lines.score("guesses", 50) == pytest.approx(0.5, abs=0.05)


def test_gains_are_paired():
    early = {"mine": [with_costs(simulated(600, 0))] * 2, "same": [with_costs(simulated(600, 0))] * 2}
    full = early["mine"][0].layer_operations.sum(1).mean()
    models = {f"static {k}": [static(600, seed, 0.5 + 0.05 * k, k / 5 * full) for seed in (1, 2)] for k in (1, 3)}
    lines = baselines.frontier(SST2, early, models)
    assert lines.gain("same", "mine", 50) == (0, (0, 0))
    gain, (low, high) = lines.gain("mine", STATIC, 50)
    assert low < gain < high
    assert lines.score("mine", 50) - lines.score(STATIC, 50) == pytest.approx(gain)
    assert np.isnan(lines.curve("mine")[COSTS < 0.19]).all()  # no model is cheaper than the static one of one layer
    header, _, *rows = baselines.frontier_table(lines).splitlines()
    assert header.count("over static models") == header.count("over mine") == 1
    assert [row.split("|")[1].strip() for row in rows] == ["mine", "same", STATIC]
    assert rows[0].split("|")[5].strip() == f"{100 * gain:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
    alone = baselines.frontier_table(baselines.frontier(SST2, early, {}))
    assert STATIC not in alone
    points = baselines.static_points(SST2, models, early["mine"][0])
    assert points["static 1"][0] == pytest.approx(0.2, abs=0.01)
    assert "| static 3 | 6" in baselines.static_table(points)


def test_one_seed_has_no_interval():
    early = {"mine": [with_costs(simulated(100, 0))], "other": [with_costs(simulated(100, 1))]}
    lines = baselines.frontier(SST2, early, {})
    assert lines.gain("other", "mine", 50)[1] is None
    assert "(" not in baselines.frontier_table(lines)
    assert "no intervals" in baselines.about_intervals(100, seeds=1)
    assert "Student's t over the 2 seeds" in baselines.about_intervals(100, seeds=2)


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("spread", [1, 3])
def test_intervals_hold_for_few_seeds(seeds, spread):
    """The mean of new seeds and new texts is 0; the spread of seeds is `spread` times that of the texts."""
    rng, trials, covered = np.random.default_rng(0), 2000, 0
    for _ in range(trials):
        of_seeds, of_texts = rng.normal(0, spread, (seeds, 1)), rng.normal(0, 1)
        resampled = rng.normal(0, 1, 200)  # what a bootstrap of these texts adds, the same for all seeds
        low, high = baselines.interval(of_seeds + of_texts + np.concatenate([[0], resampled]))
        covered += low <= 0 <= high
    assert 0.94 < covered / trials < 0.995  # 0.95, less the error of the simulation


def test_rivals_are_scored_at_half_the_cost():
    header, _, line = baselines.rivals_table(SST2, {"mine": [with_costs(simulated(150, 5))]}).splitlines()
    assert [cell.strip() for cell in header.split("|")[2:5]] == [
        f"{way} at 50 %" for way in ("early exit", "random exits", "one exit for all")
    ]
    early, chance, alone = (float(cell) for cell in line.split("|")[2:5])
    assert min(early, alone) > chance
