"""Exported models answer as the PyTorch model does; and a folder that is not a whole export gets one clear line."""

import json
import math
import shutil
from contextlib import contextmanager

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import BACKBONES, random_batch, tiny_model, tiny_tokenizer

from deebert.commands import export
from deebert.data.batching import collator
from deebert.modeling.checkpoints import save_model
from deebert.modeling.early_exit import first_exit_layer
from deebert.modeling.exit_rules import EXIT_RULES, entropy, make_rule
from deebert.runtime import onnx_export
from deebert.runtime.continuous_batching import classify_stream
from deebert.runtime.onnx_graph import MOST_LAYERS, merge
from deebert.runtime.onnx_runtime import MANIFEST, OnnxDeeBert, open_session
from deebert.utils import cli
from deebert.utils.cli import InputError

CONFIGS = {  # between them: both backbones, every pooling, a head, temperatures, one label and three
    "bert": {"highway_pooling": "mean", "exit_rule": "learned", "num_labels": 3},
    "roberta": {"highway_pooling": "attention", "exit_temperatures": [0.5, 2.0, 3.0]},
}
LAYERS = 3
NAN_TOKEN = 4  # no random batch has it


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """For each backbone a PyTorch model and the same one exported."""
    pairs = {}
    for backbone, config in CONFIGS.items():
        model = tiny_model(backbone, num_hidden_layers=LAYERS, **config)
        for name, parameter in model.named_parameters():
            if "query" in name or "learn_to_exit" in name:
                torch.nn.init.normal_(parameter)
        model.get_input_embeddings().weight.data[NAN_TOKEN] = math.nan
        folder = tmp_path_factory.mktemp(backbone)
        onnx_export.export(model, tiny_tokenizer(backbone), folder)
        pairs[backbone] = model, OnnxDeeBert(folder)
    return pairs


def with_token_types(config, batch: dict, seed: int) -> dict:
    """Both types at random, where the model knows two."""
    generator = torch.Generator().manual_seed(seed)
    types = torch.randint(config.type_vocab_size, batch["input_ids"].shape, generator=generator)
    return batch | {"token_type_ids": types}


def thresholds_between(model, full, quantile: float) -> tuple[list[float], float]:
    """A threshold for each layer, and how far the nearest uncertainty is."""
    rule = make_rule(model.config.exit_rule, model.config.num_labels)
    uncertainties = rule.uncertainties(full.all_logits, full.all_certainties)
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
def test_the_graphs_answer_as_pytorch_does(models, backbone, lengths, padding, quantile, seed):
    model, exported = models[backbone]
    batch = with_token_types(model.config, random_batch(model.config, lengths, seed, padding), seed)
    with torch.no_grad():
        full = model(**batch, output_all_exits=True)
    theirs = exported(**batch, output_all_exits=True)
    torch.testing.assert_close(theirs.all_logits, full.all_logits, atol=1e-4, rtol=0)
    if full.all_certainties is not None:
        torch.testing.assert_close(theirs.all_certainties, full.all_certainties, atol=1e-4, rtol=0)
    thresholds, gap = thresholds_between(model, full, quantile)
    if gap < 2e-6:
        return
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
    shares=st.lists(st.sampled_from([-1, 0.3, 0.6, 0.9, 1.2]), min_size=2, max_size=2),
    seed=st.integers(0, 1000),
)
def test_every_rule_whatever_the_graph_was_made_with(models, backbone, name, lengths, shares, seed):
    model, exported = models[backbone]
    rule = make_rule(name, model.config.num_labels)
    if rule.learned and not exported.has_certainty:
        with pytest.raises(ValueError, match="no learning-to-exit head"):
            exported.set_exit_rule(name)
        return
    thresholds = [max(1.0, round(3 * x)) if rule.stateful else rule.max_uncertainty * x for x in shares]
    batch = with_token_types(model.config, random_batch(model.config, lengths, seed), seed)
    own = model.config.exit_rule
    try:
        for one in (model, exported):
            one.set_exit_rule(name, thresholds)
        with torch.no_grad():
            expected, found = model(**batch), exported(**batch)
            full = model(**batch, output_all_exits=True)
    finally:
        for one in (model, exported):
            one.set_exit_rule(own)
    uncertainties = rule.uncertainties(full.all_logits, full.all_certainties)
    if rule.decision_margin(full.all_logits, uncertainties, rule.cutoffs(thresholds, LAYERS)).min() > 2e-6:
        assert found.exit_layer.tolist() == expected.exit_layer.tolist()
        torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("name", list(EXIT_RULES))
def test_the_graph_measures_by_the_rule_of_the_model(tmp_path, name, labels):
    model = tiny_model("bert", num_labels=labels, exit_rule=name, num_hidden_layers=2)
    if name == "learned":
        torch.nn.init.normal_(model.bert.encoder.learn_to_exit.weight)
    hidden = torch.randn(5, 4, model.config.hidden_size)
    path, answers = tmp_path / "exit.onnx", ["logits", "uncertainty", "certainty"]
    onnx_export.save_graph(
        onnx_export.ExitGraph(model, 0), {"hidden": hidden}, answers[: 3 if name == "learned" else 2], path
    )
    found = onnxruntime.InferenceSession(path).run(["uncertainty"], {"hidden": hidden.numpy()})[0]
    with torch.no_grad():
        expected, _ = make_rule(name, labels).uncertainty(*model.bert.encoder.off_ramp(0, hidden, None), None)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_single_text_is_one_run_of_the_graph(models):
    """Also without this package: the graph's own outputs are logits and exit layer."""
    model, exported = models["roberta"]
    batches = [random_batch(model.config, [6], seed) for seed in range(20)]
    with torch.no_grad():
        logits = torch.cat([model(**batch, output_all_exits=True).all_logits for batch in batches])
    cutoffs = entropy(logits).median(dim=0).values[:-1] + 3e-6
    exit_layers = first_exit_layer(entropy(logits)[:, :-1], cutoffs.tolist())
    assert len(set(exit_layers.tolist())) == LAYERS
    for batch, exit_layer, expected in zip(batches, exit_layers, logits, strict=True):
        ids, mask = (batch[name].numpy() for name in ("input_ids", "attention_mask"))
        feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        assert exported.session.run(["exit_layer"], feed)[0] == LAYERS  # its own threshold: never
        feed["limits"] = cutoffs.numpy()
        layer, found, uncertainty = exported.session.run(["exit_layer", "logits", "uncertainty"], feed)
        assert layer == exit_layer
        np.testing.assert_allclose(found[0], expected[layer - 1], atol=1e-4)
        np.testing.assert_allclose(uncertainty, entropy(expected[layer - 1]), atol=1e-4)
        with counted_runs(exported) as runs:
            exported(**batch, exit_threshold=cutoffs.tolist())
        assert runs == [0]


@contextmanager
def counted_runs(exported):
    """At which layers runs of the graph begin."""
    original, begun = exported._run_graph, []
    exported._run_graph = lambda i, *arguments: begun.append(i) or original(i, *arguments)
    try:
        yield begun
    finally:
        del exported._run_graph


def test_a_batch_needs_a_run_more_where_samples_leave(models):
    model, exported = models["roberta"]
    batch = random_batch(model.config, [6] * 8)
    with torch.no_grad():
        entropies = entropy(model(**batch, output_all_exits=True).all_logits[:, :-1])
    for thresholds, expected in (
        ([1e-6, 1e-6], [0]),
        ([-1, float(entropies[:, 1].median()) + 3e-6], [0, 2]),
        ([float(entropies[:, 0].median()) + 3e-6, 1e-6], [0, 1]),
        ([math.inf, -1], [0]),
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
    uncertainties = rule.uncertainties(full.all_logits, full.all_certainties)
    assert uncertainties.isnan().any(dim=1).tolist() == broken
    thresholds = [math.inf, -1.0]  # takes everybody
    if quantile and not all(broken):
        thresholds = (uncertainties.nanquantile(quantile, dim=0) + 3e-6).tolist()
    if (uncertainties - torch.tensor(thresholds)).abs().nan_to_num(1).min() < 2e-6:
        return
    with torch.no_grad():
        expected = model(**batch, exit_threshold=thresholds)
    found = exported(**batch, exit_threshold=thresholds)
    assert found.exit_layer.tolist() == expected.exit_layer.tolist()
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=0, equal_nan=True)


def test_the_deepest_graph_runs_and_a_deeper_model_is_refused(tmp_path):
    model = tiny_model("bert", num_hidden_layers=3)
    onnx_export.export_parts(onnx_export.exportable(model), tmp_path)
    for name in ("layer", "exit"):
        (tmp_path / f"{name}_2.onnx").rename(tmp_path / f"{name}_{MOST_LAYERS - 1}.onnx")
        for i in range(2, MOST_LAYERS - 1):
            shutil.copy(tmp_path / f"{name}_1.onnx", tmp_path / f"{name}_{i}.onnx")
    model.config.num_hidden_layers = MOST_LAYERS
    merge(tmp_path, model.config, tmp_path / "all.onnx")
    ids = np.ones((1, 4), np.int64)
    feed = {"input_ids": ids, "token_type_ids": 0 * ids, "attention_mask": ids}
    session = open_session(tmp_path / "all.onnx")
    for begin, end in ((0, 1), (0, 20), (0, MOST_LAYERS), (15, 20), (MOST_LAYERS - 1, MOST_LAYERS)):
        cutoffs = np.full(MOST_LAYERS - 1, -1, np.float32)
        cutoffs[end - 1 : end] = 9
        hidden = np.ones((1, 4, model.config.hidden_size), np.float32)
        given = feed | {"limits": cutoffs, "layer": np.array(begin), "hidden_in": hidden}
        assert session.run(["exit_layer"], given)[0] == end
    model.config.num_hidden_layers += 1
    with pytest.raises(InputError, match=f"{MOST_LAYERS + 1} layers; a graph holds up to {MOST_LAYERS}"):
        onnx_export.export(model, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_samples(models):
    with pytest.raises(ValueError, match="nothing to classify"):
        models["bert"][1](torch.zeros(0, 5, dtype=torch.long))


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
            certainties = None if fulls[0].all_certainties is None else torch.cat([f.all_certainties for f in fulls])
        measure = make_rule(model.config.exit_rule, model.config.num_labels)
        uncertainties = measure.uncertainties(logits, certainties)
        thresholds = 2.0 if rule == "patience" else (torch.quantile(uncertainties, quantile, dim=0) + 3e-6).tolist()
        cutoffs = measure.cutoffs(thresholds, LAYERS)
        if measure.decision_margin(logits, uncertainties, cutoffs).min() < 2e-6:
            return
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
    assert found.exit_layer.tolist() == first_exit_layer(uncertainties, cutoffs).tolist()
    torch.testing.assert_close(found.logits, torch.cat([one.logits for one in alone]), atol=1e-4, rtol=1e-4)


def test_deep_layers_run_on_full_batches():
    model = tiny_model("bert", num_hidden_layers=LAYERS)
    batches = [random_batch(model.config, [6] * 8, seed) for seed in range(8)]
    with torch.no_grad():
        first = torch.cat([model(**batch, output_all_exits=True).all_logits[:, 0] for batch in batches])
    uncertainties, _ = make_rule("entropy", 2).uncertainty(first, None, None)
    threshold = [float(uncertainties.quantile(0.75)), -1]  # two of eight stay
    sizes: dict[int, list[int]] = {i: [] for i in range(LAYERS)}
    for i, layer in enumerate(model.bert.encoder.layer):
        layer.output.register_forward_hook(lambda _, inputs, output, i=i: sizes[i].append(len(inputs[0])))
    classify_stream(model, batches, 8, exit_threshold=threshold)
    assert sizes[0] == [8] * 8
    assert sum(sizes[1]) == int((uncertainties >= threshold[0]).sum())
    assert all(size >= 4 for size in sizes[1][:-1])
    assert sizes[1] == sizes[2]


def test_threshold_rule_and_training_mode(models):
    model, exported = models["roberta"]
    batch = random_batch(model.config, [4, 9])
    exported.set_exit_threshold(10.0)
    assert exported.eval()(**batch).exit_layer.tolist() == [1, 1]
    assert exported(**batch, exit_threshold=-1).exit_layer.tolist() == [LAYERS] * 2
    with pytest.raises(ValueError, match="NaN"):
        exported.set_exit_threshold(math.nan)
    exported.set_exit_threshold(-1)
    assert exported(input_ids=batch["input_ids"][:, :4]).logits.shape == (2, 2)


def test_int8_is_smaller_and_near(tmp_path):
    model = tiny_model("bert", highway_pooling="mean", initializer_range=0.05, num_hidden_layers=2)
    tokenizer = tiny_tokenizer("bert")
    onnx_export.export(model, tokenizer, tmp_path / "fp32")
    onnx_export.export(model, tokenizer, tmp_path / "int8", int8=True)
    full, small = OnnxDeeBert(tmp_path / "fp32"), OnnxDeeBert(tmp_path / "int8")
    assert (full.precision, small.precision) == ("fp32", "int8")
    batch = random_batch(model.config, [4, 9, 12])
    a, b = (one(**batch, output_all_exits=True).all_logits for one in (full, small))
    assert 0 < (a - b).abs().max() < 0.1
    sizes = [sum(p.stat().st_size for p in (tmp_path / name).glob("*.onnx")) for name in ("fp32", "int8")]
    assert sizes[1] < sizes[0]


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command and returns what it printed."""

    def run(*arguments) -> str:
        monkeypatch.setattr("sys.argv", ["export", *map(str, arguments)])
        cli.run(export.main)
        return capsys.readouterr().out

    return run


def test_the_command_and_predict(tmp_path, backbone, run, tiny_data, monkeypatch, capsys):
    from deebert.commands import predict

    model = tiny_model(backbone, highway_pooling="mean", num_hidden_layers=2)
    save_model(model, tiny_tokenizer(backbone), tmp_path / "model")
    arguments = ("--task_name", "SST-2", "--data_dir", tiny_data / "SST-2", "--max_seq_length", 32)
    printed = run("--model", tmp_path / "model", "--output", tmp_path / "onnx", *arguments)
    assert "2 layers:" in printed
    assert "(+0.00 points)" in printed
    assert "same label at each exit: 100.0 100.0 %" in printed
    texts = tmp_path / "texts.txt"
    texts.write_text("a good film\nbad\nthe plot was so very very dull and awful\nfine\nnot a lovely scene\n")
    outputs = []
    for folder, more in (("model", []), ("onnx", []), ("model", ["--refill"]), ("onnx", ["--refill"])):
        argv = ["predict", "--model", str(tmp_path / folder), "--file", str(texts), "--batch_size", "2"]
        monkeypatch.setattr("sys.argv", [*argv, "--exit_threshold", "0.55", *more])
        cli.run(predict.main)
        outputs.append([line.split("\t") for line in capsys.readouterr().out.splitlines()])
    assert len(outputs[0]) == 5
    for other in outputs[1:]:
        assert [line[::2] for line in other] == [line[::2] for line in outputs[0]]
        np.testing.assert_allclose([float(x[1]) for x in other], [float(x[1]) for x in outputs[0]], atol=2e-4)


def test_what_is_no_whole_export_gets_one_clear_line(tmp_path, run):
    save_model(tiny_model("bert", num_hidden_layers=2), tiny_tokenizer("bert"), tmp_path / "model")
    assert "not measured" in run("--model", tmp_path / "model", "--output", tmp_path / "onnx")
    manifest = tmp_path / "onnx" / MANIFEST
    assert not [path for path in (tmp_path / "onnx").iterdir() if path.name.startswith(".")]

    graph = tmp_path / "onnx/layers.onnx"
    whole = graph.read_bytes()
    graph.write_bytes(whole[:100])
    with pytest.raises(InputError, match=r"layers.onnx: not a graph that ONNX Runtime can read"):
        OnnxDeeBert(tmp_path / "onnx")
    graph.unlink()
    with pytest.raises(InputError, match=r"layers.onnx: no such file; the export is incomplete"):
        OnnxDeeBert(tmp_path / "onnx")
    graph.write_bytes(whole)
    config = tmp_path / "onnx/config.json"
    config.rename(tmp_path / "config.json")
    with pytest.raises(InputError, match=r"config.json: no such file; the export is incomplete"):
        OnnxDeeBert(tmp_path / "onnx")
    (tmp_path / "config.json").rename(config)
    facts = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(facts | {"format": 0, "deebert": "0.0.1"}))
    with pytest.raises(InputError, match=r"exported by version 0.0.1 \(format 0"):
        OnnxDeeBert(tmp_path / "onnx")
    for damaged in ("", "[1]", '{"format": 1}'):
        manifest.write_text(damaged)
        with pytest.raises(InputError, match="damaged"):
            OnnxDeeBert(tmp_path / "onnx")
    manifest.write_text(json.dumps(facts | {"layers": 5}))
    with pytest.raises(InputError, match=r"5 layers, but a config.json of 2 layers"):
        OnnxDeeBert(tmp_path / "onnx")
    manifest.unlink()
    with pytest.raises(InputError, match=f"no {MANIFEST} there, so no complete export"):
        OnnxDeeBert(tmp_path / "onnx")
    with pytest.raises(InputError, match=f"no {MANIFEST}"):
        OnnxDeeBert(tmp_path / "model")
    with pytest.raises(InputError, match="nowhere: no such folder"):
        OnnxDeeBert(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--output", "model"), "--output model: give another folder than --model"),
        (("--output", "onnx", "--task_name", "SST-2"), "give --task_name and --data_dir together"),
        (("--output", "onnx", "--task_name", "IMDB", "--data_dir", "x"), "no such GLUE task"),
    ],
)
def test_bad_arguments_write_nothing(tmp_path, run, arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_model(tiny_model("bert", num_hidden_layers=2), tiny_tokenizer("bert"), tmp_path / "model")
    with pytest.raises(SystemExit):
        run("--model", "model", *arguments)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "onnx").exists()


def test_all_exits_of_a_dev_set_come_from_the_graphs_too(models):
    from deebert.data.features import Features
    from deebert.evaluation.all_exits import run_all_exits

    model, exported = models["bert"]
    lengths = [3, 9, 5, 12, 7]
    tokens = np.random.default_rng(0).integers(5, 300, sum(lengths)).astype(np.int32)
    features = Features(tokens, np.zeros_like(tokens, np.int8), np.cumsum([0, *lengths]), None)
    ours, theirs = (run_all_exits(one, features, collator(model.config), batch_size=2) for one in (model, exported))
    np.testing.assert_allclose(ours.logits, theirs.logits, atol=1e-4)
    np.testing.assert_allclose(ours.certainties, theirs.certainties, atol=1e-4)
