"""Repeats the experiments of the paper: trains, scores and times each model on each task. reproduce_paper.sh runs it.

REPRODUCTION_DIR/MODEL/TASK holds a model, its results and a log. Beside them are table 1 and the figures 2 to 6, which
are written again after each model. Further flags go to run_glue_deebert.py in every run. What is finished is reused.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from paper_figures import draw_figures, read_shown
from paper_run import Run, label, timed_thresholds
from paper_table import Block, notes, read_result, write_table

from deebert.commands.download import download
from deebert.data.tasks import TASKS, Task, get_task
from deebert.experiment.arguments import parse_args
from deebert.modeling.checkpoints import load_config
from deebert.utils import cli
from deebert.utils.cli import ArgumentParser, positive_float
from deebert.utils.errors import InputError, Interrupted

DEFAULT_TASKS = ("SST-2", "MRPC", "QNLI", "RTE", "QQP", "MNLI")
DEFAULT_MODELS = ("bert-base-uncased", "roberta-base")


def need_data(tasks: Sequence[Task], data_dir: Path) -> None:
    """Fetches the tasks that have no folder in data_dir. Raises InputError."""
    missing = [task for task in tasks if not (data_dir / task.name).is_dir()]
    for task in missing:
        print(f"{task.name}: fetching it to {data_dir / task.name}", flush=True)
        try:
            download(task, data_dir)
        except InputError as error:
            names = ", ".join(task.name for task in missing)
            raise InputError(
                f"no data of {names} in {data_dir} (set PATH_TO_DATA), and it cannot be fetched: {error}"
            ) from None


def read_all(task: Task, data_dir: Path) -> None:
    """Reads all files that a run needs, so that a wrong line is reported before hours of work. Raises InputError."""
    for split in ("train", *task.dev_splits):
        task.read(data_dir / task.name, split)


def make_runs(args: argparse.Namespace, tasks: Sequence[Task], flags: Sequence[str]) -> list[Run]:
    """All runs, in order, with their input checked. Raises InputError."""
    labels = Counter(label(name) for name in args.models)
    if (twice := labels.most_common(1)[0])[1] > 1:
        raise InputError(f"MODELS: two of them are called {twice[0]}; rename a folder")
    configs = {name: load_config(name) for name in args.models}
    runs = []
    for task in tasks:
        for name, config in configs.items():
            folder = args.output_dir / label(name) / task.name
            epochs = args.roberta_epochs if config.model_type == "roberta" else args.epochs
            runs.append(Run(name, config, task, args.data_dir / task.name, folder, epochs, flags))
    for run in runs:
        if run.args.model.exit_rule not in (None, "entropy"):
            raise InputError(f"--exit_rule {run.args.model.exit_rule}: the paper's is entropy; leave it out")
    return runs


def execute_all(runs: Sequence[Run], args: argparse.Namespace) -> None:
    """Executes the runs that are not finished, with a line for each, and writes the table after each."""
    for number, run in enumerate(runs, 1):
        about = f"[{number}/{len(runs)}] {run.task.name}, {label(run.name)}"
        if run.evaluated:
            print(f"{about}: finished before", flush=True)
            continue
        print(f"{about}: epochs {run.epochs:g}", flush=True)
        try:
            run.execute()
        except Interrupted as stop:
            raise Interrupted(f"stopped; the same command goes on with {run.folder}", stop.exit_code - 128) from None
        table(runs, args)


def table(runs: Sequence[Run], args: argparse.Namespace) -> str:
    """Writes table 1 with the runs that are finished so far, and returns it as text."""
    finished = [run for run in runs if run.evaluated]
    blocks = []
    for name in args.models:
        own = [run for run in finished if run.name == name]
        ours = {run.task.name: [read_result(f, run.evaluated["thresholds"]) for f in run.results] for run in own}
        config = next(run.config for run in runs if run.name == name)
        blocks.append(Block(label(name), config.model_type, config.num_hidden_layers, ours))
    tasks = list(dict.fromkeys(run.task for run in runs))
    devices = sorted({run.evaluated["device"] for run in finished})
    return write_table(args.output_dir, blocks, tasks, notes(blocks, tasks, " or ".join(devices)))


def figures(runs: Sequence[Run], folder: Path) -> list[str]:
    """Draws the figures. Returns a line for each file and for each figure that is left out."""
    shown = [
        read_shown(run.task.name, label(run.name), run.results[0], timed_thresholds(run.task.num_labels))
        for run in runs
    ]
    written, left_out = draw_figures(folder, shown)
    return [*map(str, written), *left_out]


def parse() -> tuple[argparse.Namespace, list[str]]:
    """Our arguments, and the flags of run_glue_deebert.py. Raises InputError."""
    parser = ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--tasks", nargs="+", default=DEFAULT_TASKS, help=f"some of {', '.join(TASKS)}")
    parser.add_argument("--models", nargs="+", default=DEFAULT_MODELS, help="names on the hub, or folders")
    parser.add_argument("--data_dir", type=Path, required=True, help="holds a folder of TSV files for each task")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for models, results, table and figures")
    parser.add_argument("--epochs", type=positive_float, required=True, help="of each stage")
    parser.add_argument("--roberta_epochs", type=positive_float, required=True, help="the same for RoBERTa")
    return parser.parse_known_args()


def main() -> None:
    args, flags = parse()
    tasks = list(dict.fromkeys(get_task(name) for name in args.tasks))
    parse_args(
        ["--do_train", "--output_dir", "any", "--model_name_or_path", "any", *flags]
    )  # reports wrong flags first
    need_data(tasks, args.data_dir)
    for task in tasks:
        read_all(task, args.data_dir)
    runs = make_runs(args, tasks, flags)
    execute_all(runs, args)
    print(f"\n{table(runs, args)}\n")
    print(*figures(runs, args.output_dir), sep="\n")


if __name__ == "__main__":
    cli.run(main)
