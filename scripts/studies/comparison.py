"""What settings save at a given drop of the score, over several seeds: a table, a CSV file and a figure.

compare.py trains the models; everything here follows from the logits of their exits.
Shapes: N layers, G points of a curve.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from deebert.data.tasks import Task
from deebert.evaluation.all_exits import AllExits, dense_thresholds, layer_scores, sweep
from deebert.evaluation.plotting import COLORS, LINES, STYLE, line_style, save
from deebert.evaluation.results import primary_scores
from deebert.evaluation.tables import markdown
from deebert.utils.files import replacing

DROPS = (0.0, 0.005, 0.01, 0.02)  # of the score, in shares, at which savings are compared
GRID = np.linspace(0, 1, 101)  # (G,) the shares of the cost saved at which a curve has its points
FEW_SAMPLES = 300

Points = dict[str, tuple[float, list[float]]]  # of models without exits: cost, and the score with each seed


@dataclass(frozen=True)
class Outcome:
    """The results of one setting with one seed. Scores and savings of the cost are shares.

    exits: the score of each exit, by its layer; that of the last layer is the final classifier.
    saved: the most that any threshold saves, for each of DROPS. It is chosen and scored on the same samples, so that
        these are upper bounds.
    curve: (G,) the best score that saves at least GRID, NaN where no threshold does.
    """

    exits: dict[int, float]
    saved: list[float]
    curve: np.ndarray

    @classmethod
    def of(cls, task: Task, exits: AllExits) -> "Outcome":
        rows = sweep(task, exits, dense_thresholds(exits, 500))
        saved, score = np.array([row.cost_saved for row in rows]), np.array([row.score for row in rows])
        change = np.array([row.score_change for row in rows])
        best = [score[saved >= share - 1e-9].max(initial=-np.inf) for share in GRID]
        return cls(
            exits=primary_scores(layer_scores(task, exits)),
            saved=[float(saved[change >= -drop - 1e-9].max()) for drop in DROPS],
            curve=np.where(np.isfinite(best), best, np.nan),
        )


def caption(samples: int, seeds: Sequence[int]) -> str:
    """What a reader of `table` has to know, as a paragraph."""
    few = " So few samples show little: differences of some points are chance." if samples < FEW_SAMPLES else ""
    spread = f"seeds {' '.join(map(str, seeds))}, mean ± standard deviation" if len(seeds) > 1 else f"seed {seeds[0]}"
    return (
        f"{samples:,} samples, {spread}, in per cent.{few} Exits: the score of each off-ramp. Cost saved at 1: "
        "the most that a threshold saves where the score may be 1 point below the full model's. The threshold "
        "is chosen on these samples, so that this is an upper bound."
    )


def table(outcomes: dict[str, list[Outcome]]) -> str:
    """A Markdown table in per cent: means over the seeds, with standard deviations where there are several."""
    rows = [["setting", "final score", "exits", *(f"cost saved at {100 * drop:g}" for drop in DROPS)]]
    for name, of_seeds in outcomes.items():
        *layers, last = of_seeds[0].exits
        means = {layer: 100 * np.mean([o.exits[layer] for o in of_seeds]) for layer in layers}
        exits = " ".join(f"{'0: ' if layer == 0 else ''}{mean:.1f}" for layer, mean in means.items())
        saved = [mean_and_deviation([o.saved[i] for o in of_seeds]) for i in range(len(DROPS))]
        rows.append([name, mean_and_deviation([o.exits[last] for o in of_seeds]), exits, *saved])
    return markdown(rows)


def mean_and_deviation(values: Sequence[float]) -> str:
    """In per cent, such as "81.3 ± 0.4"; of a single value only the value."""
    mean = f"{100 * np.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * np.std(values, ddof=1):.1f}"


def write_csv(path: Path, outcomes: dict[str, list[Outcome]], seeds: Sequence[int]) -> None:
    """Writes one line for each setting and seed. A setting without an exit before the first layer has no exit_0."""
    lines = [
        {"setting": name, "seed": seed}
        | {f"exit_{layer}": score for layer, score in outcome.exits.items()}
        | {f"cost_saved_at_drop_{drop:g}": saved for drop, saved in zip(DROPS, outcome.saved, strict=True)}
        for name, of_seeds in outcomes.items()
        for seed, outcome in zip(seeds, of_seeds, strict=True)
    ]
    with replacing(path) as file:
        pd.DataFrame(lines).to_csv(file, index=False)


def draw(curves: dict[str, list[np.ndarray]], stem: Path, points: Points | None = None) -> list[Path]:
    """Draws the score over what is saved: a curve (G,) of each seed for each setting, and models without exits.

    Returns the files written.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 4.6), layout="constrained")
        axes = figure.subplots()
        for i, (name, of_seeds) in enumerate(curves.items()):
            look = line_style(i) | {"linestyle": LINES[i // len(COLORS) % len(LINES)], "markersize": 4}
            axes.plot(100 * GRID, 100 * np.mean(of_seeds, axis=0), **look, markevery=(i % 10, 10), label=name)
        for i, (name, (cost, scores)) in enumerate((points or {}).items()):
            x, y = 100 * (1 - cost), 100 * np.mean(scores)
            axes.plot(x, y, "x", color="0.4", markersize=4)
            side, across = ("right", -3) if x > 80 else ("left", 3)  # in the frame, and above and below in turn
            place = {"xytext": (across, (3, -8)[i % 2]), "textcoords": "offset points", "ha": side}
            axes.annotate(name, (x, y), **place, fontsize=6)
        axes.set(xlabel="cost saved (%)", ylabel="score (%), mean over the seeds")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        return save(figure, stem)
