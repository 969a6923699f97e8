"""Checkpoints, losses, stages, and life inside transformers."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file
from support.tiny import CLASSES, random_batch, tiny_config, tiny_model
from torch.nn import functional
from transformers import AutoTokenizer, BertConfig, pipeline
from transformers.models.bert.modeling_bert import BertPooler

from deebert.modeling import checkpoints
from deebert.modeling.backbones.bert import DeeBertForSequenceClassification
from deebert.modeling.checkpoints import (
    load_config,
    load_model,
    load_pretrained,
    load_tokenizer,
    save_model,
    set_labels,
)
from deebert.modeling.config import HighwayConfig
from deebert.modeling.off_ramps import is_off_ramp
from deebert.utils.errors import InputError


def assert_same_weights(loaded, model) -> None:
    """Bit for bit. Logits are equal up to rounding: loaded weights may be aligned differently in memory."""
    weights = model.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


def test_parameter_names_are_the_originals(backbone):
    names = set(dict(tiny_model(backbone).named_parameters()))
    p = backbone
    expected = {"classifier.weight", "classifier.bias", f"{p}.pooler.dense.weight", f"{p}.pooler.dense.bias"}
    for i in range(3):
        expected |= {
            f"{p}.encoder.highway.{i}.{part}.{kind}"
            for part in ("pooler.dense", "classifier")
            for kind in ("weight", "bias")
        }
    rest = {name for name in names if name.startswith((f"{p}.embeddings.", f"{p}.encoder.layer."))}
    assert names - rest == expected


def test_a_checkpoint_of_the_original_loads_as_it_is(backbone, tmp_path):
    """A pickled state dict, with an off-ramp after the last layer, too, and a config without our fields."""
    model, p = tiny_model(backbone), backbone
    state = dict(model.state_dict())
    for name in [name for name in state if ".highway.0." in name]:
        state[name.replace(".highway.0.", ".highway.3.")] = torch.full_like(state[name], 9.0)
    state[f"{p}.embeddings.position_ids"] = torch.arange(66)[None]  # saved by the transformers of its day
    torch.save(state, tmp_path / "pytorch_model.bin")
    config = model.config.to_dict()
    ours = [field.name for field in dataclasses.fields(HighwayConfig)]
    for name in (*ours, "architectures", "transformers_version"):
        config.pop(name, None)
    (tmp_path / "config.json").write_text(json.dumps(config | {"finetuning_task": "mrpc"}))

    loaded, info = CLASSES[backbone][1].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"))
    assert {name: getattr(loaded.config, name) for name in ours} == {
        "exit_threshold": -1.0,
        "exit_rule": "entropy",
        "patience_tolerance": 0.5,
        "highway_pooling": "first",
        "highway_head": "pooler",
        "classifier_pooling": "cls",
        "min_confidence": 0.0,
        "exit_before_first_layer": False,
        "max_seq_length": None,
    }
    assert_same_weights(loaded, model)
    batch = random_batch(model.config, [4, 9])
    for layer in range(4):
        outputs = (each.eval()(**batch, output_layer=layer) for each in (loaded, model))
        torch.testing.assert_close(*(output.logits for output in outputs))


def test_a_plain_checkpoint_loads_with_just_the_new_parts_reported(backbone, tiny_checkpoints):
    _, info = CLASSES[backbone][1].from_pretrained(tiny_checkpoints[backbone], output_loading_info=True)
    assert all(name.startswith("classifier.") or ".encoder.highway." in name for name in info["missing_keys"])
    assert len(info["missing_keys"]) == 2 + 3 * 4
    assert not info["unexpected_keys"]


def test_new_off_ramps_start_with_the_pretrained_pooler(backbone, tiny_checkpoints):
    config = load_config(str(tiny_checkpoints[backbone]))
    model, new = load_pretrained(str(tiny_checkpoints[backbone]), config)
    assert len(new) == 14
    for highway in model.base_model.encoder.highway:
        assert torch.equal(highway.pooler.dense.weight, model.base_model.pooler.dense.weight)
    assert not torch.equal(
        model.base_model.encoder.highway[0].classifier.weight, model.base_model.encoder.highway[1].classifier.weight
    )


def test_trained_off_ramps_keep_their_weights(tmp_path):
    tiny_model("bert").save_pretrained(tmp_path)
    model, new = load_pretrained(str(tmp_path), load_config(str(tmp_path)))
    assert not new
    assert not torch.equal(model.bert.encoder.highway[0].pooler.dense.weight, model.bert.pooler.dense.weight)


def test_saving_keeps_thresholds_pooling_and_logits(backbone, tmp_path):
    model = tiny_model(backbone, highway_pooling="mean", num_labels=3)
    model.set_exit_threshold([0.2, 0.9, 1.05])
    model.save_pretrained(tmp_path)
    loaded = CLASSES[backbone][1].from_pretrained(tmp_path).eval()
    assert loaded.config.exit_threshold == [0.2, 0.9, 1.05]
    assert loaded.config.highway_pooling == "mean"
    batch = random_batch(model.config, [4, 9, 20, 3, 3, 8])
    before, after = model(**batch), loaded(**batch)
    assert torch.equal(before.exit_layer, after.exit_layer)
    assert_same_weights(loaded, model)
    torch.testing.assert_close(before.logits, after.logits)


def test_config_fields_can_be_given_to_from_pretrained(tmp_path):
    tiny_model("bert").save_pretrained(tmp_path)
    model = DeeBertForSequenceClassification.from_pretrained(tmp_path, highway_pooling="mean", exit_threshold=0.4)
    assert (model.config.highway_pooling, model.config.exit_threshold) == ("mean", 0.4)


def test_a_plain_config_gets_the_papers_defaults():
    model = DeeBertForSequenceClassification(
        BertConfig(num_hidden_layers=2, hidden_size=8, num_attention_heads=2, intermediate_size=8, vocab_size=20)
    )
    assert (model.config.highway_pooling, model.config.exit_threshold) == ("first", -1.0)


def test_the_exit_before_the_first_layer_reads_the_embeddings(backbone, tmp_path):
    model = tiny_model(backbone, highway_pooling="mean", exit_before_first_layer=True, num_labels=3)
    new = {name for name in model.state_dict() if ".highway_embeddings." in name}
    assert set(model.state_dict()) - new == set(tiny_model(backbone, num_labels=3).state_dict())
    assert {name.split(".highway_embeddings.")[1] for name in new} == {
        f"{part}.{kind}" for part in ("pooler.dense", "classifier") for kind in ("weight", "bias")
    }
    assert all(map(is_off_ramp, new))
    batch = random_batch(model.config, [4, 9, 6])
    with torch.no_grad():
        mask = batch["attention_mask"][..., None]
        mean = (model.base_model.embeddings(batch["input_ids"]) * mask).sum(1) / mask.sum(1)
        expected = model.base_model.encoder.highway_embeddings.classify(mean)
        full = model(**batch, output_all_exits=True)
        assert full.all_logits.shape == (3, 5, 3)
        torch.testing.assert_close(full.all_logits[:, 0], expected)
        ran = []
        model.base_model.encoder.layer[0].register_forward_hook(lambda *_: ran.append(1))
        first = model(**batch, output_layer=-1)
        assert (first.exit_layer.tolist(), ran) == ([0, 0, 0], [])
        torch.testing.assert_close(first.logits, expected)
        torch.testing.assert_close(model(**batch, output_layer=0).logits, full.all_logits[:, 1])
    with pytest.raises(ValueError, match="exits -1 to 3"):
        model(**batch, output_layer=-2)
    model.set_exit_threshold([0.5, 0.6, 0.7, 0.8])
    model.save_pretrained(tmp_path)
    again = load_model(str(tmp_path), load_config(str(tmp_path))).eval()
    assert torch.equal(again(**batch).exit_layer, model(**batch).exit_layer)
    without, info = CLASSES[backbone][1].from_pretrained(
        tmp_path, exit_before_first_layer=False, exit_threshold=-1, output_loading_info=True
    )
    assert not info["unexpected_keys"]
    torch.testing.assert_close(without.eval()(**batch, output_all_exits=True).all_logits, full.all_logits[:, 1:])


def test_the_first_tokens_embedding_is_no_exit():
    with pytest.raises(ValueError, match="exit_before_first_layer: the first token's embedding is the same"):
        tiny_model("bert", exit_before_first_layer=True)


def test_an_exit_is_added_to_a_trained_model(tmp_path):
    """Only the new off-ramp begins as a copy of the pooler; the others keep what they have learnt."""
    trained = tiny_model("bert", highway_pooling="mean")
    trained.save_pretrained(tmp_path)
    config = load_config(str(tmp_path))
    config.exit_before_first_layer = True
    model, new = load_pretrained(str(tmp_path), config)
    assert {name.split(".")[2] for name in new} == {"highway_embeddings"}
    added = model.bert.encoder.highway_embeddings.pooler.dense.weight
    assert torch.equal(added, model.bert.pooler.dense.weight)
    for name, tensor in trained.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    with pytest.raises(InputError, match=r"it has no bert.encoder.highway_embeddings.* and 3 more"):
        load_model(str(tmp_path), config)


def test_a_linear_off_ramp_is_the_classifier_alone():
    model = tiny_model("bert", highway_pooling="mean", highway_head="linear")
    names = {name for name in model.state_dict() if ".highway.0." in name}
    assert names == {"bert.encoder.highway.0.classifier.weight", "bert.encoder.highway.0.classifier.bias"}
    states, highway = torch.randn(2, 5, 32), model.bert.encoder.highway[0]
    expected = states.mean(dim=1) @ highway.classifier.weight.T + highway.classifier.bias
    torch.testing.assert_close(highway(states), expected)
    model.bert.init_highway_pooler()  # there is no pooler to copy into


@pytest.mark.parametrize("name", ["exit_threshold", "early_exit_entropy"])
def test_the_threshold_has_the_originals_name_as_alias(name, tmp_path):
    model = tiny_model("bert", **{name: 0.3})
    assert (model.config.exit_threshold, model.config.early_exit_entropy) == (0.3, 0.3)
    for set_threshold in (model.set_exit_threshold, model.set_early_exit_entropy):
        set_threshold(0.2)
        assert model.config.exit_threshold == model.config.early_exit_entropy == 0.2
        set_threshold(0.1)
    model.bert.encoder.set_early_exit_entropy(0.4)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["exit_threshold"] == 0.4
    batch = random_batch(model.config, [4, 9])
    with torch.no_grad():
        assert model(**batch, **{name: 10.0}).exit_layer.tolist() == [1, 1]


def test_a_plain_config_knows_the_alias_too():
    facts = tiny_config("bert").to_diff_dict() | {"early_exit_entropy": 0.3}
    with pytest.raises(
        ValueError, match=r"early_exit_entropy is 0.3, and exit_threshold, the same, is -1.0; remove one"
    ):
        DeeBertForSequenceClassification(BertConfig(**facts))
    del facts["exit_threshold"]
    plain = BertConfig(**facts)
    model = DeeBertForSequenceClassification(plain).eval()
    assert (model.config.exit_threshold, model.config.early_exit_entropy) == (0.3, 0.3)
    model.config.early_exit_entropy = 10.0
    with torch.no_grad():
        assert model(**random_batch(model.config, [4, 9])).exit_layer.tolist() == [1, 1]


def test_float_labels_mean_several_labels_from_the_first_call_on():
    """As in Hugging Face's loss, which says so in the config only after samples have exited."""
    model = tiny_model("bert", num_labels=3, problem_type=None)
    batch = random_batch(model.config, [5, 9]) | {"labels": torch.tensor([[1.0, 0, 1], [0, 0, 1]])}
    first, second = (model(**batch, exit_threshold=0.65) for _ in range(2))
    assert torch.equal(first.exit_layer, second.exit_layer)
    torch.testing.assert_close(first.entropy, second.entropy)
    assert first.entropy.max() < 0.694  # ln 2, of one label's yes or no


def test_one_label_may_be_a_class():
    model = tiny_model("bert", num_labels=1)
    model.config.problem_type = "single_label_classification"
    assert model(**random_batch(model.config, [5, 9]), labels=torch.zeros(2, dtype=torch.long)).loss == 0


def test_a_classifier_of_the_mean_reads_no_pooler():
    model = tiny_model("bert", classifier_pooling="mean").eval()
    batch = random_batch(model.config, [4, 9])
    with torch.no_grad():
        expected = model(**batch).logits
        model.base_model.pooler = BertPooler(model.config)  # as an encoder of one's own may have
        for switches in ({}, {"output_all_exits": True}, {"exit_threshold": 1e-9}):
            torch.testing.assert_close(model(**batch, **switches).logits, expected, rtol=1e-5, atol=1e-5)


def test_unknown_pooling_is_refused():
    with pytest.raises(ValueError, match="choose one of first, mean"):
        DeeBertForSequenceClassification(tiny_config("bert", highway_pooling="last"))


@pytest.mark.parametrize("num_labels", [1, 3])
def test_losses_of_both_stages(backbone, num_labels):
    model = tiny_model(backbone, num_labels=num_labels)
    batch = random_batch(model.config, [4, 9, 20, 3])
    labels = torch.tensor([0.5, -1.0, 3.0, 2.0]) if num_labels == 1 else torch.tensor([0, 2, 1, 1])

    def loss(logits):
        if num_labels == 1:
            return functional.mse_loss(logits[:, 0], labels)
        return functional.cross_entropy(logits, labels)

    exits = model(**batch, output_all_exits=True).all_logits
    torch.testing.assert_close(model(**batch, labels=labels).loss, loss(exits[:, 3]))
    expected = loss(exits[:, 0]) + loss(exits[:, 1]) + loss(exits[:, 2])
    torch.testing.assert_close(model(**batch, labels=labels, train_highway=True).loss, expected)


def test_stage_1_computes_no_off_ramp_and_stage_2_no_backbone_gradient(backbone):
    model = tiny_model(backbone)
    batch = random_batch(model.config, [4, 9]) | {"labels": torch.tensor([0, 1])}
    called = []
    for highway in model.base_model.encoder.highway:
        highway.register_forward_hook(lambda *_: called.append(1))
    model.train()
    model(**batch).loss.backward()
    assert not called
    model.zero_grad()
    model(**batch, train_highway=True).loss.backward()  # even where the backbone is not frozen
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, _ in model.named_parameters() if ".highway." in name}


def test_a_stage_freezes_what_it_does_not_train(backbone):
    model = tiny_model(backbone)
    for stage, off_ramps, rest in (("backbone", False, True), ("off_ramps", True, False), ("all", True, True)):
        model.train_stage(stage)
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == (off_ramps if is_off_ramp(name) else rest), name
    with pytest.raises(ValueError, match="stage is 'both'; choose one of backbone, off_ramps, all"):
        model.train_stage("both")


@pytest.mark.parametrize("num_labels", [1, 3])
def test_in_training_the_loss_is_that_of_the_stage(backbone, num_labels):
    model = tiny_model(backbone, num_labels=num_labels, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    batch = random_batch(model.config, [4, 9, 20, 3])
    labels = torch.tensor([0.5, -1.0, 3.0, 2.0]) if num_labels == 1 else torch.tensor([0, 2, 1, 1])
    batch["labels"] = labels
    loss = functional.mse_loss if num_labels == 1 else functional.cross_entropy
    losses = [loss(z.squeeze(1), labels) for z in model(**batch, output_all_exits=True).all_logits.unbind(dim=1)]
    for stage, expected in (("backbone", losses[-1]), ("off_ramps", sum(losses[:-1])), ("all", sum(losses))):
        model.train_stage(stage)
        output = model.train()(**batch)
        torch.testing.assert_close(output.loss, expected)
        output.loss.backward()
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
        model.zero_grad()
        torch.testing.assert_close(model.eval()(**batch).loss, losses[-1])


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")  # its successor is not in 5.10
def test_gradient_checkpointing_gives_the_same_gradients(backbone):
    model = tiny_model(backbone, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    batch = random_batch(model.config, [4, 9]) | {"labels": torch.tensor([0, 1])}
    model(**batch).loss.backward()
    expected = model.base_model.encoder.layer[0].output.dense.weight.grad.clone()
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(**batch).loss.backward()
    torch.testing.assert_close(model.base_model.encoder.layer[0].output.dense.weight.grad, expected)


def test_pipeline_exits_early(backbone, tiny_checkpoints, caplog):
    model = tiny_model(backbone)
    set_labels(model.config, ("dull", "lovely"))
    model.set_exit_threshold(10.0)
    ran = []
    model.base_model.encoder.layer[1].register_forward_hook(lambda *_: ran.append(1))
    classify = pipeline("text-classification", model=model, tokenizer=load_tokenizer(str(tiny_checkpoints[backbone])))
    predictions = classify(["a good film", "a very bad and dull scene"], batch_size=2)
    assert {prediction["label"] for prediction in predictions} <= {"dull", "lovely"}
    assert not ran
    assert "not supported" not in caplog.text


def test_an_untrained_checkpoint_is_no_model_to_evaluate(tiny_checkpoints):
    folder = str(tiny_checkpoints["bert"])
    with pytest.raises(InputError, match=r"not a trained DeeBERT, it has no .*highway.0.* and 13 more"):
        load_model(folder, load_config(folder))


def test_saving_leaves_no_temporary_files_and_replaces_files(tmp_path, tiny_checkpoints):
    tokenizer = load_tokenizer(str(tiny_checkpoints["bert"]))
    for seed in (0, 1):
        model = tiny_model("bert", seed=seed)
        save_model(model, tokenizer, tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1  # a service of another user can read all
    assert torch.equal(load_file(tmp_path / "model.safetensors")["classifier.weight"], model.classifier.weight)


@pytest.mark.parametrize(
    ("files", "model_type", "message"),
    [
        ({}, "bert", "no config.json there"),
        ({"config.json": "{"}, "bert", "config.json"),
        ({"config.json": '{"model_type": "distilbert"}'}, "bert", "a distilbert checkpoint"),
        (
            {"config.json": '{"model_type": "roberta"}'},
            "bert",
            "a roberta checkpoint, but the model type is bert; give roberta",
        ),
        (
            {"config.json": '{"model_type": "bert", "exit_rule": "boredom"}'},
            "bert",
            "config.json: exit_rule is 'boredom'",
        ),
        (
            {"config.json": '{"model_type": "bert", "exit_rule": "patience", "exit_threshold": 0.4}'},
            "bert",
            "config.json: patience counts",
        ),
    ],
)
def test_another_architecture_is_refused(tmp_path, files, model_type, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        load_config(str(tmp_path), model_type)


def test_a_model_of_another_task_is_a_start_and_no_result(tmp_path, backbone):
    before = tiny_model(backbone, num_labels=3)
    before.save_pretrained(tmp_path)
    config = tiny_config(backbone)
    model, new = load_pretrained(str(tmp_path), config)
    ours = [name for name, _ in model.named_parameters() if "classifier." in name and "dense" not in name]
    assert new == sorted(ours)
    for name, tensor in before.state_dict().items():
        assert name in new or torch.equal(tensor, model.state_dict()[name]), name
    with pytest.raises(InputError, match="weights do not load"):
        load_model(str(tmp_path), config)


def test_broken_weights_are_refused(tmp_path, tiny_checkpoints):
    config = load_config(str(tiny_checkpoints["bert"]))
    with pytest.raises(InputError, match="weights do not load"):
        load_pretrained(str(tmp_path), config)
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(InputError, match="weights do not load"):
        load_pretrained(str(tmp_path), config)
    tiny_model("bert", intermediate_size=40).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"weights do not load: bert.encoder.layer.0.* is \(40"):
        load_pretrained(str(tmp_path), config)
    tiny_model("roberta").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="so they are not those of a bert model"):
        load_pretrained(str(tmp_path), tiny_config("bert"))


def test_a_models_cache_folder_is_passed_on(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(CLASSES["bert"][1], "from_pretrained", lambda *_, **options: seen.update(options) or 1 / 0)
    with pytest.raises(InputError, match="division"):
        load_model(str(tmp_path), tiny_config("bert"), cache_dir="cache")
    assert seen["cache_dir"] == "cache"
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **options: seen.update(of=options) or 1 / 0)
    with pytest.raises(InputError, match="division"):
        load_tokenizer("name", cache_dir="cache")
    assert seen["of"]["cache_dir"] == "cache"


def test_cudnns_attention_is_switched_off():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        checkpoints.disable_cudnn_attention()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_a_checkpoint_in_half_precision_is_loaded_in_full(tmp_path):
    tiny_model("bert").half().save_pretrained(tmp_path)
    assert load_model(str(tmp_path), load_config(str(tmp_path))).dtype == torch.float32


def test_a_config_may_want_tuples():
    model = tiny_model("bert")
    batch = random_batch(model.config, [5, 9])
    expected = model(**batch)
    model.config.return_dict = False
    torch.testing.assert_close(model(**batch)[0], expected.logits)


@pytest.mark.parametrize("threshold", [-1.0, 1e9])
def test_a_config_may_request_hidden_states(threshold):
    model = tiny_model("bert", output_hidden_states=True, exit_threshold=threshold)
    assert [state.shape for state in model(**random_batch(model.config, [5, 9])).hidden_states] == [(2, 9, 32)] * 5


def test_distilberts_names_are_berts():
    config = checkpoints.MODELS["distilbert"][0](dropout=0.3, seq_classif_dropout=0.4, hidden_dim=7)
    assert (config.hidden_dropout_prob, config.classifier_dropout, config.intermediate_size) == (0.3, 0.4, 7)


def test_labels_say_what_the_problem_is():
    config = tiny_config("bert")
    for labels, given, problem in (
        (("a", "b"), None, "single_label_classification"),
        ((), None, "regression"),
        (("a", "b"), "multi_label_classification", "multi_label_classification"),
    ):
        checkpoints.set_labels(config, labels, given)
        assert config.problem_type == problem


def test_the_known_encoders_can_be_counted():
    assert len(checkpoints.MODELS) == len(list(checkpoints.MODELS)) >= 7
