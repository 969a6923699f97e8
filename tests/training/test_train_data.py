"""Off-ramps that are trained on cached features equal those trained with the backbone."""

import contextlib

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from support.tiny import tiny_model, tiny_tokenizer

from deebert.data.batching import collator, tokenize
from deebert.data.tasks import TASKS
from deebert.modeling.off_ramps import is_off_ramp
from deebert.training import train_data
from deebert.training.stage import StageTraining
from deebert.training.strategies import TrainSettings
from deebert.training.train_data import TokenData, cached_features

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SETTINGS = TrainSettings(
    per_gpu_train_batch_size=5,
    gradient_accumulation_steps=2,
    num_train_epochs=2,
    learning_rate=1e-2,
    adam_epsilon=1e-2,
    distill=0.3,
)


def trained(model, features, cached: bool, tmp_path) -> dict[str, torch.Tensor]:
    accelerator, collate = Accelerator(cpu=True), collator(model.config)
    source = contextlib.nullcontext(TokenData(features, collate))
    if cached:
        source = cached_features(model, features, collate, accelerator, tmp_path)
    torch.manual_seed(0)
    with source as data:
        StageTraining(2, model, data, SETTINGS, accelerator).run()
    return model.state_dict()


@pytest.mark.parametrize(
    ("backbone", "pooling", "rule", "task"),  # every pair of choices
    [
        ("bert", "first", "entropy", "SST-2"),
        ("bert", "mean", "patience", "STS-B"),
        ("roberta", "mean", "entropy", "SST-2"),
        ("roberta", "first", "patience", "STS-B"),
    ],
)
def test_training_with_a_cache_equals_training_without_dropout_in_the_backbone(
    backbone, pooling, rule, task, tiny_data, tmp_path
):
    config = {"highway_pooling": pooling, "exit_rule": rule, "num_labels": TASKS[task].num_labels}
    config |= {"highway_head": "linear", "exit_before_first_layer": True} if pooling == "mean" else {}
    features = tokenize(TASKS[task].read(tiny_data / task, "train")[:28], tiny_tokenizer(backbone), 32)
    plain, cached = (
        trained(tiny_model(backbone, **config, **NO_DROPOUT), features, use, tmp_path) for use in (False, True)
    )
    before = tiny_model(backbone, **config).state_dict()
    for name, tensor in plain.items():
        torch.testing.assert_close(cached[name], tensor, atol=1e-4, rtol=1e-3, msg=name)
        assert torch.equal(tensor, before[name]) != is_off_ramp(name), name


def test_a_large_cache_is_a_temporary_file(tiny_data, tmp_path, monkeypatch):
    features = tokenize(TASKS["SST-2"].read(tiny_data / "SST-2", "train")[:28], tiny_tokenizer("bert"), 32)
    in_memory = trained(tiny_model("bert"), features, True, tmp_path)
    monkeypatch.setattr(train_data, "IN_MEMORY", 0)
    model = tiny_model("bert")
    with cached_features(model, features, collator(model.config), Accelerator(cpu=True), tmp_path) as data:
        assert isinstance(data.pooled, np.memmap)
        assert not list(tmp_path.iterdir())  # it has no name, so that a killed process leaves nothing
    in_file = trained(model, features, True, tmp_path)
    assert all(torch.equal(in_memory[name], in_file[name]) for name in in_memory)  # dropout of the off-ramps, too


def test_only_the_off_ramps_have_dropout(tiny_data, tmp_path):
    features = tokenize(TASKS["SST-2"].read(tiny_data / "SST-2", "train")[:28], tiny_tokenizer("bert"), 32)
    states = []
    for dropout in (
        {"classifier_dropout": 0.5},
        {"classifier_dropout": 0.5, "hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5},
        {"classifier_dropout": 0.0},
    ):
        states.append(trained(tiny_model("bert", **dropout), features, True, tmp_path))
    name = "bert.encoder.highway.0.classifier.weight"
    assert torch.equal(states[0][name], states[1][name])
    assert not torch.equal(states[0][name], states[2][name])
