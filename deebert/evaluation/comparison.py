"""Compares training settings: the layers that each saves at a given drop of the score, over several seeds.

scripts/compare.py trains the models; this module computes the table, the CSV and the curves from their logits.
Shapes: N layers, G points of a curve.
"""

import csv
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy.integrate import trapezoid

from deebert.data.tasks import Task
from deebert.evaluation.all_exits import AllExits, layer_scores, sweep
from deebert.evaluation.calibration import calibrated, fit_temperatures
from deebert.utils.cli import InputError
from deebert.utils.files import replacing

DROPS = (0.0, 0.005, 0.01, 0.02)  # of the score, in shares, at which savings are compared
GRID = np.linspace(0, 1, 101)  # (G,) the shares of layers saved at which a curve has its points


@dataclass(frozen=True)
class Outcome:
    """The results of one setting with one seed, in shares.

    exits: (N,) the score of each exit; the last is the final classifier.
    saved: the largest share of layers that any threshold saves, for each of DROPS.
    area: the mean of the score over the share of layers run, from the smallest share to 1.
    curve: (G,) the best score that saves at least GRID of the layers, NaN where no threshold does.
    """

    exits: list[float]
    saved: list[float]
    area: float
    curve: np.ndarray


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


def cross_calibrated(exits: AllExits, seed: int) -> AllExits:
    """Calibrates each random half of the samples with temperatures fitted to the other half."""
    halves = exits.halves(seed)
    parts = [calibrated(part, fit_temperatures(other)) for part, other in zip(halves, halves[::-1], strict=True)]
    joined = {
        name: None if getattr(exits, name) is None else np.concatenate([getattr(part, name) for part in parts])
        for name in ("logits", "labels", "certainties")
    }
    return replace(exits, **joined)


def all_thresholds(exits: AllExits, most: int = 1000) -> list[float]:
    """Every threshold that makes a difference, from no early exit to all at layer 1, or `most` of them."""
    rule = exits.exit_rule
    if not rule.supported:
        return [0.0]
    if rule.stateful:
        return [0.0, *rule.grid(most, exits.num_layers)]
    # "nearest": no interpolation, so that rules which order samples in the same way give the same curve
    observed = np.quantile(exits.uncertainties, np.linspace(0, 1, most), method="nearest")
    return [0.0, *np.unique(observed).tolist(), rule.exit_all_threshold()]


def outcome(task: Task, exits: AllExits) -> Outcome:
    """The outcome from the logits of all exits on a dev set.

    Thresholds are chosen and scored on the same samples, so the savings are upper bounds.
    """
    rows = sweep(task, exits, all_thresholds(exits))
    saved = np.array([row.layers_saved for row in rows])
    score, change = np.array([row.score for row in rows]), np.array([row.score_change for row in rows])
    width = saved.max() - saved.min()
    order = np.argsort(saved, kind="stable")
    area = trapezoid(score[order], saved[order]) / width if width > 0 else score[0]
    best = [score[saved >= share - 1e-9].max(initial=-np.inf) for share in GRID]
    return Outcome(
        exits=[next(iter(scores.values())) for scores in layer_scores(task, exits)],
        saved=[float(saved[change >= -drop - 1e-9].max()) for drop in DROPS],
        area=float(area),
        curve=np.where(np.isfinite(best), best, np.nan),
    )


def table(outcomes: dict[str, list[Outcome]]) -> str:
    """A Markdown table in per cent: means over the seeds, with standard deviations where there are several."""
    drops = " | ".join(f"saved at {100 * drop:g}" for drop in DROPS)
    lines = [
        f"| setting | final score | exits | {drops} | area |",
        f"| --- | ---: | --- | {' | '.join(['---:'] * len(DROPS))} | ---: |",
    ]
    for name, of_seeds in outcomes.items():
        exits = " ".join(f"{100 * score:.1f}" for score in np.mean([o.exits for o in of_seeds], axis=0)[:-1])
        saved = " | ".join(mean_and_deviation([o.saved[i] for o in of_seeds]) for i in range(len(DROPS)))
        final = mean_and_deviation([o.exits[-1] for o in of_seeds])
        lines.append(f"| {name} | {final} | {exits} | {saved} | {mean_and_deviation([o.area for o in of_seeds])} |")
    return "\n".join(lines)


def mean_and_deviation(values: Sequence[float]) -> str:
    """In per cent, such as "81.3 ± 0.4"; of a single value only the value."""
    mean = f"{100 * np.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * np.std(values, ddof=1):.1f}"


def write_csv(path: Path, outcomes: dict[str, list[Outcome]], seeds: Sequence[int]) -> None:
    """Writes one line for each setting and seed."""
    layers = max(len(o.exits) for of_seeds in outcomes.values() for o in of_seeds)
    header = ["setting", "seed", *(f"exit_{i}" for i in range(1, layers + 1))]
    with replacing(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*header, *(f"layers_saved_at_drop_{drop:g}" for drop in DROPS), "area"])
        for name, of_seeds in outcomes.items():
            for seed, o in zip(seeds, of_seeds, strict=True):
                missing = [""] * (layers - len(o.exits))  # of a model with fewer layers
                writer.writerow([name, seed, *o.exits, *missing, *o.saved, o.area])
