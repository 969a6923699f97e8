"""`deebert eval`: scores and times a trained model. Its flags are those of run_glue_deebert.py."""

import sys

from deebert.commands.train import start


def main() -> None:
    start(sys.argv[1:], "--do_eval")
