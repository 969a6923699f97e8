"""Fine-tunes and evaluates DeeBERT on own data or a GLUE task: the original's driver. `deebert train` is the same."""

from collections.abc import Sequence

from deebert.utils import cli


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Returns the full model's scores, such as `acc_`, and those of checkpoints, such as `acc_stage1-50`."""
    from deebert.experiment.arguments import parse_args  # imported here: cli.run reports a missing package

    args = parse_args(argv)
    from deebert.experiment.run import run  # five seconds of imports, after the flags have been checked

    return run(args)


if __name__ == "__main__":
    cli.run(main)
