"""Static models: which layers they have, what their classifier reads, what they cost, and that they train."""

from types import SimpleNamespace

import numpy as np
import pytest
import static_models
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertForSequenceClassification

from deebert.data.tasks import TASKS
from deebert.evaluation.all_exits import AllExits
from deebert.evaluation.cost import costs_of
from deebert.modeling.checkpoints import load_config
from deebert.modeling.exit_rules import NO_EXIT
from deebert.utils import cli


def run(folder, tiny_data, checkpoint, *flags: str) -> None:
    given = f"static_models.py --do_train --output_dir {folder} --model_name_or_path {checkpoint} --task_name SST-2 "
    given += f"--data_dir {tiny_data}/SST-2 --max_seq_length 32 --learning_rate 3e-3 --no_cuda --num_train_epochs 1"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [*given.split(), *flags])
        static_models.main()


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_an_ordinary_model_of_the_first_layers_is_saved(tmp_path, tiny_data, tiny_checkpoints, capsys, pooling):
    run(tmp_path, tiny_data, tiny_checkpoints["bert"], "--layers", "2", "--pooling", pooling)
    model, exits = static_models.load(tmp_path), AllExits.load(tmp_path / "all_exits.npz")
    assert static_models.pooling_of(model) == pooling
    assert len(model.base_model.encoder.layer) == 2
    if pooling == "first":
        assert type(model) is BertForSequenceClassification
        assert type(AutoModelForSequenceClassification.from_pretrained(tmp_path)) is BertForSequenceClassification
    tokenizer, texts = AutoTokenizer.from_pretrained(tmp_path), TASKS["SST-2"].read(tiny_data / "SST-2", "dev")
    for i, example in enumerate(texts[:3]):  # one at a time: padding makes no difference
        inputs = tokenizer(*example.texts, truncation=True, max_length=32, return_tensors="pt")
        with torch.no_grad():
            np.testing.assert_allclose(model(**inputs).logits[0], exits.logits[i, 0], atol=1e-5)
    assert exits.labels.tolist() == [example.label for example in texts]
    assert f"2 layers, dev score {100 * exits.full_score(TASKS['SST-2']):.1f}" in capsys.readouterr().out


def test_it_starts_from_the_checkpoints_own_layers(tmp_path, tiny_data, tiny_checkpoints):
    run(tmp_path, tiny_data, tiny_checkpoints["bert"], "--layers", "2", "--learning_rate", "1e-12")
    start = AutoModelForSequenceClassification.from_pretrained(tiny_checkpoints["bert"]).bert.state_dict()
    trained = static_models.load(tmp_path).encoder.state_dict()
    assert len(trained) > 20
    for name, tensor in trained.items():
        torch.testing.assert_close(tensor, start[name], msg=name)


def test_a_student_learns_the_labels_and_the_teachers_predictions(tmp_path, tiny_data, tiny_checkpoints, monkeypatch):
    class Teacher:  # sure that each text is of label 1
        def __init__(self, folder: str):
            assert folder == "teacher"

        def __call__(self, texts: list[tuple[str, ...]], exit_threshold: float) -> list[SimpleNamespace]:
            assert exit_threshold == NO_EXIT
            return [SimpleNamespace(probabilities={"1": 0.9, "0": 0.1}) for _ in texts]

    monkeypatch.setattr(static_models, "Classifier", Teacher)
    train = TASKS["SST-2"].read(tiny_data / "SST-2", "train")
    soft = np.array(static_models.soft_labels("teacher", train, ("0", "1")))
    labels = np.array([example.label for example in train])
    np.testing.assert_allclose(soft[labels == 0], [[0.55, 0.45]] * sum(labels == 0))
    np.testing.assert_allclose(soft[labels == 1], [[0.05, 0.95]] * sum(labels == 1))
    run(
        tmp_path,
        tiny_data,
        tiny_checkpoints["bert"],
        "--layers",
        "1",
        "--teacher",
        "teacher",
        "--num_train_epochs",
        "5",
    )
    logits = AllExits.load(tmp_path / "all_exits.npz").logits[:, 0]
    assert (logits[:, 1] - logits[:, 0]).mean() > 0.3  # two thirds of the mass is at label 1


def test_all_layers_cost_what_the_full_model_costs(tiny_checkpoints):
    config, lengths = load_config(str(tiny_checkpoints["bert"])), np.array([5.0, 30.0])
    full = costs_of(config, lengths).full
    layers = config.num_hidden_layers
    np.testing.assert_allclose(static_models.operations(config, layers, "first", lengths), full)
    one, two = (static_models.operations(config, k, "mean", lengths) for k in (1, 2))
    assert (static_models.operations(config, layers, "mean", lengths) > full).all()  # its last layer is not shortened
    assert (two < full).all()
    assert (one < two).all()
    config.classifier_pooling = "mean"  # of our model; a static one has its own
    np.testing.assert_allclose(static_models.operations(config, layers, "first", lengths), full)
    mean = static_models.operations(config, layers, "mean", lengths)
    np.testing.assert_allclose(mean, costs_of(config, lengths).full)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--layers is required"),
        (["--layers", "5"], "--layers 5: .* has 4"),
        (["--layers", "2", "--pooling", "max"], "invalid choice: 'max'"),
    ],
)
def test_bad_flags_get_one_line(tmp_path, tiny_data, tiny_checkpoints, flags, message):
    with pytest.raises(cli.InputError, match=message):
        run(tmp_path / "none", tiny_data, tiny_checkpoints["bert"], *flags)
    assert not (tmp_path / "none").exists()
