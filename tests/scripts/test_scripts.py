"""The shell scripts end to end, from another folder, on a tiny model and tiny TSV files."""

import sys

import numpy as np
import pytest
from support.helpers import ROOT, script, started_by

import run_glue_deebert


@pytest.mark.slow
def test_the_three_scripts_and_the_figures(tmp_path, tiny_data, tiny_checkpoints, monkeypatch):
    """The second and the third start the driver here: a process of its own would only take seconds more."""
    monkeypatch.chdir(tmp_path)
    settings = {
        "PATH_TO_DATA": str(tiny_data),
        "DATASET": "MRPC",
        "MODEL_NAME": str(tiny_checkpoints["bert"]),
        "MODEL_TYPE": "bert",
        "MODEL_SIZE": "tiny",
        "EPOCHS": "1",
        "OMP_NUM_THREADS": "1",
    }
    flags = ("--max_seq_length", "32")
    done = script("train_deebert.sh", tmp_path, "--learning_rate", "1e-3", *flags, **settings)
    assert done.returncode == 0, done.stderr
    for name in ("eval_deebert.sh", "entropy_eval.sh"):
        program, *arguments = started_by(name, tmp_path, *flags, **settings, ENTROPIES="0 0.5")
        assert program == str(ROOT / "run_glue_deebert.py")
        run_glue_deebert.main(arguments)
    done = script("plot_results.sh", tmp_path, **settings)
    assert done.returncode == 0, done.stderr
    model, results = "saved_models/bert-tiny/MRPC/two_stage", tmp_path / "results/saved_models/bert-tiny/MRPC/two_stage"
    assert (tmp_path / model / "model.safetensors").is_file()
    assert np.load(results / "each_layer.npy").shape == (4,)
    assert {path.name for path in results.glob("entropy_*.npy")} == {"entropy_0.0.npy", "entropy_0.5.npy"}
    assert len(list(results.glob("*.png"))) == len(list(results.glob("*.pdf"))) == 4


@pytest.mark.parametrize("name", ["train_deebert.sh", "studies/compare.sh", "studies/benchmark_training.sh"])
@pytest.mark.parametrize("own", [False, True], ids=["a task", "own data"])
def test_scripts_that_train_take_the_recipe_and_the_epochs(tmp_path, tiny_data, name, own):
    (tmp_path / "films.csv").touch()
    data = {"TRAIN_FILE": "films.csv"} if own else {"PATH_TO_DATA": str(tiny_data), "DATASET": "MRPC"}
    arguments = started_by(name, tmp_path, "--seed", "7", **data, MODEL_NAME="m", EPOCHS="5")
    paper = ["--per_gpu_train_batch_size", "8", "--learning_rate", "2e-5", "--save_steps", "0"]
    fast = ["--save_steps", "500", "--save_total_limit", "1"]
    assert arguments[arguments.index("--model_name_or_path") + 1] == "m"
    recipe = [*(fast if own else paper), "--num_train_epochs", "5"]
    assert arguments[-len(recipe) - 2 :] == [*recipe, "--seed", "7"]


@pytest.mark.parametrize("recipe", [["--recipe", "fast"], ["--recipe=fast"]])
def test_the_fast_recipe_keeps_its_own_rates_on_a_task(tmp_path, tiny_data, recipe):
    data = {"PATH_TO_DATA": str(tiny_data), "DATASET": "MRPC", "MODEL_NAME": "m"}
    arguments = started_by("train_deebert.sh", tmp_path, *recipe, **data)
    assert not {"--learning_rate", "--per_gpu_train_batch_size"} & set(arguments)
    expected = ["--save_steps", "0", "--num_train_epochs", "3", *recipe]
    assert arguments[-len(expected) :] == expected


@pytest.mark.parametrize(
    ("name", "program"),
    [
        ("train_deebert.sh", "run_glue_deebert.py"),
        ("eval_deebert.sh", "run_glue_deebert.py"),
        ("entropy_eval.sh", "run_glue_deebert.py"),
        ("studies/compare.sh", "scripts/studies/compare.py"),
    ],
)
def test_the_error_line_and_status_are_passed_on(tmp_path, tiny_data, name, program):
    """A stand-in for Python fails as programs do that get bad arguments."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\n[ "$1" = -c ] && exec {sys.executable} "$@"\n'
        f'[ "$2" = {ROOT}/{program} ] && echo "error: --highway_pooling last" >&2 && exit 2\n'
    )
    python.chmod(0o755)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    settings = {"PATH_TO_DATA": str(tiny_data), "DATASET": "SST-2", "OUTPUT_DIR": "model", "PYTHON": str(python)}
    done = script(name, tmp_path, "--highway_pooling", "last", **settings)
    assert (done.returncode, done.stderr) == (2, "error: --highway_pooling last\n")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("train_deebert.sh", "no data in ./glue_data/MRPC: set PATH_TO_DATA"),
        ("eval_deebert.sh", "no data in ./glue_data/MRPC: set PATH_TO_DATA"),
        ("entropy_eval.sh", "no data in ./glue_data/MRPC: set PATH_TO_DATA"),
        ("plot_results.sh", "no results in ./results/: run scripts/eval_deebert.sh"),
    ],
)
def test_missing_data_gets_one_clear_line(tmp_path, name, message):
    done = script(name, tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}")
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("files", "name"),
    [
        ({"TRAIN_FILE": "my data/tickets.v2.csv", "TEST_FILE": "test.csv"}, "tickets.v2"),
        ({"TRAIN_FILE": "banking/train.tsv", "VALIDATION_FILE": "banking/dev.tsv"}, "banking"),
    ],
)
def test_own_files_take_the_place_of_a_task(tmp_path, files, name):
    """A stand-in for Python prints its arguments; what the driver does with them is tested in tests/experiment."""
    (tmp_path / "python").write_text('#!/bin/sh\n[ "$1" = -c ] || printf "%s\\n" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    for folder in ("my data", "banking", f"saved_models/{name}/two_stage"):
        (tmp_path / folder).mkdir(parents=True)
    for file in (*files.values(), f"saved_models/{name}/two_stage/config.json"):
        (tmp_path / file).touch()
    for script_name in ("train_deebert.sh", "eval_deebert.sh", "entropy_eval.sh"):
        done = script(script_name, tmp_path, "--label_column", "team", PYTHON=str(tmp_path / "python"), **files)
        arguments = done.stdout.splitlines()
        for variable, path in files.items():
            assert arguments[arguments.index(f"--{variable.lower()}") + 1] == path
        assert arguments[arguments.index("--output_dir") + 1] == f"./saved_models/{name}/two_stage"
        assert arguments[-2:] == ["--label_column", "team"]
        assert not {"--task_name", "--data_dir", "--plot_data_dir"} & {*arguments}  # results are beside the model
    chosen = script("eval_deebert.sh", tmp_path, PYTHON=str(tmp_path / "python"), RESULTS_DIR="there", **files)
    assert "--plot_data_dir\nthere\n" in chosen.stdout
    for part in ("results", "results-test"):
        (tmp_path / f"saved_models/{name}/two_stage/{part}").mkdir()
        (tmp_path / f"saved_models/{name}/two_stage/{part}/each_layer.csv").touch()
    drawn = script("plot_results.sh", tmp_path, PYTHON=str(tmp_path / "python"), **files).stdout.splitlines()
    folders = [drawn[i + 1] for i, argument in enumerate(drawn) if argument == "--output_dir"]
    assert folders == [f"./saved_models/{name}/two_stage/{part}" for part in ("results", "results-test")]

    arguments = script("studies/compare.sh", tmp_path, PYTHON=str(tmp_path / "python"), **files).stdout.splitlines()
    assert arguments[arguments.index("--comparison_dir") + 1] == f"./comparison/{name}"
    assert arguments[arguments.index("--train_file") + 1] == files["TRAIN_FILE"]
    assert "--task_name" not in arguments
    for script_name in (
        "train_deebert.sh",
        "eval_deebert.sh",
        "entropy_eval.sh",
        "studies/compare.sh",
    ):
        both = script(script_name, tmp_path, DATASET="MRPC", **files)
        assert (both.returncode, both.stdout) == (2, "")
        assert both.stderr == (
            "error: DATASET=MRPC and a file of your own: unset DATASET, or TRAIN_FILE, VALIDATION_FILE and TEST_FILE\n"
        )


def test_tasks_share_a_folder_of_predictions(tmp_path):
    """A stand-in for Python prints its arguments."""
    (tmp_path / "python").write_text('#!/bin/sh\n[ "$1" = -c ] && echo RTE, SST-2 || printf "%s\\n" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    for task, thresholds, wanted in (("RTE", "", []), ("SST-2", "0.1 0.3", ["--exit_threshold", "0.1", "0.3"])):
        model = tmp_path / "saved_models/roberta-base" / task / "two_stage"
        for folder in (model, tmp_path / "glue_data" / task):
            folder.mkdir(parents=True)
        (model / "config.json").write_text("{}")
        settings = {"PYTHON": str(tmp_path / "python"), "MODEL_TYPE": "roberta", "ENTROPIES": thresholds}
        done = script("predict_glue.sh", tmp_path, "--no_cuda", DATASET=task, **settings)
        assert done.returncode == 0, done.stderr
        arguments = done.stdout.splitlines()
        start = arguments.index("--submission_dir")
        assert arguments[start:] == [
            "--submission_dir", "./submissions/roberta-base", *wanted, "--no_cuda"
        ]  # fmt: skip


def test_own_files_have_no_test_set_on_glues_server(tmp_path):
    done = script("predict_glue.sh", tmp_path, TRAIN_FILE="my.csv")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: GLUE has test sets for a task in PATH_TO_DATA: unset TRAIN_FILE,")


def test_the_quickstart_has_two_models(tmp_path):
    done = script("quickstart.sh", tmp_path, MODEL="huge")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: MODEL=huge: choose small or base\n")


def test_a_wrong_task_gets_one_clear_line(tmp_path):
    done = script("train_deebert.sh", tmp_path, DATASET="SST2")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: DATASET=SST2 is none of CoLA, SST-2,")


def test_a_python_without_the_requirements_gets_one_clear_line(tmp_path, tiny_data):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')
    bare.chmod(0o755)
    done = script("train_deebert.sh", tmp_path, PATH_TO_DATA=str(tiny_data), PYTHON=str(bare))
    assert done.returncode == 2
    assert "lacks the requirements" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "settings", "model"),
    [
        ("eval_deebert.sh", {"DATASET": "SST-2"}, "./saved_models/bert-base/SST-2/two_stage"),
        (
            "eval_deebert.sh",
            {"DATASET": "SST-2", "MODEL_NAME": "models/minilm"},
            "./saved_models/minilm/SST-2/two_stage",
        ),
        ("entropy_eval.sh", {"TEST_FILE": "new.csv", "OUTPUT_DIR": "runs/train"}, "runs/train"),
    ],
)
def test_a_missing_model_gets_one_clear_line(tmp_path, tiny_data, name, settings, model):
    (tmp_path / "new.csv").touch()
    done = script(name, tmp_path, PATH_TO_DATA=str(tiny_data), **settings)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: no trained model in {model}: run scripts/train")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", ["train_deebert.sh", "eval_deebert.sh", "entropy_eval.sh"])
def test_a_missing_file_gets_one_clear_line(tmp_path, name):
    (tmp_path / "tickets.csv").touch()
    done = script(name, tmp_path, TRAIN_FILE="tickets.csv", TEST_FILE="tests.csv")
    assert (done.returncode, done.stderr) == (2, "error: TEST_FILE=tests.csv: no such file\n")
