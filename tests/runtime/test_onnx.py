"""Exported models give the logits and exits of the PyTorch model."""

import copy
import errno
import math
import os
import shutil
from collections import Counter
from contextlib import contextmanager

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.exported import LAYERS, NAN_TOKEN, model_to_export, with_token_types
from support.tiny import BACKBONES, random_batch, tiny_model, tiny_tokenizer

from deebert.data.batching import collator
from deebert.evaluation.timing import decision_margins
from deebert.modeling.config import config_rule
from deebert.modeling.early_exit import first_exit_layer
from deebert.modeling.exit_rules import EXIT_RULES, entropy, make_rule
from deebert.runtime import onnx_export, onnx_graph
from deebert.runtime.onnx_graph import MOST_EXITS, merge
from deebert.runtime.onnx_runtime import open_session
from deebert.utils.errors import InputError


def thresholds_between(model, full, quantile: float) -> tuple[list[float], float]:
    """A threshold for each layer, and how far the nearest uncertainty is."""
    rule = make_rule(model.config.exit_rule, model.config.num_labels)
    uncertainties = rule.uncertainties(full.all_logits)
    thresholds = torch.quantile(uncertainties, quantile, dim=0) + 3e-6
    return thresholds.tolist(), (uncertainties - thresholds).abs().min().item()


@settings(max_examples=60)
@given(
    backbone=st.sampled_from(BACKBONES),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=9),
    padding=st.sampled_from([0, 5]),
    quantile=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_the_graphs_give_pytorchs_logits(models, backbone, lengths, padding, quantile, seed):
    model, exported = models[backbone]
    batch = with_token_types(model.config, random_batch(model.config, lengths, seed, padding), seed)
    with torch.no_grad():
        full = model(**batch, output_all_exits=True)
    theirs = exported(**batch, output_all_exits=True)
    torch.testing.assert_close(theirs.all_logits, full.all_logits, atol=1e-4, rtol=0)
    thresholds, gap = thresholds_between(model, full, quantile)
    assume(gap >= 2e-6)
    with torch.no_grad():
        ours = model(**batch, exit_threshold=thresholds)
    theirs = exported(**batch, exit_threshold=thresholds)
    assert theirs.exit_layer.tolist() == ours.exit_layer.tolist()
    torch.testing.assert_close(theirs.logits, ours.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(theirs.entropy, ours.entropy, atol=1e-4, rtol=0)


@settings(max_examples=60)
@given(
    backbone=st.sampled_from(BACKBONES),
    name=st.sampled_from(list(EXIT_RULES)),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    shares=st.lists(st.sampled_from([-1, 0.3, 0.6, 0.9, 1.2]), min_size=LAYERS, max_size=LAYERS),
    seed=st.integers(0, 1000),
)
def test_every_rule_whatever_the_graph_was_made_with(models, backbone, name, lengths, shares, seed):
    model, exported = models[backbone]
    rule = make_rule(name, model.config.num_labels)
    exits = len(model.config.exit_layers)
    thresholds = [max(1.0, round(3 * x)) if rule.stateful else rule.max_uncertainty * x for x in shares[: exits - 1]]
    batch = with_token_types(model.config, random_batch(model.config, lengths, seed), seed)
    own = model.config.exit_rule
    try:
        for one in (model, exported):
            one.set_exit_rule(name, thresholds)
        with torch.no_grad():
            expected, actual = model(**batch), exported(**batch)
            full = model(**batch, output_all_exits=True)
    finally:
        for one in (model, exported):
            one.set_exit_rule(own)
    logits = full.all_logits.numpy()
    assume(decision_margins(rule, logits, rule.uncertainties(logits), rule.cutoffs(thresholds, exits)).min() > 2e-6)
    assert actual.exit_layer.tolist() == expected.exit_layer.tolist()
    torch.testing.assert_close(actual.logits, expected.logits, atol=1e-4, rtol=0)


class ExitByEveryRule(torch.nn.Module):
    """The exit after the first layer, with the uncertainty by each rule in place of one."""

    def __init__(self, model):
        super().__init__()
        self.exits = torch.nn.ModuleList()
        for name in EXIT_RULES:
            model.config.exit_rule = name
            self.exits.append(onnx_export.Part(onnx_export.exit_outputs, model, 0, config_rule(model.config)))

    def forward(self, hidden):
        return tuple(one(hidden)[1] for one in self.exits)


@pytest.mark.parametrize(("labels", "kind"), [(1, None), (3, None), (3, "multi_label_classification")])
def test_the_graph_measures_by_the_rule_of_the_model(tmp_path, labels, kind):
    model = tiny_model("bert", num_labels=labels, problem_type=kind, num_hidden_layers=2)
    hidden = torch.randn(5, 4, model.config.hidden_size)
    path = tmp_path / "exit.onnx"
    onnx_export.save_graph(ExitByEveryRule(model), {"hidden": hidden}, list(EXIT_RULES), path)
    actual = onnxruntime.InferenceSession(path).run(list(EXIT_RULES), {"hidden": hidden.numpy()})
    for name, uncertainty in zip(EXIT_RULES, actual, strict=True):
        with torch.no_grad():
            rule = make_rule(name, labels, several_labels=kind is not None)
            expected, _ = rule.uncertainty(model.bert.encoder.off_ramps[0](hidden))
        if rule.stateful:  # the graph keeps no state: better no exit than a wrong one
            expected = torch.full_like(expected, math.inf)
        np.testing.assert_allclose(uncertainty, expected, atol=1e-5, err_msg=name)


def test_a_single_text_is_one_run_of_the_graph(models):
    """Also without this package: the graph's own outputs are logits and exit layer."""
    model, exported = models["roberta"]
    batches = [random_batch(model.config, [6], seed) for seed in range(20)]
    with torch.no_grad():
        logits = torch.cat([model(**batch, output_all_exits=True).all_logits for batch in batches])
    cutoffs = entropy(logits).median(dim=0).values[:-1] + 3e-6
    exit_layers = first_exit_layer(entropy(logits)[:, :-1], cutoffs.tolist(), 0)
    assert set(exit_layers.tolist()) == set(model.config.exit_layers) == {0, 1, 2, LAYERS}
    for batch, exit_layer, expected in zip(batches, exit_layers, logits, strict=True):
        ids, mask = (batch[name].numpy() for name in ("input_ids", "attention_mask"))
        feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        assert exported.session.run(["exit_layer"], feed)[0] == LAYERS  # its own threshold: never
        feed["exit_threshold"] = cutoffs.numpy()
        (layer,), (actual,) = exported.session.run(["exit_layer", "logits"], feed)
        assert layer == exit_layer
        np.testing.assert_allclose(actual, expected[layer], atol=1e-4)
        with counted_runs(exported) as runs:
            exported(**batch, exit_threshold=cutoffs.tolist())
        assert runs == [0]


def graph_inputs(batch: dict, row: int | None = None) -> dict[str, np.ndarray]:
    """What a host without this package gives the graph: a batch, or one row of it without its padding."""
    if row is not None:
        length = int(batch["attention_mask"][row].sum())
        batch = {name: tensor[row : row + 1, :length] for name, tensor in batch.items()}
    feed = {name: tensor.numpy() for name, tensor in batch.items()}
    return {"token_type_ids": np.zeros_like(feed["input_ids"])} | feed


@pytest.fixture(scope="module")
def several_labels(exports, tmp_path_factory):
    """A model whose three labels exclude no other, and its graph: that of bert with other exits."""
    folder, model = tmp_path_factory.mktemp("several"), model_to_export("bert")
    model.config.problem_type, model.config.exit_rule = "multi_label_classification", "entropy"
    shutil.copytree(exports["bert"] / "parts", folder, dirs_exist_ok=True)
    inputs = {"hidden": torch.randn(2, 7, model.config.hidden_size), "pooling_weights": torch.ones(2, 7)}
    for i in range(LAYERS - 1):
        outputs = ["logits", "uncertainty"]
        part = onnx_export.Part(onnx_export.exit_outputs, model, i, config_rule(model.config))
        onnx_export.save_graph(part, inputs, outputs, folder / f"exit_{i}.onnx")
    merge(folder, model.config, folder / "all.onnx")
    return model, open_session(folder / "all.onnx")


@pytest.mark.parametrize("size", [16, 32, 128])
@pytest.mark.parametrize("kind", [*BACKBONES, "several labels"])
def test_a_batch_in_one_run_of_the_graph_is_right(models, several_labels, kind, size):
    """As servers run it that know nothing of early exit: the texts of many callers at once, of different lengths."""
    if kind == "several labels":
        model, session = several_labels
    else:
        model, session = models[kind][0], models[kind][1].session
    lengths = np.random.default_rng(size).integers(1, 20, size).tolist()
    batch = with_token_types(model.config, random_batch(model.config, lengths, size), size)
    batch["input_ids"][3, 0] = NAN_TOKEN
    with torch.no_grad():
        full = model(**batch, output_all_exits=True)
    uncertainties = config_rule(model.config).uncertainties(full.all_logits)
    cutoffs = uncertainties.nanquantile(0.31, dim=0) + 3e-6
    assert (uncertainties - cutoffs).abs().nan_to_num(1).min() > 1e-6
    for threshold in (cutoffs, cutoffs[:1], torch.tensor([math.inf])):
        cut = {"exit_threshold": threshold.numpy()}
        logits, layers = session.run(["logits", "exit_layer"], graph_inputs(batch) | cut)
        with torch.no_grad():
            stored = threshold.tolist() if len(threshold) > 1 else float(threshold)
            expected = model(**batch, exit_threshold=stored)
        assert layers.tolist() == expected.exit_layer.tolist()
        assert (len(set(layers.tolist())) > 1) == bool(threshold.isfinite().all())
        alone = [session.run(["logits", "exit_layer"], graph_inputs(batch, row) | cut) for row in range(size)]
        assert layers.tolist() == [int(layer) for _, (layer,) in alone]
        np.testing.assert_allclose(logits, np.concatenate([one for one, _ in alone]), atol=1e-5)
        np.testing.assert_allclose(logits, expected.logits, atol=1e-4)


def test_what_the_graph_is_called_with(models, exports, tmp_path):
    """Servers take the outputs in their order, and the stored threshold where none is given."""
    model, exported = models["roberta"]
    assert [output.name for output in exported.session.get_outputs()][:2] == ["logits", "exit_layer"]
    assert len(exported.session.get_inputs()) == 3  # the others have defaults
    feed = graph_inputs(random_batch(model.config, [4, 9, 2]))
    for stored, expected in ((10.0, 0), ([-1, -1, 10.0], 2), (-1, LAYERS)):
        config = copy.deepcopy(model.config)
        config.exit_threshold = stored
        merge(exports["roberta"] / "parts", config, tmp_path / "stored.onnx")
        session = open_session(tmp_path / "stored.onnx")
        assert session.run(["exit_layer"], feed)[0].tolist() == [expected] * 3
        assert session.run(["exit_layer"], feed | {"exit_threshold": np.full(1, 10, np.float32)})[0].tolist() == [0] * 3


def test_8_bit_weights_in_a_batch(exports, tmp_path, models):
    """What is rounded depends on the batch: so each sample has the logits that its exit has in the same batch."""
    model = models["roberta"][0]
    onnx_export.quantize_parts(exports["roberta"] / "parts", tmp_path)
    merge(tmp_path, model.config, tmp_path / "all.onnx")
    session = open_session(tmp_path / "all.onnx")
    feed = graph_inputs(random_batch(model.config, [5, 9, 3, 12, 7, 2, 9, 4] * 4, seed=1))
    exits = []
    for i in range(LAYERS + 1):
        stops = np.where(np.arange(LAYERS) == i, np.inf, -1).astype(np.float32)
        exits.append(session.run(["logits"], feed | {"exit_threshold": stops})[0])
    uncertainties = entropy(torch.from_numpy(np.stack(exits, axis=1)))[:, :-1]
    cutoffs = uncertainties.quantile(0.3, dim=0) + 3e-6
    logits, layers = session.run(["logits", "exit_layer"], feed | {"exit_threshold": cutoffs.numpy()})
    assert layers.tolist() == first_exit_layer(uncertainties, cutoffs.tolist(), 0).tolist()
    assert len(set(layers.tolist())) > 2
    np.testing.assert_allclose(logits, [exits[layer][row] for row, layer in enumerate(layers)], atol=1e-5)


def test_one_token_with_large_numbers_costs_the_others_no_precision(tmp_path):
    """Some tokens of trained models are like that, and 8-bit numbers have one scale for all tokens of a batch."""
    torch.manual_seed(0)
    feed_forward = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Linear(64, 16))
    hidden = torch.randn(3, 5, 16)
    hidden[1, 2] *= 1000
    hidden[2, 4] = 0
    plain, scaled = tmp_path / "plain.onnx", tmp_path / "scaled.onnx"
    onnx_export.save_graph(feed_forward, {"input": hidden}, ["y"], plain)
    onnx.save(onnx_export.scale_tokens(plain), scaled)
    with torch.no_grad():
        expected = feed_forward(hidden).numpy()
    others = np.abs(expected).max(axis=-1) < 10
    assert others.sum() == 14
    errors = {}
    for exact in (plain, scaled):
        rough = exact.with_suffix(".int8")
        onnx_export.quantize(exact, rough)
        first, second = (open_session(each).run(None, {"input": hidden.numpy()})[0] for each in (exact, rough))
        np.testing.assert_allclose(first, expected, rtol=1e-4, atol=1e-4)
        errors[exact] = np.abs(second - expected)[others].max()
    assert errors[scaled] < 0.02 < 0.2 < errors[plain]


def test_the_layers_of_an_int8_export_scale_tokens(small_exports, tmp_path):
    onnx_export.quantize_parts(small_exports / "parts", tmp_path)
    for i in range(2):
        before, after = (
            Counter(node.op_type for node in onnx.load(folder / f"layer_{i}.onnx").graph.node)
            for folder in (small_exports / "parts", tmp_path)
        )
        assert after["ReduceMax"] - before["ReduceMax"] == 2  # one for each feed-forward product
        assert after["MatMulInteger"] == 6


@contextmanager
def counted_runs(exported):
    """At which layers runs of the graph begin."""
    original, begun = exported._run_graph, []
    exported._run_graph = lambda i, *more, **options: begun.append(i) or original(i, *more, **options)
    try:
        yield begun
    finally:
        del exported._run_graph


def test_a_batch_needs_one_more_run_where_samples_exit(models):
    model, exported = models["roberta"]
    batch = random_batch(model.config, [6] * 8)
    with torch.no_grad():
        entropies = entropy(model(**batch, output_all_exits=True).all_logits[:, :-1])
    for thresholds, expected in (
        ([1e-6, 1e-6, 1e-6], [0]),
        ([-1, -1, float(entropies[:, 2].median()) + 3e-6], [0, 3]),
        ([1e-6, float(entropies[:, 1].median()) + 3e-6, 1e-6], [0, 2]),
        ([float(entropies[:, 0].median()) + 3e-6, -1, 1e-6], [0, 1]),
        ([math.inf, -1, -1], [0]),
    ):
        with counted_runs(exported) as runs:
            exported(**batch, exit_threshold=thresholds)
        assert runs == expected, thresholds


@settings(max_examples=60)
@given(
    backbone=st.sampled_from(BACKBONES),
    broken=st.lists(st.booleans(), min_size=1, max_size=33),
    quantile=st.sampled_from([0.2, 0.7, None]),
    seed=st.integers(0, 1000),
)
def test_a_sample_that_is_not_a_number_harms_no_other(models, backbone, broken, quantile, seed):
    model, exported = models[backbone]
    batch = random_batch(model.config, [3] * len(broken), seed)
    batch["input_ids"][torch.tensor(broken), 1] = NAN_TOKEN
    with torch.no_grad():
        full = model(**batch, output_all_exits=True)
    rule = make_rule(model.config.exit_rule, model.config.num_labels)
    uncertainties = rule.uncertainties(full.all_logits)
    assert uncertainties.isnan().any(dim=1).tolist() == broken
    thresholds = [math.inf] + [-1.0] * (uncertainties.shape[1] - 1)  # all exit
    if quantile and not all(broken):
        thresholds = (uncertainties.nanquantile(quantile, dim=0) + 3e-6).tolist()
    assume((uncertainties - torch.tensor(thresholds)).abs().nan_to_num(1).min() >= 2e-6)
    with torch.no_grad():
        expected = model(**batch, exit_threshold=thresholds)
    actual = exported(**batch, exit_threshold=thresholds)
    assert actual.exit_layer.tolist() == expected.exit_layer.tolist()
    torch.testing.assert_close(actual.logits, expected.logits, atol=1e-4, rtol=0, equal_nan=True)


def test_the_deepest_graph_runs_and_a_deeper_model_is_refused(tmp_path, exports):
    model = model_to_export("bert")
    shutil.copytree(exports["bert"] / "parts", tmp_path, dirs_exist_ok=True)
    for name in ("layer", "exit"):
        (tmp_path / f"{name}_2.onnx").rename(tmp_path / f"{name}_{MOST_EXITS - 1}.onnx")
        for i in range(2, MOST_EXITS - 1):
            shutil.copy(tmp_path / f"{name}_1.onnx", tmp_path / f"{name}_{i}.onnx")
    model.config.num_hidden_layers = MOST_EXITS
    merge(tmp_path, model.config, tmp_path / "all.onnx")
    ids = np.ones((1, 4), np.int64)
    feed = {"input_ids": ids, "token_type_ids": 0 * ids, "attention_mask": ids}
    session = open_session(tmp_path / "all.onnx")
    for begin, end in ((0, 1), (0, 20), (0, MOST_EXITS), (15, 20), (MOST_EXITS - 1, MOST_EXITS)):
        cutoffs = np.full(MOST_EXITS - 1, -1, np.float32)
        cutoffs[end - 1 : end] = 9
        hidden = np.ones((1, 4, model.config.hidden_size), np.float32)
        given = feed | {"exit_threshold": cutoffs, "layer": np.array(begin), "hidden_in": hidden}
        assert session.run(["exit_layer"], given)[0] == end
    model.config.num_hidden_layers += 1
    with pytest.raises(InputError, match=f"{MOST_EXITS + 1} exits; a graph holds up to {MOST_EXITS}"):
        onnx_export.export(model, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_samples(models):
    with pytest.raises(ValueError, match="nothing to classify"):
        models["bert"][1](torch.zeros(0, 5, dtype=torch.long))


def test_threshold_rule_and_training_mode(models):
    model, exported = models["roberta"]
    batch = random_batch(model.config, [4, 9])
    exported.set_exit_threshold(10.0)
    assert exported.eval()(**batch).exit_layer.tolist() == [0, 0]
    assert exported(**batch, exit_threshold=-1).exit_layer.tolist() == [LAYERS] * 2
    with pytest.raises(ValueError, match="NaN"):
        exported.set_exit_threshold(math.nan)
    exported.set_exit_threshold(-1)
    assert exported(input_ids=batch["input_ids"][:, :4]).logits.shape == (2, 2)


def test_all_exits_of_a_dev_set_come_from_the_graphs_too(models):
    from deebert.data.batching import Features
    from deebert.evaluation.all_exits import run_all_exits

    model, exported = models["bert"]
    lengths = [3, 9, 5, 12, 7]
    tokens = np.random.default_rng(0).integers(5, 300, sum(lengths)).astype(np.int32)
    features = Features(tokens, np.zeros_like(tokens, np.int8), np.cumsum([0, *lengths]), None)
    ours, theirs = (run_all_exits(one, features, collator(model.config), batch_size=2) for one in (model, exported))
    np.testing.assert_allclose(ours.logits, theirs.logits, atol=1e-4)


def test_an_export_that_cannot_be_written_gets_one_line(tmp_path, monkeypatch):
    model, tokenizer = tiny_model("bert"), tiny_tokenizer("bert")
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/layer_0.onnx").write_bytes(b"graph")

    def full_disk(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(onnx_graph, "merge", full_disk)
    with pytest.raises(InputError, match=r"out: the export cannot be written: .*No space left"):
        onnx_export.write_export(tmp_path / "parts", model.config, tokenizer, tmp_path / "out")
    monkeypatch.setattr(onnx_export, "MOST_BYTES", 4)
    with pytest.raises(InputError, match="and ONNX holds 2 in a file; export it with 8-bit weights"):
        onnx_export.write_export(tmp_path / "parts", model.config, tokenizer, tmp_path / "out")
    assert not any((tmp_path / "out").iterdir())
