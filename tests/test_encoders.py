"""Every encoder beside BERT and RoBERTa, and a toy one: exits, training and all runtimes."""

import contextlib
import copy
import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from accelerate import Accelerator
from cuda_graphs import GraphedDeeBert
from full_graphs import FullGraph
from scipy.special import softmax
from scipy.stats import entropy as nats
from support import toy_encoder
from support.helpers import ROOT, counted_by_pytorch, train
from support.saved import TEXTS
from support.tiny import BACKBONES, random_batch, tiny_tokenizer
from transformers import AutoModelForSequenceClassification
from transformers.modeling_layers import GradientCheckpointingLayer

import deebert
from deebert.data.batching import collator, tokenize
from deebert.data.tasks import TASKS
from deebert.evaluation.cost import costs_of
from deebert.experiment.earlier_run import FIELDS
from deebert.experiment.model_card import new_card
from deebert.modeling.backbones import MODELS, NAMES
from deebert.modeling.checkpoints import load_config, load_model, load_pretrained, max_tokens, save_model
from deebert.modeling.exit_rules import NO_EXIT
from deebert.modeling.off_ramps import is_off_ramp
from deebert.runtime import onnx_export
from deebert.runtime.onnx_runtime import OnnxDeeBert
from deebert.training.stage import StageTraining, parameter_groups
from deebert.training.strategies import TrainSettings
from deebert.training.train_data import TokenData, cached_features
from deebert.utils.errors import InputError

SIZES = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 48, "max_position_embeddings": 66, "initializer_range": 0.2, "num_labels": 3}
WINDOW = {"local_attention": 6, "global_attn_every_n_layers": 2, "pad_token_id": 3}  # global, local, global, local
EXIT_0 = {"exit_before_first_layer": True}
ENCODERS = {  # between them: both poolings, both heads, exit 0
    "xlm-roberta": {"pad_token_id": 1, "highway_pooling": "mean", "highway_head": "linear"},
    "camembert": {"pad_token_id": 1},
    "electra": {"embedding_size": 16, "highway_pooling": "mean", **EXIT_0},
    "distilbert": {"highway_head": "linear"},
    "modernbert": {**WINDOW, "classifier_pooling": "mean", "highway_pooling": "mean", "highway_head": "linear"}
    | EXIT_0,
    "modernbert, first token": WINDOW,
    "mpnet": {"pad_token_id": 1, "highway_pooling": "mean", "highway_head": "linear", **EXIT_0},
    "toy": {"highway_pooling": "mean", **EXIT_0},
}
LENGTHS = [3, 20, 9, 1, 12, 6]
FAST = TrainSettings(per_gpu_train_batch_size=6, learning_rate=1e-3, num_train_epochs=1, logging_steps=0, save_steps=0)


def make(name: str, **overrides):
    config_class, model_class = MODELS[name.split(",")[0]]
    torch.manual_seed(0)
    return model_class(config_class(**SIZES | ENCODERS.get(name, {"pad_token_id": 1}) | overrides)).eval()


@pytest.mark.parametrize("name", [*ENCODERS, *BACKBONES])
def test_weight_decay_spares_biases_and_layer_norms(name):
    """Whatever a backbone calls its norms: their weights and all biases are vectors. The only other is a query."""
    model = make(name)
    model.train_stage("all")
    groups = parameter_groups(model, TrainSettings(weight_decay=0.1))
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    matrices = {id(p) for name, p in model.named_parameters() if p.dim() == 2 or name.endswith("query")}
    assert decayed == matrices
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


@pytest.mark.parametrize("name", [*ENCODERS, *BACKBONES])
def test_the_longest_input_is_what_the_positions_allow(name):
    """RoBERTa's positions begin after the padding token's. One token more has no position, where they are added."""
    model = make(name)
    longest = max_tokens(model.config)
    assert longest == 66 - (2 if name in ("roberta", "xlm-roberta", "camembert", "mpnet") else 0)
    with torch.no_grad():
        assert model(**random_batch(model.config, [longest])).logits.isfinite().all()
        if not name.startswith(("modernbert", "toy")):
            with pytest.raises((IndexError, RuntimeError)):
                model(**random_batch(model.config, [longest + 1]))


@functools.cache
def made(name: str):
    """A model that no test changes, and a threshold for each off-ramp at which half of the samples of a batch exit."""
    model = make(name)
    with torch.no_grad():
        all_logits = model(**random_batch(model.config, LENGTHS), output_all_exits=True).all_logits
    uncertainties = nats(softmax(all_logits[:, :-1].double().numpy(), axis=-1), axis=-1)
    return model, (np.median(uncertainties, axis=0) + 1e-5).tolist()


def stock_class(model) -> type:
    name = type(model).__name__.removeprefix("Dee")
    return getattr(toy_encoder if name.startswith("Toy") else transformers, name)


@pytest.fixture(params=ENCODERS)
def name(request) -> str:
    return request.param


@pytest.mark.parametrize("name", [*ENCODERS, *BACKBONES])
def test_a_config_may_request_checkpoints_of_activations(name):
    """In our layers too, which take the place of those that Hugging Face's constructors make."""
    config = copy.deepcopy(made(name)[0].config)
    config.gradient_checkpointing = True
    layers = [x for x in MODELS[config.model_type][1](config).modules() if isinstance(x, GradientCheckpointingLayer)]
    assert all(layer.gradient_checkpointing for layer in layers)
    assert len(layers) == (0 if name in ("mpnet", "toy") else 4)  # Hugging Face has none for MPNet


def test_every_encoder_has_its_classes():
    assert {name.split(",")[0] for name in ENCODERS} >= set(NAMES) - {"bert", "roberta"}
    for model_type, name in NAMES.items():
        assert getattr(deebert, f"{name}ForSequenceClassification") is MODELS[model_type][1]
        assert getattr(deebert, f"{name}Config") is MODELS[model_type][0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_without_exits_it_is_hugging_faces(name, attention, tmp_path):
    model = copy.deepcopy(made(name)[0])
    if model._supports_sdpa:
        model.set_attn_implementation(attention)
    model.save_pretrained(tmp_path)
    stock, info = stock_class(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert all(map(is_off_ramp, info["unexpected_keys"]))
    if model._supports_sdpa:
        stock.eval().set_attn_implementation(attention)
    batch = random_batch(model.config, LENGTHS)
    for inputs in (batch, {"input_ids": batch["input_ids"]}, {key: value[2:3, :9] for key, value in batch.items()}):
        with torch.no_grad():
            expected, actual = stock.eval()(**inputs), model(**inputs)
            everything = model(**inputs, output_all_exits=True)
        torch.testing.assert_close(actual.logits, expected.logits, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(everything.all_logits[:, -1], expected.logits, atol=1e-5, rtol=1e-4)
        assert actual.exit_layer.tolist() == [4] * len(actual.logits)


def test_a_batch_equals_single_samples_and_the_brute_force(name):
    model, thresholds = made(name)
    batch = random_batch(model.config, LENGTHS, padding=5)
    with torch.no_grad():
        together = model(**batch, exit_threshold=thresholds)
        full = model(**batch, output_all_exits=True, output_hidden_states=True)
        alone = [
            model(**{key: value[i : i + 1, :n] for key, value in batch.items()}, exit_threshold=thresholds)
            for i, n in enumerate(LENGTHS)
        ]
    assert len(full.hidden_states) == 5
    layers = model.config.exit_layers
    expected = []
    for logits in full.all_logits.double().numpy():
        exits = [nats(softmax(one)) < cutoff for one, cutoff in zip(logits, thresholds, strict=False)]
        expected.append([*exits, True].index(True))
    assert len(set(expected)) > 1
    assert together.exit_layer.tolist() == [layers[i] for i in expected]
    assert [one.exit_layer.item() for one in alone] == [layers[i] for i in expected]
    logits = full.all_logits[range(len(LENGTHS)), expected]
    torch.testing.assert_close(together.logits, logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(torch.cat([one.logits for one in alone]), logits, atol=1e-5, rtol=1e-4)


def test_the_stages_train_what_they_should_and_cached_features_train_the_same(name, tiny_data, tmp_path):
    examples = TASKS["SST-2"].read(tiny_data / "SST-2", "train")[:15]
    features = tokenize(examples, tiny_tokenizer("bert"), 32)
    no_dropout = [
        "dropout",
        "seq_classif_dropout",
        "classifier_dropout",
        "attention_dropout",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
    ]
    given = vars(made(name)[0].config)
    model = make(name, num_labels=2, **{key: 0.0 for key in no_dropout if key in given})
    before = copy.deepcopy(model.state_dict())
    train(1, model, features, FAST)
    between = copy.deepcopy(model.state_dict())
    changed = [key for key in before if not torch.equal(before[key], between[key])]
    assert changed
    assert not any(map(is_off_ramp, changed))
    states = []
    for cached in (False, True):
        trainee = copy.deepcopy(model)
        accelerator, collate = Accelerator(cpu=True), collator(model.config)
        source = contextlib.nullcontext(TokenData(features, collate))
        if cached:
            source = cached_features(trainee, features, collate, accelerator, tmp_path)
        torch.manual_seed(0)
        with source as data:
            StageTraining(2, trainee, data, FAST, accelerator).run()
        states.append(trainee.state_dict())
    for key, tensor in states[0].items():
        assert torch.equal(tensor, between[key]) != is_off_ramp(key), key
        torch.testing.assert_close(states[1][key], tensor, atol=1e-4, rtol=1e-3, msg=key)


def test_a_pretrained_checkpoint_gets_new_off_ramps_and_a_new_head(name, tmp_path):
    model, _ = made(name)
    stock = stock_class(model)(model.config).base_model
    stock.save_pretrained(tmp_path)
    facts = json.loads((tmp_path / "config.json").read_text())
    facts.pop("architectures")
    (tmp_path / "config.json").write_text(json.dumps(facts))
    again, missing = load_pretrained(str(tmp_path), load_config(str(tmp_path)))
    backbone = {f"{model.base_model_prefix}.{key}" for key in stock.state_dict()}
    assert set(missing) == set(model.state_dict()) - backbone
    for key, tensor in stock.state_dict().items():
        assert torch.equal(again.state_dict()[f"{model.base_model_prefix}.{key}"], tensor)
    alone = type(model.base_model).from_pretrained(tmp_path).eval()  # the backbone without a classifier
    batch = random_batch(alone.config, LENGTHS)
    with torch.no_grad():
        torch.testing.assert_close(alone(**batch)[0], stock.eval()(**batch)[0], atol=1e-5, rtol=1e-4)
    with pytest.raises(InputError, match="not a trained DeeBERT"):
        load_model(str(tmp_path), load_config(str(tmp_path)))


@pytest.mark.parametrize("name", [*ENCODERS, *BACKBONES])
def test_with_other_labels_what_gives_logits_is_new(name, tmp_path):
    model, _ = made(name)
    model.save_pretrained(tmp_path)
    again, new = load_pretrained(str(tmp_path), load_config(str(tmp_path)), other_labels=True)
    old = model.state_dict()
    changed = {key for key, value in again.state_dict().items() if not torch.equal(value, old[key])}
    assert changed <= set(new)
    assert {key for key in old if len(old[key]) == 3 and key.endswith("weight")} <= changed


def test_a_saved_folder_exits_wherever_it_is_loaded(name, tmp_path):
    model, thresholds = made(name)
    model = copy.deepcopy(model)
    model.set_exit_threshold(thresholds)
    save_model(model, tiny_tokenizer("bert"), tmp_path)
    with torch.no_grad():
        batch = random_batch(model.config, LENGTHS)
        expected = model(**batch)
        for again in (
            load_model(str(tmp_path), load_config(str(tmp_path))),
            AutoModelForSequenceClassification.from_pretrained(tmp_path),
        ):
            assert type(again) is type(model)
            assert again.eval()(**batch).exit_layer.tolist() == expected.exit_layer.tolist()
        if name != "toy":
            remote = AutoModelForSequenceClassification.from_pretrained(tmp_path, trust_remote_code=True)
            assert type(remote).__name__ == type(model).__name__
    predicted = deebert.Classifier(str(tmp_path))(TEXTS)
    one = deebert.Classifier(str(tmp_path), batch_size=1)(TEXTS)
    assert [x.exit_layer for x in predicted] == [x.exit_layer for x in one]
    assert "with early exit" in new_card(tmp_path, again.config, TASKS["SST-2"], FIELDS).text
    with pytest.raises(ValueError, match="checkpoint; DeeBertForSequenceClassification reads bert checkpoints"):
        deebert.DeeBertForSequenceClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize("speculate", [False, True])
def test_the_loop_of_the_cuda_graphs(name, speculate):
    model, thresholds = made(name)
    batch = random_batch(model.config, LENGTHS, padding=2)
    with torch.inference_mode():
        expected = model(**batch, exit_threshold=thresholds)
    output = GraphedDeeBert(model, speculate)(**batch, exit_threshold=thresholds)
    assert output.exit_layer.tolist() == expected.exit_layer.tolist()
    torch.testing.assert_close(output.logits, expected.logits, atol=1e-4, rtol=1e-4)


INT8 = ("modernbert", "mpnet", "toy")


@pytest.mark.slow
@pytest.mark.parametrize("name", ENCODERS, indirect=True)
def test_an_export_gives_the_same_exits(name, tmp_path):
    model = make(name, num_hidden_layers=2, exit_before_first_layer=False)
    with onnx_export.traced_parts(model) as parts:
        for precision in ("fp32", "int8") if name in INT8 else ("fp32",):
            folder = tmp_path / precision
            onnx_export.write_export(parts, model.config, tiny_tokenizer("bert"), folder, precision == "int8")
    exported = OnnxDeeBert(tmp_path / "fp32", threads=1)
    for lengths in (LENGTHS, [17], [2, 2]):
        batch = random_batch(model.config, lengths)
        with torch.no_grad():
            full = model(**batch, output_all_exits=True)
            uncertainties = nats(softmax(full.all_logits[:, :-1].double().numpy(), axis=-1), axis=-1)
            threshold = np.quantile(uncertainties, 0.4) + 1e-4
            expected = model(**batch, exit_threshold=threshold)
        actual = exported(**batch, output_all_exits=True)
        torch.testing.assert_close(actual.all_logits, full.all_logits, atol=1e-4, rtol=1e-3)
        early = exported(**batch, exit_threshold=threshold)
        assert early.exit_layer.tolist() == expected.exit_layer.tolist()
        torch.testing.assert_close(early.logits, expected.logits, atol=1e-4, rtol=1e-3)
        if name in INT8:
            rough = OnnxDeeBert(tmp_path / "int8", threads=1)(**batch, output_all_exits=True).all_logits
            assert (rough - full.all_logits).abs().mean() < 0.2 * full.all_logits.abs().mean()
    assert deebert.Classifier(str(tmp_path / "fp32"))(TEXTS)[0].exit_layer == 2


def test_the_full_model_as_one_graph_takes_no_types_where_there_are_none():
    model, _ = made("distilbert")
    batch = random_batch(model.config, LENGTHS)
    with torch.no_grad():
        actual = FullGraph(model)(**batch, token_type_ids=torch.ones_like(batch["input_ids"]))
        torch.testing.assert_close(actual, model(**batch).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in ENCODERS if name != "toy"], indirect=True)
def test_the_cost_is_what_pytorch_counts(name):
    model = make(name, highway_pooling="first", exit_before_first_layer=False)
    if name == "electra":
        model = make(name, highway_pooling="first", exit_before_first_layer=False, embedding_size=32)
    for length in (3, 11):
        costs, batch = costs_of(model.config, np.array([length])), random_batch(model.config, [length])
        for thresholds, layer in (([NO_EXIT] * 3, 4), ([NO_EXIT, 1e9, NO_EXIT], 2), ([1e-9] * 3, 4)):
            actual, output = counted_by_pytorch(model, **batch, exit_threshold=thresholds)
            assert output.exit_layer.tolist() == [layer]
            counted = costs.of(np.array([layer]), np.array(thresholds) > 0)
            mean = 2 * 32 * length if model.config.model_type == "modernbert" and name == "modernbert" else 0
            assert counted.item() == pytest.approx(actual - mean * (layer == 4))


def test_the_page_shows_the_toy_that_is_tested():
    page = (ROOT / "docs" / "add_an_encoder.md").read_text(encoding="utf-8")
    snippet = page.split("```py\n")[1].split("```")[0]
    assert Path(toy_encoder.__file__).read_text(encoding="utf-8").endswith(f"\n\n\n{snippet}")
    for model_type, name in NAMES.items():
        assert f"| `{model_type}` | `{name}...` |" in page


def test_an_unknown_encoder_gets_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(InputError, match=r"a t5 checkpoint; DeeBERT takes bert, .*modernbert.*docs/add_an_encoder\.md"):
        load_config(str(tmp_path))


def test_modernbert_says_what_it_does_not_take():
    model, _ = made("modernbert")
    batch = random_batch(model.config, [5])
    with pytest.raises(ValueError, match="take no position_ids"):
        model(**batch, position_ids=torch.arange(5)[None], exit_threshold=0.5)
    with pytest.raises(ValueError, match="local_attention is -4"):
        make("modernbert", local_attention=-4)


@pytest.mark.parametrize("backbone", [name for name in MODELS if name not in ("modernbert", "toy")])
def test_a_classifier_of_the_mean_is_linear_and_hugging_faces_class_says_what_it_lacks(backbone, tmp_path):
    model = make(backbone, classifier_pooling="mean")
    batch = random_batch(model.config, LENGTHS)
    with torch.no_grad():
        hidden_states = model(**batch, output_hidden_states=True, exit_threshold=NO_EXIT).hidden_states[-1]
        tokens = zip(hidden_states, batch["attention_mask"].bool(), strict=True)
        means = [state[mask].mean(dim=0) for state, mask in tokens]
        expected = torch.stack(means) @ model.classifier.weight.T + model.classifier.bias
        for threshold in (NO_EXIT, 1e-9):  # plain, and with exits that no sample takes
            torch.testing.assert_close(model(**batch, exit_threshold=threshold).logits, expected)
    model.train_stage("backbone")
    model.train()(**batch, labels=torch.arange(6) % 3).loss.backward()
    unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not [name for name in unused if "pooler" in name or "classifier" in name]
    model.save_pretrained(tmp_path)
    _, info = stock_class(model).from_pretrained(tmp_path, output_loading_info=True, ignore_mismatched_sizes=True)
    assert info["missing_keys"]
