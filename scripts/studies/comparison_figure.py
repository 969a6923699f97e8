"""The figure of compare.py: score over what is saved, a curve for each setting and a point for each static model."""

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from deebert.evaluation.plotting import COLORS, LINES, STYLE, line_style, save

Points = dict[str, tuple[float, list[float]]]  # of models without exits: cost, and the score with each seed


def plot_comparison(grid: np.ndarray, curves: dict[str, list[np.ndarray]], points: Points) -> Figure:
    """For each setting the best score (G,) that saves the share grid (G,) of the cost, the mean over the seeds."""
    figure = Figure(figsize=(8.4, 4.6), layout="constrained")
    axes = figure.subplots()
    for i, (name, of_seeds) in enumerate(curves.items()):
        style = line_style(i) | {"linestyle": LINES[i // len(COLORS) % len(LINES)]}
        mean = 100 * np.mean(of_seeds, axis=0)
        axes.plot(100 * grid, mean, **style, markevery=(i % 10, 10), markersize=4, label=name)
    for i, (name, (cost, scores)) in enumerate(points.items()):
        x, y = 100 * (1 - cost), 100 * np.mean(scores)
        axes.plot(x, y, "x", color="0.4", markersize=4)
        side, across = ("right", -3) if x > 80 else ("left", 3)  # in the frame, and above and below in turn
        place = {"xytext": (across, (3, -8)[i % 2]), "textcoords": "offset points", "ha": side}
        axes.annotate(name, (x, y), **place, fontsize=6)
    axes.set(xlabel="cost saved (%)", ylabel="score (%), mean over the seeds")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def draw_comparison(
    grid: np.ndarray, curves: dict[str, list[np.ndarray]], stem: Path, points: Points | None = None
) -> list[Path]:
    """Draws the figure of `plot_comparison` and returns the files written."""
    with mpl.rc_context(STYLE):
        return save(plot_comparison(grid, curves, points or {}), stem)
