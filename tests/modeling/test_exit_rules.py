"""Every exit rule: in batches, in the one-pass table and one at a time, samples exit where brute force says."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from scipy.stats import entropy as scipy_entropy
from support.tiny import BACKBONES, random_batch, tiny_model

from deebert.data.batching import Features, collator
from deebert.data.tasks import TASKS
from deebert.evaluation.all_exits import AllExits, dense_thresholds
from deebert.evaluation.results import SweepRow
from deebert.evaluation.threshold_selection import SelectionTarget, choose
from deebert.evaluation.timing import decision_margins, timed_sweep
from deebert.modeling.config_checks import plain_threshold
from deebert.modeling.early_exit import first_exit_layer
from deebert.modeling.exit_rules import EXIT_RULES, make_rule

LAYERS, TOLERANCE = 4, 0.3
CASES = [(rule, labels) for rule in EXIT_RULES for labels in (1, 2, 3) if make_rule(rule, labels).supported]
MODELS = {
    (backbone, rule, labels): tiny_model(
        backbone,
        exit_rule=rule,
        num_labels=labels,
        patience_tolerance=TOLERANCE,
        highway_pooling="mean",
        exit_before_first_layer=backbone == "roberta",
    )
    for backbone in BACKBONES
    for rule, labels in CASES
}


def brute_force(rule: str, logits: np.ndarray, thresholds: list[float]) -> int:
    """The exit, from 0, of one sample, from the logits (E, C) of all exits."""
    row = 0
    for i, threshold in enumerate(thresholds[: len(logits) - 1]):
        before, now = logits[i - 1], logits[i]
        alike = abs(now[0] - before[0]) <= TOLERANCE if len(now) == 1 else now.argmax() == before.argmax()
        row = row + 1 if i > 0 and alike else 1
        if rule == "patience":
            exits = 0 < threshold <= row
        else:
            p = np.sort(softmax(now.astype(np.float64)))
            uncertainty = {
                "entropy": scipy_entropy(p),
                "confidence": 1 - p[-1],
            }
            exits = uncertainty[rule] < threshold
        if exits:
            return i
    return len(logits) - 1


@settings(max_examples=60)
@given(
    backbone=st.sampled_from(BACKBONES),
    case=st.sampled_from(CASES),
    lengths=st.lists(st.integers(1, 14), min_size=1, max_size=7),
    quantile=st.floats(0.05, 0.95),
    per_layer=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_samples_of_a_batch_exit_where_brute_force_says(backbone, case, lengths, quantile, per_layer, seed):
    model, (name, labels) = MODELS[(backbone, *case)], case
    batch = random_batch(model.config, lengths, seed)
    with torch.no_grad():
        full = model(**batch, output_all_exits=True)
    first_layer = 0 if backbone == "roberta" else 1
    exits = AllExits(full.all_logits.numpy(), None, name, TOLERANCE, first_layer=first_layer)
    off_ramps = LAYERS - first_layer
    if name == "patience":
        rng = np.random.default_rng(seed)
        thresholds = rng.integers(-1, LAYERS, off_ramps).astype(float).tolist()  # -1 and 0: no sample exits there
        threshold = thresholds if per_layer else thresholds[0]
    else:
        at = np.quantile(exits.uncertainties, quantile, axis=0 if per_layer else None) + 3e-6
        threshold = at.tolist() if per_layer else float(at)
    thresholds = threshold if per_layer else [threshold] * off_ramps
    rule = make_rule(name, labels, TOLERANCE)
    slack = decision_margins(rule, exits.logits, exits.uncertainties, exits.cutoffs(threshold))
    assume(slack.min() >= 2e-6)  # or rounding would decide

    exits_at = [brute_force(name, logits, thresholds) for logits in exits.logits]
    expected = [first_layer + i for i in exits_at]
    assert exits.exit_layers(threshold).tolist() == expected
    with torch.no_grad():
        together = model(**batch, exit_threshold=threshold)
        alone = [
            model(**{key: tensor[i : i + 1, :n] for key, tensor in batch.items()}, exit_threshold=threshold)
            for i, n in enumerate(lengths)
        ]
    assert together.exit_layer.tolist() == expected
    assert [one.exit_layer.item() for one in alone] == expected
    expected_logits = full.all_logits[torch.arange(len(lengths)), torch.tensor(exits_at)]
    torch.testing.assert_close(together.logits, expected_logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "labels"), CASES)
def test_candidate_thresholds_go_from_no_exit_to_all_exits(name, labels):
    rng = np.random.default_rng(0)
    exits = AllExits(rng.normal(size=(50, LAYERS, labels)).astype(np.float32), rng.integers(0, 2, 50), name)
    thresholds = dense_thresholds(exits)
    cost = [exits.exit_layers(threshold).mean() for threshold in thresholds]
    assert cost == sorted(cost, reverse=True)
    assert (cost[0], cost[-1]) == (LAYERS, 1)
    assert exits.exit_layers(exits.exit_rule.exit_all_threshold()).tolist() == [1] * 50
    assert exits.exit_layers(0).tolist() == exits.exit_layers(-1).tolist() == [LAYERS] * 50


@pytest.mark.parametrize(("name", "labels"), CASES)
def test_a_threshold_is_chosen_with_every_rule(name, labels):
    rng = np.random.default_rng(1)
    truth = rng.normal(size=400) if labels == 1 else rng.integers(0, labels, 400)
    right = truth[:, None] if labels == 1 else np.eye(labels)[truth] * 3
    noise = np.linspace(1.5, 0.2, LAYERS)[:, None]
    logits = (right[:, None] + noise * rng.normal(size=(400, LAYERS, labels))).astype(np.float32)
    exits = AllExits(logits, truth, name, TOLERANCE)
    task = TASKS["STS-B"] if labels == 1 else replace(TASKS["SST-2"], labels=tuple("abc")[:labels])
    choice = choose(task, exits, SelectionTarget(drop=0.05))
    assert choice.point.layers_saved > 0
    assert choice.point.score_change >= -0.05 - 1e-9
    assert choice.point.rule == name


@pytest.mark.parametrize(("name", "labels"), CASES)
def test_timed_passes_exit_where_the_one_pass_says(name, labels):
    model = MODELS["bert", name, labels]
    rng = np.random.default_rng(0)
    lengths = [3, 9, 5, 12, 7]
    tokens = rng.integers(5, 300, sum(lengths)).astype(np.int32)
    features = Features(tokens, np.zeros_like(tokens, np.int8), np.cumsum([0, *lengths]), None)
    collate = collator(model.config)
    with torch.no_grad():
        outputs = [
            model(**{k: v for k, v in collate(features, [i]).items() if k != "index"}, output_all_exits=True)
            for i in range(5)
        ]
    exits = AllExits(torch.cat([o.all_logits for o in outputs]).numpy(), None, name, TOLERANCE)
    threshold = 2.0 if name == "patience" else float(np.median(exits.uncertainties)) + 1e-5
    layers = exits.exit_layers(threshold)
    row = SweepRow(threshold, 0.0, 0.0, layers.mean() / LAYERS, {}, rule=name)
    (timed,) = timed_sweep([row], exits, model, features, collate, batch_size=2)
    assert timed[0].other_exits == 0
    wrong = replace(exits, logits=exits.logits[::-1] * np.float32([1, -1, 1, -1])[:, None])
    assert wrong.exit_layers(threshold).tolist() != layers.tolist()
    with pytest.raises(RuntimeError, match="no rounding error"):
        list(timed_sweep([row], wrong, model, features, collate, batch_size=2))


def test_rounding_excuses_a_patient_exit_only_where_a_prediction_was_close():
    logits = np.array([[[0.0, 1.0], [0.0, 1e-6], [1.0, 0.0], [1.0, 0.0]]])
    rule = make_rule("patience", 2)
    uncertainties = rule.uncertainties(logits)
    assert uncertainties.tolist() == [[1.0, 0.5, 1.0]]
    assert (decision_margins(rule, logits, uncertainties, [0.0] * 3) < 1e-5).tolist() == [[False, True, True]]
    values = np.array([[[0.0], [0.4], [0.9000001], [3.0]]])
    slack = decision_margins(make_rule("patience", 1, 0.5), values, uncertainties, [0.0] * 3)
    np.testing.assert_allclose(slack, [[math.inf, 0.1, 0.0]], atol=1e-6)


@pytest.mark.parametrize(
    ("name", "labels", "threshold", "message"),
    [
        ("patience", 2, 1.5, "patience counts off-ramps"),
        ("confidence", 1, 0.1, "confidence needs at least two labels"),
        ("entropy", 2, math.nan, "NaN"),
        ("boredom", 2, 1, "choose one of entropy, confidence, patience .0.10.0 had more., or import its file first"),
    ],
)
def test_what_makes_no_sense_is_refused(name, labels, threshold, message):
    with pytest.raises(ValueError, match=message):
        make_rule(name, labels).cutoffs(threshold, LAYERS)


def test_values_that_differ_by_the_tolerance_agree():
    rule = make_rule("patience", 1, tolerance=0.5)
    all_logits = torch.tensor([[[1.0], [1.5], [1.0], [0.0]], [[1.0], [1.75], [1.75], [0.0]]])  # (B, E, 1)
    torch.testing.assert_close(rule.uncertainties(all_logits), torch.tensor([[1, 1 / 2, 1 / 3], [1, 1, 1 / 2]]))


@pytest.mark.parametrize("number", [np.float32(0.25), np.array(0.25), torch.tensor(0.25), 0.25])
def test_a_threshold_is_any_kind_of_number(number):
    assert plain_threshold(number) == 0.25
    assert plain_threshold([number, 1]) == [0.25, 1.0]
    with pytest.raises(ValueError, match="give a number, or one for each off-ramp"):
        plain_threshold([number, None])


def test_the_rule_of_a_model_can_be_changed_and_is_saved(tmp_path, backbone):
    model = tiny_model(backbone)
    batch = random_batch(model.config, [3, 8])
    model.set_exit_rule("confidence", 0.999)
    assert model(**batch).exit_layer.tolist() == [1, 1]
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert (again.config.exit_rule, again.config.exit_threshold) == ("confidence", 0.999)
    model.set_exit_rule("patience", 2)
    assert set(model(**batch).exit_layer.tolist()) <= {2, 3, 4}
    for name, threshold, message in (("learned", 0.1, "0.10.0"), ("patience", 0.5, "counts")):
        with pytest.raises(ValueError, match=message):
            model.set_exit_rule(name, threshold)
    assert (model.config.exit_rule, model.config.exit_threshold) == ("patience", 2.0)


@pytest.mark.parametrize(("labels", "several"), [(1, False), (2, False), (5, False), (3, True)])
@pytest.mark.parametrize("name", EXIT_RULES)
def test_arrays_of_numpy_and_tensors_exit_alike(name, labels, several):
    rule, rng = make_rule(name, labels, several_labels=several), np.random.default_rng(0)
    logits = rng.normal(size=(40, 5, labels)).astype(np.float32)
    logits[:, 1:3] = logits[:, :1]  # so that off-ramps agree
    logits[0], logits[1] = np.nan, 1e4 * np.sign(logits[1])
    cutoffs = [0.4, math.inf, 0.6, 0.5]
    tensors = torch.from_numpy(logits)
    ours, expected = rule.uncertainties(logits), rule.uncertainties(tensors)
    np.testing.assert_allclose(ours, expected, atol=1e-6)
    assert first_exit_layer(ours, cutoffs).tolist() == first_exit_layer(expected, cutoffs).tolist()
