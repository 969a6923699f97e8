"""The benchmark of training: the plain loop trains what the original does, and the tables have the right rows."""

import multiprocessing
import os
import sys
import threading
from multiprocessing.connection import Connection
from types import SimpleNamespace

import benchmark_training
import compare
import pytest
import torch
from support.helpers import ROOT, started_by
from support.tiny import tiny_model, tiny_tokenizer

from deebert.modeling.checkpoints import save_model
from deebert.utils import cli


@pytest.fixture
def argv(monkeypatch, tmp_path, tiny_data):
    """Flags for a model without dropout."""
    model = tiny_model("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    save_model(model, tiny_tokenizer("bert"), tmp_path / "model")

    def flags(more: str) -> None:
        given = f"benchmark_training.py --model_type bert --model_name_or_path {tmp_path}/model --task_name SST-2 "
        given += f"--data_dir {tiny_data}/SST-2 --no_cuda --max_seq_length 32 --learning_rate 1e-3 {more}"
        monkeypatch.setattr("sys.argv", given.split())

    return flags


def test_both_loops_make_the_same_step(argv):
    """Of all samples at once, so that order and padding make no difference."""
    argv("--samples 16 --batch_size 16")
    args = benchmark_training.parse_args()
    states = {}
    for system in benchmark_training.SYSTEMS:
        trainer = benchmark_training.Trainer(args, system, seed=0)
        before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
        trainer.prepare(1)
        assert trainer.train(1, max_steps=1, adam_epsilon=0.1) == 16
        states[system] = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
        changed = {name for name, tensor in states[system].items() if not torch.equal(before[name], tensor)}
        assert changed == {name for name in before if ".highway." not in name}
        trainer.prepare(2)
        assert trainer.train(2, max_steps=2) == 32
        after = trainer.model.state_dict()
        assert {n for n in before if not torch.equal(after[n], states[system][n])} == set(before) - changed
        trainer.open.close()
    for name, tensor in states["plain loop"].items():
        torch.testing.assert_close(states["here"][name], tensor, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.slow
def test_the_tables_have_a_row_for_each_system(argv, monkeypatch, capsys):

    def thread(target, args, daemon):
        """In place of a process; it has a pipe of its own, as a process has."""
        *rest, pipe = args
        return threading.Thread(target=target, args=(*rest, Connection(os.dup(pipe.fileno()))), daemon=daemon)

    threads = SimpleNamespace(Pipe=multiprocessing.Pipe, Process=thread)
    monkeypatch.setattr(benchmark_training.multiprocessing, "get_context", lambda method: threads)
    monkeypatch.setattr(sys, "stderr", sys.stderr)  # the workers silence theirs
    argv("--samples 20 --steps 2 --repeats 2 --batch_size 4 --seeds 1 2 --num_train_epochs 1")
    cli.run(benchmark_training.main)
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [line[0] for line in lines[2:8]] == ["| 1", "| 1", "| 2", "| 2", "| 2", "| 2"]
    assert [line[3][:3] for line in lines[2:8] if line[1] == "plain loop"] == ["1.0", "1.0"]
    assert all(float(line[2]) > 0 for line in lines[2:8])
    assert [line[0][2:] for line in lines[10:]] == list(benchmark_training.SYSTEMS)
    assert all("±" in cell for line in lines[10:] for cell in line[1:3])


def test_several_seeds_give_one_table(tmp_path, tiny_data, tiny_checkpoints, monkeypatch, capsys):
    settings = {"PATH_TO_DATA": str(tiny_data), "DATASET": "SST-2", "MODEL_NAME": str(tiny_checkpoints["bert"])}
    flags = "--seeds 3 4 --max_seq_length 32 --learning_rate 3e-3 --num_train_epochs 1 --no_cuda"
    started = started_by("studies/seeds.sh", tmp_path, *flags.split(), **settings)
    assert started[0] == str(ROOT / "scripts/studies/compare.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", started)
    cli.run(compare.main)
    *_, row = (line for line in capsys.readouterr().out.splitlines() if line.startswith("| as given |"))
    assert row.count("±") == 6
    assert (tmp_path / "seeds/SST-2/comparison.png").is_file()
    assert {path.name for path in (tmp_path / "seeds/SST-2/runs/as_given").iterdir()} == {"seed3", "seed4"}
