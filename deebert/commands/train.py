"""`deebert train`: fine-tunes a model with early exit. Its flags are those of run_glue_deebert.py."""

import sys

from deebert.experiment.arguments import parse_args


def main() -> None:
    start(sys.argv[1:], "--do_train")


def start(argv: list[str], work: str) -> None:
    """Runs the driver with these flags and the one that names the work."""
    args = parse_args([*argv, work], sys.argv[0])
    from deebert.experiment.run import run  # five seconds of imports, after the flags have been checked

    run(args)
