"""The cost that is counted is what runs: written out by hand, and as PyTorch's own counter sees it."""

from dataclasses import replace

import numpy as np
import pytest
from support.helpers import counted_by_pytorch, simulated, with_costs
from support.tiny import random_batch, tiny_config, tiny_model

from deebert.data.batching import Features, collator
from deebert.data.tasks import TASKS
from deebert.evaluation.all_exits import AllExits, run_all_exits, sweep
from deebert.evaluation.cost import costs_of
from deebert.modeling.exit_rules import NO_EXIT

CERTAIN = 1e9  # a threshold at which every sample exits
NEVER_REACHED = 1e-9  # one at which the off-ramp runs and no sample exits


def small_config(**overrides):
    """3 layers, 4 wide, 6 inside, 3 labels."""
    sizes = {"hidden_size": 4, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 6}
    return tiny_config("bert", **sizes, num_labels=3, **overrides)


def test_cost_written_out_by_hand():
    costs = costs_of(small_config(), np.array([5, 1]))
    # 5 tokens: 4 projections of 4 x 4, scores and their sum over 5 tokens, 2 products of 4 x 6; 2 operations for each
    layer = 2 * (4 * 5 * 16 + 2 * 5 * 5 * 4 + 2 * 5 * 24)
    last = 2 * (2 * 5 * 16 + 2 * 16 + 2 * 5 * 4 + 2 * 24)  # keys and values of all tokens, the rest of the first one
    head = 2 * (16 + 4 * 3)  # pooler, classifier
    assert (layer, last, head) == (1520, 560, 56)
    assert costs.layers.tolist() == [[1520, 1520, 616], [240, 240, 296]]
    assert costs.off_ramps.tolist() == [[56, 56], [56, 56]]
    exit_layers = np.array([2, 3])
    assert costs.full.tolist() == [3656, 776]
    assert costs.of(exit_layers, [True, True]).tolist() == [3152, 888]
    assert costs.of(exit_layers, [False, True]).tolist() == [3096, 832]
    assert costs.of(np.array([1, 1]), [True, True]).tolist() == [1576, 296]


def test_off_ramps_that_read_all_tokens_cost_their_pooling():
    costs = costs_of(small_config(highway_pooling="mean"), np.array([5]))
    assert costs.off_ramps.tolist() == [[2 * 5 * 4 + 32 + 24] * 2]
    assert costs.layers.tolist() == [[1520, 1520, 616]]


def test_linear_off_ramps_have_no_pooler():
    config = small_config(highway_pooling="mean", highway_head="linear")
    assert costs_of(config, np.array([5])).off_ramps.tolist() == [[2 * 5 * 4 + 24] * 2]


def test_an_exit_before_the_first_layer_costs_the_off_ramp():
    config = small_config(highway_pooling="mean", highway_head="linear", exit_before_first_layer=True)
    costs = costs_of(config, np.array([5]))
    off_ramp = 2 * 5 * 4 + 24
    assert costs.off_ramps.tolist() == [[off_ramp] * 3]
    assert costs.layers.tolist() == [[1520, 1520, 616]]
    for exit_layer, ran in enumerate((off_ramp, 1520 + 2 * off_ramp, 2 * 1520 + 3 * off_ramp, 3656 + 3 * off_ramp)):
        assert costs.of(np.array([exit_layer]), [True] * 3).tolist() == [ran]
    assert costs.of(np.array([1]), [False, True, True]).tolist() == [1520 + off_ramp]


@pytest.mark.parametrize("head", ["pooler", "linear"])
@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_cost_agrees_with_the_counter_of_pytorch(backbone, pooling, head):
    """At batch size 1, for given exits. The counter counts matrix products and nothing else.

    So it counts all that we do, except for a pooling that PyTorch computes as a reduction or as a product with a
    vector: the difference is at most the pooling of the off-ramps that ran, and 0 where the first token is read.
    """
    exit_0 = {"exit_before_first_layer": True} if pooling != "first" else {}
    model = tiny_model(backbone, highway_pooling=pooling, highway_head=head, **exit_0)
    for thresholds, exit_layer, off_ramps in (
        *([([CERTAIN] + [NO_EXIT] * 3, 0, 1), ([NEVER_REACHED, NO_EXIT, CERTAIN, NO_EXIT], 2, 2)] if exit_0 else []),
        ([NO_EXIT] * 3, 4, 0),
        ([CERTAIN] * 3, 1, 1),
        ([NO_EXIT, CERTAIN, NO_EXIT], 2, 1),
        ([NEVER_REACHED, NO_EXIT, CERTAIN], 3, 2),
        ([NEVER_REACHED] * 3, 4, 3),
    ):
        thresholds = thresholds if len(thresholds) == len(model.config.exit_layers) - 1 else [NO_EXIT, *thresholds]
        for length in (3, 11):
            batch, costs = random_batch(model.config, [length]), costs_of(model.config, np.array([length]))
            by_pytorch, output = counted_by_pytorch(model, **batch, exit_threshold=thresholds)
            assert output.exit_layer.tolist() == [exit_layer]
            counted = costs.of(np.array([exit_layer]), np.array(thresholds) > 0)
            pooling_operations = {"first": 0, "mean": 2}[pooling] * length * 32 * off_ramps
            assert 0 <= round(counted.item()) - by_pytorch <= pooling_operations


def test_each_sample_counts_with_its_own_length():
    """Also in a batch that is padded, and after samples were reordered."""
    model, lengths = tiny_model("bert"), [5, 12, 7, 3]
    batch = random_batch(model.config, lengths)
    ids = np.concatenate([row[:n].numpy() for row, n in zip(batch["input_ids"], lengths, strict=True)])
    features = Features(ids, np.zeros_like(ids), np.cumsum([0, *lengths]), np.array([0, 1, 1, 0]))
    exits = run_all_exits(model, features, collator(model.config), batch_size=4)
    expected = costs_of(model.config, np.array(lengths))
    np.testing.assert_array_equal(exits.layer_operations, expected.layers)
    np.testing.assert_array_equal(exits.off_ramp_operations, expected.off_ramps)
    again = exits.take(np.random.default_rng(0).permutation(4))
    rows = [np.flatnonzero((exits.logits == sample).all(axis=(1, 2))).item() for sample in again.logits]
    assert sorted(rows) == [0, 1, 2, 3] != rows
    np.testing.assert_array_equal(again.layer_operations, expected.layers[rows])
    np.testing.assert_array_equal(again.off_ramp_operations, expected.off_ramps[rows])


def test_never_is_1_and_off_ramps_that_nobody_takes_cost_more():
    exits, task = with_costs(simulated(50, 0)), TASKS["SST-2"]
    full = exits.costs.full.sum()
    never, nobody, all_at_once = sweep(task, exits, [0.0, 1e-12, 1.0])
    assert (never.cost, never.cost_saved) == (1, 0)
    assert never.exits == nobody.exits == {1: 0, 2: 0, 3: 0, 4: 0, 5: 50}
    assert nobody.cost == pytest.approx(1 + exits.off_ramp_operations.sum() / full)
    assert nobody.cost > 1 == nobody.layers_run
    first = exits.layer_operations[:, 0] + exits.off_ramp_operations[:, 0]
    assert all_at_once.cost == pytest.approx(first.sum() / full)


def test_off_ramps_that_a_rule_needs_for_its_state_cost_too():
    exits = replace(with_costs(simulated(20, 0)), rule="patience")
    only_the_last = [NO_EXIT, NO_EXIT, NO_EXIT, 1]
    layers = exits.exit_layers(only_the_last)
    assert set(layers) == {4}
    ran = exits.layer_operations[:, :4].sum(axis=1) + exits.off_ramp_operations.sum(axis=1)
    np.testing.assert_allclose(exits.operations(layers, only_the_last), ran)


def test_the_cost_of_a_data_set_is_a_ratio_of_sums():
    """A short text that exits early saves little of what the data set costs."""
    exits = AllExits(
        logits=np.array([[[9, 0], [9, 0]], [[0.1, 0], [9, 0]]], np.float32),
        labels=np.array([0, 0]),
        layer_operations=np.array([[10.0, 10.0], [490.0, 490.0]]),
        off_ramp_operations=np.array([[1.0], [1.0]]),
    )
    (row,) = sweep(TASKS["SST-2"], exits, [0.3])
    assert row.exits == {1: 1, 2: 1}
    assert row.cost == (10 + 1 + 980 + 1) / 1000


def test_where_operations_are_not_known_layers_count():
    exits = simulated(30, 0)
    (row,) = sweep(TASKS["SST-2"], exits, [0.3])
    assert row.cost == pytest.approx(row.layers_run)
    assert row.cost < 1


def test_costs_are_stored_with_all_exits(tmp_path):
    exits = with_costs(simulated(30, 0))
    exits.save(tmp_path / "new.npz")
    assert sweep(TASKS["SST-2"], AllExits.load(tmp_path / "new.npz"), [0.3]) == sweep(TASKS["SST-2"], exits, [0.3])
