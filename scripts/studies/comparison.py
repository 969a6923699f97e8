"""Compares training settings: the cost that each saves at a given drop of the score, over several seeds.

compare.py trains the models; this module computes the table, the CSV and the curves from their logits.
Shapes: N layers, G points of a curve.
"""

import csv
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.integrate import trapezoid

from deebert.data.tasks import Task
from deebert.evaluation.all_exits import AllExits, layer_scores, sweep
from deebert.evaluation.results import SweepRow, primary_scores
from deebert.evaluation.tables import markdown
from deebert.utils.errors import InputError
from deebert.utils.files import replacing

FEW_SAMPLES, FEW = 300, "So few samples show little: differences of some points are chance."
DROPS = (0.0, 0.005, 0.01, 0.02)  # of the score, in shares, at which savings are compared
GRID = np.linspace(0, 1, 101)  # (G,) the shares saved at which a curve has its points


@dataclass(frozen=True)
class Savings:
    """What the thresholds of one model save of the cost, in shares.

    saved: the largest share that any threshold saves, for each of DROPS.
    area: the mean of the score over the share that is run, from the smallest one to 1.
    curve: (G,) the best score that saves at least GRID, NaN where no threshold does.
    """

    saved: list[float]
    area: float
    curve: np.ndarray


@dataclass(frozen=True)
class Outcome:
    """The results of one setting with one seed.

    exits: the score of each exit, by its layer; that of the last layer is the final classifier.
    """

    exits: dict[int, float]
    savings: Savings


def read_settings(path: Path) -> dict[str, list[str]]:
    """Reads lines `name: flags`; blank lines and lines that begin with # are skipped. Raises InputError."""
    if not path.is_file():
        raise InputError(f"--settings {path}: no such file")
    settings = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, colon, flags = line.partition(":")
        if not colon or not name.strip():
            raise InputError(f"{path}, line {number}: no 'name: flags'")
        if name.strip() in settings:
            raise InputError(f"{path}, line {number}: {name.strip()!r} is there already")
        settings[name.strip()] = shlex.split(flags)
    if not settings:
        raise InputError(f"--settings {path}: no settings in it")
    return settings


def for_each_depth(settings: dict[str, list[str]], layers: int) -> dict[str, list[str]]:
    """The settings; one with {k} in its name becomes several, with 1 to layers - 1 in the place of {k}."""
    depths = {name: range(1, layers) if "{k}" in name else [0] for name in settings}
    return {
        name.replace("{k}", str(k)): [flag.replace("{k}", str(k)) for flag in flags]
        for name, flags in settings.items()
        for k in depths[name]
    }


def all_thresholds(exits: AllExits, most: int = 1000) -> list[float]:
    """Every threshold that makes a difference, from no early exit to all at the first off-ramp, or `most` of them."""
    rule = exits.exit_rule
    if not rule.supported:
        return [0.0]
    if rule.stateful:
        return [0.0, *rule.grid(most, exits.num_exits)]
    # "nearest": no interpolation, so that rules which order samples in the same way give the same curve
    observed = np.quantile(exits.uncertainties, np.linspace(0, 1, most), method="nearest")
    return [0.0, *np.unique(observed).tolist(), rule.exit_all_threshold()]


def outcome(task: Task, exits: AllExits) -> Outcome:
    """The outcome from the logits of all exits on a dev set.

    Thresholds are chosen and scored on the same samples, so the savings are upper bounds.
    """
    rows = sweep(task, exits, all_thresholds(exits))
    return Outcome(exits=primary_scores(layer_scores(task, exits)), savings=savings(rows))


def savings(rows: Sequence[SweepRow]) -> Savings:
    """What a sweep saves."""
    saved = np.array([row.cost_saved for row in rows])
    score, change = np.array([row.score for row in rows]), np.array([row.score_change for row in rows])
    best = [score[saved >= share - 1e-9].max(initial=-np.inf) for share in GRID]
    return Savings(
        saved=[float(saved[change >= -drop - 1e-9].max()) for drop in DROPS],
        area=area(saved, score),
        curve=np.where(np.isfinite(best), best, np.nan),
    )


def area(saved: np.ndarray, score: np.ndarray) -> float:
    """The mean of the score over the share saved, from 0 to the largest; thresholds that cost more than 1 are left out.

    saved, score: of each threshold; one of them saves 0.
    """
    inside = saved >= 0
    saved, score = saved[inside], score[inside]
    order = np.argsort(saved, kind="stable")
    return float(trapezoid(score[order], saved[order]) / saved.max() if saved.max() > 0 else score[0])


def curves(outcomes: dict[str, list[Outcome]]) -> dict[str, list[np.ndarray]]:
    """For each setting the curve of each seed."""
    return {name: [o.savings.curve for o in of_seeds] for name, of_seeds in outcomes.items()}


def caption(samples: int, seeds: Sequence[int]) -> str:
    """What a reader of `table` has to know, as a paragraph."""
    few = f" {FEW}" if samples < FEW_SAMPLES else ""
    return (
        f"{samples:,} samples, {'seed' if len(seeds) == 1 else 'seeds'} {' '.join(map(str, seeds))}; in per cent.{few} "
        "Exits: the score of each off-ramp. Saved at 1: the most that a threshold saves where the score may be 1 point "
        "below the full model's; the threshold is chosen on these samples, so that this is an upper bound. Area: the "
        "mean score over what is run."
    )


def table(outcomes: dict[str, list[Outcome]]) -> str:
    """A Markdown table in per cent: means over the seeds, with standard deviations where there are several."""
    rows = [["setting", "final score", "exits", *(f"cost saved at {100 * drop:g}" for drop in DROPS), "area"]]
    for name, of_seeds in outcomes.items():
        *layers, last = of_seeds[0].exits
        exits = " ".join(
            f"{'0: ' if layer == 0 else ''}{100 * np.mean([o.exits[layer] for o in of_seeds]):.1f}" for layer in layers
        )
        saved = [mean_and_deviation([o.savings.saved[i] for o in of_seeds]) for i in range(len(DROPS))]
        final = mean_and_deviation([o.exits[last] for o in of_seeds])
        rows.append([name, final, exits, *saved, mean_and_deviation([o.savings.area for o in of_seeds])])
    return markdown(rows)


def mean_and_deviation(values: Sequence[float]) -> str:
    """In per cent, such as "81.3 ± 0.4"; of a single value only the value."""
    mean = f"{100 * np.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * np.std(values, ddof=1):.1f}"


def write_csv(path: Path, outcomes: dict[str, list[Outcome]], seeds: Sequence[int]) -> None:
    """Writes one line for each setting and seed."""
    layers = sorted({layer for of_seeds in outcomes.values() for o in of_seeds for layer in o.exits})
    header = ["setting", "seed", *(f"exit_{layer}" for layer in layers)]
    with replacing(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*header, *(f"cost_saved_at_drop_{drop:g}" for drop in DROPS), "area_over_cost"])
        for name, of_seeds in outcomes.items():
            for seed, o in zip(seeds, of_seeds, strict=True):
                exits = [o.exits.get(layer, "") for layer in layers]  # a model may have fewer layers, or no exit 0
                writer.writerow([name, seed, *exits, *o.savings.saved, o.savings.area])
