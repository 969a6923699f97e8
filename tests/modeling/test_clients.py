"""Programs of other people that know Hugging Face's classifiers, and get one with early exit."""

import logging

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from support.tiny import random_batch, sentences, tiny_model, tiny_tokenizer
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments


def rows(tokenizer) -> list[dict]:
    return [{**tokenizer(text), "labels": label} for text, label in sentences(6, seed=0)]


def trainer(model, folder, **options) -> Trainer:
    tokenizer = tiny_tokenizer("bert")
    settings = TrainingArguments(str(folder), per_device_eval_batch_size=4, report_to=[], use_cpu=True)
    return Trainer(
        model, settings, eval_dataset=rows(tokenizer), data_collator=DataCollatorWithPadding(tokenizer), **options
    )


def accuracy(predicted) -> dict[str, float]:
    """As in every tutorial."""
    logits, labels = predicted
    return {"accuracy": float((np.argmax(logits, axis=-1) == labels).mean())}


def test_trainer_evaluates_and_predicts_with_the_usual_metric(tmp_path):
    model = tiny_model("bert", exit_threshold=0.5)
    training = trainer(model, tmp_path, compute_metrics=accuracy)
    with torch.no_grad():
        batch = training.data_collator(rows(tiny_tokenizer("bert")))
        expected = model(**batch)
    right = (expected.logits.argmax(-1) == batch["labels"]).float().mean().item()
    assert training.evaluate()["eval_accuracy"] == pytest.approx(right)
    predicted = training.predict(training.eval_dataset)
    np.testing.assert_allclose(predicted.predictions, expected.logits, atol=1e-5)
    with_exits = trainer(model, tmp_path).predict(training.eval_dataset, ignore_keys=[])
    assert with_exits.predictions[1].tolist() == expected.exit_layer.tolist()


def test_the_loss_comes_first_and_then_the_logits():
    model = tiny_model("bert", attn_implementation="eager")
    batch = random_batch(model.config, [5, 9]) | {"labels": torch.tensor([0, 1])}
    for options in ({}, {"exit_threshold": 0.5}, {"output_all_exits": True}):
        output = model(**batch, **options)
        assert output[0] is output.loss
        assert output[1] is output.logits
        loss, logits = model(**batch, **options, return_dict=False)[:2]
        torch.testing.assert_close((loss, logits), (output.loss, output.logits))
    output = model(**batch, output_hidden_states=True, output_attentions=True)
    assert list(output) == ["loss", "logits", "hidden_states", "attentions", "exit_layer", "entropy"]
    assert list(model(**batch, output_all_exits=True)) == ["loss", "logits", "exit_layer", "entropy", "all_logits"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of PyTorch, about its successor
def test_a_quantized_model_exits():
    model = tiny_model("bert", highway_pooling="mean")
    quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    batch = random_batch(model.config, [5, 9, 3])
    with torch.no_grad():
        full = quantized(**batch, output_all_exits=True)
        early = quantized(**batch, exit_threshold=10.0)
    assert early.exit_layer.tolist() == [1, 1, 1]
    torch.testing.assert_close(early.logits, full.all_logits[:, 0], atol=0.05, rtol=0.05)
    assert (full.logits - model(**batch).logits).abs().max() < 0.5


def test_a_model_whose_weights_accelerate_loads_layer_by_layer_gives_the_same(tmp_path):
    """Its hooks are on the layers: without them the last layer's weights would be on no device."""
    model = tiny_model("bert", highway_pooling="mean")
    batch = random_batch(model.config, [5, 9, 3])
    with torch.no_grad():
        expected = [model(**batch, exit_threshold=threshold) for threshold in (-1, 0.5)]
        device_map = {"bert.embeddings": "cpu", "bert.pooler": "cpu", "classifier": "cpu", "dropout": "cpu"}
        device_map |= {f"bert.encoder.layer.{i}": "disk" for i in range(4)} | {"bert.encoder.highway": "cpu"}
        model = dispatch_model(model, device_map, main_device="cpu", offload_dir=tmp_path)
        actual = [model(**batch, exit_threshold=threshold) for threshold in (-1, 0.5)]
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.exit_layer.tolist() == theirs.exit_layer.tolist()
        torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-5, rtol=1e-4)


def test_untrained_off_ramps_are_named_once(tmp_path, caplog):
    """Also after they were saved and loaded, when transformers has nothing new to report."""
    model = tiny_model("bert")
    for i in (0, 2):
        torch.nn.init.zeros_(model.bert.encoder.highway[i].classifier.bias)
    model.save_pretrained(tmp_path)
    model = type(model).from_pretrained(tmp_path)
    batch = random_batch(model.config, [5, 9])
    with caplog.at_level(logging.WARNING), torch.no_grad():
        model(**batch)
        assert "off-ramp" not in caplog.text
        for _ in range(2):
            model(**batch, exit_threshold=0.5)
    assert caplog.text.count("off-ramps after the layers [1, 3] were never trained") == 1
