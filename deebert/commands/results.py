"""`deebert results`: prints the sweep of result folders as tables."""

from pathlib import Path

from deebert.evaluation.results import read_sweep
from deebert.evaluation.tables import summary, sweep_table
from deebert.utils.cli import ArgumentParser


def main() -> None:
    parser = ArgumentParser(prog="deebert results", description="Prints threshold sweeps as tables.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="RESULT_DIR", help="folders of result files")
    for folder in parser.parse_args().folders:
        rows = read_sweep(folder)
        print(f"{folder}\n\n{sweep_table(rows)}\n\n{summary(rows)}\n")
