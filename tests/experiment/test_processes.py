"""Training and evaluation on two processes, started as a user starts them, or forked, which takes seconds less."""

import json
import os
import socket
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from support.helpers import ROOT
from support.tiny import tiny_model, tiny_tokenizer

import run_glue_deebert
from deebert.evaluation.all_exits import AllExits
from deebert.utils.errors import InputError


def by_torchrun(arguments: list[str]) -> str:
    """Runs the driver in two processes and returns what they print."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, str(ROOT / "run_glue_deebert.py"), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def by_fork(arguments: list[str]) -> str:
    """As `by_torchrun`, without its processes' imports."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(forked, (port, arguments), nprocs=2, start_method="fork")
    return "".join(Path(f"printed_{rank}").read_text() for rank in range(2))


def forget_processes() -> None:
    """Accelerate keeps what tests before have set up."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def fresh_accelerate():
    forget_processes()
    yield
    forget_processes()


def forked(rank: int, port: int, arguments: list[str]) -> None:
    """What torchrun sets for a process, and the driver in it."""
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
    forget_processes()
    with Path(f"printed_{rank}").open("w") as printed, redirect_stdout(printed):
        run_glue_deebert.main(arguments)


NO_GPU = "--no_cuda" if torch.cuda.is_available() else ""  # without a GPU, processes need no flag to be connected
BEST = "--evaluate_during_training --load_best_model_at_end"


@pytest.mark.parametrize(
    ("launch", "backbone", "strategy", "flags"),
    [
        (by_fork, "bert", "two_stage", BEST),
        pytest.param(by_torchrun, "bert", "two_stage", BEST, marks=pytest.mark.slow),
        (by_fork, "roberta", "alternating", "--distill"),
        (by_fork, "bert", "two_stage", "--recipe fast --max_steps 7"),
    ],
    ids=["stages", "torchrun", "unused parameters", "cached"],
)
def test_two_processes_give_the_results_of_one(tmp_path, tiny_data, monkeypatch, launch, backbone, strategy, flags):
    """Half the batch each: the same losses, weights and scores. The last step of an epoch has an odd size."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # bfloat16 rounds the halves of a batch differently
    head = "linear" if "fast" in flags else "pooler"
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = tiny_model(backbone, **dropout, highway_pooling="mean", highway_head=head)
    model.save_pretrained("model")
    tiny_tokenizer(backbone).save_pretrained("model")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/dev.tsv").write_bytes((tiny_data / "SST-2/dev.tsv").read_bytes())
    lines = (tiny_data / "SST-2/train.tsv").read_text().splitlines()
    (tmp_path / "data/train.tsv").write_text("\n".join(lines[:-3]) + "\n")  # 45: 12, 12, 12 and 9 in an epoch
    common = (
        f"--model_type {backbone} --model_name_or_path ./model --task_name SST-2 --data_dir data --do_train --do_eval "
        f"--eval_each_highway --max_seq_length 32 --num_train_epochs 2 --gradient_accumulation_steps 2 "
        f"--learning_rate 3e-3 --adam_epsilon 1e-2 --train_strategy {strategy} --logging_steps 2 --save_steps 4 "
        f"{flags} {NO_GPU}"
    )
    run_glue_deebert.main(f"{common} --output_dir one --plot_data_dir res1 --per_gpu_train_batch_size 6".split())
    printed = launch(f"{common} --output_dir two --plot_data_dir res2 --per_gpu_train_batch_size 3".split())
    assert printed.count("Result of two on dev") == 1

    records = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("one", "two")]
    assert [record["processes"] for record in records] == [1, 2]
    for stage, expected in records[0]["stages"].items():
        other = records[1]["stages"][stage]
        assert other["mean_loss"] == pytest.approx(expected["mean_loss"], rel=1e-4)
        assert (other["updates"], other["best_dev_score"]) == (expected["updates"], expected["best_dev_score"])
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=2e-4, rtol=2e-3, msg=name)
    exits = [AllExits.load(tmp_path / name / "all_exits.npz") for name in ("res1/one", "res2/two")]
    np.testing.assert_allclose(exits[1].logits, exits[0].logits, atol=2e-3)
    np.testing.assert_array_equal(exits[1].labels, exits[0].labels)


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("connects", [True, False])
def test_processes_that_are_not_connected_are_refused(tmp_path, tiny_data, tiny_checkpoints, monkeypatch, connects):
    """Each of them would train a model of its own, in one folder."""
    if connects:  # accelerate tries, but without the address that torchrun sets it cannot
        message = "the processes cannot be connected: .*MASTER_ADDR.*; start them by torchrun or accelerate launch"
    else:
        alone = Accelerator(cpu=True)
        monkeypatch.setattr("deebert.experiment.run.Accelerator", lambda **_: alone)
        message = "2 processes were started, and 1 is connected; start one"
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    arguments = (
        f"--model_name_or_path {tiny_checkpoints['bert']} --task_name SST-2 --data_dir {tiny_data}/SST-2 --no_cuda"
    )
    with pytest.raises(InputError, match=message):
        run_glue_deebert.main(f"{arguments} --do_train --output_dir {tmp_path}/out".split())
    assert not (tmp_path / "out" / "run.json").exists()
