"""Figures from result files, PNG and PDF. Reads what results.py wrote, and never a model.

`deebert plot RESULT_DIR ... --output_dir DIR` draws what the folders have files for, all in one.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from deebert.evaluation.results import CURVE, EACH_LAYER, SWEEP, SweepRow, read_each_layer, read_sweep, threshold_name
from deebert.utils.cli import InputError
from deebert.utils.files import replacing

# Okabe and Ito's colours, packed apart by colour-blind readers; a marker and a line style each for print in grey.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")  # one more than colors, so that pairs repeat late
LINES = ("-", "--", "-.", ":")
STYLE = {"font.size": 10, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True, "legend.frameon": False}


@dataclass(frozen=True)
class Series:
    """The results of one model on one task; what a folder has no file for is empty."""

    label: str
    metric: str
    each_layer: list[float]
    sweep: list[SweepRow]
    curve: list[SweepRow]

    @property
    def timed(self) -> list[SweepRow]:
        return [row for row in self.sweep if row.time_saved is not None]


def read_series(folders: Sequence[Path]) -> list[Series]:
    """Reads result folders. Raises InputError where one holds no results."""
    series = []
    for folder, label in zip(folders, labels(folders), strict=True):
        if not any((folder / name).is_file() for name in (EACH_LAYER, SWEEP)):
            raise InputError(
                f"{folder}: no results there; run scripts/eval_deebert.sh and scripts/entropy_eval.sh first"
            )
        metric, each_layer = read_each_layer(folder) if (folder / EACH_LAYER).is_file() else ("", [])
        sweep = read_sweep(folder) if (folder / SWEEP).is_file() else []
        curve = read_sweep(folder, CURVE) if (folder / CURVE).is_file() else []
        series.append(Series(label, metric, each_layer, sweep, curve))
    return series


def labels(folders: Sequence[Path]) -> list[str]:
    """What is different about each folder's path; of a single one its last three parts."""
    paths = [folder.resolve() for folder in folders]
    if len(paths) == 1:
        return ["/".join(paths[0].parts[1:][-3:]).removesuffix("/two_stage")]
    shared = Path(os.path.commonpath(paths))
    return [
        (path.relative_to(shared).as_posix() if path != shared else path.name).removesuffix("/two_stage")
        for path in paths
    ]


def percent(values: Iterable[float]) -> list[float]:
    return [100 * value for value in values]


def score_label(series: Sequence[Series]) -> str:
    metrics = sorted({s.metric for s in series} - {""})
    return f"score ({', '.join(metrics)}, %)" if metrics else "score (%)"


def looks(i: int) -> dict:
    return {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)], "linestyle": LINES[i % len(LINES)]}


def plot_tradeoff(series: Sequence[Series]) -> Figure:
    """Score against layers saved (counted, with the dense curve) and against time saved (measured)."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    by_layers, by_time = figure.subplots(1, 2, sharey=True)
    for i, s in enumerate(series):
        line, dots = looks(i) | {"marker": ""}, looks(i) | {"linestyle": ""}
        curve = s.curve or s.sweep
        by_layers.plot(percent(r.layers_saved for r in curve), percent(r.score for r in curve), **line, linewidth=1)
        by_layers.plot(
            percent(r.layers_saved for r in s.sweep), percent(r.score for r in s.sweep), **dots, label=s.label
        )
        by_time.plot(percent(r.time_saved for r in s.timed), percent(r.score for r in s.timed), **looks(i), linewidth=1)
        full = 100 * (s.sweep[0].score - s.sweep[0].score_change)
        for axes in (by_layers, by_time):
            axes.axhline(full, color=COLORS[i % len(COLORS)], linewidth=0.8, alpha=0.6)
    if len(series) == 1:
        sweep, timed = series[0].sweep, series[0].timed
        name_thresholds(by_layers, sweep, percent(r.layers_saved for r in sweep), percent(r.score for r in sweep))
        name_thresholds(by_time, timed, percent(r.time_saved for r in timed), percent(r.score for r in timed))
    by_layers.set(xlabel="layers saved (%, counted)", ylabel=score_label(series))
    by_time.set(xlabel="time saved (%, measured)")
    note = "horizontal line: full model" + (f"; numbers: {threshold_name(series[0].sweep)}" if len(series) == 1 else "")
    by_layers.set_title(note, fontsize=9, loc="left")
    for axes in (by_layers, by_time):
        axes.margins(x=0.08, y=0.1)  # room for the numbers
    by_layers.legend(loc="lower left")
    return figure


def name_thresholds(axes, rows: Sequence, across: Sequence[float], up: Sequence[float]) -> None:
    """Writes the rows' thresholds beside their points, but none where it would cover another's."""
    room = 0.06 * (max(across, default=0) - min(across, default=0))
    named: list[float] = []
    for row, x, y in zip(rows, across, up, strict=True):
        if all(abs(x - other) > room for other in named):
            axes.annotate(f"{row.threshold:g}", (x, y), (4, 5), textcoords="offset points", fontsize=8)
            named.append(x)


def plot_layers(series: Sequence[Series]) -> Figure:
    """Each exit's own score, as if every sample left there."""
    figure = Figure(figsize=(5, 3.8), layout="constrained")
    axes = figure.subplots()
    for i, s in enumerate(series):
        axes.plot(range(1, len(s.each_layer) + 1), percent(s.each_layer), **looks(i), label=s.label)
    axes.set(xlabel="exit layer (the last is the final classifier)", ylabel=score_label(series))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="best")
    return figure


def plot_exits(series: Sequence[Series]) -> Figure:
    """For each threshold the share of samples that leaves at each layer; one panel for each series."""
    figure = Figure(figsize=(5.4, 0.6 + 3.2 * len(series)), layout="constrained")
    for axes, s in zip(figure.subplots(len(series), squeeze=False)[:, 0], series, strict=True):
        layers = len(s.sweep[0].exits)
        colors = mpl.colormaps["viridis"].resampled(layers)
        names = [f"{row.threshold:g}" for row in s.sweep]
        bottom = [0.0] * len(s.sweep)
        for layer in range(layers):
            share = [100 * row.exits[layer] / sum(row.exits) for row in s.sweep]
            axes.bar(
                names, share, bottom=bottom, color=colors(layer), width=0.8, edgecolor="white", label=f"{layer + 1}"
            )
            bottom = [b + h for b, h in zip(bottom, share, strict=True)]
        axes.set(xlabel=threshold_name(s.sweep), ylabel="samples leaving (%)", ylim=(0, 100))
        axes.grid(visible=False)
        axes.set_title(s.label, fontsize=10)
        handles, layer_names = axes.get_legend_handles_labels()
        axes.legend(  # upside down, so that it is stacked like the bars
            handles[::-1],
            layer_names[::-1],
            title="exit layer",
            loc="center left",
            bbox_to_anchor=(1, 0.5),
            ncols=1 + layers // 13,
        )
    return figure


def plot_savings(series: Sequence[Series]) -> Figure:
    """Time saved as measured against layers saved as counted: on the diagonal, layers are all that costs time."""
    figure = Figure(figsize=(4.6, 4.2), layout="constrained")
    axes = figure.subplots()
    ends = [0, 100 * max(r.layers_saved for s in series for r in s.timed)]
    axes.plot(ends, ends, color="0.5", linewidth=1, label="time saved = layers saved")
    for i, s in enumerate(series):
        expected, measured = percent(r.layers_saved for r in s.timed), percent(r.time_saved for r in s.timed)
        spread = percent(r.time_saved_spread / 2 for r in s.timed)
        axes.errorbar(expected, measured, yerr=spread, **looks(i) | {"linestyle": ""}, capsize=2, label=s.label)
    if len(series) == 1:
        axes.set_title(f"numbers: {threshold_name(series[0].timed)}", fontsize=9, loc="left")
        name_thresholds(axes, series[0].timed, expected, measured)
    axes.set(xlabel="expected: layers saved (%)", ylabel="measured: time saved (%)")
    axes.margins(0.08)
    axes.legend(loc="upper left")
    return figure


def plot_comparison(grid: np.ndarray, curves: dict[str, list[np.ndarray]]) -> Figure:
    """For each setting the best score that saves this share (G,) of the layers: mean over the seeds, (G,) each."""
    figure = Figure(figsize=(8.4, 4.6), layout="constrained")
    axes = figure.subplots()
    for i, (name, found) in enumerate(curves.items()):
        look = looks(i) | {"linestyle": LINES[i // len(COLORS) % len(LINES)]}
        axes.plot(100 * grid, 100 * np.mean(found, axis=0), **look, markevery=(i % 10, 10), markersize=4, label=name)
    axes.set(xlabel="layers saved (%, counted)", ylabel="score (%), mean over the seeds")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def draw_comparison(grid: np.ndarray, curves: dict[str, list[np.ndarray]], stem: Path) -> list[Path]:
    """Draws it (see `plot_comparison`) and returns the files written."""
    with mpl.rc_context(STYLE):
        return save(plot_comparison(grid, curves), stem)


def save(figure: Figure, stem: Path) -> list[Path]:
    """Writes a figure as PNG and PDF and returns their paths."""
    written = [stem.with_name(f"{stem.name}.{suffix}") for suffix in ("png", "pdf")]
    for path in written:
        with replacing(path, "wb") as file:
            figure.savefig(file, format=path.suffix[1:], dpi=150)
    return written


def draw(series: Sequence[Series], output_dir: Path) -> list[Path]:
    """Draws every figure that there is data for and returns the files written."""
    swept, timed = [s for s in series if s.sweep], [s for s in series if s.timed]
    layered = [s for s in series if s.each_layer]
    plots = {
        "score_by_saving": (plot_tradeoff, swept),
        "score_by_layer": (plot_layers, layered),
        "exits_by_threshold": (plot_exits, swept),
        "expected_and_measured_saving": (plot_savings, timed),
    }
    written = []
    with mpl.rc_context(STYLE):
        for name, (plot, usable) in plots.items():
            if not usable:
                continue
            written += save(plot(usable), output_dir / name)
    return written
