"""What the probes of a frozen backbone say and fit, beside the same by other means."""

import dataclasses

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from sklearn.linear_model import LogisticRegression
from support.tiny import tiny_model, tiny_tokenizer

from deebert.data.batching import collator, tokenize
from deebert.data.tasks import TASKS
from deebert.training.probes import INVERSE_PENALTY, fit_classifier, last_states, probe_poolings
from deebert.training.train_data import TokenData


def inputs(features, model, i: int) -> dict[str, torch.Tensor]:
    """Text i as a batch of one."""
    batch = next(iter(TokenData(features, collator(model.config)).load([[i]])))
    return {name: tensor for name, tensor in batch.items() if name not in ("index", "labels")}


@pytest.mark.parametrize("task", ["SST-2", "STS-B"])
def test_the_probe_is_a_ridge_regression_that_leaves_each_text_out(task, tiny_data):
    """Each text is predicted by a regression on the others, for the best of seven strengths."""
    examples = TASKS[task].read(tiny_data / task, "train")[:24]
    features, model = (
        tokenize(examples, tiny_tokenizer("bert"), 32),
        tiny_model("bert", num_labels=TASKS[task].num_labels),
    )
    explained = probe_poolings(model, features, collator(model.config), Accelerator(cpu=True))
    assert explained.keys() == {"cls", "mean"}

    model.eval()
    states = {"cls": [], "mean": []}
    for i in range(len(features)):
        with torch.no_grad():
            last = model.bert(**inputs(features, model, i)).last_hidden_state[0].double().numpy()
        states["cls"].append(last[0])
        states["mean"].append(last.mean(axis=0))
    targets = np.eye(2)[features.labels] if task == "SST-2" else features.labels[:, None].astype(float)
    for name, pooled in states.items():
        x = (np.array(pooled) - np.mean(pooled, axis=0)) / (np.std(pooled, axis=0) + 1e-6)
        errors = []
        for strength in len(x) * 10.0 ** np.arange(-4, 3):
            left_out = []
            for i in range(len(x)):
                rest = np.arange(len(x)) != i
                centre, mean = x[rest].mean(axis=0), targets[rest].mean(axis=0)
                a = x[rest] - centre
                weights = np.linalg.solve(a.T @ a + strength * np.eye(x.shape[1]), a.T @ (targets[rest] - mean))
                left_out.append(targets[i] - mean - (x[i] - centre) @ weights)
            errors.append(np.square(left_out).mean())
        assert explained[name] == pytest.approx(1 - min(errors) / targets.var(axis=0).mean(), abs=1e-3)


def test_the_probe_prefers_what_knows_the_labels(tiny_data):
    """Random layers keep in the first token little of a word that stands elsewhere; the mean has it."""
    examples = TASKS["SST-2"].read(tiny_data / "SST-2", "train")
    features, model = tokenize(examples, tiny_tokenizer("bert"), 32), tiny_model("bert")
    texts = [set(inputs(features, model, i)["input_ids"][0].tolist()) for i in range(len(features))]
    words = set().union(*texts)
    word = min(words, key=lambda word: abs(sum(word in text for text in texts) - len(texts) / 2))
    features = dataclasses.replace(features, labels=np.array([word in text for text in texts], np.int64))
    model.base_model.encoder.layer[-1].output.LayerNorm.register_forward_hook(
        lambda module, inputs, output: torch.cat([torch.ones_like(output[:, :1]), output[:, 1:]], dim=1)
    )
    explained = probe_poolings(model, features, collator(model.config), Accelerator(cpu=True))
    assert explained["cls"] == pytest.approx(0, abs=0.05)
    assert explained["mean"] > 0.1


def test_numbers_are_fitted_too(tiny_data):
    examples = TASKS["STS-B"].read(tiny_data / "STS-B", "train")
    model = tiny_model("bert", num_labels=1, classifier_pooling="mean")
    features = tokenize(examples, tiny_tokenizer("bert"), 32)
    fit_classifier(model, features, collator(model.config), Accelerator(cpu=True))
    (pooled,) = last_states(model, features, collator(model.config), Accelerator(cpu=True), ["mean"])
    with torch.no_grad():
        error = (model.classifier(torch.from_numpy(pooled))[:, 0].numpy() - features.labels).var()
    assert error < 0.9 * features.labels.var()


@pytest.mark.parametrize("several", [False, True])
def test_a_fitted_classifier_is_logistic_regression_and_nothing_else_changes(tiny_data, several):
    examples = TASKS["SST-2"].read(tiny_data / "SST-2", "train")
    kind = {"num_labels": 2, "problem_type": "multi_label_classification"} if several else {"num_labels": 3}
    features, model = (
        tokenize(examples, tiny_tokenizer("bert"), 32),
        tiny_model("bert", classifier_pooling="mean", **kind),
    )
    labels = np.random.default_rng(0).integers(3, size=len(features))
    labels = np.eye(3, 2, dtype=np.float32)[labels] if several else labels
    features = dataclasses.replace(features, labels=labels)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fit_classifier(model, features, collator(model.config), Accelerator(cpu=True))
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"classifier.weight", "classifier.bias"}
    assert all(parameter.grad is None for parameter in model.parameters())

    (pooled,) = last_states(model, features, collator(model.config), Accelerator(cpu=True), ["mean"])
    size = np.linalg.norm(pooled, axis=1).mean()
    targets = list(labels.T) if several else [labels]
    strength = INVERSE_PENALTY / (2 if several else 1)  # the loss is the mean over the labels
    fitted = [LogisticRegression(C=strength, max_iter=5000, tol=1e-8).fit(pooled / size, each) for each in targets]
    expected = np.stack([each.decision_function(pooled / size) for each in fitted], axis=1).reshape(len(pooled), -1)
    with torch.no_grad():
        given = model.classifier(torch.from_numpy(pooled)).numpy()
    centred = (lambda z: z) if several else (lambda z: z - z.mean(axis=1, keepdims=True))
    np.testing.assert_allclose(centred(given), centred(expected), atol=0.02)
