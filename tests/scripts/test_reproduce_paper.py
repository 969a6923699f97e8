"""The paper's experiments on tiny models and files of several GLUE tasks: the table, the figures, what is reused."""

import csv
import gc
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import paper_figures
import paper_run
import paper_table
import pytest
import reproduce_paper
from paper_run import timed_thresholds
from support.helpers import once_for_all_workers, script, simulated
from support.tiny import sentences

import run_glue_deebert
from deebert.data.tasks import TASKS, Task
from deebert.evaluation import results, timing
from deebert.evaluation.all_exits import AllExits, sweep
from deebert.utils.errors import InputError

GLUE = ["CoLA", "SST-2", "STS-B", "MNLI", "RTE"]
MODELS = ("bert", "roberta")  # the names of the folders
FLAGS = "--epochs 1 --roberta_epochs 2 --max_seq_length 16 --per_gpu_train_batch_size 4 --learning_rate 1e-3"
FLAGS += " --save_steps 0 --no_cuda"


def write_split(task: Task, path: Path, count: int, seed: int) -> None:
    """A file in the form of the GLUE download, with the columns that are read."""
    columns = task.headerless or (*task.text_columns, task.label_column)
    lines = [] if task.headerless else ["\t".join(columns)]
    for text, label in sentences(count, seed):
        values = dict.fromkeys(task.text_columns, text) | {task.label_column: (task.labels or "15")[label]}
        lines.append("\t".join(values.get(column, "") for column in columns))
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, tiny_checkpoints) -> Path:
    """A folder with two models, and in `glue` the tasks: 8 lines to train on, 4 to score."""
    root = tmp_path_factory.mktemp("reproduction")
    for name in MODELS:
        (root / name).mkdir()
        for file in tiny_checkpoints[name].iterdir():
            (root / name / file.name).write_bytes(file.read_bytes())
    (root / "glue").mkdir()
    for name in GLUE:
        write_split(TASKS[name], root / "glue" / name / "train.tsv", 8, 1)
        for split in TASKS[name].dev_splits:
            write_split(TASKS[name], root / "glue" / name / f"{split}.tsv", 4, 2)
    return root


@pytest.fixture(scope="module")
def reproduce(workplace) -> Callable:
    """Runs the script in process, in the workplace; flags given later win."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace)
        patch.setattr(timing, "TURN_WARM_UP_SECONDS", 0.0)
        patch.setattr(timing, "WARM_UP_BATCHES", 1)
        gc.freeze()  # each stage of a training collects garbage, which takes longer than its few steps

        def run(tasks: list[str], *more: str) -> None:
            argv = ["reproduce_paper.py", "--tasks", *tasks, "--models", *MODELS, "--data_dir", "glue"]
            patch.setattr("sys.argv", [*argv, "--output_dir", "out", *FLAGS.split(), *more])
            reproduce_paper.main()

        yield run
        gc.unfreeze()


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory, reproduce, workplace) -> tuple[Path, str]:
    """The folder of a reproduction of all tasks, without figures, and what was printed, but for the table."""

    def make(folder: Path) -> None:
        lines: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reproduce_paper, "figures", lambda runs, folder: [])
            patch.setattr("builtins.print", lambda *words, **_: lines.extend(map(str, words)))
            reproduce(GLUE)
        shutil.copytree(workplace / "out", folder / "out")
        (folder / "printed.txt").write_text("\n".join(lines))

    shared = once_for_all_workers(tmp_path_factory, "reproduced", make)
    if not (workplace / "out").exists():
        shutil.copytree(shared / "out", workplace / "out")
    return workplace / "out", (shared / "printed.txt").read_text()


@pytest.mark.slow
def test_each_training_has_a_line(reproduced):
    lines = [line for line in reproduced[1].splitlines() if re.match(r"\[\d+/10\]", line)]
    assert lines[:2] == ["[1/10] CoLA, bert: epochs 1", "[2/10] CoLA, roberta: epochs 2"]
    assert len(lines) == 10


@pytest.mark.slow
def test_the_table_has_each_task_beside_the_papers(reproduced):
    folder, printed = reproduced
    text = (folder / "table1.txt").read_text()
    assert text.strip() in printed
    lines = [re.split(r"   +", line) for line in text.splitlines()]
    header, _, *rows = lines[: lines.index([""])]
    assert [cell.split()[0] for cell in header[1:]] == GLUE
    assert [row[0] for row in rows[::2]] == [
        f"{model}{limit}" for model in MODELS for limit in ("", *(f", drop < {x}" for x in ("0.5", "2", "4")))
    ]
    paper = dict(zip(GLUE, rows[1][1:], strict=True))
    assert (paper["SST-2"], paper["MNLI"], paper["CoLA"]) == ("93.6, 36.72 s", "83.9/83.0, 202.84 s", "-")
    assert dict(zip(GLUE, rows[3][1:], strict=True))["MNLI"] == "-0.0,-0.1/-14 %"
    assert {row[1 + GLUE.index("STS-B")] for row in rows[2::2] if "drop" in row[0]} == {"-"}
    for words in ("the paper's are test sets", "STS-B: regression", "bert has 4 layers, the paper's BERT-base 12"):
        assert words in text
    useless = re.search(r"^bert, (.*): no better than always the most frequent label", text, re.M)
    at_chance = []
    for name in GLUE:
        exits = AllExits.load(folder / "bert" / name / "results" / "all_exits.npz")
        right = exits.logits[:, -1].argmax(-1) == exits.labels
        if name != "STS-B" and right.mean() <= np.unique(exits.labels, return_counts=True)[1].max() / len(right):
            at_chance.append(name)
    assert (useless[1].split(", ") if useless else []) == at_chance
    markdown = (folder / "table1.md").read_text().splitlines()
    assert [cell.strip() for cell in markdown[3].strip("|").split("|")] == ["paper, BERT-base", *rows[1][1:]]


@pytest.mark.slow
def test_the_csv_file_repeats_what_was_measured(reproduced):
    folder, _ = reproduced
    rows = list(csv.DictReader((folder / "table1.csv").open()))
    assert len(rows) == 2 * (4 * 5 + 1)  # STS-B has no thresholds, MNLI has two data sets
    for row in rows:
        suffix = "-MM" if row["data_set"] == "dev_mismatched" else ""
        at = folder / row["model"] / row["task"] / f"results{suffix}"
        measured = {each.threshold: each for each in results.read_sweep(at)}
        if not row["limit"]:
            *_, full_score = results.read_each_layer(at)[1].values()
            assert (float(row["score"]), float(row["seconds"])) == (full_score, measured[0.0].full_seconds)
            continue
        own = measured[float(row["threshold"])]
        assert float(row["change"]) == own.score_change
        assert float(row["time_saved"]) == own.time_saved
        assert suffix or own.score_change > -float(row["limit"])
    (known,) = [row for row in rows if row["task"] == "RTE" and row["model"] == "roberta" and row["limit"] == "0.04"]
    assert (float(known["paper_change"]), float(known["paper_time_saved"])) == (-0.011, 0.35)


@pytest.mark.slow
def test_what_is_finished_is_reused_and_figures_are_drawn(reproduced, reproduce, monkeypatch, capsys):
    """Only figures are drawn; a model counts as large from LARGE layers on."""
    folder, _ = reproduced
    monkeypatch.setattr(run_glue_deebert, "main", lambda argv: pytest.fail("it ran again"))
    reproduce(["SST-2", "STS-B"])
    printed = capsys.readouterr().out
    assert printed.startswith("[1/4] SST-2, bert: finished before\n[2/4] SST-2, roberta: finished before\n")
    assert "Figure 5 is left out: no model of 24 layers or more among MODELS." in printed
    drawn = {path.name for path in folder.glob("figure*")}
    assert drawn == {f"figure{number}.{kind}" for number in (2, 3, 4, 6) for kind in ("png", "pdf")}

    monkeypatch.setattr(paper_figures, "LARGE", 4)
    monkeypatch.setattr(paper_figures, "save", lambda figure, stem: [stem])
    reproduce(["STS-B", "SST-2"])
    *_, only, two, three, four, six = capsys.readouterr().out.splitlines()
    assert only == "out/figure5"
    for number, line in zip((2, 3, 4, 6), (two, three, four, six), strict=True):
        assert line.startswith(f"Figure {number} is left out")


@pytest.mark.slow
def test_figures_show_what_was_measured(reproduced):
    folder, _ = reproduced
    row = timed_thresholds(2)
    shown = [
        paper_figures.read_shown(task, model, folder / model / task / "results", row)
        for task in ("SST-2", "RTE")
        for model in MODELS
    ]
    measured = shown[0].series
    tradeoff, savings, layers = (
        plot(shown).axes for plot in (paper_figures.tradeoff, paper_figures.savings, paper_figures.layers)
    )
    assert [axes.get_title() for axes in tradeoff[:2]] == ["SST-2 (acc)", "RTE (acc)"]
    assert tradeoff[0].lines[0].get_xdata() == pytest.approx([100 * each.time_saved for each in measured.sweep])
    assert layers[0].lines[1].get_ydata() == pytest.approx([100 * x for x in shown[1].series.each_layer.values()])
    assert [axes.get_title() for axes in savings[:2]] == list(MODELS)
    points = savings[0].containers[0].lines[0]
    assert points.get_xdata() == pytest.approx([100 * each.layers_saved for each in measured.sweep])
    bars = paper_figures.exits(shown).axes[0].containers
    assert [len(bars), len(bars[0])] == [4, len(row)]  # layers, and thresholds without those that were chosen
    of_row = [each for each in measured.sweep if each.threshold in row]
    assert [bar.get_height() for bar in bars[1]] == pytest.approx([100 * each.exits[2] / 4 for each in of_row])


@pytest.mark.slow
def test_an_interrupted_run_goes_on(reproduce, monkeypatch, workplace):
    """Stopped between training and evaluation: the training is not repeated. Other settings are refused."""
    evaluate_padded, calls = paper_run.evaluate_padded, []

    def stop_first(argv: list[str]) -> None:
        calls.append(argv)
        if len(calls) == 1:
            raise KeyboardInterrupt
        evaluate_padded(argv)

    monkeypatch.setattr(paper_run, "evaluate_padded", stop_first)
    monkeypatch.setattr(reproduce_paper, "figures", lambda runs, folder: [])
    new = ("--output_dir", "new", "--models", "bert")
    with pytest.raises(KeyboardInterrupt):
        reproduce(["RTE"], *new)
    reproduce(["RTE"], *new)
    assert len(calls) == 2
    assert (workplace / "new/bert/RTE/log.txt").read_text().count("stage 2: mean loss") == 1
    with pytest.raises(InputError, match=r"had another learning_rate, 0\.001"):
        reproduce(["RTE"], *new, "--learning_rate", "1e-4")


@pytest.mark.parametrize(
    ("tasks", "flags", "message"),
    [
        (["SST2"], [], "SST2: no such GLUE task"),
        (["RTE"], ["--data_dir", "nowhere"], r"no data of RTE in nowhere .*, and it cannot be fetched"),
        (["RTE"], ["--models", "bert", "glue/../bert"], "MODELS: two of them are called bert"),
        (["RTE"], ["--models", "./none"], "none: no such folder"),
        (["RTE"], ["--exit_rule", "patience"], "the paper's is entropy"),
        (["RTE"], ["--epochs", "0"], "0 is not a number above 0"),
        (["RTE"], ["--no_such_flag"], "unrecognized arguments: --no_such_flag"),
    ],
)
def test_bad_input_gets_one_clear_line(reproduce, workplace, tasks, flags, message):
    with pytest.raises(InputError, match=message):
        reproduce(tasks, "--output_dir", "none", *flags)
    assert not (workplace / "none").exists()


@pytest.mark.parametrize("seed", range(3))
def test_thresholds_save_the_most_below_their_drop(seed):
    exits, task = simulated(250, seed), TASKS["SST-2"]
    every = sweep(task, exits, np.unique(exits.uncertainties).tolist())
    chosen = sweep(task, exits, paper_table.choose_thresholds(task, exits))
    for drop, row in zip(paper_table.DROPS, chosen, strict=True):
        best = max(each.layers_saved for each in every if each.score_change > -drop + 1e-9)
        assert row.score_change > -drop
        assert row.layers_saved == pytest.approx(best, abs=0.01)
    regression = AllExits(np.zeros((4, 3, 1), np.float32), np.zeros(4, np.float32))
    assert paper_table.choose_thresholds(TASKS["STS-B"], regression) == []


def test_the_rows_of_thresholds_reach_the_largest_entropy():
    assert timed_thresholds(2) == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    assert (timed_thresholds(3)[-1], timed_thresholds(1)) == (1.1, [0.0])


def test_the_script_passes_the_papers_recipe(tmp_path):
    """A stand-in for Python prints its arguments."""
    (tmp_path / "python").write_text('#!/bin/sh\n[ "$1" = -c ] || printf "%s\\n" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    settings = {"TASKS": "RTE MRPC", "PATH_TO_DATA": "my data", "PYTHON": str(tmp_path / "python")}
    done = script("reproduce_paper.sh", tmp_path, "--no_cuda", **settings, MODELS="", REPRODUCTION_DIR="out")
    arguments = " ".join(done.stdout.split()[2:])
    assert arguments == (
        "--tasks RTE MRPC --data_dir my data --output_dir out --epochs 3 --roberta_epochs 10 --max_seq_length 128 "
        "--per_gpu_train_batch_size 8 --learning_rate 2e-5 --save_steps 0 --no_cuda"
    )
