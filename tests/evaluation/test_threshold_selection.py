"""The chosen threshold is reported on other samples, is the best where that can be checked, and keeps its guarantee."""

import json
import math
import re
from bisect import bisect_right
from dataclasses import replace

import numpy as np
import pytest
from support.helpers import simulated, with_costs
from support.tiny import CLASSES, tiny_model

import run_glue_deebert
from deebert.data.batching import Features
from deebert.data.tasks import TASKS
from deebert.evaluation import threshold_selection, timing
from deebert.evaluation.all_exits import AllExits, sweep
from deebert.evaluation.metrics import changes
from deebert.evaluation.risk_control import drop_p_value, fewest_samples, fixed_sequence, paired_p_value, risk_p_value
from deebert.evaluation.threshold_selection import (
    MIN_CONFIDENCES,
    SelectionTarget,
    answered,
    better_exit,
    candidate_thresholds,
    changed_texts,
    choose,
    choose_confidence,
    shown_threshold,
    single_exit,
    verdict,
)
from deebert.modeling.checkpoints import load_tokenizer, save_model
from deebert.modeling.exit_rules import NO_EXIT
from deebert.utils.errors import InputError

SST2 = TASKS["SST-2"]


def breaks(world: AllExits, task, target: SelectionTarget, threshold: float) -> bool:
    """Whether a threshold breaks the target in the population that dev sets are drawn from."""
    if target.drop is not None:
        return sweep(task, world, [threshold])[0].score_change < -target.drop
    return changed_texts(world, world.exit_layers(threshold))[1] > target.risk * len(world.labels)


def broken_rate(world: AllExits, task, target: SelectionTarget, samples: int, runs: int) -> tuple[float, float]:
    """Over many dev sets drawn from a world: the share of chosen thresholds that break the target, the mean saving."""
    rng, chosen = np.random.default_rng(0), []
    for seed in range(runs):
        threshold = shown_threshold(task, world.take(rng.integers(0, len(world.labels), samples)), target, seed)
        if threshold is not None:
            chosen.append(threshold)
    assert len(chosen) > runs / 2  # no target is kept by never exiting
    saved = [row.cost_saved for row in sweep(task, world, chosen)]
    return float(np.mean([breaks(world, task, target, x) for x in chosen])), float(np.mean(saved))


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
        naive = max(row.threshold for row in sweep(SST2, dev, thresholds) if row.score_change >= -target.drop)
        broken.append(breaks(world, SST2, target, naive))
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


def test_values_are_rounded_at_random_and_keep_their_mean():
    """Half a loss of each of many samples is half as many losses; what was not seen is not excluded by few samples."""
    values = np.full(2000, -0.01)
    assert drop_p_value(values, 0.02, 0.005, 0.1, seed=0) == 1.0
    assert drop_p_value(values, 0.02, 0.012, 0.1, seed=0) < 0.1
    for samples, certain in ((50, False), (800, True)):
        assert (drop_p_value(np.zeros(samples), 1.2, 0.01, 0.1, seed=0) < 0.1) == certain
    exact = drop_p_value(np.array([-1.0] * 3 + [1.0] + [0.0] * 396), 1.0, 0.02, 0.1, seed=0)
    assert exact == paired_p_value(3, 1, 400, 0.02)  # nothing is random


def test_the_fewest_samples_are_those_that_do_without_a_loss():
    needed = fewest_samples(lambda samples: risk_p_value(0, samples, 0.05), 0.05)
    assert risk_p_value(0, needed, 0.05) <= 0.05 < risk_p_value(0, needed - 1, 0.05)


def test_regression_has_a_drop_too():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(2000, 1))
    outputs = values + rng.normal(scale=[1.0, 0.2, 0.02, 0.02], size=(2000, 4))
    exits = AllExits(outputs[:, :, None].astype(np.float32), values[:, 0], rule="patience", tolerance=0.3)
    choice = choose(TASKS["STS-B"], exits, SelectionTarget(drop=0.05))
    assert choice.threshold == 2
    assert threshold_selection.describe(TASKS["STS-B"], exits, choice.point).endswith(" exit early")


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
        assert choice.threshold == round(same.exit_rule.exit_all_threshold(), 4)
        assert choice.point.exits == {1: 600, 2: 0, 3: 0, 4: 0, 5: 0}
        text = threshold_selection.describe(SST2, same, choice.point)
        assert "of 600 texts 600 exit early, and 0 predictions change, 0 for the worse" in text


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
    report = threshold_selection.report(choice, target, 600)
    assert report.endswith("; with 90 % confidence the score of unseen texts falls by at most 5 points")
    assert float(re.match(r"chosen threshold: (\S+) nats", report)[1]) == choice.threshold
    changes = changed_texts(exits, exits.exit_layers(choice.threshold))
    assert changes == ((early != full).sum(), lost, gained)
    text = threshold_selection.describe(SST2, exits, choice.point)
    assert f"predictions change, {lost} for the worse and {gained} for the better" in text
    assert "wrong with both" not in text  # of two labels
    assert f"{100 * choice.point.score:.2f} %" in text
    assert f"{100 * choice.point.cost_saved:.1f} % of the cost and" in text


def test_one_point_is_no_points():
    for drop, words in ((0.01, "by at most 1 point"), (0.02, "by at most 2 points")):
        assert threshold_selection.describe_target(SelectionTarget(drop=drop)).endswith(words)


@pytest.mark.parametrize(
    ("target", "samples", "needed"), [(SelectionTarget(drop=0.02), 100, 160), (SelectionTarget(risk=0.02), 100, 149)]
)
def test_too_few_samples_say_how_many_would_do(target, samples, needed):
    exits = simulated(samples, 0)
    exits.logits[:, :-1] = exits.logits[:, -1:]  # nothing changes
    few = choose(SST2, exits, target)
    report = threshold_selection.report(few, target, samples)
    assert f"{samples} dev texts are too few, at least {needed} are needed" in report
    enough = exits.take(np.arange(needed) % samples)
    assert choose(SST2, enough, target).threshold == round(exits.exit_rule.exit_all_threshold(), 4)
    assert choose(SST2, exits.take(np.arange(needed - 1) % samples), target).threshold is None


@pytest.mark.parametrize("name", ["f1", "recall", "mcc", "f1_macro"])
def test_a_rare_class_says_how_many_of_its_texts_would_do(name):
    """None, or one, among many dev texts is no evidence, though no prediction changes."""
    target, task = SelectionTarget(drop=0.01), replace(SST2, metrics=(name,))

    def refusal(labels: np.ndarray) -> str:
        exits = AllExits(np.repeat(9 * np.eye(2)[labels][:, None], 6, axis=1).astype(np.float32), labels)
        choice = choose(task, exits, target)
        assert (choice.threshold is None) == bool(choice.refusal)
        return choice.refusal

    for positives in (0, 1, 20):
        labels = (np.arange(1000) < positives).astype(int)
        fix = "give more, or weaken the target"
        text = rf"{positives} dev texts of the class '1' are too few, at least (\d+) are needed; {fix}"
        needed = int(re.fullmatch(text, refusal(labels))[1])
        assert 60 < needed < 350
    more = np.repeat(labels, needed)  # needed times as many; a 20th part of them
    assert refusal(more[::20]) == ""
    assert refusal(more[::21]).startswith(f"{int(more[::21].sum())} dev texts of the class '1' are too few")


def test_a_promise_holds_where_each_off_ramp_is_used_by_rare_texts_only():
    """24 layers. At each off-ramp few texts exit, and are right; at the last one they would be wrong.

    A threshold whose unused off-ramps were switched off after the test broke the promise in half of the dev sets.
    """
    rng, layers, texts, target = np.random.default_rng(0), 24, 200, SelectionTarget(risk=0.05)
    size = 20_000
    labels = rng.integers(0, 2, size)
    predicted, sure = np.repeat(labels[:, None], layers, axis=1), np.full((size, layers), 0.05)
    group = rng.integers(0, texts, size)  # text i of 200 exits at off-ramp i, where there is one
    exits_at = np.where(group < layers - 2, group, layers - 2)
    sure[np.arange(size), exits_at] = sure[:, layers - 2] = 9
    predicted[:, layers - 2] = np.where(group < layers - 2, 1 - labels, labels)
    lost = rng.random(size) < 0.045
    predicted[lost, exits_at[lost]] = 1 - labels[lost]
    world = AllExits((sure[..., None] * np.eye(2)[predicted]).astype(np.float32), labels)
    choices = [choose(SST2, world.take(rng.integers(0, size, texts)), target).threshold for _ in range(60)]
    broken = [breaks(world, SST2, target, threshold) for threshold in choices if threshold is not None]
    assert broken
    assert sum(broken) <= 0.15 * len(choices)  # 5 %, and chance


def test_a_wrong_label_in_place_of_another_wrong_one_is_counted():
    labels, early, full = np.array([0, 0, 1, 2]), np.array([1, 0, 1, 2]), np.array([2, 1, 1, 2])
    exits = AllExits((9 * np.eye(3)[np.stack([early, full], axis=1)]).astype(np.float32), labels)
    (row,) = sweep(TASKS["MNLI"], exits, [0.5])
    text = threshold_selection.describe(TASKS["MNLI"], exits, row)
    assert text.endswith("2 predictions change, 0 for the worse and 1 for the better; the other 1 are wrong with both")


@pytest.mark.parametrize("name", ["f1", "mcc"])
def test_a_promise_about_a_rare_class_holds_at_its_limit(name):
    """3 % of the texts have the class, and the score falls by just more than the limit at every threshold."""
    rng, task, target, size = (
        np.random.default_rng(1),
        replace(SST2, metrics=(name,)),
        SelectionTarget(drop=0.05),
        100_000,
    )
    labels = (np.arange(size) < 0.03 * size).astype(int)
    full = np.where(rng.random(size) < np.where(labels == 1, 0.1, 0.003), 1 - labels, labels)
    rights = np.flatnonzero((labels == 1) & (full == 1))

    def without(lost: int) -> np.ndarray:
        early = full.copy()
        early[rights[:lost]] = 0
        return early

    def fall(lost: int) -> float:
        return -changes(task, labels, full, without(lost)).values.mean()

    early = without(bisect_right(range(len(rights)), target.drop, key=fall))
    world = AllExits((9 * np.eye(2)[np.stack([early, early, full], axis=1)]).astype(np.float32), labels)
    for texts in (50, 1000):
        rows = (rng.integers(0, size, texts) for _ in range(150))
        broken = [choose(task, world.take(each), target).threshold is not None for each in rows]
        assert np.mean(broken) <= 0.1


def test_no_promise_is_made_against_a_final_classifier_that_is_worse_than_an_off_ramp():
    exits = simulated(600, 3)
    exits.logits[:, [2, -1]] = exits.logits[:, [-1, 2]]
    for target in (SelectionTarget(drop=0.05), SelectionTarget(risk=0.05)):
        choice = choose(SST2, exits, target)
        assert choice.threshold is None
        assert "the off-ramp after layer 3 scores more than the final classifier" in choice.refusal
    rng = np.random.default_rng(0)
    alike = AllExits(rng.normal(size=(300, 25, 2)).astype(np.float32), rng.integers(0, 2, 300))
    assert better_exit(SST2, alike) is None  # the best of 24 that guess is better by chance


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "for a risk or for a drop of the score: give one"),
        ({"drop": 0.1, "risk": 0.1}, "give one of them"),
        ({"drop": 1.0}, "drop 1.0: give a number above 0 up to 0.999"),
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
    assert written["point"]["cost"] < 1
    assert " ms (median " in (text := capsys.readouterr().out)
    assert "stored in" in text
    assert f"chosen threshold: {model.config.exit_threshold:g} nats" in text
    assert float(f"{model.config.exit_threshold:g}") == model.config.exit_threshold
    assert re.search(r"\nearly exit at \S+ saves \d+ % of the cost and -?\d+ % of the time for \S+ points; ", text)

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
    assert re.search(r"20 dev texts are too few, at least 3\d\d are needed", text)
    assert f"the threshold {written['threshold']}; the model does not exit" in text


def test_the_verdict_compares_with_the_best_single_exit():
    """An exit that is no worse and cheaper; where there is none, the one that scores most."""
    labels = np.arange(100) % 2
    margins = np.where(np.arange(100) < 60, 9, 0.1)  # after layer 2, 60 texts are certain
    logits = 9 * np.repeat(np.eye(2)[labels][:, None], 4, axis=1)
    logits[:, 1] = margins[:, None] * np.eye(2)[labels]
    logits[:, 0] = 0.1 * np.eye(2)[np.where(np.arange(100) < 30, labels, 1 - labels)]
    exits = AllExits(logits.astype(np.float32), labels)
    assert single_exit(SST2, exits, 1.0) == (2, 1.0, 0.5)
    assert single_exit(SST2, exits, 0.2) == (1, 0.3, 0.75)
    assert verdict(SST2, exits, sweep(SST2, exits, [0.3])[0], 0.25) == (
        "early exit at 0.3 saves 40 % of the cost and 25 % of the time for +0.0 points; "
        "the best single exit, layer 2, would save 50 % at +0.0"
    )
    exits.logits[60:, 1:3] = exits.logits[60:, 1:3, ::-1]  # now only the full model is right about all texts
    assert single_exit(SST2, exits, 1.0)[:2] == (2, 0.6)


def sure_texts(n: int, wrong, rng: np.random.Generator) -> AllExits:
    """Texts of which a model is as sure as U(0.5, 1). wrong: the share of errors at each confidence."""
    sure = rng.uniform(0.5, 1, n)
    logits = np.stack([np.log(sure / (1 - sure)), np.zeros(n)], axis=-1).astype(np.float32)
    return AllExits(np.stack([logits, logits], axis=1), (rng.random(n) < wrong(sure)).astype(int))


def test_the_accuracy_of_answered_texts_is_shown():
    exits = sure_texts(2000, lambda sure: np.where(sure > 0.7, 0.01, 0.4), np.random.default_rng(0))
    chosen = choose_confidence(exits, NO_EXIT, 0.95)
    texts, right = answered(exits, NO_EXIT, chosen)
    sure = 1 / (1 + np.exp(-exits.logits[:, -1, 0].astype(float)))
    assert texts == (sure >= chosen).sum()
    assert right == ((sure >= chosen) & (exits.labels == 0)).sum()
    assert 0.6 < chosen < 0.7  # 70 % of the errors that are allowed are there to be used
    lower = MIN_CONFIDENCES[MIN_CONFIDENCES.index(chosen) + 1]
    texts, right = answered(exits, NO_EXIT, lower)
    assert risk_p_value(texts - right, texts, 0.05) > 0.05  # the next one is not shown
    assert choose_confidence(exits.take(np.arange(30)), NO_EXIT, 0.95) is None  # too few
    perfect = replace(exits, labels=np.zeros(2000, int))
    assert choose_confidence(perfect, NO_EXIT, 0.98) == 0  # every text is answered


@pytest.mark.parametrize("texts", [300, 2000])
@pytest.mark.parametrize("errors", ["at each confidence", "where it is less sure"])
def test_the_promise_of_answered_texts_is_kept(texts, errors):
    """Where it is hardest: the accuracy is at the limit whatever is chosen, or if every text is answered."""
    shares = {"at each confidence": lambda sure: 0.05, "where it is less sure": lambda sure: 0.2 * (1 - sure)}[errors]
    rng, runs = np.random.default_rng(0), 100
    chosen = [choose_confidence(sure_texts(texts, shares, rng), NO_EXIT, 0.95) for _ in range(runs)]
    limit = 1.0 if errors == "at each confidence" else 0.5
    assert sum(x is not None and x <= limit for x in chosen) <= 16  # 10 % and what chance adds in 98 of 100 such tests


def test_the_time_of_a_text_is_a_mean_and_a_median(monkeypatch):
    seconds = [np.array([0.001, 0.001, 0.004]), np.array([0.006, 0.010, 0.014])]
    turns = [[timing.Timing(each[None]) for each in seconds]]
    monkeypatch.setattr(timing, "timed_passes", lambda *_, batch_size: turns if batch_size == 1 else [])
    three = Features(np.zeros(3, int), np.zeros(3, int), np.arange(4), None)
    text, saved = timing.compare_latency(tiny_model("bert"), 0.1, three, collate=None)
    assert text == "a text takes 2.0 ms (median 1.0) in place of 10.0 ms (median 10.0); 3 texts, one at a time, on cpu"
    assert saved == pytest.approx(0.8)
