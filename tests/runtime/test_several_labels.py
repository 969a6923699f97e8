"""Several labels a sample: the uncertainty is that of the least certain label, in every runtime."""

import numpy as np
import pytest
import torch
from cuda_graphs import GraphedDeeBert
from scipy.special import expit
from scipy.stats import entropy as scipy_entropy
from support.tiny import random_batch
from torch.nn import functional

from deebert.evaluation.all_exits import AllExits
from deebert.evaluation.metrics import class_scores, exits_at_chance, majority, predictions
from deebert.evaluation.threshold_selection import changed_texts
from deebert.modeling.exit_rules import EXIT_RULES, make_rule
from deebert.training.losses import distillation_losses, training_loss

LABELS = 3


@pytest.fixture
def model(models, monkeypatch):
    """A model whose three labels exclude no other; its export is the one that all tests share."""
    for one in models["bert"]:
        monkeypatch.setattr(one.config, "problem_type", "multi_label_classification")
        monkeypatch.setattr(one.config, "exit_rule", "entropy")
        monkeypatch.setattr(one.config, "exit_threshold", -1.0)
    monkeypatch.setattr(models["bert"][1], "graph_rule", "of single labels")
    return models["bert"][0]


@pytest.fixture
def runtimes(model, models) -> dict:
    """Functions from a batch to an output."""
    exported, graphed = models["bert"][1], GraphedDeeBert(model)
    return {
        "onnx": lambda batch: exported(**batch),
        "graphed": lambda batch: graphed(**batch),
        "batch": lambda batch: model(**batch),
    }


def brute_force(rule: str, logits: np.ndarray) -> list[float]:
    """The uncertainties (N-1,) of one sample, from the logits (N, C) of all exits."""
    uncertainties, row, before = [], 0, None
    for now in logits[:-1]:
        p = expit(now.astype(np.float64))
        row, before = row + 1 if before is not None and ((now > 0) == before).all() else 1, now > 0
        entropies = scipy_entropy([p, 1 - p])
        of_rule = {
            "entropy": max(entropies),
            "confidence": max(np.minimum(p, 1 - p)),
            "patience": 1 / row,
        }
        uncertainties.append(of_rule[rule])
    return uncertainties


@pytest.mark.parametrize("name", EXIT_RULES)
def test_every_runtime_exits_where_brute_force_says(models, model, runtimes, name):
    batch = random_batch(model.config, [5, 9, 3, 12, 7, 2, 9, 4], seed=0)
    batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    with torch.no_grad():
        full = model(**batch, output_all_exits=True)
    logits = full.all_logits.numpy()
    exits = AllExits(logits, None, rule=name, several_labels=True)
    expected = np.array([brute_force(name, sample) for sample in logits])
    np.testing.assert_allclose(exits.uncertainties, expected, atol=1e-5)
    threshold = 2.0 if name == "patience" else float(np.sort(expected, axis=None)[expected.size // 2 - 1 :][:2].mean())
    layers = exits.exit_layers(threshold)
    assert len(set(layers)) > 1
    for one in models["bert"]:
        one.set_exit_rule(name, threshold)
    singles = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(len(layers))]
    with torch.no_grad():
        outputs = {f"{runtime}, one by one": list(map(run, singles)) for runtime, run in runtimes.items()}
        outputs |= {runtime: [run(batch)] for runtime, run in runtimes.items()}
    nats = [brute_force("entropy", np.stack([sample[i - 1]] * 2))[0] for sample, i in zip(logits, layers, strict=True)]
    for runtime, parts in outputs.items():
        assert torch.cat([part.exit_layer for part in parts]).tolist() == layers.tolist(), runtime
        close = {"atol": 1e-4, "err_msg": runtime}
        np.testing.assert_allclose(torch.cat([part.logits for part in parts]), exits.logits_at(layers), **close)
        np.testing.assert_allclose(torch.cat([part.entropy for part in parts]), nats, **close)


def test_the_loss_is_binary_cross_entropy(model):
    batch, labels = random_batch(model.config, [5, 9, 3]), torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1]])
    output = model(**batch, labels=labels, train_highway=True)
    each = [functional.binary_cross_entropy_with_logits(x, labels.float()) for x in output.all_logits.unbind(1)]
    torch.testing.assert_close(output.loss, sum(each[:-1]))
    loss, losses = training_loss(output, labels, [1.0] * len(each))
    torch.testing.assert_close(loss, sum(each))
    torch.testing.assert_close(losses, torch.stack(each).detach())
    p, q = (torch.sigmoid(output.all_logits[:, i] / 2) for i in (-1, 0))  # at temperature 2
    divergence = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    students, teacher = output.all_logits[:, :1], output.all_logits[:, -1]
    torch.testing.assert_close(distillation_losses(students, teacher, True)[:, 0], 4 * divergence.mean(dim=1))


def test_scores_of_classes_and_of_chance():
    logits = np.array([[2.0, -1, -1], [1, 1, -1], [-1, 2, -1], [1, -1, -1]])
    labels = np.array([[1, 0, 0], [1, 1, 0], [1, 1, 0], [0, 0, 0]], np.float32)
    each = class_scores(logits, labels)
    nothing = np.nan  # the third label neither occurs nor is predicted
    for name, expected in (
        ("precision", [2 / 3, 1, nothing]),
        ("recall", [2 / 3, 1, nothing]),
        ("f1", [2 / 3, 1, nothing]),
    ):
        np.testing.assert_allclose(each[name], expected)
    assert majority(labels) == (0, pytest.approx(2 * 3 / (5 + 4)))
    nothing = np.full_like(logits, -1)
    assert exits_at_chance(np.stack([nothing, logits], axis=1), labels) == [0]
    single = np.array([0, 0, 1])
    assert majority(single) == (0, pytest.approx(2 / 3))
    right, constant = np.eye(2)[single], np.array([[1.0, 0]] * 3)
    assert exits_at_chance(np.stack([constant, right, constant], axis=1), single) == [0, 2]
    assert predictions(logits, several_labels=True).tolist()[1] == [1, 1, 0]


def test_lost_samples():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(400, 2, LABELS)).astype(np.float32) * 3
    labels = (rng.random((400, LABELS)) < expit(logits[:, -1] / 2)).astype(np.float32)
    exits = AllExits(logits, labels, several_labels=True)
    right = ((logits > 0) == labels[:, None]).all(-1)
    _, lost, gained = changed_texts(exits, exits.exit_layers(10.0))
    assert (lost, gained) == ((~right[:, 0] & right[:, 1]).sum(), (right[:, 0] & ~right[:, 1]).sum())


def test_the_threshold_of_the_rule_does_not_depend_on_the_number_of_labels():
    assert make_rule("entropy", 28, several_labels=True).max_uncertainty == pytest.approx(np.log(2))
