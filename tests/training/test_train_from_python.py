"""The page that trains by transformers.Trainer: its code runs, and the exits score what those of the driver score."""

import re

import numpy as np
import pandas
import pytest
import torch
from support.helpers import ROOT
from support.tiny import sentences, tiny_model, tiny_tokenizer
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

import run_glue_deebert
from deebert.evaluation.all_exits import AllExits
from deebert.experiment import run

CODE = "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / "docs/train_from_python.md").read_text("utf-8"), re.DOTALL))
FOR_A_TINY_MODEL = {
    "max_length=128": "max_length=32",
    "learning_rate=2e-5": "learning_rate=3e-3",
    "epochs=3": "epochs=6",
}


def test_the_page_scores_what_the_driver_scores(tiny_checkpoints, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "FEW", 0)  # the page's classifier starts at random
    for name, n, seed in (("train", 96, 1), ("dev", 60, 2)):
        pandas.DataFrame(sentences(n, seed), columns=["text", "label"]).to_csv(f"{name}.csv", index=False)
    code = CODE
    for was, becomes in {"bert-base-uncased": str(tiny_checkpoints["bert"]), **FOR_A_TINY_MODEL}.items():
        assert was in code
        code = code.replace(was, becomes)
    page = {}
    exec(code, page)
    printed = capsys.readouterr().out
    flags = "--do_train --do_eval --eval_each_highway --recipe fast --no_cuda --max_seq_length 32 --learning_rate 3e-3"
    files = "--train_file train.csv --validation_file dev.csv --output_dir driver --plot_data_dir results"
    flags += " --head_learning_rate 3e-3 --per_gpu_train_batch_size 8 --load_best_model_at_end false"
    start = f"--num_train_epochs 6 --save_steps 0 --model_name_or_path {tiny_checkpoints['bert']}"
    run_glue_deebert.main(f"{flags} {files} {start}".split())
    (file,) = tmp_path.glob("results/**/all_exits.npz")
    driver = AllExits.load(file)
    scores = (driver.logits.argmax(-1) == driver.labels[:, None]).mean(axis=0)
    np.testing.assert_allclose(page["scores"], scores, atol=0.1)
    assert page["scores"][-1] > 0.9

    # the saved model exits where the sweep, from one pass, says that it does
    page["model"].eval()
    with torch.inference_mode():
        layers = page["model"](**page["collate"](page["dev"])).exit_layer
    expected = page["layers"][(page["uncertainty"] < 0.3).int().argmax(dim=1)]
    assert layers.tolist() == expected.tolist()
    assert len(layers.unique()) > 1
    assert [line.split(":")[0] for line in printed.splitlines() if line.startswith("threshold")] == [
        f"threshold 0.{i}" for i in range(7)
    ]
    assert [line.split()[0] for line in printed.splitlines()[-2:]] == ["LABEL_1", "LABEL_0"]


@pytest.mark.parametrize("stage", ["backbone", "off_ramps", "all"])
def test_accumulated_gradients_are_those_of_a_larger_batch(stage, tmp_path):
    tokenizer, weights = tiny_tokenizer("bert"), []
    data = [{**tokenizer(text), "labels": label} for text, label in sentences(8, 1)]
    for size, accumulated in ((8, 1), (2, 4)):
        model = tiny_model("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        model.train_stage(stage)
        settings = TrainingArguments(
            tmp_path,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0.0,
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulated,
            save_strategy="no",
            report_to="none",
        )
        Trainer(model, settings, train_dataset=data, data_collator=DataCollatorWithPadding(tokenizer)).train()
        weights.append(model.state_dict())
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=1e-5, rtol=1e-4, msg=name)
