"""Both stages: which weights they change, that a step is the paper's, and that they learn."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from support.helpers import train
from support.tiny import tiny_model, tiny_tokenizer
from torch.nn import functional

from deebert.data.batching import TrainBatches, collator, tokenize
from deebert.data.tasks import TASKS
from deebert.evaluation.all_exits import layer_scores, run_all_exits
from deebert.training.stage import parameter_groups
from deebert.training.strategies import TrainSettings
from deebert.utils.errors import InputError

QUIET = {"logging_steps": 0, "save_steps": 0}


def data(backbone, tiny_data, folder, split="train"):
    return tokenize(TASKS["SST-2"].read(tiny_data / "SST-2", split), tiny_tokenizer(backbone), 32)


def snapshot(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def run(stage, model, features, **settings):
    settings = TrainSettings(**QUIET | {"learning_rate": 1e-3, "num_train_epochs": 1} | settings)
    return train(stage, model, features, settings).mean_loss


def test_stage_1_trains_all_but_the_off_ramps_and_stage_2_only_them(backbone, tiny_data, tmp_path):
    model, features = tiny_model(backbone), data(backbone, tiny_data, tmp_path)
    states = [snapshot(model)]
    for stage in (1, 2):
        run(stage, model, features)
        states.append(snapshot(model))
    for stage, (before, after) in enumerate(pairwise(states), 1):
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        off_ramps = {name for name in before if ".highway." in name}
        assert changed == (set(before) - off_ramps if stage == 1 else off_ramps)


def test_two_stages_learn_the_task(backbone, tiny_data, tmp_path):
    model = tiny_model(backbone, initializer_range=0.05, highway_pooling="mean")
    features, dev = data(backbone, tiny_data, tmp_path), data(backbone, tiny_data, tmp_path, "dev")
    first = run(1, model, features, num_train_epochs=12, learning_rate=3e-3)
    run(2, model, features, num_train_epochs=12, learning_rate=3e-3)
    assert first < math.log(2)
    exits = run_all_exits(model, dev, collator(model.config))
    scores = [s["acc"] for s in layer_scores(TASKS["SST-2"], exits).values()]
    assert min(scores) >= 0.9, scores


def test_a_step_of_stage_2_is_the_papers(tiny_data, tmp_path):
    """One step of stage 2 against AdamW on the sum of the off-ramps' losses, written out."""
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model, reference = tiny_model("bert", **dropout), tiny_model("bert", **dropout)
    features = data("bert", tiny_data, tmp_path)
    run(2, model, features, max_steps=1, per_gpu_train_batch_size=8, weight_decay=0.1, max_grad_norm=0.5)

    batch = collator(model.config)(features, TrainBatches(features.lengths, 8, 42).epoch(0)[0])
    labels, _ = batch.pop("labels"), batch.pop("index")
    highway = reference.bert.encoder.highway
    groups = [
        {"params": [p for n, p in highway.named_parameters() if n.endswith("weight")], "weight_decay": 0.1},
        {"params": [p for n, p in highway.named_parameters() if n.endswith("bias")], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, eps=1e-8)
    states = reference(**batch, output_hidden_states=True).hidden_states
    logits = [
        ramp.classifier(torch.tanh(ramp.pooler.dense(h[:, 0]))) for ramp, h in zip(highway, states[1:], strict=False)
    ]
    sum(functional.cross_entropy(z, labels) for z in logits).backward()
    torch.nn.utils.clip_grad_norm_(highway.parameters(), 0.5)
    optimizer.step()
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, msg=name)


def test_gradient_accumulation_is_a_larger_batch(tiny_data, tmp_path):
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    features = data("bert", tiny_data, tmp_path)
    models = []
    for size, accumulation in ((20, 1), (5, 4), (3, 7)):
        model = tiny_model("bert", **dropout)
        # a large epsilon: AdamW would otherwise turn rounding errors into full steps
        batches = {"per_gpu_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        run(1, model, features, num_train_epochs=2, adam_epsilon=0.1, **batches)
        models.append(model.state_dict())
    for name, tensor in models[0].items():  # 48 samples: the last step has 8, in micro-batches of 5 and 3
        torch.testing.assert_close(models[1][name], tensor, atol=1e-6, rtol=0, msg=name)
    changed = [name for name in models[0] if not torch.allclose(models[2][name], models[0][name], atol=2e-5, rtol=1e-3)]
    assert changed  # steps of 21 samples differ


def test_the_same_seed_gives_the_same_weights(tiny_data, tmp_path):
    features, states = data("bert", tiny_data, tmp_path), []
    for seed in (1, 1, 2):
        model = tiny_model("bert")
        torch.manual_seed(seed)
        run(1, model, features, seed=seed)
        states.append(snapshot(model))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["classifier.weight"], states[2]["classifier.weight"])


def test_callbacks_are_called_at_the_right_steps(tiny_data, tmp_path):
    logged, saved = [], []
    model, features = tiny_model("bert"), data("bert", tiny_data, tmp_path)
    settings = TrainSettings(
        per_gpu_train_batch_size=8,
        num_train_epochs=1.5,
        logging_steps=3,
        save_steps=4,
        warmup_steps=3,
        learning_rate=1e-4,
    )
    train(
        1,
        model,
        features,
        settings,
        log=lambda training, scalars: logged.append((training.steps, scalars)),
        save=lambda training: saved.append(training.steps),
    )
    assert [step for step, _ in logged] == [3, 6, 9]  # 1.5 epochs of 6 batches
    assert saved == [4, 8, 9]  # and at the end
    rates = [scalars["learning_rate"] for _, scalars in logged]
    np.testing.assert_allclose(rates, [1e-4, 0.5e-4, 0], atol=1e-12)
    assert all(scalars["grad_norm"] > 0 and scalars["loss"] > 0 for _, scalars in logged)


def test_an_epoch_may_be_the_last_one(tiny_data, tmp_path):
    epochs, saved = [], []
    model, features = tiny_model("bert"), data("bert", tiny_data, tmp_path)

    def epoch(training) -> bool:
        epochs.append(training.steps)
        return len(epochs) == 2

    settings = TrainSettings(num_train_epochs=5, logging_steps=0, save_steps=5)
    training = train(1, model, features, settings, epoch=epoch, save=lambda training: saved.append(training.steps))
    assert epochs == [6, 12]  # 6 batches in an epoch
    assert saved == [5, 10, 12]
    assert (training.steps, training.state_dict()["total"]) == (12, 12)  # one that is resumed here is at its end


def test_each_part_has_its_learning_rate(backbone):
    model = tiny_model(backbone)
    settings = TrainSettings(learning_rate=1.0, head_learning_rate=2.0, highway_learning_rate=3.0, weight_decay=0.5)
    groups = parameter_groups(model, settings)
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    by_name = {name: rates[id(parameter)] for name, parameter in model.named_parameters()}
    backbones = (".layer.", ".layers.", "embeddings.", "final_norm", "relative_attention_bias")
    for name, rate in by_name.items():
        of_backbone = any(part in name for part in backbones)
        assert rate == (3 if ".highway" in name else 1 if of_backbone else 2), name
    assert {*by_name.values()} == {1, 2, 3}
    plain = parameter_groups(model, TrainSettings(learning_rate=1.0))
    assert {group["lr"] for group in plain} == {1}


def test_a_loss_that_is_not_finite_ends_the_training(tiny_data, tmp_path):
    model = tiny_model("bert")
    torch.nn.init.constant_(model.classifier.weight, math.inf)
    with pytest.raises(
        InputError, match=r"stage 1, step 1: the loss is nan, on the training samples (\d+ ){7}\d+; lower"
    ):
        run(1, model, data("bert", tiny_data, tmp_path))
