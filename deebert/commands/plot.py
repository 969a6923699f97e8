"""`deebert plot`: prints the sweeps of result files as tables, or draws figures from them."""

from pathlib import Path

from deebert.evaluation.plotting import draw, read_series
from deebert.evaluation.results import read_sweep
from deebert.evaluation.tables import summary, sweep_table
from deebert.utils.cli import ArgumentParser


def main() -> None:
    about = "Prints threshold sweeps as tables, or draws figures, from result files: CSV, or the original's npy files."
    parser = ArgumentParser(description=about)
    parser.add_argument("folders", nargs="+", type=Path, metavar="RESULT_DIR", help="folders of result files")
    parser.add_argument("--output_dir", type=Path, help="folder for the figures; without it, tables are printed")
    args = parser.parse_args()
    if args.output_dir is not None:
        print(*draw(read_series(args.folders), args.output_dir), sep="\n")
        return
    for folder in args.folders:
        rows = read_sweep(folder)
        print(f"{folder}\n\n{sweep_table(rows)}\n\n{summary(rows)}\n")
