"""The chosen threshold is reported on other samples, is the best where that can be checked, and keeps its guarantee."""

import json
import math

import numpy as np
import pytest
from helpers import simulated, with_costs
from tiny import CLASSES, tiny_model

import run_glue_deebert
from deebert.data.tasks import TASKS
from deebert.evaluation import threshold_selection
from deebert.evaluation.all_exits import AllExits, dense_thresholds
from deebert.evaluation.risk_control import controlled_threshold, lost_to_early_exit
from deebert.evaluation.threshold_selection import (
    SelectionTarget,
    choose,
    fit_per_layer,
    fit_single,
    operating_point,
)
from deebert.modeling.checkpoints import load_tokenizer, save_model
from deebert.utils.cli import InputError

SST2 = TASKS["SST-2"]


def test_halves_are_disjoint_and_seeded(monkeypatch):
    monkeypatch.setattr(threshold_selection, "PER_LAYER_CANDIDATES", 3)  # for speed
    exits = simulated(101, 0)
    parts = []
    take = AllExits.take
    monkeypatch.setattr(AllExits, "take", lambda self, rows: (parts.append(rows), take(self, rows))[1])
    first = choose(SST2, exits, SelectionTarget(drop=0.02), seed=1)
    chosen, reported = parts[:2]
    assert sorted([*chosen, *reported]) == list(range(101))
    assert (first.chosen_on.samples, first.reported_on.samples) == (50, 51)
    assert choose(SST2, exits, SelectionTarget(drop=0.02), seed=1) == first
    assert choose(SST2, exits, SelectionTarget(drop=0.02), seed=2) != first


@pytest.mark.parametrize("unit", ["layers_saved", "cost_saved"])
@pytest.mark.parametrize(("aim", "limit"), [("drop", 0.0), ("drop", 0.02), ("saving", 0.3), ("saving", 0.6)])
def test_single_threshold_is_the_best_candidate(aim, limit, unit):
    exits, target = simulated(400, 1), SelectionTarget(**{aim: limit})
    exits = exits if unit == "layers_saved" else with_costs(exits)
    chosen = operating_point(SST2, exits, fit_single(SST2, exits, target))
    candidates = [operating_point(SST2, exits, threshold) for threshold in dense_thresholds(exits)]
    if aim == "drop":
        assert chosen.score_change >= -limit - 1e-9
        assert getattr(chosen, unit) == max(getattr(m, unit) for m in candidates if m.score_change >= -limit - 1e-9)
    else:
        assert getattr(chosen, unit) >= limit
        assert chosen.score == max(m.score for m in candidates if getattr(m, unit) >= limit)


def test_thresholds_per_layer_are_at_least_as_good_on_the_samples_they_fit():
    exits, target = simulated(400, 2), SelectionTarget(drop=0.01)
    single = operating_point(SST2, exits, fit_single(SST2, exits, target))
    per_layer = operating_point(SST2, exits, fit_per_layer(SST2, exits, target))
    assert per_layer.layers_saved >= single.layers_saved
    assert per_layer.score_change >= -0.01 - 1e-9


def test_over_confident_useless_off_ramp_needs_thresholds_per_layer():
    exits = simulated(2000, 3)
    exits.logits[:, 0] = (
        np.random.default_rng(0).permutation(exits.logits[:, 0]) * 20
    )  # sure, and no better than chance
    choice = choose(SST2, exits, SelectionTarget(drop=0.01))
    assert isinstance(choice.threshold, list)
    assert (exits.exit_layers(choice.threshold) == 1).mean() < 0.05
    assert choice.reported_on.layers_saved > 0.1
    without_it = choose(SST2, simulated(2000, 3), SelectionTarget(saving=0.6))
    assert isinstance(without_it.threshold, float)  # as good, and simpler


def test_off_ramp_that_costs_more_than_it_saves_is_switched_off():
    """By layers alone such an off-ramp does no harm: no sample is certain at the first one here.

    The last one costs 0.4 of a layer, and the layer after it less than that.
    """
    exits = simulated(600, 3)
    exits.logits[:, 0] = 0
    target = SelectionTarget(drop=0.02)
    choice = choose(SST2, with_costs(exits, off_ramp=0.4), target)
    assert [threshold > 0 for threshold in choice.threshold] == [False, True, True, False]
    point = choice.reported_on
    assert 0 < point.cost_saved < point.layers_saved  # the other off-ramps cost, and the last layer is a cheap one
    assert f"{100 * point.cost_saved:.1f} % of the cost and {100 * point.layers_saved:.1f} % of the layers saved" in (
        threshold_selection.report(choice, target)
    )


def test_saving_is_one_of_cost_where_the_cost_is_known():
    target = SelectionTarget(saving=0.4)
    for exits, unit in ((simulated(400, 1), "layers"), (with_costs(simulated(400, 1)), "cost")):
        choice = choose(SST2, exits, target)
        assert choice.holds == (getattr(choice.reported_on, f"{unit}_saved") >= 0.4)
        assert f"a saving of 40 % of the {unit}, " in threshold_selection.report(choice, target)
        assert (choice.reported_on.cost_saved is None) == (unit == "layers")


def test_report_says_whether_the_target_holds():
    exits = simulated(600, 4)
    for target in (SelectionTarget(drop=0.02), SelectionTarget(saving=0.5), SelectionTarget(risk=0.05)):
        choice = choose(SST2, exits, target)
        text = threshold_selection.report(choice, target)
        if target.drop is not None:
            assert choice.holds == (choice.reported_on.score_change >= -0.02)
        if target.saving is not None:
            assert choice.holds == (choice.reported_on.layers_saved >= 0.5)
        if target.risk is None:
            assert ("holds" if choice.holds else "is missed by") in text
        low, high = choice.score_interval
        assert low < choice.reported_on.score < high
        assert f"{100 * choice.reported_on.score:.2f} %" in text


def test_risk_control_keeps_its_guarantee():
    """Over many calibration sets the true risk exceeds `risk` no more often than 1 - confidence allows."""
    risk, confidence, runs = 0.05, 0.9, 200
    world = simulated(40_000, 5)
    rng = np.random.default_rng(0)
    violations, thresholds = 0, []
    for _ in range(runs):
        calibration = world.take(rng.integers(0, 40_000, 150))
        thresholds.append(controlled_threshold(calibration, risk, confidence))
        violations += lost_to_early_exit(world, thresholds[-1]).mean() > risk
    assert violations / runs <= (1 - confidence) + 3 * math.sqrt(confidence * (1 - confidence) / runs)
    assert np.median(thresholds) > 0.02  # and it does not keep its guarantee by never exiting
    naive = [  # choosing by the observed rate alone breaks the guarantee: the test above can fail
        max(
            t
            for t in np.linspace(0, math.log(2), 101)
            if lost_to_early_exit(world.take(rng.integers(0, 40_000, 150)), t).mean() <= risk
        )
        for _ in range(40)
    ]
    assert np.mean([lost_to_early_exit(world, t).mean() > risk for t in naive]) > 0.3


def test_risk_control_takes_the_largest_threshold_when_no_exit_loses_a_sample():
    exits = simulated(300, 6)
    same = AllExits(np.repeat(exits.logits[:, -1:], 5, axis=1), exits.labels)
    assert controlled_threshold(same, 0.02, 0.95) == pytest.approx(math.log(2))


def test_too_few_samples_for_a_guarantee_are_refused():
    with pytest.raises(InputError, match="at least 149 samples are needed"):
        controlled_threshold(simulated(148, 0), 0.02, 0.95)
    assert controlled_threshold(simulated(149, 0), 0.02, 0.95) >= 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "one of --target_drop"),
        ({"drop": 0.1, "risk": 0.1}, "one of --target_drop"),
        ({"drop": 1.0}, "--target_drop 1.0: give a share between 0 and 1"),
        ({"saving": -0.1}, "--target_saving -0.1"),
        ({"risk": 0.0}, "--risk 0.0"),
        ({"risk": 0.1, "confidence": 1.0}, "--confidence 1.0"),
    ],
)
def test_targets_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        SelectionTarget(**settings)


@pytest.mark.parametrize(
    ("exits", "message"),
    [
        (AllExits(np.zeros((9, 3, 2), np.float32), None), "without labels"),
        (AllExits(np.zeros((9, 3, 1), np.float32), np.zeros(9)), "regression"),
        (AllExits(np.zeros((3, 3, 2), np.float32), np.zeros(3)), "at least 4"),
    ],
)
def test_input_without_a_possible_choice_is_refused(exits, message):
    with pytest.raises(InputError, match=message):
        choose(SST2, exits, SelectionTarget(drop=0.01))


def test_choice_is_stored_in_the_model(tmp_path, tiny_data, tiny_checkpoints, monkeypatch, capsys):
    save_model(
        tiny_model("bert", highway_pooling="mean"), load_tokenizer(str(tiny_checkpoints["bert"])), tmp_path / "out"
    )
    argv = (
        f"run --model_type bert --task_name SST-2 --data_dir {tiny_data}/SST-2 --output_dir {tmp_path}/out --no_cuda "
    )
    argv += f"--model_name_or_path out --plot_data_dir {tmp_path}/res --do_eval --max_seq_length 32 --target_saving 0.5"
    monkeypatch.setattr("sys.argv", argv.split())
    run_glue_deebert.main()
    written = json.loads((tmp_path / "res/out/threshold.json").read_text())
    model = CLASSES["bert"][1].from_pretrained(tmp_path / "out")
    assert model.config.exit_threshold == written["threshold"]
    assert model.config.highway_pooling == "mean"
    assert written["target"]["saving"] == 0.5
    assert written["chosen_on"]["cost_saved"] >= 0.5
    assert "stored in" in capsys.readouterr().out
