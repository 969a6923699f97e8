"""One full pass gives the same scores and exits as a pass for each layer and threshold, and as the timed passes."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support.helpers import simulated, with_costs
from support.tiny import random_batch, tiny_model

from deebert.data.batching import Features, collator
from deebert.data.tasks import TASKS
from deebert.evaluation import timing
from deebert.evaluation.all_exits import (
    AllExits,
    dense_thresholds,
    layer_scores,
    run_all_exits,
    spread_thresholds,
    sweep,
)
from deebert.evaluation.metrics import scores
from deebert.evaluation.timing import timed_sweep
from deebert.utils.errors import InputError


def test_spread_thresholds_save_ten_to_ninety_per_cent():
    exits = with_costs(simulated(500, 1))
    thresholds = spread_thresholds(exits)
    assert thresholds[0] == 0
    saved = [1 - exits.cost(exits.exit_layers(x), x) for x in thresholds]
    assert saved == sorted(saved)
    possible = 1 - exits.cost(exits.exit_layers(1.0), 1.0)
    for share in np.arange(1, 10) / 10:
        if share < possible:
            assert min(abs(share - each) for each in saved) < 0.06


RIGHT = AllExits(np.zeros((4, 3, 2), np.float32), np.arange(4) % 2)


@pytest.mark.parametrize("damage", ["empty", "truncated", "text", "foreign", "pickle", "folder"])
@pytest.mark.hostile("npz of results", "one line")
def test_a_damaged_file_of_all_exits_gets_one_line(tmp_path, damage):
    path = tmp_path / "all_exits.npz"
    RIGHT.save(path)
    content = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage in ("foreign", "pickle"):
        np.savez(path, **{"foreign": {"x": np.ones(2)}, "pickle": {"logits": np.array([{}])}}[damage])
    else:
        path.write_bytes({"empty": b"", "truncated": content[: len(content) // 2], "text": b"logits"}[damage])
    with pytest.raises(InputError, match=r"all_exits.npz: not a file of all exits \("):
        AllExits.load(path)


LENGTHS = [5, 12, 7, 3, 20, 9, 14, 6, 11, 4]
SHAPES = st.tuples(st.integers(1, 6), st.integers(2, 5), st.integers(2, 4))  # S, N, C


def features_of(model, lengths=LENGTHS, labels=None) -> Features:
    batch = random_batch(model.config, list(lengths))
    ids = np.concatenate([row[:n].numpy() for row, n in zip(batch["input_ids"], lengths, strict=True)])
    labels = np.arange(len(lengths)) % 2 if labels is None else labels
    return Features(ids, np.zeros_like(ids), np.cumsum([0, *lengths]), labels)


def samples(model, features):
    for i in range(len(features)):
        batch = collator(model.config)(features, [i])
        batch.pop("index")
        batch.pop("labels")
        yield batch


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_one_pass_equals_one_pass_per_layer_and_threshold(backbone, pooling):
    """The original runs one pass for each layer and each threshold, at batch size 1."""
    model = tiny_model(backbone, highway_pooling=pooling)
    features, task = features_of(model), TASKS["MRPC"]
    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    exits = run_all_exits(model, features, collator(model.config), batch_size=4)
    assert len(forwards) == 3
    entropies = np.sort(exits.uncertainties.ravel())
    thresholds = [float(entropies[i : i + 2].mean()) for i in (3, 11, 18, 25)]

    for layer, layer_score in enumerate(layer_scores(task, exits).values()):
        with torch.no_grad():
            logits = torch.cat([model(**one, output_layer=layer).logits for one in samples(model, features)])
        assert layer_score == scores(task, logits.numpy(), features.labels)
    for row in sweep(task, exits, thresholds):
        with torch.no_grad():
            outputs = [model(**one, exit_threshold=row.threshold) for one in samples(model, features)]
        logits, layers = torch.cat([o.logits for o in outputs]), torch.cat([o.exit_layer for o in outputs])
        assert row.exits == {i: int((layers == i).sum()) for i in range(1, 5)}
        assert row.layers_run == pytest.approx(layers.float().mean().item() / 4)
        assert row.score == scores(task, logits.numpy(), features.labels)["f1"]
        full = scores(task, exits.logits[:, -1], features.labels)["f1"]
        assert row.score_change == pytest.approx(row.score - full)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_timed_passes_exit_at_the_predicted_layers(backbone, batch_size):
    model = tiny_model(backbone)
    features, collate = features_of(model), collator(tiny_model(backbone).config)
    exits = run_all_exits(model, features, collate)
    thresholds = [0.0, float(np.median(exits.uncertainties)) + 1e-5, 5.0]
    rows = sweep(TASKS["SST-2"], exits, thresholds)
    repeats = list(timed_sweep(rows, exits, model, features, collate, batch_size, repeats=3))
    assert len(repeats) == 3
    for timed in repeats:
        for row, before in zip(timed, rows, strict=True):
            assert (row.score, row.exits, row.layers_run) == (before.score, before.exits, before.layers_run)
            assert row.other_exits == 0
            assert row.seconds > 0
            assert row.full_seconds == timed[0].full_seconds
    assert repeats[0][0].time_saved_spread == 0
    assert repeats[2][0].time_saved_spread > 0
    assert len({tuple(row.exits.values()) for row in rows}) == 3


def test_exit_that_rounding_cannot_explain_is_an_error():
    model = tiny_model("bert")
    features, collate = features_of(model), collator(model.config)
    exits = run_all_exits(model, features, collate)
    wrong = AllExits(exits.logits[::-1].copy(), exits.labels)
    rows = sweep(TASKS["SST-2"], wrong, [float(np.median(exits.uncertainties))])
    with pytest.raises(RuntimeError, match="no rounding error"):
        list(timed_sweep(rows, wrong, model, features, collate, 1))


def test_ties_are_counted():
    exits = AllExits(np.random.default_rng(0).normal(size=(6, 3, 2)).astype(np.float32), None)
    entropies = exits.uncertainties
    for gap, timed_at in ((5e-5, 2), (-5e-5, 1), (1e-3, 2)):
        threshold = float(entropies[4, 0]) + gap
        timed_layers = exits.exit_layers(threshold)
        assert (timed_layers[4] == 1) == (gap > 0)
        assert timing._count_ties(exits, threshold, timed_layers) == 0
        timed_layers[4] = timed_at
        if abs(gap) < timing.TIE:
            assert timing._count_ties(exits, threshold, timed_layers) == 1
        else:
            with pytest.raises(RuntimeError, match="sample 5 exited at layer 2"):
                timing._count_ties(exits, threshold, timed_layers)


@given(
    hnp.arrays(np.float32, SHAPES, elements=st.floats(-9, 9, width=32)),
    st.floats(0, 1.5),
)
def test_sweep_counts(logits, threshold):
    exits = AllExits(logits, np.zeros(len(logits), np.int64))
    layers = exits.exit_layers(threshold)
    for sample, layer in enumerate(layers):
        entropies = exits.uncertainties[sample]
        assert (entropies[: layer - 1] >= np.float32(threshold)).all()
        assert layer == logits.shape[1] or entropies[layer - 1] < np.float32(threshold)
    (row,) = sweep(TASKS["SST-2"], exits, [threshold])
    assert sum(row.exits.values()) == len(logits)
    assert row.layers_run == pytest.approx(layers.mean() / logits.shape[1])


def test_dense_thresholds_reach_the_largest_entropy():
    rng = np.random.default_rng(0)
    exits = AllExits(rng.normal(size=(50, 4, 3)).astype(np.float32), rng.integers(0, 2, 50))
    thresholds = dense_thresholds(exits)
    assert thresholds == sorted(thresholds)
    assert (thresholds[0], thresholds[-1]) == (0, pytest.approx(math.log(3), rel=1e-5))
    cost = [row.layers_run for row in sweep(TASKS["SST-2"], exits, thresholds)]
    assert cost[0] == 1
    assert cost[-1] == 0.25
    assert cost == sorted(cost, reverse=True)


def test_all_exits_are_saved_and_loaded(tmp_path):
    for labels in (np.array([1, 0]), None):
        exits = AllExits(np.ones((2, 3, 2), np.float32), labels)
        exits.save(tmp_path / "all_exits.npz")
        again = AllExits.load(tmp_path / "all_exits.npz")
        np.testing.assert_array_equal(again.logits, exits.logits)
        assert (again.labels is None) == (labels is None)


def test_nan_logits_get_an_input_error(backbone):
    model = tiny_model(backbone)
    torch.nn.init.constant_(model.base_model.encoder.highway[1].classifier.bias, math.nan)
    with pytest.raises(InputError, match=r"\[nan, nan\] at exit 2 for sample 1 \(10 of 10"):
        run_all_exits(model, features_of(model), collator(model.config))


def test_infinite_logits_and_a_single_sample_work():
    model = tiny_model("bert")
    torch.nn.init.constant_(model.bert.encoder.highway[0].classifier.bias[:1], -math.inf)
    exits = run_all_exits(model, features_of(model, [6]), collator(model.config))
    assert exits.exit_layers(0.1).tolist() == [1]
    assert sweep(TASKS["SST-2"], exits, [0.1])[0].exits == {1: 1, 2: 0, 3: 0, 4: 0}


def test_regression_has_scores_but_no_entropy_exits():
    model = tiny_model("bert", num_labels=1)
    features = features_of(model, labels=np.linspace(0, 5, len(LENGTHS), dtype=np.float32))
    exits = run_all_exits(model, features, collator(model.config))
    assert exits.logits.shape == (10, 4, 1)
    assert set(layer_scores(TASKS["STS-B"], exits)[1]) == {"spearmanr", "pearson"}
    with pytest.raises(ValueError, match="at least two labels"):
        exits.exit_layers(0.1)
