"""`deebert download MRPC SST-2 --data_dir DIR`: fetches GLUE tasks from the Hugging Face hub, as TSV files."""

import sys
from collections.abc import Sequence

from deebert.data.download import DOWNLOADS, download, hub_loader
from deebert.data.tasks import Task, get_task
from deebert.utils.cli import ArgumentParser
from deebert.utils.errors import InputError


def main() -> None:
    parser = ArgumentParser(prog="deebert download", description="Fetches GLUE tasks and writes their TSV files.")
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"some of {', '.join(DOWNLOADS)}, or all")
    parser.add_argument("--data_dir", required=True, help="the files of a task go to DATA_DIR/TASK")
    args = parser.parse_args()
    tasks = find_tasks(DOWNLOADS if "all" in [name.lower() for name in args.tasks] else args.tasks)
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
        again = f"deebert download {' '.join(failed)} --data_dir {args.data_dir}"
        raise InputError(f"not fetched: {', '.join(failed)}; {again} tries them again")


def find_tasks(names: Sequence[str]) -> list[Task]:
    """The tasks of these names, each once. Raises InputError."""
    if not names:
        raise InputError(f"name the tasks to download: {', '.join(DOWNLOADS)}, or all")
    tasks = []
    for name in names:
        if name.lower() == "ratings":
            raise InputError("Ratings is not a GLUE task; scripts/sample_data.py makes an example of it")
        try:
            tasks.append(get_task(name))
        except InputError:
            raise InputError(f"{name}: no such GLUE task; choose one of {', '.join(DOWNLOADS)}") from None
    return list(dict.fromkeys(tasks))
