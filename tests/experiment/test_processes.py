"""Training and evaluation on two processes, started as a user starts them."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT
from safetensors.torch import load_file
from tiny import tiny_model, tiny_tokenizer

import run_glue_deebert
from deebert.evaluation.all_exits import AllExits


@pytest.mark.parametrize(
    ("backbone", "strategy", "flags"),
    [
        ("bert", "two_stage", "--exit_rule learned --evaluate_during_training --load_best_model_at_end"),
        ("roberta", "alternating", "--distill"),
        ("bert", "two_stage", "--cache_features --max_steps 7"),
    ],
    ids=["stages", "unused parameters", "cached"],
)
def test_two_processes_give_the_results_of_one(tmp_path, tiny_data, monkeypatch, capsys, backbone, strategy, flags):
    """Half the batch each: the same losses, weights and scores. The last step of an epoch has an odd size."""
    monkeypatch.chdir(tmp_path)
    model = tiny_model(backbone, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, highway_pooling="mean")
    model.save_pretrained("model")
    tiny_tokenizer(backbone).save_pretrained("model")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/dev.tsv").write_bytes((tiny_data / "SST-2/dev.tsv").read_bytes())
    lines = (tiny_data / "SST-2/train.tsv").read_text().splitlines()
    (tmp_path / "data/train.tsv").write_text("\n".join(lines[:-3]) + "\n")  # 45: 12, 12, 12 and 9 in an epoch
    common = (
        f"--model_type {backbone} --model_name_or_path ./model --task_name SST-2 --data_dir data --do_train --do_eval "
        f"--eval_each_highway --max_seq_length 32 --num_train_epochs 2 --no_cuda --gradient_accumulation_steps 2 "
        f"--learning_rate 3e-3 --adam_epsilon 1e-2 --train_strategy {strategy} --logging_steps 2 --save_steps 4 "
        f"{flags}"
    )
    run_glue_deebert.main(f"{common} --output_dir one --plot_data_dir res1 --per_gpu_train_batch_size 6".split())
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    two = f"{common} --output_dir two --plot_data_dir res2 --per_gpu_train_batch_size 3".split()
    done = subprocess.run(
        [*launch, str(ROOT / "run_glue_deebert.py"), *two],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Result of two on dev") == 1

    records = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("one", "two")]
    assert [record["processes"] for record in records] == [1, 2]
    for stage, expected in records[0]["stages"].items():
        other = records[1]["stages"][stage]
        assert other["mean_loss"] == pytest.approx(expected["mean_loss"], rel=1e-4)
        assert (other["updates"], other["best_dev_score"]) == (expected["updates"], expected["best_dev_score"])
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=2e-4, rtol=2e-3, msg=name)
    exits = [AllExits.load(tmp_path / name / "model/all_exits.npz") for name in ("res1", "res2")]
    np.testing.assert_allclose(exits[1].logits, exits[0].logits, atol=2e-3)
    np.testing.assert_array_equal(exits[1].labels, exits[0].labels)
