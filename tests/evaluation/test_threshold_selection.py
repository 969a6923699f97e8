"""The chosen threshold is reported on other samples, is the best where that can be checked, and keeps its guarantee."""

import json
import math

import numpy as np
import pytest
from support.helpers import simulated, with_costs
from support.tiny import CLASSES, tiny_model

import run_glue_deebert
from deebert.data.tasks import TASKS
from deebert.evaluation import threshold_selection
from deebert.evaluation.all_exits import AllExits
from deebert.evaluation.risk_control import PairedBootstrap, fixed_sequence, paired_p_value, risk_p_value
from deebert.evaluation.threshold_selection import (
    SelectionTarget,
    candidate_thresholds,
    choose,
    operating_point,
    shown_threshold,
)
from deebert.modeling.checkpoints import load_tokenizer, save_model
from deebert.modeling.exit_rules import NO_EXIT
from deebert.utils.errors import InputError

SST2 = TASKS["SST-2"]


def broken_rate(world: AllExits, task, target: SelectionTarget, samples: int, runs: int) -> tuple[float, float]:
    """Over many dev sets drawn from a world: the share of chosen thresholds that break the target, the mean saving."""
    rng, points = np.random.default_rng(0), []
    for seed in range(runs):
        threshold = shown_threshold(task, world.take(rng.integers(0, len(world.labels), samples)), target, seed)
        if threshold is not None:
            points.append(operating_point(task, world, threshold))
    if target.drop is not None:
        broken = [point.score_change < -target.drop for point in points]
    else:
        broken = [point.lost > target.risk * point.samples for point in points]
    assert len(points) > runs / 2  # no target is kept by never exiting
    return float(np.mean(broken)), float(np.mean([point.cost_saved for point in points]))


@pytest.mark.parametrize(
    ("task", "target"),
    [
        (SST2, SelectionTarget(drop=0.03)),
        (SST2, SelectionTarget(risk=0.05)),
        (TASKS["MRPC"], SelectionTarget(drop=0.04)),
    ],
)
def test_what_is_chosen_is_kept(task, target, monkeypatch):
    """A threshold breaks its target no more often than 1 - confidence allows, and still saves."""
    monkeypatch.setattr(threshold_selection, "POINTS", 45)  # for speed
    runs = 50
    broken, saving = broken_rate(with_costs(simulated(5000, 5)), task, target, samples=250, runs=runs)
    allowed = 1 - target.confidence
    assert broken <= allowed + 3 * math.sqrt(allowed * (1 - allowed) / runs)
    assert saving > 0.05


def test_choosing_by_the_observed_drop_would_break_the_target():
    """The test above can fail."""
    world, target, rng = simulated(5000, 5), SelectionTarget(drop=0.03), np.random.default_rng(0)
    thresholds = candidate_thresholds(world.exit_rule, world.num_layers)[::4]
    broken = []
    for _ in range(30):
        dev = world.take(rng.integers(0, 5000, 250))
        naive = max(x for x in thresholds if operating_point(SST2, dev, x).score_change >= -target.drop)
        broken.append(operating_point(SST2, world, naive).score_change < -target.drop)
    assert np.mean(broken) > 0.2


def test_p_value_of_a_risk_is_exact():
    """0.95^60: no loss among 60 samples is rare enough for a risk of 5 %, and 59 are the fewest; a loss counts."""
    assert risk_p_value(0, 60, 0.05) == pytest.approx(0.95**60)
    assert risk_p_value(0, 58, 0.05) > 0.05 > risk_p_value(0, 59, 0.05)
    assert risk_p_value(1, 60, 0.05) == pytest.approx(0.95**60 + 60 * 0.05 * 0.95**59)


def test_p_value_of_a_drop_covers_the_worst_share_of_changes():
    """Simulated at the limit: whatever the share of changed samples, small p-values are as rare as they say."""
    rng, samples, drop = np.random.default_rng(0), 400, 0.02
    for share in (0.02, 0.04, 0.15):
        lost, gained, _ = rng.multinomial(samples, [(share + drop) / 2, (share - drop) / 2, 1 - share], 500).T
        p_values = [paired_p_value(int(a), int(b), samples, drop) for a, b in zip(lost, gained, strict=True)]
        assert np.mean(np.array(p_values) <= 0.1) <= 0.1 + 0.02  # simulated
    assert paired_p_value(0, 0, samples, drop) < 0.1 < paired_p_value(4, 0, samples, drop)
    assert paired_p_value(2, 20, samples, drop) < paired_p_value(2, 2, samples, drop)
    assert paired_p_value(0, samples, samples, drop) < 0.1


def test_bootstrap_is_not_sure_of_what_it_has_not_seen():
    """No prediction changes here; on unseen samples some might, and few samples cannot exclude it."""
    for samples, certain in ((50, False), (800, True)):
        exits = simulated(samples, 6)
        exits.logits[:, :-1] = exits.logits[:, -1:]
        p_value = PairedBootstrap(TASKS["MRPC"], exits, seed=0).p_value(0.3, 0.01)
        assert (p_value < 0.1) == certain


def test_regression_has_a_drop_too():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(500, 1))
    outputs = values + rng.normal(scale=[1.0, 0.2, 0.02, 0.02], size=(500, 4))
    exits = AllExits(outputs[:, :, None].astype(np.float32), values[:, 0], rule="patience", tolerance=0.3)
    choice = choose(TASKS["STS-B"], exits, SelectionTarget(drop=0.05))
    assert choice.threshold == 2
    assert choice.point.changed is None
    assert "exit early" in threshold_selection.report(choice, SelectionTarget(drop=0.05), 500)


def test_sequence_ends_before_the_first_threshold_that_is_not_shown():
    p_values = {1.0: 0.0, 2.0: 0.04, 3.0: 0.2, 4.0: 0.0}
    assert fixed_sequence(p_values, p_values.get, 0.05) == 2.0
    assert fixed_sequence([3.0, 1.0], p_values.get, 0.05) is None
    assert fixed_sequence([1.0], lambda _: math.nan, 0.05) is None


def test_off_ramps_that_agree_give_the_largest_threshold():
    exits = simulated(600, 6)
    same = AllExits(np.repeat(exits.logits[:, -1:], 5, axis=1), exits.labels)
    for target in (SelectionTarget(risk=0.02), SelectionTarget(drop=0.01)):
        choice = choose(SST2, same, target)
        assert choice.threshold == same.exit_rule.exit_all_threshold()
        assert choice.point.exits == {1: 600, 2: 0, 3: 0, 4: 0, 5: 0}
        assert "of the 600 texts 600 exit early; 0 predictions change, 0 for the worse" in threshold_selection.report(
            choice, target, 600
        )


def test_the_tested_threshold_is_the_chosen_one():
    """Also where no dev text exits after an off-ramp: unseen texts may."""
    exits = with_costs(simulated(600, 3))
    exits.logits[:, 0] = 0
    target = SelectionTarget(drop=0.05)
    choice = choose(SST2, exits, target)
    assert choice.threshold == shown_threshold(SST2, exits, target, seed=42)
    assert choice.point.exits[1] == 0 < choice.point.exits[2]


def test_report_counts_texts():
    exits, target = with_costs(simulated(600, 4)), SelectionTarget(drop=0.05)
    choice = choose(SST2, exits, target)
    early = exits.logits_at(exits.exit_layers(choice.threshold)).argmax(-1)
    full = exits.logits[:, -1].argmax(-1)
    lost, gained = (
        ((early != exits.labels) & (full == exits.labels)).sum(),
        ((early == exits.labels) & (full != early)).sum(),
    )
    text = threshold_selection.report(choice, target, 600)
    assert (choice.point.changed, choice.point.lost, choice.point.gained) == ((early != full).sum(), lost, gained)
    assert f"predictions change, {lost} for the worse and {gained} for the better" in text
    assert "with 90 % confidence the score of unseen texts falls by at most 5 points" in text
    assert f"{100 * choice.point.score:.2f} %" in text
    assert f"{100 * choice.point.cost_saved:.1f} % of the cost and" in text


def test_one_point_is_no_points():
    for drop, words in ((0.01, "by at most 1 point"), (0.02, "by at most 2 points")):
        assert threshold_selection.describe_target(SelectionTarget(drop=drop)).endswith(words)


@pytest.mark.parametrize(
    ("target", "confidence"), [(SelectionTarget(drop=0.02), "90 %"), (SelectionTarget(risk=0.02), "95 %")]
)
def test_too_few_samples_choose_nothing(target, confidence):
    few = choose(SST2, simulated(60, 0), target)
    assert few.threshold is None
    report = threshold_selection.report(few, target, 60)
    assert f"60 dev samples do not show with {confidence} confidence that" in report


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "for a risk or for a drop of the score: give one"),
        ({"drop": 0.1, "risk": 0.1}, "give one of them"),
        ({"drop": 1.0}, "drop 1.0: give a share between 0 and 1"),
        ({"risk": 0.0}, "risk 0.0"),
        ({"risk": 0.1, "confidence": 1.0}, "confidence 1.0"),
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
    argv += f"--model_name_or_path out --plot_data_dir {tmp_path}/res --do_eval --max_seq_length 32 --risk 0.9"
    monkeypatch.setattr("sys.argv", argv.split())
    run_glue_deebert.main()
    written = json.loads((tmp_path / "res/out/threshold.json").read_text())
    model = CLASSES["bert"][1].from_pretrained(tmp_path / "out")
    assert model.config.exit_threshold == written["threshold"]
    assert model.config.highway_pooling == "mean"
    assert written["target"]["risk"] == 0.9
    assert written["point"]["cost_saved"] > 0
    assert min(written["latency"]["early_ms"], written["latency"]["full_ms"]) > 0
    assert "the median time of a text is" in (text := capsys.readouterr().out)
    assert "stored in" in text

    other_rule = argv.replace("--risk 0.9", "--target_drop 0.01 --exit_rule confidence")
    monkeypatch.setattr("sys.argv", other_rule.split())
    before = (tmp_path / "out/config.json").read_text()
    run_glue_deebert.main()
    assert (tmp_path / "out/config.json").read_text() == before
    assert f"keeps its rule entropy and its threshold {written['threshold']}" in capsys.readouterr().out

    monkeypatch.setattr("sys.argv", [*argv.replace("--risk 0.9", "--target_drop 0.01").split()])
    run_glue_deebert.main()
    assert json.loads((tmp_path / "out/config.json").read_text())["exit_threshold"] == NO_EXIT
    assert json.loads((tmp_path / "res/out/threshold.json").read_text())["threshold"] is None
    text = capsys.readouterr().out
    assert "no threshold is chosen: 20 dev samples do not show" in text
    assert f"the threshold {written['threshold']}; the model does not exit" in text
