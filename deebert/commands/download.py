"""`deebert download`: fetches a GLUE task from the Hugging Face hub and writes its TSV files."""

from pathlib import Path

from deebert.data.tasks import TASKS, download, get_task
from deebert.utils.cli import ArgumentParser, InputError

DOWNLOADS = [name for name in TASKS if name != "Ratings"]


def main() -> None:
    parser = ArgumentParser(prog="deebert download", description="Fetches a GLUE task and writes its TSV files.")
    parser.add_argument("task", nargs="?", metavar="TASK", help=f"one of {', '.join(DOWNLOADS)}")
    parser.add_argument("--download", dest="old_task", metavar="TASK", help="the same; the name of version 0.5")
    parser.add_argument("--data_dir", required=True, help="the files go to DATA_DIR/TASK")
    args = parser.parse_args()
    if (args.task is None) == (args.old_task is None):
        raise InputError(f"give one task to download: {', '.join(DOWNLOADS)}")
    name = args.task or args.old_task
    if name.lower() == "ratings":
        raise InputError("Ratings is not a GLUE task; scripts/sample_data.py makes an example of it")
    try:
        task = get_task(name)
    except InputError:
        raise InputError(f"{name}: no such GLUE task; choose one of {', '.join(DOWNLOADS)}") from None
    for path in download(task, Path(args.data_dir) / task.name):
        print(path)
