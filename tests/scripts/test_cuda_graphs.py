"""The runtime for GPUs gives the model's outputs; on a machine without one the same steps run without graphs."""

from concurrent.futures import ThreadPoolExecutor

import cuda_graphs
import pytest
import torch
from cuda_graphs import GraphedDeeBert
from hypothesis import assume, given
from hypothesis import strategies as st
from support.tiny import BACKBONES, random_batch, tiny_model

from deebert.modeling.exit_rules import EXIT_RULES, entropy, make_rule

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MODELS = {}


def pair(backbone: str, labels: int, pooling: str, speculate: bool):
    """A model and its runtime, made once: the states are reused by all examples."""
    key = (backbone, labels, pooling, speculate)
    if key not in MODELS:
        head = "linear" if pooling == "first" else "pooler"
        off_ramps = {"highway_pooling": pooling, "highway_head": head, "exit_before_first_layer": pooling != "first"}
        model = tiny_model(backbone, num_labels=labels, **off_ramps).to(DEVICE)
        MODELS[key] = model, GraphedDeeBert(model, speculate)
    return MODELS[key]


def alike(actual, expected) -> None:
    assert actual.exit_layer.tolist() == expected.exit_layer.tolist()
    torch.testing.assert_close(actual.logits, expected.logits.cpu().float(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(actual.entropy, expected.entropy.cpu(), atol=1e-4, rtol=1e-4)


@given(
    st.sampled_from(BACKBONES),
    st.sampled_from([1, 3]),
    st.sampled_from(["first", "mean"]),
    st.booleans(),
    st.sampled_from(list(EXIT_RULES)),
    st.lists(st.integers(2, 62), min_size=1, max_size=9),
    st.lists(st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0]), min_size=4, max_size=4),
    st.integers(0, 2),
)
def test_its_outputs_are_the_models(backbone, labels, pooling, speculate, name, lengths, shares, padding):
    rule = make_rule(name, labels, 0.5)
    assume(rule.supported)
    model, runtime = pair(backbone, labels, pooling, speculate)
    threshold = [round(3 * x) if rule.stateful else rule.exit_all_threshold() * x for x in shares]
    threshold = threshold[: len(model.config.exit_layers) - 1]
    model.set_exit_rule(name)
    batch = {k: v.to(DEVICE) for k, v in random_batch(model.config, lengths, sum(lengths), padding).items()}
    if backbone == "bert":
        batch["token_type_ids"] = (batch["input_ids"] % 2) * batch["attention_mask"]
    with torch.inference_mode():
        expected = model(**batch, exit_threshold=threshold)
    alike(runtime(**batch, exit_threshold=threshold), expected)
    model.config.exit_threshold = threshold
    alike(runtime(**{name: tensor.cpu() for name, tensor in batch.items()}), expected)


def test_at_most_one_layer_after_the_exit_runs(monkeypatch):
    """A batch of one runs the layers up to its exit, and the one that was begun while its exit was read."""
    ran = []
    model = tiny_model("bert").to(DEVICE)
    for speculate in (False, True):
        runtime = GraphedDeeBert(model, speculate)
        launch = cuda_graphs.GraphedLayer.launch
        monkeypatch.setattr(cuda_graphs.GraphedLayer, "launch", lambda self, to=launch: (ran.append(self), to(self))[1])
        batch = {k: v.to(DEVICE) for k, v in random_batch(model.config, [7]).items()}
        for layer, threshold in ((1, [9.0, -1, -1]), (2, [-1, 9.0, -1]), (4, -1)):
            ran.clear()
            assert runtime(**batch, exit_threshold=threshold).exit_layer.tolist() == [layer]
            assert len(ran) == min(layer + speculate, 4)
        monkeypatch.undo()


def test_shapes_shrink_with_the_batch():
    model = tiny_model("roberta").to(DEVICE)
    runtime = GraphedDeeBert(model)
    batch = {k: v.to(DEVICE) for k, v in random_batch(model.config, [3, 5, 6, 60, 9, 11, 4, 7, 8]).items()}
    with torch.inference_mode():
        uncertain = entropy(model(**batch, output_all_exits=True).all_logits[:, 0])
    threshold = [float(uncertain.sort().values[6:8].mean()), -1, -1]  # seven of nine leave at layer 1
    alike(runtime(**batch, exit_threshold=threshold), model(**batch, exit_threshold=threshold))
    assert {rows for rows, _ in runtime.states} == {16, 2}
    assert max(runtime.states) == (16, 64)


def test_thresholds_that_do_not_fit_are_refused():
    runtime = GraphedDeeBert(tiny_model("bert").to(DEVICE))
    with pytest.raises(ValueError, match="exit_threshold has 2 values"):
        runtime(torch.ones(1, 4, dtype=torch.long, device=DEVICE), exit_threshold=[0.1, 0.2])


def test_long_texts_share_shapes():
    model = tiny_model("bert", max_position_embeddings=1000).to(DEVICE)
    runtime = GraphedDeeBert(model)
    for length in (513, 600, 768, 800, 1000):
        batch = {k: v.to(DEVICE) for k, v in random_batch(model.config, [length]).items()}
        alike(runtime(**batch), model(**batch))
    assert {tokens for _, tokens in runtime.states} == {768, 1000}


def test_a_capture_that_failed_is_tried_again(monkeypatch):
    model = tiny_model("bert").to(DEVICE)
    runtime = GraphedDeeBert(model)
    batch = {k: v.to(DEVICE) for k, v in random_batch(model.config, [5]).items()}

    def no_memory(*_):
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(runtime, "captured", no_memory)
        with pytest.raises(torch.OutOfMemoryError):
            runtime(**batch)
    alike(runtime(**batch), model(**batch))


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_a_gpu(dtype):
    model = tiny_model("bert").to(DEVICE, dtype)
    batch = {k: v.to(DEVICE) for k, v in random_batch(model.config, [7, 20, 9]).items()}
    with torch.inference_mode():
        expected = model(**batch)
    torch.testing.assert_close(
        GraphedDeeBert(model)(**batch).logits, expected.logits.cpu().float(), atol=5e-2, rtol=5e-2
    )


def test_threads_may_share_one_runtime():
    """The buffers of a shape are shared: without a lock, about a quarter of such calls gave other texts' logits."""
    model, graphed = pair("bert", 3, "first", True)
    model.set_exit_rule("entropy")
    batches = [random_batch(model.config, [length, 5], seed) for seed, length in enumerate([5, 9, 20, 33])]
    with torch.no_grad():
        expected = [model(**{name: t.to(DEVICE) for name, t in batch.items()}, exit_threshold=0.5) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(graphed, **batches[i % 4], exit_threshold=0.5) for i in range(80)]
        for i, call in enumerate(calls):
            alike(call.result(), expected[i % 4])
