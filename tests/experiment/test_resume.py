"""A training that is stopped or starved of disk goes on as if nothing had been. tests/faults kills it, too."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import threading
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.helpers import snapshot_files
from support.tiny import CLASSES, tiny_tokenizer
from tensorboardX.event_file_writer import EventsWriter

import run_glue_deebert
from deebert.data.batching import collator, tokenize
from deebert.data.tasks import TASKS
from deebert.evaluation.all_exits import layer_scores, run_all_exits
from deebert.experiment.monitor import Monitor, standard_error
from deebert.training import checkpointing
from deebert.training.checkpointing import saved_steps
from deebert.training.stage import StageTraining
from deebert.utils import cli
from deebert.utils.files import LOCK

TRAIN = (
    "--do_train --do_eval --eval_each_highway --max_seq_length 32 --learning_rate 3e-3 --num_train_epochs 2 --no_cuda "
    "--gradient_accumulation_steps 2 --per_gpu_train_batch_size 6 --logging_steps 3 --save_steps 2"
)  # 2 epochs of 4 updates in each stage
UPDATES = 8
BEST = f"{TRAIN} --evaluate_during_training --load_best_model_at_end --save_total_limit 2"


@pytest.fixture(scope="module")
def all_flags(tiny_data, tiny_checkpoints):
    """The driver's arguments, with more flags after them; flags given later win."""
    common = f"--model_type=bert --model_name_or_path={tiny_checkpoints['bert']} --task_name=SST-2"
    common += f" --data_dir={tiny_data / 'SST-2'} --output_dir=out --plot_data_dir=results"
    return lambda more: f"{common} {more}".split()


@pytest.fixture
def argv(monkeypatch, tmp_path, all_flags):
    monkeypatch.chdir(tmp_path)
    return all_flags


@pytest.fixture(scope="module")
def uninterrupted(all_flags, tmp_path_factory):
    """The weights after a training with given flags that nothing disturbs; one for all tests that compare with it."""

    @cache
    def train(flags: str) -> dict[str, torch.Tensor]:
        folder = tmp_path_factory.mktemp("uninterrupted")
        run_glue_deebert.main(all_flags(f"{flags} --output_dir {folder}/out --plot_data_dir {folder}/results"))
        return weights(folder / "out")

    return train


def counted(patch, target, name: str, before) -> None:
    """Replaces target.name by a function that first calls before(n), at its n-th call."""
    calls, original = [], getattr(target, name)

    def replacement(*args, **kwargs):
        calls.append(1)
        before(len(calls))
        return original(*args, **kwargs)

    patch.setattr(target, name, replacement)


def in_child(main) -> int:
    """Runs main in a process of its own and returns the exit code, negative where a signal ended it."""
    process = multiprocessing.get_context("fork").Process(target=main)
    process.start()
    process.join(120)
    assert process.exitcode is not None, "the process hangs"
    return process.exitcode


def killed(argv: list[str], target, name: str, count: int) -> bool:
    """Runs the driver in a process of its own, which is killed with SIGKILL at the count-th call of target.name."""

    def child() -> None:
        counted(pytest.MonkeyPatch(), target, name, lambda n: n == count and os.kill(os.getpid(), signal.SIGKILL))
        cli.run(lambda: run_glue_deebert.main(argv))

    exit_code = in_child(child)
    assert exit_code in (0, -signal.SIGKILL), exit_code
    return exit_code != 0


def weights(folder) -> dict:
    return load_file(folder / "model.safetensors")


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def ends(argv: list[str]) -> int:
    """The exit code of the driver."""
    with pytest.raises(SystemExit) as error:
        cli.run(lambda: run_glue_deebert.main(argv))
    return error.value.code


STOPS = {  # a signal in this step of both stages; one step more is run, because the processes agree before each step
    3: "stopped in stage 1 after step 4 of 8; {}stage1-4",
    7: "stopped after stage 1; {}stage1-8",
    8: "stopped after stage 1; {}stage1-8",
    11: "stopped in stage 2 after step 4 of 8; {}stage2-4",
    16: "stopped; the training in out is finished",
}


@pytest.mark.parametrize(
    "stops",
    [[(3, signal.SIGINT), (7, signal.SIGTERM), (11, signal.SIGTERM)], [(8, signal.SIGTERM), (16, signal.SIGTERM)]],
    ids=["within", "at the ends"],
)
def test_a_signal_leaves_a_checkpoint_and_says_how_to_go_on(argv, tmp_path, uninterrupted, capsys, stops):
    done = 0
    for step, number in stops:
        before = signal.getsignal(number)
        with pytest.MonkeyPatch.context() as patch:
            counted(
                patch,
                StageTraining,
                "step",
                lambda n, at=step - done, kind=number: n == at and os.kill(os.getpid(), kind),
            )
            assert ends(argv(f"{TRAIN} --save_steps 0 --resume")) == 128 + number
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.endswith(STOPS[step].format("the same command with --resume goes on from out/checkpoint-"))
        assert signal.getsignal(number) == before
        done = min(step + 1, 8) if step <= 8 else step + 1
    run_glue_deebert.main(argv(f"{TRAIN} --resume"))
    assert same(weights(tmp_path / "out"), uninterrupted(TRAIN))


def test_a_finished_training_is_not_repeated(argv, tmp_path, capsys):
    run_glue_deebert.main(argv(f"{TRAIN} --max_steps 5"))
    before, record = weights(tmp_path / "out"), (tmp_path / "out/run.json").read_text()
    assert not list((tmp_path / "out").glob("*/training_state.pt"))  # nothing will go on from them
    capsys.readouterr()
    run_glue_deebert.main(argv(f"{TRAIN} --max_steps 5 --resume"))
    printed = capsys.readouterr().out
    assert "the training in out is finished; nothing to resume" in printed
    assert "Result of out on dev" in printed
    assert same(before, weights(tmp_path / "out"))
    assert (tmp_path / "out/run.json").read_text() == record
    (tmp_path / "out/model.safetensors").unlink()  # not so finished
    run_glue_deebert.main(argv(f"{TRAIN} --max_steps 5 --resume"))
    assert same(before, weights(tmp_path / "out"))


def test_what_does_not_fit_is_refused(argv, tmp_path, capsys):
    assert killed(argv(f"{TRAIN} --resume"), StageTraining, "step", 6)
    events = b"".join(path.read_bytes() for path in (tmp_path / "out/tensorboard").iterdir())
    assert b"stage1/loss_layer4" in events  # what was logged before the checkpoint is not logged again
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").write_text("mine")
    (tmp_path / "out" / LOCK).unlink()  # of the killed process
    before = snapshot_files(tmp_path)
    for flags, message in (
        ("", "--output_dir out: a training that is not finished; --resume goes on with it"),
        ("--resume --seed 7", "--resume: the training in out had another seed, 42; this run has 7"),
        ("--resume --recipe fast", "had another recipe, paper; this run has fast"),
        ("--resume --logging_steps 2", "had another logging_steps, 3; this run has 2"),
        ("--resume --head_learning_rate 0.1", "had another head_learning_rate, the default; this run has 0.1"),
        ("--resume --output_dir other", "--output_dir other: the folder is not empty"),
        ("--output_dir other/file/new", "other/file/new: no folder can be made there"),
        ("--fp16 --output_dir new", "--fp16 needs a GPU; leave it out"),
    ):
        assert ends(argv(f"{TRAIN} {flags}")) == 2, flags
        actual = capsys.readouterr().err
        assert message in actual
        assert actual.count("\n") == 1
        assert snapshot_files(tmp_path) == before
    folder = saved_steps(tmp_path / "out")[-1]
    (folder / checkpointing.CHECKSUMS).unlink()
    state = checkpointing.read_state(folder)
    del state["training"]["steps"]  # it has other names in 0.10
    torch.save(state, folder / checkpointing.STATE)
    assert ends(argv(f"{TRAIN} --resume")) == 2
    message = "error: out: the checkpoint does not fit ('steps'); --overwrite_output_dir starts again\n"
    assert capsys.readouterr().err.endswith(message)
    run_glue_deebert.main(argv(f"{TRAIN} --resume --seed 7 --overwrite_output_dir"))  # the new training has priority
    note = "out: its training is not resumed but overwritten: it had another seed, 42; this run has 7\n"
    assert note in capsys.readouterr().out
    run_glue_deebert.main(argv(f"{TRAIN} --resume --seed 7 --overwrite_output_dir"))
    assert "overwritten" not in capsys.readouterr().out


def test_a_training_that_was_killed_before_its_first_checkpoint_begins_again(argv, tmp_path, capsys):
    command, note = f"{TRAIN} --max_steps 2 --save_steps 0 --resume", "out: no checkpoint to resume from; the training"
    run_glue_deebert.main(argv(command))
    assert note not in capsys.readouterr().out  # there was no training before
    record = json.loads((tmp_path / "out/run.json").read_text())
    (tmp_path / "out/run.json").write_text(json.dumps(record | {"finished": False}))
    run_glue_deebert.main(argv(command))
    assert f"{note} starts from the beginning\n" in capsys.readouterr().out


def test_an_overwritten_model_is_gone_at_once(argv, tmp_path, monkeypatch):
    """Whoever evaluates after an interruption must not score the model of the training before."""
    run_glue_deebert.main(argv(f"{TRAIN} --max_steps 2 --save_steps 0"))
    assert (tmp_path / "out/config.json").is_file()
    with monkeypatch.context() as patch:
        counted(patch, StageTraining, "step", lambda n: n == 3 and os.kill(os.getpid(), signal.SIGTERM))
        assert ends(argv(f"{TRAIN} --overwrite_output_dir")) == 128 + signal.SIGTERM
    assert ends(argv("--do_eval")) == 2
    assert not (tmp_path / "out/config.json").exists()


def test_a_disk_that_fills_up_leaves_the_checkpoints_before(argv, tmp_path, uninterrupted, capsys):
    def fill(n: int) -> None:
        if n == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        counted(patch, torch, "save", fill)
        assert ends(argv(TRAIN)) == 2
    assert "out/checkpoint-stage1-6: the checkpoint cannot be written: [Errno 28] No space" in capsys.readouterr().err
    assert [folder.name for folder in saved_steps(tmp_path / "out")] == ["checkpoint-stage1-2", "checkpoint-stage1-4"]
    run_glue_deebert.main(argv(f"{TRAIN} --resume"))
    assert same(weights(tmp_path / "out"), uninterrupted(TRAIN))


def test_a_disk_that_is_full_for_scalars_gets_one_line(argv, tmp_path, uninterrupted, capsys):
    def fill(n: int) -> None:
        if n == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    threads = threading.active_count()
    with pytest.MonkeyPatch.context() as patch:
        counted(patch, EventsWriter, "flush", fill)
        assert ends(argv(TRAIN)) == 2
    expected = "error: out/tensorboard: no scalars can be written: [Errno 28] No space left on device; make room, then"
    assert capsys.readouterr().err.splitlines()[-1].startswith(expected)
    assert threading.active_count() == threads  # none that would report the same once more, later
    run_glue_deebert.main(argv(f"{TRAIN} --resume"))
    assert same(weights(tmp_path / "out"), uninterrupted(TRAIN))


@pytest.mark.parametrize("file", ["model.safetensors", "training_state.pt"])
def test_a_flipped_bit_in_a_checkpoint_is_refused(argv, tmp_path, uninterrupted, capsys, file):
    """And an earlier checkpoint gives the weights of a training that nothing disturbed."""
    with pytest.MonkeyPatch.context() as patch:
        counted(patch, StageTraining, "step", lambda n: n == 7 and os.kill(os.getpid(), signal.SIGTERM))
        assert ends(argv(TRAIN)) == 128 + signal.SIGTERM
    newest = saved_steps(tmp_path / "out")[-1]
    content = bytearray((newest / file).read_bytes())
    content[len(content) // 2] ^= 1
    (newest / file).write_bytes(content)
    capsys.readouterr()
    assert ends(argv(f"{TRAIN} --resume")) == 2
    name = f"out/{newest.name}"
    message = f"error: {name}/{file}: damaged; remove {name} to continue from an earlier checkpoint\n"
    assert capsys.readouterr().err.endswith(message)
    shutil.rmtree(newest)
    run_glue_deebert.main(argv(f"{TRAIN} --resume"))
    assert same(weights(tmp_path / "out"), uninterrupted(TRAIN))


def test_the_best_weights_are_kept_and_few_checkpoints(argv, tmp_path, monkeypatch, tiny_data):
    seen, original = {1: [], 2: []}, Monitor.dev_scores

    def watched(self, training):
        scalars = original(self, training)
        seen[training.stage].append(np.mean([value for name, value in scalars.items() if name.endswith("acc")]))
        return scalars

    monkeypatch.setattr(Monitor, "dev_scores", watched)
    flags = "--highway_learning_rate 0.03 --highway_pooling mean --save_steps 4 --per_gpu_train_batch_size 3 --seed 1"
    run_glue_deebert.main(argv(f"{BEST} {flags}"))
    record = json.loads((tmp_path / "out/run.json").read_text())["stages"]
    assert all(len(scores) == 6 for scores in seen.values())  # every 3 of 16, and at the end
    assert max(seen[2]) > seen[2][-1]  # or the test would show nothing
    for stage, scores in seen.items():
        assert record[str(stage)]["best_dev_score"] == max(scores)
    assert [folder.name for folder in saved_steps(tmp_path / "out")] == [f"checkpoint-stage2-{i}" for i in (12, 16)]
    model = CLASSES["bert"][1].from_pretrained(tmp_path / "out")
    dev = tokenize(TASKS["SST-2"].read(tiny_data / "SST-2", "dev"), tiny_tokenizer("bert"), 32)
    exits = layer_scores(TASKS["SST-2"], run_all_exits(model, dev, collator(model.config)))
    assert np.mean([scores["acc"] for layer, scores in exits.items() if layer < len(exits)]) == max(seen[2])


def test_a_stage_ends_after_two_epochs_without_a_better_score(argv, tmp_path, monkeypatch, capsys):
    """The best epoch's weights are used, of equal ones the last's; the off-ramps' stage is not scored."""
    scores, used = iter((0.5, 0.7, 0.7, 0.6, 0.6)), {}

    def dev_scores(self, training):
        self.keep_if_best(training, next(scores))
        used[training.steps] = training.model.classifier.weight.detach().clone()
        return {}

    monkeypatch.setattr(Monitor, "dev_scores", dev_scores)
    run_glue_deebert.main(argv(f"{TRAIN} --num_train_epochs 9 --load_best_model_at_end --max_seq_length 16"))
    record = json.loads((tmp_path / "out/run.json").read_text())["stages"]
    assert [record[stage]["updates"] for stage in "12"] == [5 * 4, 9 * 4]
    assert (record["1"]["best_dev_score"], record["1"]["kept_update"]) == (0.7, 12)
    assert (
        "the weights after step 12 are used, the last within a standard error of the best dev score, 70.00"
        in capsys.readouterr().out
    )
    assert torch.equal(weights(tmp_path / "out")["classifier.weight"], used[12])


def test_later_weights_are_kept_that_score_less_by_chance_alone():
    training = SimpleNamespace(best=None, best_step=None, steps=0, stage=1)
    kept = SimpleNamespace(accelerator=SimpleNamespace(is_main_process=False))
    for score, step in ((0.90, 1), (0.93, 2), (0.925, 3), (0.915, 4), (0.921, 5), (0.919, 6)):
        training.steps = step
        Monitor.keep_if_best(kept, training, score, noise=0.01)
        assert training.best_step == {4: 3, 6: 5}.get(step, step)
    assert training.best == 0.93
    assert standard_error(0.93, 1000) == pytest.approx(0.00807, abs=1e-5)


def test_after_an_epoch_the_noise_of_the_dev_set_counts(argv, tmp_path, monkeypatch):
    """A loss of 0.1 is chance on a small dev set, one of 0.2 is not."""
    given = iter((0.7, 0.6, 0.5, 0.5))
    monkeypatch.setattr("deebert.experiment.monitor.layer_scores", lambda task, exits: scored(next(given)))

    def scored(score: float) -> dict[int, dict[str, float]]:
        return {layer: {"acc": score} for layer in range(5)}

    run_glue_deebert.main(argv(f"{TRAIN} --num_train_epochs 9 --load_best_model_at_end --max_seq_length 16"))
    stage = json.loads((tmp_path / "out/run.json").read_text())["stages"]["1"]
    assert (stage["updates"], stage["best_dev_score"], stage["kept_update"]) == (4 * 4, 0.7, 2 * 4)


def test_run_json_tells_what_each_stage_took(argv, tmp_path, uninterrupted):
    run_glue_deebert.main(argv(TRAIN))
    record = json.loads((tmp_path / "out/run.json").read_text())
    assert record["arguments"]["learning_rate"] == 3e-3
    assert record["versions"].keys() == {"deebert", "torch", "transformers"}
    for stage in "12":
        actual = record["stages"][stage]
        assert actual["updates"] == UPDATES
        assert actual["samples_per_second"] == pytest.approx(96 / actual["seconds"])
    assert same(weights(tmp_path / "out"), uninterrupted(TRAIN))
