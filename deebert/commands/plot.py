"""`deebert plot`: draws figures from result files."""

from pathlib import Path

from deebert.evaluation.plotting import draw
from deebert.evaluation.series import read_series
from deebert.utils.cli import ArgumentParser


def main() -> None:
    parser = ArgumentParser(
        prog="deebert plot", description="Draws figures from result files: CSV, or npy as the original writes them."
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="RESULT_DIR", help="folders of result files")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the figures")
    args = parser.parse_args()
    for path in draw(read_series(args.folders), args.output_dir):
        print(path)
