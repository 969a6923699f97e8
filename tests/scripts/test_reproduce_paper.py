"""reproduce_paper.py on tiny models and tiny files of all GLUE tasks: what it trains, writes, reuses and refuses."""

import csv
import json
from pathlib import Path

import pytest
import reproduce_paper
from helpers import script, snapshot_files
from tiny import sentences

import run_glue_deebert
from deebert.data.tasks import TASKS, Task
from deebert.utils import cli
from deebert.utils.cli import InputError

GLUE = [name for name in TASKS if name != "Ratings"]
FAST = "--max_seq_length 16 --per_gpu_train_batch_size 8 --learning_rate 1e-3 --save_steps 0 --seed 42 --no_cuda"
EPOCHS = ("--epochs", "1", "--roberta_epochs", "2")


def write_split(task: Task, path: Path, count: int, seed: int) -> None:
    """A file in the form of the GLUE download, with the columns that are read."""
    columns = [*(task.headerless or (*task.text_columns, task.label_column))]
    lines = [] if task.headerless else ["\t".join(columns)]
    for text, label in sentences(count, seed):
        values = dict.fromkeys(task.text_columns, text) | {task.label_column: (*task.labels, "5", "1")[label]}
        lines.append("\t".join(values.get(column, "") for column in columns))
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def glue(tmp_path_factory) -> Path:
    """A folder with the nine tasks: 16 lines to train on, 12 to score."""
    root = tmp_path_factory.mktemp("glue")
    for name in GLUE:
        task = TASKS[name]
        write_split(task, root / name / "train.tsv", 16, 1)
        for split, _ in task.dev_splits:
            write_split(task, root / name / f"{split}.tsv", 12, 2)
    return root


@pytest.fixture
def reproduce(monkeypatch, tmp_path, tiny_checkpoints, glue):
    """Runs the script in process, in tmp_path; flags given later win."""
    monkeypatch.chdir(tmp_path)
    for name, folder in tiny_checkpoints.items():
        Path(f"tiny-{name}").symlink_to(folder)

    def run(tasks: list[str], *more: str, models: tuple[str, ...] = ("tiny-bert", "tiny-roberta")) -> None:
        argv = ["reproduce_paper.py", "--data_dir", str(glue), "--output_dir", "out", *EPOCHS, *FAST.split()]
        monkeypatch.setattr("sys.argv", [*argv, "--tasks", *tasks, "--models", *models, *more])
        reproduce_paper.main()

    return run


def test_all_tasks_and_both_models(reproduce, tmp_path, capsys):
    reproduce(GLUE)
    print(capsys.readouterr().out)
