"""A training that is killed, stopped or starved of disk goes on as if nothing had been."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
from collections import namedtuple

import numpy as np
import pytest
import torch
from helpers import snapshot_files
from safetensors.torch import load_file
from tiny import CLASSES, tiny_tokenizer

import run_glue_deebert
from deebert.data.batching import collator
from deebert.data.features import load_features
from deebert.data.tasks import TASKS
from deebert.evaluation.all_exits import layer_scores, run_all_exits
from deebert.experiment.monitor import Monitor
from deebert.modeling import checkpoints
from deebert.training import checkpointing
from deebert.training.checkpointing import saved_steps
from deebert.training.stage import StageTraining
from deebert.utils import cli, files

TRAIN = (
    "--do_train --do_eval --eval_each_highway --max_seq_length 32 --learning_rate 3e-3 --num_train_epochs 2 --no_cuda "
    "--gradient_accumulation_steps 2 --per_gpu_train_batch_size 3 --logging_steps 3 --save_steps 5"
)  # 16 updates in each stage
BEST = f"{TRAIN} --evaluate_during_training --load_best_model_at_end --save_total_limit 2"
KILLS = int(os.environ.get("KILLS", "1"))  # of each kind


@pytest.fixture
def argv(monkeypatch, tmp_path, tiny_data, tiny_checkpoints):
    monkeypatch.chdir(tmp_path)

    def flags(more: str, backbone: str = "bert") -> list[str]:
        return [
            f"--model_type={backbone}",
            f"--model_name_or_path={tiny_checkpoints[backbone]}",
            "--task_name=SST-2",
            f"--data_dir={tiny_data / 'SST-2'}",
            "--output_dir=out",
            "--plot_data_dir=results",
            *more.split(),
        ]

    return flags


def killed(argv: list[str], monkeypatch, target, name: str, count: int) -> bool:
    """Runs the driver in a process of its own, which is killed with SIGKILL at the count-th call of target.name."""

    def child() -> None:
        calls, original = [], getattr(target, name)

        def counted(*args, **kwargs):
            calls.append(1)
            if len(calls) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(target, name, counted)
        cli.run(lambda: run_glue_deebert.main(argv))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(120)
    assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
    return process.exitcode != 0


def weights(folder) -> dict:
    return load_file(folder / "model.safetensors")


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("flags", [TRAIN, f"{BEST} --cache_features"], ids=["plain", "best, cached"])
def test_killed_at_any_moment_and_resumed_gives_the_same_weights(argv, tmp_path, monkeypatch, flags):
    """In the middle of either stage, while a file of a checkpoint is written, between the stages, in the last save."""
    run_glue_deebert.main(argv(f"{flags} --output_dir whole"))
    whole = weights(tmp_path / "whole")
    generator = torch.Generator().manual_seed(len(flags))
    moments = [(StageTraining, "step", 32), (checkpoints.shutil, "rmtree", 12), (checkpointing.torch, "save", 8)]
    for target, name, most in moments:
        for _ in range(KILLS):
            out = f"{flags} --output_dir out --resume"
            times = 0
            while times < 2 and killed(
                argv(out), monkeypatch, target, name, int(torch.randint(1, most, (), generator=generator))
            ):
                times += 1
            run_glue_deebert.main(argv(out))
            assert times > 0, (name, "the moment never came")
            assert same(weights(tmp_path / "out"), whole), (name, times)
            assert not [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]
            record = json.loads((tmp_path / "out/run.json").read_text())
            assert record["finished"]
            assert record["stages"].keys() == {"1", "2"}
            shutil.rmtree(tmp_path / "out")


def ends(argv: list[str]) -> int:
    """The exit code of the driver."""
    with pytest.raises(SystemExit) as error:
        cli.run(lambda: run_glue_deebert.main(argv))
    return error.value.code


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [4, 15, 16, 20, 32])
def test_a_signal_leaves_a_checkpoint_and_says_how_to_go_on(argv, tmp_path, monkeypatch, capsys, number, step):
    run_glue_deebert.main(argv(f"{TRAIN} --output_dir whole"))
    steps, original, before = [], StageTraining.step, signal.getsignal(number)

    def counted(self):
        steps.append(1)
        if len(steps) == step:
            os.kill(os.getpid(), number)
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(StageTraining, "step", counted)
        assert ends(argv(f"{TRAIN} --save_steps 0")) == 128 + number
    line = capsys.readouterr().err.strip().splitlines()[-1]
    resuming = "the same command with --resume goes on from out/checkpoint-"
    # the step in which the signal came is the last but one: who stops is agreed on before it
    assert line.endswith(
        {
            4: f"stopped in stage 1 after step 5 of 16; {resuming}stage1-5",
            15: f"stopped after stage 1; {resuming}stage1-16",
            16: f"stopped after stage 1; {resuming}stage1-16",
            20: f"stopped in stage 2 after step 5 of 16; {resuming}stage2-5",
            32: "stopped; the training in out is finished",
        }[step]
    )
    run_glue_deebert.main(argv(f"{TRAIN} --resume"))
    assert same(weights(tmp_path / "out"), weights(tmp_path / "whole"))
    assert signal.getsignal(number) == before


def test_workers_leave_signals_to_the_training(argv, tmp_path):
    """A scheduler's SIGTERM reaches the whole group of processes."""
    run_glue_deebert.main(argv(f"{TRAIN} --output_dir whole"))

    def child() -> None:
        os.setpgid(0, 0)
        steps, original = [], StageTraining.step

        def counted(self):
            steps.append(1)
            if len(steps) == 4:
                os.killpg(0, signal.SIGTERM)
            return original(self)

        StageTraining.step = counted
        cli.run(lambda: run_glue_deebert.main(argv(f"{TRAIN} --dataloader_num_workers 1")))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(120)
    assert process.exitcode == 128 + signal.SIGTERM
    assert checkpointing.newest_checkpoint(tmp_path / "out").name in ("checkpoint-stage1-4", "checkpoint-stage1-5")
    run_glue_deebert.main(argv(f"{TRAIN} --resume"))
    assert same(weights(tmp_path / "out"), weights(tmp_path / "whole"))


def test_a_finished_training_is_not_repeated(argv, tmp_path, capsys):
    run_glue_deebert.main(argv(f"{TRAIN} --max_steps 5"))
    before = weights(tmp_path / "out")
    assert not list((tmp_path / "out").glob("*/training_state.pt"))  # nothing will go on from them
    capsys.readouterr()
    run_glue_deebert.main(argv(f"{TRAIN} --max_steps 5 --resume"))
    printed = capsys.readouterr().out
    assert "the training in out is finished; nothing to resume" in printed
    assert "Result of out on dev" in printed
    assert same(before, weights(tmp_path / "out"))
    (tmp_path / "out/model.safetensors").unlink()  # not so finished
    run_glue_deebert.main(argv(f"{TRAIN} --max_steps 5 --resume"))
    assert same(before, weights(tmp_path / "out"))


def test_what_does_not_fit_is_refused(argv, tmp_path, monkeypatch, capsys):
    killed(argv(f"{TRAIN} --resume"), monkeypatch, StageTraining, "step", 8)
    events = b"".join(path.read_bytes() for path in (tmp_path / "out/tensorboard").iterdir())
    assert b"stage1/loss_layer4" in events  # what was logged before the checkpoint is not logged again
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").write_text("mine")
    before = snapshot_files(tmp_path)
    for flags, message in (
        ("", "--output_dir out: a training that is not finished; --resume goes on with it"),
        ("--resume --seed 7", "--resume: the training in out had another seed, 42; this run has 7"),
        ("--resume --highway_epochs 3", "had another highway_epochs, None; this run has 3.0"),
        ("--resume --cache_features", "had another cache_features, False; this run has True"),
        ("--resume --output_dir other", "--output_dir other: the folder is not empty"),
        ("--load_best_model_at_end --output_dir new", "--load_best_model_at_end needs scores"),
        ("--cache_features --train_strategy joint --output_dir new", "no stage freezes the backbone"),
        ("--cache_features --highway_pooling attention --output_dir new", "attention learn what to read"),
        ("--output_dir other/file/new", "other/file/new: no folder can be made there"),
        ("--fp16 --bf16 --output_dir new", "--fp16 and --bf16: choose one"),
        ("--resume --first_stage other --output_dir new", "--first_stage other: no model after stage 1 there"),
    ):
        assert ends(argv(f"{TRAIN} {flags}")) == 2, flags
        found = capsys.readouterr().err
        assert message in found
        assert found.count("\n") == 1
        assert snapshot_files(tmp_path) == before
    run_glue_deebert.main(argv(f"{TRAIN} --resume --seed 7 --overwrite_output_dir"))  # both: what was asked for last


def test_a_disk_that_is_too_small_is_noticed_before_the_work(argv, tmp_path, monkeypatch, capsys):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1_000_000))
    assert ends(argv(TRAIN)) == 2
    assert (
        "out: checkpoints (--save_steps, --save_total_limit) take up to 0.0 GB, and 0.0 GB are free"
        in capsys.readouterr().err
    )
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    run_glue_deebert.main(argv(f"{TRAIN} --save_steps 0 --resume"))


def test_a_disk_that_fills_up_leaves_the_checkpoints_before(argv, tmp_path, monkeypatch, capsys):
    run_glue_deebert.main(argv(f"{TRAIN} --output_dir whole"))
    calls, original = [], torch.save

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(checkpointing.torch, "save", full)
        assert ends(argv(TRAIN)) == 2
    assert "out/checkpoint-stage1-15: the checkpoint cannot be written ([Errno 28] No space" in capsys.readouterr().err
    assert [folder.name for folder in saved_steps(tmp_path / "out")] == ["checkpoint-stage1-5", "checkpoint-stage1-10"]
    run_glue_deebert.main(argv(f"{TRAIN} --resume"))
    assert same(weights(tmp_path / "out"), weights(tmp_path / "whole"))


def test_the_best_weights_are_kept_and_few_checkpoints(argv, tmp_path, monkeypatch, tiny_data):
    seen, original = {1: [], 2: []}, Monitor.dev_scores

    def watched(self, training):
        scalars = original(self, training)
        seen[training.stage].append(np.mean([value for name, value in scalars.items() if name.endswith("acc")]))
        return scalars

    monkeypatch.setattr(Monitor, "dev_scores", watched)
    run_glue_deebert.main(argv(f"{BEST} --highway_learning_rate 0.03 --highway_pooling mean --save_steps 4 --seed 1"))
    record = json.loads((tmp_path / "out/run.json").read_text())["stages"]
    assert all(len(scores) == 6 for scores in seen.values())  # every 3 of 16, and at the end
    assert max(seen[2]) > seen[2][-1]  # or the test would show nothing
    for stage, scores in seen.items():
        assert record[str(stage)]["best_dev_score"] == max(scores)
    assert [folder.name for folder in saved_steps(tmp_path / "out")] == [f"checkpoint-stage2-{i}" for i in (12, 16)]
    model = CLASSES["bert"][1].from_pretrained(tmp_path / "out")
    dev = load_features(TASKS["SST-2"], tiny_data / "SST-2", "dev", ("0", "1"), tiny_tokenizer("bert"), 32)
    exits = layer_scores(TASKS["SST-2"], run_all_exits(model, dev, collator(model.config)))
    assert np.mean([scores["acc"] for scores in exits[:-1]]) == max(seen[2])


def test_run_json_tells_what_each_stage_took(argv, tmp_path):
    run_glue_deebert.main(argv(f"{TRAIN} --dataloader_num_workers 1"))
    record = json.loads((tmp_path / "out/run.json").read_text())
    assert record["arguments"]["learning_rate"] == 3e-3
    assert record["versions"].keys() == {"deebert", "torch", "transformers"}
    for stage in "12":
        found = record["stages"][stage]
        assert found["updates"] == 16
        assert found["samples_per_second"] == pytest.approx(96 / found["seconds"])
        assert 0.1 < found["peak_memory_gib"] < 20
    run_glue_deebert.main(argv(f"{TRAIN} --output_dir again"))
    assert same(weights(tmp_path / "out"), weights(tmp_path / "again"))  # whatever the number of workers
