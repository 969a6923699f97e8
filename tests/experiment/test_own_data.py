"""Own data through the driver: what is trained, scored, stored and said, and one clear line for what cannot be."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import f1_score, precision_recall_fscore_support
from support.tiny import sentences, tiny_config, tiny_tokenizer
from transformers import BertConfig, BertForSequenceClassification

import run_glue_deebert
from deebert import Classifier
from deebert.evaluation.all_exits import AllExits
from deebert.evaluation.results import read_each_layer, read_sweep
from deebert.experiment import monitor, run
from deebert.experiment.arguments import parse_args
from deebert.utils import cli
from deebert.utils.arrays import softmax

FROZEN = "--learning_rate 1e-12 --head_learning_rate 1e-12"
TRAIN = "--do_train --do_eval --max_seq_length 32 --learning_rate 3e-3 --num_train_epochs 1 --save_steps 0 --no_cuda"
EVALUATE = "--do_eval --eval_each_highway --model_name_or_path out --max_seq_length 32"


@pytest.fixture
def own(monkeypatch, tmp_path, tiny_checkpoints):
    """Runs the driver in tmp_path with the tiny model."""
    monkeypatch.chdir(tmp_path)

    def run(flags: str) -> None:
        common = f"--model_type bert --model_name_or_path {tiny_checkpoints['bert']} --output_dir out"
        monkeypatch.setattr("sys.argv", ["run_glue_deebert.py", *common.split(), *flags.split()])
        cli.run(run_glue_deebert.main)

    return run


def write_csv(path, rows: list[tuple], header: tuple = ("text", "label")) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def stock_classifier(folder, names: tuple[str, ...]) -> BertForSequenceClassification:
    """An ordinary fine-tuned classifier with these names of its outputs."""
    config = BertConfig(**tiny_config("bert").to_diff_dict() | {"id2label": dict(enumerate(names))})
    model = BertForSequenceClassification(config)
    model.save_pretrained(folder)
    tiny_tokenizer("bert").save_pretrained(folder)
    return model


def results_of(folder) -> tuple[AllExits, list[dict], dict]:
    """The exits, the table of classes and the model's config."""
    with (folder / "out/results/classes.csv").open() as file:
        classes = list(csv.DictReader(file))
    return (
        AllExits.load(folder / "out/results/all_exits.npz"),
        classes,
        json.loads((folder / "out/config.json").read_text()),
    )


def test_texts_with_a_label(own, tmp_path, capsys):
    names = ("good", "bad")
    write_csv(tmp_path / "films.csv", [(text, names[label]) for text, label in sentences(60, 1)])
    write_csv(tmp_path / "test.csv", [(text, names[label]) for text, label in sentences(12, 2)])
    own(f"{TRAIN} --train_file films.csv --validation_split 0.3")
    printed = capsys.readouterr().out
    assert "films.csv: 60 lines, text from 'text', label from 'label', one of 2 labels each: bad, good" in printed
    assert "films.csv: 18 of its lines are the dev set, 42 the training set (validation_split 0.3)" in printed

    own(f"{EVALUATE} --risk 0.9 --seed 7")  # the data are those of the training, and its part of them
    printed = capsys.readouterr().out
    exits, classes, config = results_of(tmp_path)
    assert (config["id2label"], config["problem_type"]) == ({"0": "bad", "1": "good"}, "single_label_classification")
    assert config["highway_head"] == "linear"  # --recipe fast is the default
    assert exits.logits.shape == (18, 5, 2)  # with exit 0
    early = exits.logits_at(exits.exit_layers(config["exit_threshold"])).argmax(-1)
    assert "\nEach class of dev, in %, full model -> at the model's threshold:\n" in printed
    average = printed.split("| macro average | 18 |")[1].splitlines()[0]
    for at, predicted in (("full", exits.logits[:, -1].argmax(-1)), ("early", early)):
        *expected, _ = precision_recall_fscore_support(exits.labels, predicted, zero_division=0)
        for name, values in zip(("precision", "recall", "f1"), expected, strict=True):
            assert [float(row[f"{name}_{at}"]) for row in classes] == pytest.approx(values)
            assert f"{100 * np.mean(values):.1f}" in average
    assert [row["label"] for row in classes] == ["bad", "good"]

    own(f"{EVALUATE} --validation_file films.csv --test_file test.csv --eval_highway")
    printed = capsys.readouterr().out
    dev, test = ([row.threshold for row in read_sweep(tmp_path / "out" / name)] for name in ("results", "results-test"))
    assert dev == test  # the test file is only scored: it chooses no threshold
    assert "Result of out on test: acc" in printed
    assert "warning: 60 of 60 texts in films.csv are in films.csv, too" in printed
    assert len(AllExits.load(tmp_path / "out/results-test/all_exits.npz").labels) == 12

    seen = "a part of this one may hold texts that it has seen; give --validation_file"
    for flags, message in (
        ("--train_file films.csv --validation_split 0.2", seen),
        ("--train_file test.csv", seen),
    ):
        with pytest.raises(SystemExit):
            own(f"{EVALUATE} {flags}")
        assert message in capsys.readouterr().err


def test_a_test_file_alone_needs_the_files_of_the_training(own, tmp_path, capsys):
    for name, seed in (("films", 1), ("dev", 2), ("test", 3)):
        write_csv(tmp_path / f"{name}.csv", [(text, ("good", "bad")[label]) for text, label in sentences(24, seed)])
    own(f"{TRAIN} --train_file films.csv --validation_file dev.csv")
    own(f"{EVALUATE} --test_file test.csv")
    assert "Result of out on test: acc" in capsys.readouterr().out
    (tmp_path / "films.csv").rename(tmp_path / "moved films.csv")  # the dev set is still there
    own(f"{EVALUATE} --test_file test.csv")
    assert "Result of out on test: acc" in capsys.readouterr().out
    (tmp_path / "dev.csv").rename(tmp_path / "moved.csv")
    with pytest.raises(SystemExit):
        own(f"{EVALUATE} --test_file test.csv")
    message = "--test_file test.csv: give --validation_file, or --train_file of the training, too"
    assert message in capsys.readouterr().err


def test_texts_with_several_labels(own, tmp_path, capsys):
    for name, n, seed in (("train", 60, 1), ("dev", 20, 2)):
        lines = [
            {"text": text, "tags": [["bad"], ["good"], ["good", "long"], []][label + 2 * (len(text) > 40)]}
            for text, label in sentences(n, seed)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    files = "--train_file train.jsonl --validation_file dev.jsonl --label_column tags"
    own(f"{TRAIN} {files} --exit_rule confidence --distill")
    own(f"{EVALUATE} --exit_rule entropy --risk 0.9 --eval_highway --exit_threshold 0 0.6")
    printed = capsys.readouterr().out
    assert "any number of 3 labels each: bad, good, long" in printed
    exits, classes, config = results_of(tmp_path)
    assert (config["problem_type"], exits.labels.shape) == ("multi_label_classification", (20, 3))
    probabilities = 1 / (1 + np.exp(-exits.logits[:, :-1].astype(float)))
    binary = -(probabilities * np.log(probabilities) + (1 - probabilities) * np.log(1 - probabilities))
    assert exits.uncertainties == pytest.approx(binary.max(-1), abs=1e-5)
    predicted = exits.logits[:, -1] > 0
    scores = dict(line.split(" = ") for line in (tmp_path / "out/eval_results.txt").read_text().splitlines())
    for average in ("micro", "macro"):
        expected = f1_score(exits.labels, predicted, average=average, zero_division=0)
        assert float(scores[f"f1_{average}"]) == pytest.approx(expected)
    assert [int(row["texts"]) for row in classes] == exits.labels.sum(0).tolist()
    text = json.loads((tmp_path / "dev.jsonl").read_text().splitlines()[0])["text"]
    (prediction,) = Classifier("out", exit_threshold=-1, max_seq_length=32)([text])
    assert prediction.label == np.array(["bad", "good", "long"])[predicted[0]].tolist()


def test_one_column_for_each_label_and_texts_that_are_cut(own, tmp_path, capsys):
    rows = [(text, label, 1 - label, int(len(text) > 40)) for text, label in sentences(40, 1)]
    write_csv(tmp_path / "films.csv", rows, ("text", "good", "bad", "long"))
    flags = TRAIN.replace("--max_seq_length 32", "--max_seq_length 8")
    with pytest.raises(SystemExit):
        own(f"{flags} --train_file films.csv")
    assert "label_column good,bad,long makes a label of each column of 0 and 1" in capsys.readouterr().err
    own(f"{flags} --train_file films.csv --label_columns good,bad,long")
    printed = capsys.readouterr().out
    assert "any number of 3 labels each, by 0 and 1: good, bad, long" in printed
    assert " %) have more than 8 tokens and were cut (max_seq_length)" in printed.split("note: train: ")[1]
    assert "note: dev: " in printed
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["id2label"] == {"0": "good", "1": "bad", "2": "long"}


def test_tokens_that_the_model_has_no_embeddings_for_are_one_line(own, tmp_path, tiny_checkpoints, capsys):
    shutil.copytree(tiny_checkpoints["bert"], tmp_path / "tokens")
    tokenizer = tiny_tokenizer("bert")
    tokenizer.add_tokens(["[TICKET]", *(f"[{i}]" for i in range(tiny_config("bert").vocab_size - len(tokenizer)))])
    tokenizer.save_pretrained(tmp_path / "tokens")
    write_csv(tmp_path / "films.csv", [(f"[TICKET] {text}", label) for text, label in sentences(40, 1)])
    with pytest.raises(SystemExit):
        own(f"{TRAIN} --train_file films.csv --tokenizer_name tokens")
    (line,) = capsys.readouterr().err.splitlines()
    assert "but the model has embeddings for" in line


def test_numbers(own, tmp_path, capsys):
    write_csv(tmp_path / "stars.csv", [(text, 4 * label + 0.5) for text, label in sentences(40, 1)], ("text", "stars"))
    own(f"{TRAIN} --train_file stars.csv --problem_type regression --exit_rule patience")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["problem_type"] == "regression"
    with pytest.raises(SystemExit):
        own(f"{EVALUATE} --answered_accuracy 0.9")
    assert "--answered_accuracy: stars has numbers to predict" in capsys.readouterr().err
    assert "spearmanr = " in (tmp_path / "out/eval_results.txt").read_text()


def test_the_metric_decides_the_score_everywhere(own, tmp_path, capsys):
    names = ("good", "bad")
    write_csv(tmp_path / "films.csv", [(text, names[label]) for text, label in sentences(60, 1)])
    own(f"{TRAIN} --train_file films.csv --validation_file films.csv --metric recall:good")
    assert "Result of out on dev: recall:good " in capsys.readouterr().out
    own(f"{EVALUATE} --target_drop 0.01 --eval_highway --exit_threshold 0 0.69")  # the metric of the training
    assert "dev texts of the class 'good' are too few, at least 3" in capsys.readouterr().out
    exits = AllExits.load(tmp_path / "out/results/all_exits.npz")
    good = exits.labels == 1
    recall = (exits.logits.argmax(-1) == 1)[good].mean(axis=0)
    assert list(read_each_layer(tmp_path / "out/results")[1].values()) == pytest.approx(recall.tolist())
    swept = read_sweep(tmp_path / "out/results")[1]
    early = exits.logits_at(exits.exit_layers(0.69)).argmax(-1)
    assert swept.score == pytest.approx((early == 1)[good].mean())
    own(f"{EVALUATE} --metric f1_macro")
    assert "Result of out on dev: f1_macro " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        own(f"{EVALUATE} --metric f1:great")
    assert "metric f1:great: give f1:CLASS, where CLASS is one of bad, good" in capsys.readouterr().err


def test_the_test_file_is_scored_at_the_stored_threshold(own, tmp_path, capsys):
    write_csv(tmp_path / "films.csv", [(text, ("good", "bad")[label]) for text, label in sentences(60, 1)])
    write_csv(tmp_path / "test.csv", [(text, ("good", "bad")[label]) for text, label in sentences(16, 2)])
    own(f"{TRAIN} --train_file films.csv".replace("--do_eval ", ""))
    next_step = "the trained model is in out; python -m deebert eval --output_dir out --target_drop 0.01 scores it"
    assert next_step in capsys.readouterr().out
    config = json.loads((tmp_path / "out/config.json").read_text())
    (tmp_path / "out/config.json").write_text(json.dumps(config | {"exit_threshold": 0.69}))
    own(f"{EVALUATE} --test_file test.csv")  # its dev set is that of the training
    printed = capsys.readouterr().out
    exits = AllExits.load(tmp_path / "out/results-test/all_exits.npz")
    score = 100 * (exits.logits_at(exits.exit_layers(0.69)).argmax(-1) == exits.labels).mean()
    assert f"\ntest at the model's threshold: score {score:.2f} % (" in printed
    assert len(re.findall(r"\nearly exit at 0.69 saves .* points; the best single exit, layer ", printed)) == 2
    written = (tmp_path / "out/results-test/eval_results.txt").read_text()
    assert f"acc_at_the_threshold = {score / 100}" in written


def test_texts_that_are_handed_over(own, tmp_path, capsys):
    """They are those of `Classifier`. A later threshold changes the predictions, so that the choice is removed."""
    rows = [(text, ("good", "bad")[label]) for text, label in sentences(60, 1)]
    write_csv(tmp_path / "films.csv", rows)
    own(f"{TRAIN} --train_file films.csv --validation_file films.csv")
    evaluate = f"{EVALUATE} --validation_file films.csv"
    own(f"{evaluate} --answered_accuracy 0.2")
    printed = capsys.readouterr().out
    assert "chosen min_confidence: 0; with 90 % confidence at least 20 % of the unseen texts" in printed
    assert "stored in out/config.json: every text gets a label" in printed
    own(f"{evaluate} --answered_accuracy 0.999")
    assert "no min_confidence is chosen: 60 dev texts do not show with 90 % confidence" in capsys.readouterr().out
    exits, _, config = results_of(tmp_path)
    sure = np.sort(softmax(exits.logits[:, -1].astype(float)).max(-1))
    limit = float((sure[29] + sure[30]) / 2)
    (tmp_path / "out/config.json").write_text(json.dumps(config | {"min_confidence": limit}))
    own(evaluate)
    predictions = Classifier("out")([text for text, _ in rows])
    assert [p.label is None for p in predictions].count(True) == 30
    right = [p.label == label for p, (_, label) in zip(predictions, rows, strict=True)].count(True)
    assert f"30 of 60 texts (50.0 %) are answered, {100 * right / 30:.1f} % rightly" in capsys.readouterr().out
    assert "answered = 0.5\n" in (tmp_path / "out/eval_results.txt").read_text()
    assert "name: acc of the answered texts" in (tmp_path / "out/README.md").read_text()
    stored = {"min_confidence": limit, "exit_threshold": 0.0123}  # none of the grid's
    (tmp_path / "out/config.json").write_text(json.dumps(config | stored))
    own(f"{evaluate} --risk 0.9")  # stores another threshold, or none
    assert results_of(tmp_path)[2]["min_confidence"] == 0


def test_a_final_classifier_that_learned_too_little_is_named(own, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "FEW", 0)  # else it is fitted to the frozen backbone first
    names = ("good", "bad")
    write_csv(tmp_path / "films.csv", [(text, names[label]) for text, label in sentences(60, 1)])
    rates = f"{FROZEN} --highway_learning_rate 3e-2 --per_gpu_train_batch_size 8"
    own(f"{TRAIN} --train_file films.csv --validation_file films.csv {rates}")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: the final classifier")]
    assert len(lines) == 1
    assert "the full model is not trained enough" in lines[0]


def test_exits_at_chance_are_named(own, tmp_path, capsys):
    write_csv(
        tmp_path / "train.csv", [(text, "common" if i else "rare") for i, (text, _) in enumerate(sentences(12, 1))]
    )
    own(f"{TRAIN} --train_file train.csv --validation_file train.csv {FROZEN} --highway_learning_rate 1e-9")
    printed = capsys.readouterr().out
    assert "of 4: no better than always 'common' (91.7 %); train again with more epochs (EPOCHS," in printed
    assert "recipe" not in printed  # it is the fast one's already
    assert "warning: 12 of 12 texts in train.csv are in train.csv, too" in printed


@pytest.mark.parametrize(
    ("names", "order", "kept"),
    [(("Good", "BAD"), ("good", "bad"), True), (("cat", "dog"), ("bad", "good"), False)],
    ids=["in another case", "other labels"],
)
def test_a_fine_tuned_start_keeps_its_rows_by_their_names(own, tmp_path, capsys, names, order, kept):
    """Whatever the order in which the file has the labels. A classifier of other labels is replaced."""
    write_csv(tmp_path / "films.csv", [(text, ("good", "bad")[label]) for text, label in sentences(60, 1)])
    stock = stock_classifier(tmp_path / "start", names)
    own(f"{TRAIN} --train_file films.csv --model_name_or_path start {FROZEN} --highway_learning_rate 1e-3")
    printed = capsys.readouterr().out
    assert ("start: its classifier is of other labels, cat, dog; a new one is trained" in printed) != kept
    assert json.loads((tmp_path / "out/config.json").read_text())["id2label"] == dict(zip("01", order, strict=True))
    trained = load_file(tmp_path / "out/model.safetensors")["classifier.weight"]
    assert torch.allclose(trained, stock.classifier.weight, atol=1e-5) == kept


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--do_train", "no data: give --train_file with your own, or --task_name and --data_dir"),
        ("--do_train --task_name SST-2", "no data: give --train_file with your own, or --task_name and --data_dir"),
        ("--do_train --train_file a.csv --task_name SST-2", "--task_name and --data_dir are for GLUE's files"),
        ("--do_train --validation_file a.csv", "--do_train needs --train_file"),
        ("--do_eval --validation_file a.csv", "--output_dir out: no trained model there"),
        ("--do_train --train_file a.csv", "a.csv: no such file"),
        (
            "--do_train --train_file a.csv --validation_split 0.7",
            "--validation_split 0.7: give a number above 0 up to 0.5",
        ),
    ],
)
def test_flags_that_do_not_fit_get_one_clear_line(own, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        own(flags)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_recipe_follows_from_the_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common = "--model_type bert --model_name_or_path m --output_dir o"
    for flags, recipe in (
        ("--do_train --train_file a.csv", "fast"),
        ("--do_train --train_file a.csv --recipe paper", "paper"),
        ("--do_train --task_name SST-2 --data_dir d", "paper"),
        ("--do_eval --train_file a.csv", "paper"),  # an evaluation takes the model's off-ramps as they are
    ):
        args = parse_args(f"{common} {flags}".split())
        assert args.model.recipe == recipe


@pytest.mark.parametrize(("few", "fitted"), [(1000, True), (30, False)])
def test_a_new_classifier_of_few_texts_a_label_starts_from_a_probe(own, tmp_path, capsys, monkeypatch, few, fitted):
    """The backbone hardly learns here, so that what the full model knows is what it was fitted to."""
    monkeypatch.setattr(run, "FEW", few)
    monkeypatch.setattr(
        run, "choose_pooling", lambda experiment, model: setattr(experiment.config, "classifier_pooling", "mean")
    )
    write_csv(tmp_path / "films.csv", [(text, ("good", "bad")[label]) for text, label in sentences(60, 1)])
    own(f"{TRAIN} --train_file films.csv --validation_file films.csv {FROZEN} --eval_each_highway")
    printed = capsys.readouterr().out
    assert ("first fitted to the frozen encoder (30 texts a label)" in printed) == fitted
    (file,) = tmp_path.glob("**/all_exits.npz")
    exits = AllExits.load(file)
    assert ((exits.logits[:, -1].argmax(axis=1) == exits.labels).mean() > 0.8) == fitted


def test_own_data_leaves_no_checkpoints_and_few_while_it_trains(own, tmp_path, monkeypatch):
    args = parse_args(["--do_train", "--train_file", "a.csv", "--model_name_or_path", "b", "--output_dir", "c"])
    assert (args.training.save_steps, args.checkpoints.save_total_limit) == (500, 1)
    write_csv(tmp_path / "films.csv", [(text, ("good", "bad")[label]) for text, label in sentences(60, 1)])
    seen, write = [], monitor.write_checkpoint

    def counted(output_dir, *arguments):
        write(output_dir, *arguments)
        seen.append(len(list(output_dir.glob("checkpoint-*"))))

    monkeypatch.setattr(monitor, "write_checkpoint", counted)
    own(f"{TRAIN.replace('--save_steps 0', '--save_steps 3')} --train_file films.csv --validation_file films.csv")
    assert len(seen) > 3
    assert set(seen) == {1}
    assert not list(tmp_path.glob("out/checkpoint-*"))
