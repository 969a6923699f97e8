"""How often does a chosen threshold keep its target on samples that it was not chosen on?

Reads all_exits.npz (eval_deebert.sh writes it). At random, many times, some samples choose the threshold and all others
score it. Prints a line of a Markdown table for each number of samples.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import numpy as np

from deebert.data.tasks import TASKS, Task, check_num_labels
from deebert.evaluation.all_exits import AllExits
from deebert.evaluation.tables import markdown, row
from deebert.evaluation.threshold_selection import (
    OperatingPoint,
    SelectionTarget,
    check_choice,
    operating_point,
    shown_threshold,
)
from deebert.utils import cli
from deebert.utils.cli import positive
from deebert.utils.errors import InputError

HEAD = ("samples", "splits with a threshold", "target kept on the others (%)", "score change", "cost saved (%)")


def unseen_points(
    task: Task, exits: AllExits, target: SelectionTarget, samples: int, splits: int
) -> list[OperatingPoint]:
    """The results on the other samples, for each split whose samples show a threshold to keep the target."""
    points = []
    for seed in range(splits):
        order = np.random.default_rng(seed).permutation(len(exits.labels))
        threshold = shown_threshold(task, exits.take(order[:samples]), target, seed)
        if threshold is not None:
            points.append(operating_point(task, exits.take(order[samples:]), threshold))
    return points


def kept(point: OperatingPoint, target: SelectionTarget) -> bool:
    """Whether these samples meet the target."""
    if target.drop is not None:
        return point.score_change >= -target.drop - 1e-12  # rounding of a difference of scores
    return point.lost <= target.risk * point.samples


def line(points: list[OperatingPoint], target: SelectionTarget, samples: int, splits: int) -> str:
    """One line of the table."""
    if not points:
        return row([str(samples), f"0 of {splits}", "", "", ""])
    change, saved = (
        100 * np.mean(values) for values in zip(*((p.score_change, p.cost_saved) for p in points), strict=True)
    )
    share = 100 * np.mean([kept(point, target) for point in points])
    return row([str(samples), f"{len(points)} of {splits}", f"{share:.1f}", f"{change:+.2f}", f"{saved:.1f}"])


def main() -> None:
    parser = cli.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="all_exits.npz")
    parser.add_argument("--task_name", required=True, choices=TASKS)
    for name in ("risk", "target_drop"):
        parser.add_argument(f"--{name}", type=float, help="as for eval_deebert.sh")
    parser.add_argument("--confidence", type=float, help="as for eval_deebert.sh")
    parser.add_argument(
        "--samples", type=positive, nargs="+", default=[500, 1000], help="how many choose the threshold"
    )
    parser.add_argument("--splits", type=positive, default=200)
    args = parser.parse_args()
    target = SelectionTarget(args.target_drop, args.risk, args.confidence)
    if not args.file.is_file():
        raise InputError(f"{args.file}: no such file; scripts/eval_deebert.sh writes all_exits.npz")
    exits, task = AllExits.load(args.file), TASKS[args.task_name]
    check_num_labels(task, exits.logits.shape[2], str(args.file))
    check_choice(task, exits, target)
    if len(exits.labels) <= max(args.samples):
        raise InputError(f"{args.file}: no samples with labels remain beside --samples {max(args.samples)}")
    print(markdown([HEAD]))
    for samples in args.samples:
        points = unseen_points(task, exits, target, samples, args.splits)
        print(line(points, target, samples, args.splits), flush=True)


if __name__ == "__main__":
    cli.run(main)
