"""Settings against each other: what each saves at which drop of the score, over several seeds."""

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

DROPS = (0.0, 0.005, 0.01, 0.02)  # of the score, at which savings are compared
GRID = np.linspace(0, 1, 101)  # layers saved, of the curves


@dataclass(frozen=True)
class Outcome:
    """What one setting gives with one seed, in shares.

    exits: the score of each exit, the final classifier's last. saved: layers saved at each of DROPS.
    area: mean score over the layers run, from the least to all. curve: the best score that saves GRID of the layers,
    NaN where that is impossible.
    """

    exits: list[float]
    saved: list[float]
    area: float
    curve: np.ndarray


def read_settings(path: Path) -> dict[str, list[str]]:
    """Lines `name: flags`, blank lines and those beginning with # aside. Raises InputError."""
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
    """Each half with temperatures fitted to the other."""
    halves = exits.halves(seed)
    parts = [calibrated(part, fit_temperatures(other)) for part, other in zip(halves, halves[::-1], strict=True)]
    joined = {
        name: None if getattr(exits, name) is None else np.concatenate([getattr(part, name) for part in parts])
        for name in ("logits", "labels", "certainties")
    }
    return replace(exits, **joined)


def all_thresholds(exits: AllExits, most: int = 1000) -> list[float]:
    """From nobody to everybody leaving, every threshold that makes a difference, or so many of them."""
    rule = exits.exit_rule
    if not rule.supported:
        return [0.0]
    if rule.stateful:
        return [0.0, *rule.grid(most, exits.num_layers)]
    # values that were seen, as they are: rules that order samples alike then give the same curve
    seen = np.quantile(exits.uncertainties, np.linspace(0, 1, most), method="nearest")
    return [0.0, *np.unique(seen).tolist(), rule.exit_all_threshold()]


def outcome(task: Task, exits: AllExits) -> Outcome:
    """From the answers of all exits on the dev set, on which thresholds are chosen and scored: the curve as it is."""
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
    """Markdown, in per cent: means over the seeds, and standard deviations where there are several."""
    drops = " | ".join(f"saved at {100 * drop:g}" for drop in DROPS)
    lines = [
        f"| setting | final score | exits | {drops} | area |",
        f"| --- | ---: | --- | {' | '.join(['---:'] * len(DROPS))} | ---: |",
    ]
    for name, found in outcomes.items():
        exits = " ".join(f"{100 * x:.1f}" for x in np.mean([o.exits for o in found], axis=0)[:-1])
        saved = " | ".join(spread([o.saved[i] for o in found]) for i in range(len(DROPS)))
        final = spread([o.exits[-1] for o in found])
        lines.append(f"| {name} | {final} | {exits} | {saved} | {spread([o.area for o in found])} |")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    mean = f"{100 * np.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * np.std(values, ddof=1):.1f}"


def write_csv(path: Path, outcomes: dict[str, list[Outcome]], seeds: Sequence[int]) -> None:
    """One line for each setting and seed."""
    layers = max(len(o.exits) for found in outcomes.values() for o in found)
    header = ["setting", "seed", *(f"exit_{i}" for i in range(1, layers + 1))]
    with replacing(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*header, *(f"layers_saved_at_drop_{drop:g}" for drop in DROPS), "area"])
        for name, found in outcomes.items():
            for seed, o in zip(seeds, found, strict=True):
                shallower = [""] * (layers - len(o.exits))
                writer.writerow([name, seed, *o.exits, *shallower, *o.saved, o.area])
