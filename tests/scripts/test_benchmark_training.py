"""The benchmark of training: the plain loop trains what the original does, and the tables have the right rows."""

from dataclasses import replace

import benchmark_training
import pytest
import torch
from benchmark_training import CACHED, HERE, PLAIN, TRAINER, Training
from support.tiny import tiny_model, tiny_tokenizer

from deebert.experiment.arguments import parse_args
from deebert.modeling.checkpoints import save_model
from deebert.utils import cli


@pytest.fixture
def flags(tmp_path, tiny_data) -> str:
    """Those of a training of a model without dropout."""
    model = tiny_model("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    save_model(model, tiny_tokenizer("bert"), tmp_path / "model")
    given = f"--model_name_or_path {tmp_path}/model --task_name SST-2 --data_dir {tiny_data}/SST-2 --no_cuda "
    return given + "--max_seq_length 32 --learning_rate 1e-3 --num_train_epochs 1"


def test_both_loops_make_the_same_step(flags):
    """Of all samples at once, so that order and padding make no difference."""
    args = parse_args(["--do_train", "--output_dir", "none", "--per_gpu_train_batch_size", "16", *flags.split()])
    states = {}
    for system in (PLAIN, HERE, CACHED):
        training = Training(replace(args, training=replace(args.training, adam_epsilon=0.1)), system, samples=16)
        before = {name: tensor.clone() for name, tensor in training.model.state_dict().items()}
        training.prepare(1)
        assert training.train(1, max_steps=1) == 16
        states[system] = {name: tensor.clone() for name, tensor in training.model.state_dict().items()}
        changed = {name for name, tensor in states[system].items() if not torch.equal(before[name], tensor)}
        assert changed == {name for name in before if ".highway." not in name}
        training.prepare(2)
        assert training.train(2, max_steps=2) == 32
        after = training.model.state_dict()
        assert {n for n in before if not torch.equal(after[n], states[system][n])} == set(before) - changed
        training.open.close()
    for name, tensor in states[PLAIN].items():
        torch.testing.assert_close(states[HERE][name], tensor, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.slow
def test_the_tables_have_a_row_for_each_system(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ours = "--samples 20 --steps 2 --repeats 2 --per_gpu_train_batch_size 4 --seeds 1 2"
    monkeypatch.setattr("sys.argv", ["benchmark_training.py", *flags.split(), *ours.split()])
    cli.run(benchmark_training.main)
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [(line[0][2:], line[1].split(":")[0]) for line in lines[2:9]] == [
        *(("1", system) for system in (PLAIN, TRAINER, HERE)),
        *(("2", system) for system in (PLAIN, HERE, CACHED, CACHED)),
    ]
    assert [line[3][:3] for line in lines[2:9] if line[1] == PLAIN] == ["1.0", "1.0"]
    assert all(float(line[2]) > 0 for line in lines[2:9])
    assert [line[0][2:] for line in lines[11:]] == [PLAIN, HERE, CACHED]
    assert all("±" in cell for line in lines[11:] for cell in line[1:3])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
