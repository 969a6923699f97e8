"""A threshold chosen on film reviews, on texts of other kinds: is the promise kept, and what do index and audit show?

Takes the quickstart's model, trained with its default TRAIN and DEV. The texts are what comes with its film reviews:
tweets, product reviews and sentences from newspaper editorials, rated by the same people; the sign of the rating is the
label. Prints a line of a Markdown table for each promise and kind.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import sample_data
from scipy.stats import binom

sys.path.insert(0, str(Path(__file__).parent.parent))

from deebert.data.batching import collator
from deebert.data.features import tokenize
from deebert.data.tasks import TASKS, Example
from deebert.evaluation.all_exits import AllExits, run_all_exits
from deebert.evaluation.tables import markdown, row
from deebert.evaluation.threshold_selection import OperatingPoint, SelectionTarget, choose, operating_point
from deebert.modeling.checkpoints import load_config, load_model, load_tokenizer, quiet_transformers
from deebert.runtime.watch import population_stability_index
from deebert.utils import cli
from deebert.utils.cli import fraction, positive
from deebert.utils.errors import InputError

TASK = TASKS["SST-2"]
TRAIN, DEV, SEED = 3000, 1000, 42  # of the quickstart
KINDS = {
    "film reviews, unseen": sample_data.RATINGS,
    "product reviews": "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt",
    "tweets": "hutto_ICWSM_2014/tweets_GroundTruth.txt",
    "newspaper editorials": "hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt",
}
HEAD = (
    "promised",
    "texts",
    "number",
    "full model (%)",
    "early exit (%)",
    "change (points)",
    "predictions changed (%)",
    "cost saved (%)",
    "stability index",
    "--audit would report (%)",
)


def sentences(texts: int) -> dict[str, list[tuple[str, float]]]:
    """The dev set of film reviews, and up to this many other texts of each kind, with their ratings."""
    files = sample_data.fetch_ratings(*KINDS.values())
    rated = {kind: sample_data.read_ratings(data) for kind, data in zip(KINDS, files, strict=True)}
    films = next(iter(KINDS))
    _, others = sample_data.split(rated[films], TRAIN, DEV + texts, SEED)
    found = {"dev set": others[:DEV], films: others[DEV:]}
    for kind in list(KINDS)[1:]:
        found[kind] = sample_data.unique_sentences(rated[kind], SEED)[:texts]
    return found


def reported_by_audit(point: OperatingPoint, share: float) -> str:
    """The share of changed predictions, with what nine of ten audits of this share of the texts report."""
    audited, changed = max(1, round(share * point.samples)), point.changed / point.samples
    low, high = (100 * count / audited for count in binom.interval(0.9, audited, changed))
    return f"{100 * changed:.1f} ({low:.1f} to {high:.1f})"


def line(promise: str, kind: str, exits: AllExits, threshold: float | list[float], dev: dict, audit: float) -> str:
    """One line of the table. dev: the dev set's texts by exit layer."""
    point = operating_point(TASK, exits, threshold)
    cells = [
        promise,
        kind,
        f"{point.samples:,}",
        f"{100 * exits.full_score(TASK):.1f}",
        f"{100 * point.score:.1f}",
        f"{100 * point.score_change:+.1f}",
        f"{100 * point.changed / point.samples:.1f}",
        f"{100 * point.cost_saved:.1f}",
        f"{population_stability_index(dev, point.exits):.2f}",
        reported_by_audit(point, audit),
    ]
    return row(cells)


def main() -> None:
    parser = cli.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the model that quickstart.sh has trained")
    parser.add_argument("--target_drop", type=fraction, nargs="+", default=[0.01, 0.02], help="as for eval_deebert.sh")
    parser.add_argument("--texts", type=positive, default=2000, help="of each kind, at most")
    parser.add_argument("--audit", type=fraction, default=0.1, help="share of the texts that an audit runs to the end")
    args = parser.parse_args()
    quiet_transformers()
    config, tokenizer = load_config(args.model), load_tokenizer(args.model)
    model = load_model(args.model, config)
    if config.num_labels != 2:
        raise InputError(f"{args.model}: a model of {config.num_labels} labels; give the quickstart's")
    all_exits = {}
    for kind, rated in sentences(args.texts).items():
        features = tokenize([Example(text, None, int(rating > 0)) for text, rating in rated], tokenizer, 128)
        print(f"{kind}: {len(features)} texts", file=sys.stderr, flush=True)
        all_exits[kind] = run_all_exits(model, features, collator(config), progress=False)
    dev = all_exits.pop("dev set")
    print(markdown([HEAD], left=2))
    for drop in args.target_drop:
        choice = choose(TASK, dev, SelectionTarget(drop=drop))
        if choice.threshold is None:
            raise InputError(f"--target_drop {drop}: the dev set shows no threshold to keep it; give a larger one")
        promise = f"{100 * drop:g} points, threshold {np.max(choice.threshold):.2f}"
        for kind, exits in all_exits.items():
            print(line(promise, kind, exits, choice.threshold, choice.point.exits, args.audit), flush=True)


if __name__ == "__main__":
    cli.run(main)
