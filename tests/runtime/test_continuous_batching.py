"""A stream of batches that are filled up again gives what its samples give one at a time."""

import numpy as np
import pytest
import torch
from exported import LAYERS, with_token_types
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny import BACKBONES, random_batch, tiny_model

from deebert.modeling.early_exit import first_exit_layer
from deebert.modeling.exit_rules import make_rule
from deebert.runtime.continuous_batching import StreamedBatch, classify_stream, joined


@settings(max_examples=40)
@given(
    backbone=st.sampled_from(BACKBONES),
    runtime=st.sampled_from([0, 1]),
    sizes=st.lists(st.lists(st.integers(1, 16), min_size=1, max_size=6), min_size=1, max_size=6),
    quantile=st.floats(0, 1),
    rule=st.sampled_from(["own", "patience"]),
    seed=st.integers(0, 1000),
)
def test_refilled_batches_are_one_at_a_time(models, backbone, runtime, sizes, quantile, rule, seed):
    model, runner = models[backbone][0], models[backbone][runtime]
    batches = [
        with_token_types(model.config, random_batch(model.config, lengths, seed + i), seed)
        for i, lengths in enumerate(sizes)
    ]
    own_rule = model.config.exit_rule
    alone, thresholds = [], None
    try:
        for one in (model, models[backbone][1]):
            one.config.exit_rule = own_rule if rule == "own" else rule
        with torch.no_grad():
            fulls = [model(**batch, output_all_exits=True, exit_threshold=-1) for batch in batches]
            logits = torch.cat([full.all_logits for full in fulls])
        measure = make_rule(model.config.exit_rule, model.config.num_labels)
        uncertainties = measure.uncertainties(logits)
        thresholds = 2.0 if rule == "patience" else (torch.quantile(uncertainties, quantile, dim=0) + 3e-6).tolist()
        layers = model.config.exit_layers
        cutoffs = measure.cutoffs(thresholds, len(layers))
        assume(measure.decision_margin(logits, uncertainties, cutoffs).min() >= 2e-6)
        found = classify_stream(runner, batches, 6, exit_threshold=thresholds)
        for batch, lengths in zip(batches, sizes, strict=True):
            for i, length in enumerate(lengths):
                with torch.no_grad():
                    one = {name: tensor[i : i + 1, :length] for name, tensor in batch.items()}
                    alone.append(model(**one, exit_threshold=thresholds))
    finally:
        for one in (model, models[backbone][1]):
            one.config.exit_rule = own_rule
    assert found.exit_layer.tolist() == [one.exit_layer.item() for one in alone]
    assert found.exit_layer.tolist() == first_exit_layer(uncertainties, cutoffs, layers[0]).tolist()
    torch.testing.assert_close(found.logits, torch.cat([one.logits for one in alone]), atol=1e-4, rtol=1e-4)


def test_patience_is_that_of_the_samples_that_stay():
    """Six layers: after an exit in the middle the patience of those that stay still counts, in joined batches, too."""
    model = tiny_model("bert", num_hidden_layers=6, exit_rule="patience", num_labels=3)
    batches = [random_batch(model.config, [5, 9, 12, 7, 3, 8], seed) for seed in range(6)]
    with torch.no_grad():
        alone = [
            model(**{k: v[i : i + 1] for k, v in batch.items()}, exit_threshold=2)
            for batch in batches
            for i in range(6)
        ]
    expected = [one.exit_layer.item() for one in alone]
    assert len(set(expected)) >= 4  # or the test would show little
    found = classify_stream(model, batches, 12, exit_threshold=2)
    assert found.exit_layer.tolist() == expected
    torch.testing.assert_close(found.logits, torch.cat([one.logits for one in alone]), atol=1e-4, rtol=1e-4)


def test_deep_layers_run_on_full_batches():
    model = tiny_model("bert", num_hidden_layers=LAYERS)
    batches = [random_batch(model.config, [6] * 8, seed) for seed in range(8)]
    with torch.no_grad():
        first = torch.cat([model(**batch, output_all_exits=True).all_logits[:, 0] for batch in batches])
    uncertainties, _ = make_rule("entropy", 2).uncertainty(first)
    threshold = [float(uncertainties.quantile(0.75)), -1]  # two of eight stay
    sizes: dict[int, list[int]] = {i: [] for i in range(LAYERS)}
    for i, layer in enumerate(model.bert.encoder.layer):
        layer.output.register_forward_hook(lambda _, inputs, output, i=i: sizes[i].append(len(inputs[0])))
    classify_stream(model, batches, 8, exit_threshold=threshold)
    assert sizes[0] == [8] * 8
    assert sum(sizes[1]) == int((uncertainties >= threshold[0]).sum())
    assert all(size >= 4 for size in sizes[1][:-1])
    assert sizes[1] == sizes[2]


def test_joined_batches_lose_the_padding_that_none_needs():
    """Once the long text has left."""
    short, long = (
        StreamedBatch(np.array([tokens]), np.array([tokens]), np.ones((1, tokens, 4)), np.ones((1, tokens)))
        for tokens in (3, 9)
    )
    batch = joined([short, long])
    assert (batch.hidden_states.shape, batch.attention_mask.sum(axis=1).tolist()) == ((2, 9, 4), [3, 9])
    batch.keep(np.array([True, False]))
    assert (batch.index.tolist(), batch.hidden_states.shape, batch.attention_mask.shape) == ([3], (1, 3, 4), (1, 3))


def test_without_batches_there_is_nothing_to_classify():
    with pytest.raises(ValueError, match="nothing to classify"):
        classify_stream(tiny_model("bert"), [], 4)
