"""`deebert download MRPC SST-2 --data_dir DIR`: fetches GLUE tasks from the Hugging Face hub, as TSV files."""

import sys
from collections.abc import Callable
from pathlib import Path
from shlex import quote

from deebert.data.tasks import BINARY, DIAGNOSTIC, INDEX_COLUMNS, TASKS, Task, get_task, is_test
from deebert.utils.cli import ArgumentParser
from deebert.utils.errors import InputError
from deebert.utils.files import replacing

REPOSITORY = "nyu-mll/glue"
DOWNLOADS = tuple(name for name in TASKS if name != "Ratings")


def main() -> None:
    parser = ArgumentParser(description="Fetches GLUE tasks and writes their TSV files.")
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"some of {', '.join(DOWNLOADS)}, or all")
    parser.add_argument("--data_dir", required=True, help="the files of a task go to DATA_DIR/TASK")
    args = parser.parse_args()
    if not args.tasks:
        raise InputError(f"name the tasks to download: {', '.join(DOWNLOADS)}, or all")
    names = DOWNLOADS if "all" in [name.lower() for name in args.tasks] else args.tasks
    tasks = list(dict.fromkeys(map(get_task, names)))  # each once
    if TASKS["Ratings"] in tasks:
        raise InputError("Ratings is not a GLUE task; scripts/sample_data.py makes an example of it")
    hub_loader()  # without it, all would fail for the same reason
    failed = []
    for task in tasks:
        try:
            for path in download(task, args.data_dir):
                print(path, flush=True)
        except InputError as error:
            if len(tasks) == 1:
                raise
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            failed.append(task.name)
    if failed:
        again = f"python -m deebert download {' '.join(failed)} --data_dir {quote(args.data_dir)}"
        raise InputError(f"not fetched: {', '.join(failed)}; {again} tries them again")


def hub_loader() -> Callable:
    """`load_dataset` of the package datasets. Raises InputError if it is not installed."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise InputError("the download needs the package datasets: pip install datasets") from None
    return load_dataset


def download(task: Task, data_dir: str | Path) -> list[Path]:
    """Writes a task's TSV files to data_dir / its name, MNLI's diagnostic set beside it. Raises InputError."""
    folder = Path(data_dir) / task.name
    parts = [(task.name.lower().replace("-", ""), {folder / f"{split}.tsv": hub for split, hub in task.splits})]
    if task == TASKS["MNLI"]:
        parts.append(("ax", {Path(data_dir) / DIAGNOSTIC / f"{DIAGNOSTIC}.tsv": "test"}))
    load_dataset, written = hub_loader(), []
    for name, files in parts:
        try:
            dataset = load_dataset(REPOSITORY, name)
            splits = {path: _lines(task, dataset[hub], path.stem) for path, hub in files.items()}
        except Exception as error:  # the library's have no common base: no network, no such data, a damaged cache
            raise InputError(f"{task.name}: the hub cannot be reached, or has no such task: {error}") from None
        for path, lines in splits.items():
            with replacing(path) as file:
                file.writelines(f"{line}\n" for line in lines)
        written += splits
    return written


def _lines(task: Task, rows, split: str) -> list[str]:
    """One split of a hub dataset as GLUE lays it out."""
    test = is_test(split)  # the hub fills the label of test rows with -1
    names = rows.features["label"].names if task.labels and task.labels != BINARY else None
    columns = dict(zip(task.text_columns, task.hub_columns or task.text_columns, strict=True))
    labelled = task.headerless or (*task.text_columns, task.label_column)
    header = (INDEX_COLUMNS[0], *task.text_columns) if test else labelled

    def field(row: dict, column: str) -> str:
        if column in columns:
            return " ".join(str(row[columns[column]]).split())  # a tab or line break would end the field
        if column == task.label_column:
            return names[row["label"]] if names else str(row["label"])
        return str(row["idx"]) if column == INDEX_COLUMNS[0] else ""

    records = ["\t".join(field(row, column) for column in header) for row in rows]
    return records if task.headerless and not test else ["\t".join(header), *records]
