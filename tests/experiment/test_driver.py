"""run_glue_deebert.py in process: what it writes, and one clear line for bad input."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file
from scipy.stats import pearsonr, spearmanr
from support.helpers import snapshot_files as files
from support.tiny import CLASSES, tiny_config, tiny_model

import run_glue_deebert
from deebert import __main__
from deebert.evaluation import results
from deebert.evaluation.all_exits import AllExits
from deebert.evaluation.plotting import draw, read_series
from deebert.experiment.run import new_parts
from deebert.modeling.checkpoints import load_tokenizer, save_model, set_labels
from deebert.training.strategies import RECIPES
from deebert.utils import cli

TRAIN = "--do_train --do_eval --max_seq_length 32 --learning_rate 3e-3 --num_train_epochs 1 --save_steps 0 --no_cuda"


@pytest.fixture
def drive(monkeypatch, tmp_path, tiny_data, tiny_checkpoints):
    """Runs the driver in tmp_path with the tiny model and data; flags given later win."""
    monkeypatch.chdir(tmp_path)

    def run(flags: str = TRAIN, task: str = "SST-2", backbone: str = "bert") -> dict[str, float]:
        argv = [
            "run_glue_deebert.py",
            f"--model_type={backbone}",
            f"--model_name_or_path={tiny_checkpoints[backbone]}",
            f"--task_name={task}",
            f"--data_dir={tiny_data / task}",
            "--output_dir=out",
            "--plot_data_dir=results",
        ]
        monkeypatch.setattr("sys.argv", argv + flags.split())
        returned = {}
        cli.run(lambda: returned.update(run_glue_deebert.main()))
        return returned

    return run


def test_training_and_evaluation_write_the_documented_files(drive, tmp_path, backbone, capsys):
    drive(f"{TRAIN} --eval_after_first_stage --evaluate_during_training --logging_steps 3", backbone=backbone)
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tensorboard",
        "modeling_deebert.py",
    }
    assert "acc after layer 4" in (out / "README.md").read_text()  # the model card has the score of each exit
    record = json.loads((out / "run.json").read_text())
    assert record["arguments"]["learning_rate"] == 3e-3
    assert record["versions"]["transformers"]
    printed = capsys.readouterr().out
    assert "After the first stage, dev: acc" in printed
    assert json.loads((out / "config.json").read_text())["id2label"] == {"0": "0", "1": "1"}

    (out / "README.md").write_text("my own words")
    drive(
        "--do_eval --eval_each_highway --eval_highway --exit_threshold 0 0.3 0.7 --per_gpu_eval_batch_size 1 "
        "--model_name_or_path ./out --max_seq_length 32",
        backbone=backbone,
    )
    results = tmp_path / "results" / "out"
    assert "my own words" in (out / "README.md").read_text()
    names = {
        "each_layer.npy",
        "each_layer.csv",
        "classes.csv",
        "all_exits.npz",
        "entropy_sweep.csv",
        "entropy_curve.csv",
    }
    assert {p.name for p in results.iterdir()} == names | {f"entropy_{t}.npy" for t in (0.0, 0.3, 0.7)}
    exits = AllExits.load(results / "all_exits.npz")
    assert exits.logits.shape == (20, 4, 2)
    each_layer = np.load(results / "each_layer.npy")
    np.testing.assert_allclose(each_layer, (exits.logits.argmax(-1) == exits.labels[:, None]).mean(0))
    counts, seconds, layers_run, score = np.load(results / "entropy_0.7.npy", allow_pickle=True)
    assert counts == {1: 20, 2: 0, 3: 0, 4: 0}
    assert (layers_run, score) == (0.25, each_layer[0])
    assert seconds > 0
    text = dict(line.split(" = ") for line in (out / "eval_results.txt").read_text().splitlines())
    assert float(text["acc"]) == each_layer[-1]
    assert float(text["acc_at_entropy_0.7"]) == each_layer[0]
    assert (out / "run.json").read_text() == json.dumps(record, indent=2) + "\n"
    assert (out / "run_eval.json").is_file()


def test_the_installed_command_trains_and_evaluates(drive, tmp_path, monkeypatch, tiny_data, tiny_checkpoints, capsys):
    """With the driver's flags; an evaluation needs no more than the model and the data."""
    data = f"--task_name SST-2 --data_dir {tiny_data / 'SST-2'} --output_dir out"
    start = f"--model_name_or_path {tiny_checkpoints['bert']} --max_steps 1 --save_steps 0 --no_cuda"
    for command in (f"train {data} {start}", f"eval {data} --eval_each_highway"):
        monkeypatch.setattr("sys.argv", ["deebert", *command.split()])
        cli.run(__main__.main)
    assert "Result of out on dev: acc" in capsys.readouterr().out
    assert (tmp_path / "plotting/out/each_layer.npy").is_file()
    monkeypatch.setattr("sys.argv", ["deebert", "train", "--nothing"])
    with pytest.raises(SystemExit):
        cli.run(__main__.main)
    assert "deebert train --help lists the flags" in capsys.readouterr().err


def test_texts_are_cut_at_what_the_model_has_positions_for(drive, tmp_path, tiny_checkpoints):
    """Where no length is given; and the tokenizer that is saved knows it, though the checkpoint's did not."""
    shutil.copytree(tiny_checkpoints["bert"], tmp_path / "start")
    settings = json.loads((tmp_path / "start/tokenizer_config.json").read_text())
    del settings["model_max_length"]
    (tmp_path / "start/tokenizer_config.json").write_text(json.dumps(settings))
    drive("--do_train --max_steps 1 --save_steps 0 --model_name_or_path start")
    assert json.loads((tmp_path / "out/config.json").read_text())["max_seq_length"] == 66
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text())["model_max_length"] == 66


def test_mnli_and_mnli_mm_have_separate_results(drive, tmp_path):
    drive(task="MNLI", backbone="roberta")
    drive("--do_eval --eval_each_highway --model_name_or_path out --max_seq_length 32", task="MNLI", backbone="roberta")
    matched, mismatched = (AllExits.load(tmp_path / f"results/out{mm}/all_exits.npz") for mm in ("", "-MM"))
    np.testing.assert_allclose(matched.logits, mismatched.logits, atol=1e-6)  # the same texts ...
    assert (matched.labels != mismatched.labels).any()  # ... with other labels
    for exits, folder in ((matched, "out"), (mismatched, "out-MM")):
        accuracy = (exits.logits[:, -1].argmax(-1) == exits.labels).mean()
        assert (tmp_path / folder / "eval_results.txt").read_text() == f"acc = {accuracy}\n"
        classes = pd.read_csv(tmp_path / "results" / folder / "classes.csv")
        assert classes["texts"].tolist() == np.bincount(exits.labels, minlength=3).tolist()
        assert classes["f1_early"].isna().all()  # no threshold is stored
    labels = json.loads((tmp_path / "out/config.json").read_text())["id2label"]
    assert labels == {"0": "contradiction", "1": "neutral", "2": "entailment"}


def test_regression_end_to_end(drive, tmp_path):
    drive(task="STS-B")
    drive("--do_eval --eval_each_highway --model_name_or_path out --max_seq_length 32", task="STS-B")
    scores = dict(line.split(" = ") for line in (tmp_path / "out/eval_results.txt").read_text().splitlines())
    exits = AllExits.load(tmp_path / "results/out/all_exits.npz")
    assert exits.logits.shape == (20, 4, 1)
    assert exits.labels.max() > 4  # the raw ratings
    logits = exits.logits[:, -1, 0]
    assert float(scores["spearmanr"]) == pytest.approx(spearmanr(logits, exits.labels).statistic)
    assert float(scores["pearson"]) == pytest.approx(pearsonr(logits, exits.labels).statistic, abs=1e-6)
    assert json.loads((tmp_path / "out/config.json").read_text())["problem_type"] == "regression"


def test_regression_exits_early(drive, tmp_path):
    drive(f"{TRAIN} --exit_rule patience --highway_pooling mean --distill", task="STS-B")
    config = json.loads((tmp_path / "out/config.json").read_text())
    (tmp_path / "out/config.json").write_text(json.dumps(config | {"patience_tolerance": 0.2}))
    drive(
        "--do_eval --eval_each_highway --eval_highway --exit_threshold 0 2 --model_name_or_path out "
        "--max_seq_length 32 --per_gpu_eval_batch_size 4 --target_drop 0.9",
        task="STS-B",
    )
    exits = AllExits.load(tmp_path / "results/out/all_exits.npz")
    assert (exits.rule, exits.tolerance) == ("patience", 0.2)
    rows = results.read_sweep(tmp_path / "results/out")
    assert [row.rule for row in rows] == ["patience"] * 2
    assert rows[0].layers_run == 1
    assert list(rows[1].exits.values()) == np.bincount(exits.exit_layers(2.0), minlength=5)[1:].tolist()
    scores = dict(line.split(" = ") for line in (tmp_path / "out/eval_results.txt").read_text().splitlines())
    assert float(scores["spearmanr_at_patience_2.0"]) == rows[1].score
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["exit_rule"], config["highway_pooling"]) == ("patience", "mean")
    assert json.loads((tmp_path / "out/run.json").read_text())["arguments"]["distill"] == 0.5
    assert config["exit_threshold"] == json.loads((tmp_path / "results/out/threshold.json").read_text())["threshold"]


def test_another_rule_needs_no_new_training(drive, tmp_path):
    drive(f"{TRAIN} --exit_threshold 0.2")
    drive("--do_eval --exit_rule confidence --risk 0.9 --model_name_or_path out --max_seq_length 32")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["exit_rule"] == "confidence"
    assert config["exit_threshold"] == json.loads((tmp_path / "results/out/threshold.json").read_text())["threshold"]
    drive(f"--model_name_or_path out {TRAIN} --output_dir again")
    config = json.loads((tmp_path / "again/config.json").read_text())
    assert (config["exit_rule"], config["exit_threshold"]) == ("confidence", -1.0)


def test_new_parts_are_listed_in_short():
    modules = ("classifier", "bert.encoder.highway.0.classifier", "bert.encoder.highway.11.pooler.dense")
    names = [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]
    assert new_parts(names) == ["classifier", "2 off-ramps"]
    assert new_parts(["bert.encoder.highway_embeddings.classifier.bias"]) == ["1 off-ramp"]
    assert new_parts([]) == []


def test_an_exit_before_the_first_layer_is_layer_0_in_every_file(drive, tmp_path, figures_not_drawn, capsys):
    drive(f"{TRAIN} --recipe fast --evaluate_during_training --logging_steps 3")
    printed = capsys.readouterr().out
    assert "new, not in the checkpoint: classifier, 4 off-ramps\n" in printed
    assert "dev acc of exits 0 to 3 " in printed
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert {name: config[name] for name in RECIPES["fast"].off_ramps} == RECIPES["fast"].off_ramps
    stages = json.loads((tmp_path / "out/run.json").read_text())["stages"]
    assert [stages[stage]["updates"] for stage in "12"] == [3, 18]  # 1 epoch, and 6 on cached features

    drive(
        "--do_eval --eval_each_highway --eval_highway --exit_threshold 0 0.3 0.7 --model_name_or_path out "
        "--max_seq_length 32 --risk 0.9"
    )
    assert "Score (acc) by layer, in %: 0: " in capsys.readouterr().out
    folder = tmp_path / "results/out"
    exits = AllExits.load(folder / "all_exits.npz")
    assert (exits.logits.shape, list(exits.layers)) == ((20, 5, 2), [0, 1, 2, 3, 4])
    right = (exits.logits.argmax(-1) == exits.labels[:, None]).mean(0)
    np.testing.assert_allclose(np.load(folder / "each_layer.npy"), right[1:])  # entry 1 is layer 1, as ever
    metric, scores = results.read_each_layer(folder)
    assert (metric, scores) == ("acc", pytest.approx(dict(enumerate(right.tolist()))))
    counts, _, layers_run, score = np.load(folder / "entropy_0.7.npy", allow_pickle=True)
    assert (counts, layers_run, score) == ({0: 20, 1: 0, 2: 0, 3: 0, 4: 0}, 0, scores[0])
    never, some, every = results.read_sweep(folder)
    assert (never.cost, every.exits) == (1, counts)
    assert 0 < every.cost < 0.1
    layers = exits.exit_layers(0.3)
    assert some.exits == {layer: int((layers == layer).sum()) for layer in range(5)}
    assert some.layers_run == layers.mean() / 4
    assert {path.stem for path in draw(read_series([folder]), tmp_path / "figures")} >= {"exits_by_threshold"}
    (folder / results.SWEEP).unlink()  # the npy files alone
    assert [row.exits for row in results.read_sweep(folder)] == [never.exits, some.exits, every.exits]
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert np.size(config["exit_threshold"]) in (1, 4)


@pytest.mark.parametrize("strategy", ["joint", "weighted", "alternating"])
def test_strategies_of_one_stage(drive, tmp_path, strategy, capsys):
    drive(f"{TRAIN} --train_strategy {strategy} --highway_learning_rate 1e-2 --distill 1 --evaluate_during_training")
    printed = capsys.readouterr().out
    assert "stage 1: training the backbone, its classifier and the off-ramps" in printed
    assert "stage 2" not in printed
    assert json.loads((tmp_path / "out/run.json").read_text())["settings"]["train_strategy"] == strategy


def test_checkpoints_are_kept_and_evaluated(drive, tmp_path, capsys):
    scores = drive(f"{TRAIN} --save_steps 8 --eval_all_checkpoints --max_steps 16 --highway_learning_rate 1e-3")
    assert scores.keys() == {"acc_", *(f"acc_stage{stage}-{step}" for stage in (1, 2) for step in (8, 16))}
    assert f"acc = {scores['acc_']}\n" == (tmp_path / "out/eval_results.txt").read_text()
    names = sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*"))
    assert names == sorted(f"checkpoint-stage{stage}-{step}" for stage in (1, 2) for step in (8, 16))
    printed = capsys.readouterr().out
    order = [printed.index(f"Result of out/checkpoint-{name} on dev") for name in ("stage1-8", "stage1-16", "stage2-8")]
    assert order == sorted(order)
    assert (tmp_path / "out/checkpoint-stage2-8/eval_results.txt").is_file()
    drive(f"{TRAIN} --max_steps 2 --overwrite_output_dir")
    assert not list((tmp_path / "out").glob("checkpoint-*"))  # they belonged to the earlier training


def test_results_of_a_model_that_is_overwritten_are_removed(drive, tmp_path):
    measured = "--eval_each_highway --eval_highway --exit_threshold 0.3 --risk 0.5"
    drive(f"{TRAIN} --max_steps 2 {measured}")
    (folder,) = {file.parent for file in tmp_path.rglob("entropy_sweep.csv")}
    mine = {"drawing.png", "tickets.csv", "vectors.npy", "entropy_of_mine.npy"}
    for name in (*mine, "confidence_0.3.npy", "score_by_saving.pdf"):
        (folder / name).touch()
    drive(f"{TRAIN.replace('--do_eval', '')} --max_steps 2 --overwrite_output_dir")
    assert {file.name for file in folder.iterdir()} == mine
    assert not (tmp_path / "out/eval_results.txt").exists()


def test_stage_2_does_not_change_the_weights_of_stage_1(drive, tmp_path):
    drive(f"{TRAIN} --save_steps 6")
    after_1, after_2 = (
        load_file(tmp_path / f"out/{name}/model.safetensors") for name in ("checkpoint-stage1-6", "checkpoint-stage2-6")
    )
    for name, tensor in after_1.items():
        assert (tensor == after_2[name]).all().item() == (".highway." not in name), name


def test_highway_pooling_is_stored_in_the_config(drive, tmp_path):
    drive(f"{TRAIN} --highway_pooling mean --max_steps 1")
    assert json.loads((tmp_path / "out/config.json").read_text())["highway_pooling"] == "mean"
    drive("--do_eval --model_name_or_path out --max_seq_length 32")  # the checkpoint's pooling, without the flag


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--data_dir nowhere --do_train", "nowhere: no such directory"),
        ("--task_name IMDB --do_train", "IMDB: no such GLUE task; choose one of CoLA"),
        ("--data_dir no_columns --do_train --do_eval", "dev.tsv, line 1: no column 'label'"),
        ("--data_dir bad_label --do_train --do_eval", "dev.tsv, line 3: unknown label 'good'; the task has 0, 1"),
        ("--data_dir empty --do_train --do_eval", "dev.tsv: no examples in it"),
        ("--do_train --max_seq_length 67", " max_seq_length 67: this model takes 8 to 66 tokens"),
        ("--do_train --output_dir full", "--output_dir full: the folder is not empty; choose another or add"),
        (
            "--do_train --model_name_or_path t5",
            "t5: a t5 checkpoint; DeeBERT takes bert, roberta, ",
        ),
        (
            "--do_train --model_name_or_path nowhere/model",
            "nowhere/model: no such folder here, and the hub gives no such model: ",
        ),
        ("--do_train --model_type roberta", "but the model type is roberta; give bert"),
        ("--do_train --tokenizer_name untraned", "untraned: no such folder here, and the hub gives no such model: "),
        ("--do_train --tokenizer_name ./untraned", "./untraned: no such folder"),
        ("--do_train --exit_threshold nan", "exit_threshold nan: exit_threshold is NaN"),
        ("--do_train --fp16 --no_cuda", "--fp16 needs a GPU"),
        ("--do_eval", "--output_dir out: no trained model there"),
        ("--do_eval --output_dir untrained", "untrained: not a trained DeeBERT"),
        ("--do_eval --output_dir trained --highway_pooling mean", "trained has first; leave it out"),
        (
            "--do_train --model_name_or_path trained --recipe fast",
            "trained's off-ramps are of another kind, pooler; give --recipe paper to keep them",
        ),
        ("--do_train --data_dir bad_train", "train.tsv, line 2: unknown label 'x'"),
        ("--do_train --output_dir .", "--output_dir .: give a folder's name"),
        ("--do_train --do_eval --task_name STS-B --target_drop 0.1", "no threshold can be chosen"),
        ("--do_eval --output_dir three_labels", "a model of 3 labels, but SST-2 has 2"),
        ("", "nothing to do: give --do_train or --do_eval"),
        ("--do_train --target_drop 0.01", "--target_drop has no effect without --do_eval: add it, or leave"),
        ("--do_train --eval_highway", "--eval_highway has no effect without --do_eval"),
        ("--do_train --label_column x", "--label_column has no effect without --train_file or"),
        ("--do_train --evaluate_during_training --logging_steps 0", "it scores every --logging_steps, and that is 0"),
        ("--do_train --highway_pooling attention", "invalid choice: 'attention'"),
        ("--do_train --config_name one_layer", "a model of one layer has no off-ramps"),
        ("--do_train --train_strategy static", "invalid choice: 'static'"),
        ("--do_train --exit_rule patience --exit_threshold 1.5", "exit_threshold 1.5: patience counts"),
    ],
)
def test_bad_input_gets_one_clear_line(drive, tmp_path, tiny_data, tiny_checkpoints, capsys, flags, message):
    texts = {
        "no_columns": "sentence\tpolarity\n",
        "bad_label": "sentence\tlabel\na\t1\nb\tgood\n",
        "empty": "sentence\tlabel\n",
        "bad_train": "",
    }
    for name, text in texts.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "dev.tsv").write_text(text)
        (tmp_path / name / "train.tsv").write_bytes((tiny_data / "SST-2/train.tsv").read_bytes())
    for name in ("full", "t5", "untrained", "one_layer"):
        (tmp_path / name).mkdir()
    (tmp_path / "full/precious.txt").write_text("hours of work")
    tiny_config("bert", num_hidden_layers=1).save_pretrained(tmp_path / "one_layer")
    (tmp_path / "t5/config.json").write_text('{"model_type": "t5"}')
    for path in tiny_checkpoints["bert"].iterdir():
        (tmp_path / "untrained" / path.name).write_bytes(path.read_bytes())
    three = tiny_model("bert", num_labels=3)
    save_model(three, load_tokenizer(str(tiny_checkpoints["bert"])), tmp_path / "three_labels")
    save_model(tiny_model("bert"), load_tokenizer(str(tiny_checkpoints["bert"])), tmp_path / "trained")
    (tmp_path / "bad_train/dev.tsv").write_bytes((tiny_data / "SST-2/dev.tsv").read_bytes())
    (tmp_path / "bad_train/train.tsv").write_text("sentence\tlabel\na film\tx\n")
    before = files(tmp_path)

    with pytest.raises(SystemExit) as exit:
        drive(f"--max_seq_length 32 {flags}", task="STS-B" if "STS-B" in flags else "SST-2")
    assert exit.value.code == 2
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if line.startswith("error:")]
    assert message in line
    assert "Traceback" not in captured.err
    assert files(tmp_path) == before


RECORDS = ['{"settings": []}', "[]", "null", "3", '"x"', "{", "\xff", "[" * 10**5]
RECORDS += ['{"finished": 1}', '{"arguments": []}', '{"stages": null}']


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record[:16])
@pytest.mark.hostile("run.json", "one line")
def test_a_record_of_another_shape_gets_one_line(drive, tmp_path, capsys, record):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/run.json").write_bytes(record.encode("latin-1"))
    for flags in (TRAIN, f"{TRAIN} --resume"):
        with pytest.raises(SystemExit) as stop:
            drive(flags)
        assert stop.value.code == 2
        line = capsys.readouterr().err
        assert line.startswith("error: out/run.json: damaged (")
        assert line.endswith("); remove it\n")
        assert line.count("\n") == 1


def test_regression_refuses_entropy_exits(drive, capsys):
    with pytest.raises(SystemExit):
        drive(f"{TRAIN} --exit_threshold 0.1", task="STS-B")
    assert "needs at least two labels" in capsys.readouterr().err


def test_the_label_order_of_the_checkpoint_is_used(drive, tmp_path, tiny_checkpoints):
    """A model trained elsewhere with MNLI's labels in another order is scored by their names."""
    model = tiny_model("bert", num_labels=3)
    set_labels(model.config, ("neutral", "contradiction", "entailment"))
    save_model(model, load_tokenizer(str(tiny_checkpoints["bert"])), tmp_path / "out")
    drive("--do_eval --eval_each_highway --model_name_or_path out --max_seq_length 32", task="MNLI")
    labels = AllExits.load(tmp_path / "results/out/all_exits.npz").labels
    assert labels[:3].tolist() == [1, 2, 0]  # the file has contradiction, entailment, neutral
    assert CLASSES["bert"][1].from_pretrained(tmp_path / "out").config.id2label[0] == "neutral"
