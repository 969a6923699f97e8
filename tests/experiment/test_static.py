"""Models without exits, the baseline: an ordinary smaller Hugging Face model, with a teacher or without."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import run_glue_deebert
from deebert.data.batching import collator, eval_batches
from deebert.data.features import load_features
from deebert.data.tasks import TASKS
from deebert.evaluation.all_exits import AllExits
from deebert.evaluation.cost import costs_of
from deebert.modeling.backbones.bert import DeeBertForSequenceClassification
from deebert.modeling.checkpoints import load_config, load_final_classifier, load_tokenizer
from deebert.utils.errors import InputError

TRAIN = (
    "--do_train --do_eval --eval_each_highway --max_seq_length 32 --learning_rate 3e-3 --num_train_epochs 3 --no_cuda "
    "--save_steps 0 --plot_data_dir results"
)


def test_a_static_model_is_a_smaller_hugging_face_model(tiny_checkpoints, tiny_data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    common = f"--model_type bert --model_name_or_path {tiny_checkpoints['bert']} --task_name SST-2"
    common += f" --data_dir {tiny_data / 'SST-2'} {TRAIN}"
    static = "--train_strategy static --num_layers"

    def drive(folder: str, flags: str) -> AllExits:
        run_glue_deebert.main(f"{common} --output_dir {folder} {flags}".split())
        return AllExits.load(next((tmp_path / "results").rglob("all_exits.npz")))

    drive("two_stage", "--num_layers 2 --first_stage shared")
    exits = drive("plain", f"{static} 2 --first_stage shared")
    assert capsys.readouterr().out.count("stage 1: mean loss") == 1
    model = AutoModelForSequenceClassification.from_pretrained("plain").eval()
    assert type(model).__name__ == "BertForSequenceClassification"
    assert model.config.num_hidden_layers == 2
    assert not hasattr(model.config, "exit_rule")
    deebert = load_file("two_stage/model.safetensors")  # stage 2 leaves the backbone as it is
    assert all(torch.equal(tensor, deebert[name]) for name, tensor in model.state_dict().items())

    features = load_features(TASKS["SST-2"], tiny_data / "SST-2", "dev", ("0", "1"), load_tokenizer("plain"), 32)
    assert exits.logits.shape == (20, 1, 2)
    for rows in eval_batches(features.lengths, 8):
        batch = collator(model.config)([features[i] for i in rows])
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
        with torch.no_grad():
            np.testing.assert_allclose(exits.logits[rows, 0], model(**inputs).logits, atol=1e-5)
    layers = costs_of(load_config("two_stage"), features.lengths).layers
    np.testing.assert_allclose(exits.layer_operations[:, 0], layers.sum(axis=1))

    one = drive("one", f"{static} 1")  # not enough for exits
    assert one.layer_operations.sum() < exits.layer_operations.sum()
    taught = drive("taught", f"{static} 1 --distill 1 --teacher plain")
    again = drive("taught", f"{static} 1 --distill 1 --teacher plain --resume")
    np.testing.assert_array_equal(taught.logits, again.logits)

    flags = "--num_layers 2 --highway_pooling mean --highway_head linear --eval_after_first_stage"
    mean = drive("mean", f"--train_strategy static_off_ramp {flags}")
    printed = capsys.readouterr().out
    score = 100 * (mean.logits[:, 0].argmax(-1) == mean.labels).mean()
    assert f"After the first stage, dev: acc {score:.2f}" in printed  # not that of its last layer, which never runs
    run_glue_deebert.main(f"{common} --output_dir mean".replace("--do_train ", "").split())  # it knows its strategy
    assert f"Result of mean on dev: acc {score:.2f}" in capsys.readouterr().out
    with pytest.raises(InputError, match="mean: it always exits before its last layer"):
        load_final_classifier("mean", load_config("mean"))

    model = DeeBertForSequenceClassification.from_pretrained("mean").eval()
    assert model.config.num_hidden_layers == 3
    for rows in eval_batches(features.lengths, 8):
        batch = collator(model.config)([features[i] for i in rows])
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
        with torch.no_grad():
            output = model(**inputs)
        assert (output.exit_layer == 2).all()  # as it was saved
        np.testing.assert_allclose(mean.logits[rows, 0], output.logits, atol=1e-5)
    costs = costs_of(model.config, features.lengths)
    np.testing.assert_allclose(mean.layer_operations[:, 0], costs.layers[:, :2].sum(axis=1) + costs.off_ramps[:, 1])

    def distance(model: AllExits) -> float:
        return float(np.abs(model.logits - exits.logits).mean())

    assert distance(taught) < distance(one)
