"""Reads result folders as series, and draws figures of them, PNG and PDF. It imports neither torch nor a model.

`deebert plot RESULT_DIR ... --output_dir DIR` draws all folders together, every figure that there are files for.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from deebert.evaluation import results
from deebert.evaluation.results import SweepRow
from deebert.evaluation.tables import threshold_name
from deebert.utils.errors import InputError
from deebert.utils.files import replacing

# Okabe and Ito's colours, which colour-blind readers can tell apart; markers and line styles do so in grey print.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")  # one more than COLORS, so that a pair of both repeats late
LINES = ("-", "--", "-.", ":")
STYLE = {"font.size": 10, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True, "legend.frameon": False}


@dataclass(frozen=True)
class Series:
    """The results of one model on one task. A field is empty where the folder has no file for it.

    each_layer: the score of each exit, by its layer.
    """

    label: str
    metric: str
    each_layer: dict[int, float]
    sweep: list[SweepRow]
    curve: list[SweepRow]

    @property
    def timed(self) -> list[SweepRow]:
        """The rows of the sweep whose time was measured."""
        return [row for row in self.sweep if row.time_saved is not None]


def read_series(folders: Sequence[Path]) -> list[Series]:
    """Reads result folders: CSV files, or the original's npy files. Raises InputError where a folder holds neither."""
    series = []
    for folder, label in zip(folders, labels(folders), strict=True):
        has_layers = results.each_layer_file(folder) is not None
        has_sweep = (folder / results.SWEEP).is_file() or bool(results.entropy_files(folder))
        if not has_layers and not has_sweep:
            raise InputError(
                f"{folder}: no results there; run scripts/eval_deebert.sh and scripts/entropy_eval.sh first"
            )
        metric, each_layer = results.read_each_layer(folder) if has_layers else ("", {})
        sweep = results.read_sweep(folder) if has_sweep else []
        curve = results.read_sweep(folder, results.CURVE) if (folder / results.CURVE).is_file() else []
        series.append(Series(label, metric, each_layer, sweep, curve))
    if any(row.cost is None for s in series for row in s.sweep):  # of npy files: then layers are counted in all
        series = [replace(s, sweep=without_cost(s.sweep), curve=without_cost(s.curve)) for s in series]
    return series


def without_cost(rows: Iterable[SweepRow]) -> list[SweepRow]:
    """The rows, whose savings are layers then."""
    return [replace(row, cost=None) for row in rows]


def labels(folders: Iterable[str | Path]) -> list[str]:
    """The part of each folder's path in which they differ; for a single folder its last three parts."""
    paths = [Path(folder).resolve() for folder in folders]
    names = ["/".join(path.parts[1:][-3:]) for path in paths]
    if len(paths) > 1:
        shared = Path(os.path.commonpath(paths))
        names = [path.name if path == shared else path.relative_to(shared).as_posix() for path in paths]
    return [name.removesuffix("/two_stage") for name in names]


def percent(rows: Iterable[SweepRow], share: str) -> list[float]:
    """This field of the rows, in per cent."""
    return [100 * getattr(row, share) for row in rows]


def score_label(series: Sequence[Series]) -> str:
    """The name of an axis of scores, with the metrics where the files name them."""
    metrics = sorted({s.metric for s in series} - {""})
    return f"score ({', '.join(metrics)}, %)" if metrics else "score (%)"


def time_label(series: Sequence[Series]) -> str:
    """The name of an axis of time saved: npy files hold no time of the full model without off-ramps."""
    from_npy = any(row.full_seconds is None for s in series for row in s.timed)
    return f"time saved (%, measured{'; npy files: against threshold 0' if from_npy else ''})"


def unit(series: Sequence[Series]) -> str:
    """What `SweepRow.cost_saved` counts, the same in all of them (see `read_series`)."""
    return "layers" if any(row.cost is None for s in series for row in s.sweep) else "cost"


def line_style(i: int) -> dict:
    """Colour, marker and line style of the i-th of several lines."""
    return {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)], "linestyle": LINES[i % len(LINES)]}


def plot_tradeoff(series: Sequence[Series]) -> Figure:
    """Score against cost (or layers) saved, with the dense curve, and against measured time saved."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    by_cost, by_time = figure.subplots(1, 2, sharey=True)
    for i, s in enumerate(series):
        line, dots = line_style(i) | {"marker": ""}, line_style(i) | {"linestyle": ""}
        curve = s.curve or s.sweep
        by_cost.plot(percent(curve, "cost_saved"), percent(curve, "score"), **line, linewidth=1)
        by_cost.plot(percent(s.sweep, "cost_saved"), percent(s.sweep, "score"), **dots, label=s.label)
        draw_full_score(by_cost, s, i)
    draw_time_tradeoff(by_time, series)
    note = "horizontal line: full model"
    if len(series) == 1:
        (one,) = series
        note += f"; numbers: {threshold_name(one.sweep)}"
        annotate_thresholds(by_cost, one.sweep, percent(one.sweep, "cost_saved"), percent(one.sweep, "score"))
        annotate_thresholds(by_time, one.timed, percent(one.timed, "time_saved"), percent(one.timed, "score"))
    by_cost.set(xlabel=f"expected: {unit(series)} saved (%)", ylabel=score_label(series))
    by_time.set(xlabel=time_label(series))
    by_cost.set_title(note, fontsize=9, loc="left")
    for axes in (by_cost, by_time):
        axes.margins(x=0.08, y=0.1)  # room for the numbers
    by_cost.legend(loc="lower left")
    return figure


def draw_time_tradeoff(axes, series: Sequence[Series]) -> None:
    """Score against measured time saved, one line for each series."""
    for i, s in enumerate(series):
        axes.plot(
            percent(s.timed, "time_saved"), percent(s.timed, "score"), **line_style(i), linewidth=1, label=s.label
        )
        draw_full_score(axes, s, i)


def draw_full_score(axes, s: Series, i: int) -> None:
    """A horizontal line at the score of the full model, the i-th of several, where it is known."""
    for row in s.sweep[:1]:
        if row.score_change is not None:
            full_score = 100 * (row.score - row.score_change)
            axes.axhline(full_score, color=COLORS[i % len(COLORS)], linewidth=0.8, alpha=0.6)


def annotate_thresholds(axes, rows: Sequence, across: Sequence[float], up: Sequence[float]) -> None:
    """Writes each row's threshold beside its point, unless it would cover another."""
    room = 0.06 * (max(across, default=0) - min(across, default=0))
    annotated: list[float] = []
    for row, x, y in zip(rows, across, up, strict=True):
        if all(abs(x - other) > room for other in annotated):
            axes.annotate(f"{row.threshold:g}", (x, y), (4, 5), textcoords="offset points", fontsize=8)
            annotated.append(x)


def plot_layers(series: Sequence[Series]) -> Figure:
    """The score of each exit, as if every sample exited there."""
    figure = Figure(figsize=(5, 3.8), layout="constrained")
    axes = figure.subplots()
    draw_layers(axes, series)
    axes.set(xlabel="exit layer (the last is the final classifier)", ylabel=score_label(series))
    axes.legend(loc="best")
    return figure


def draw_layers(axes, series: Sequence[Series]) -> None:
    """The score of each exit by its layer, one line for each series."""
    for i, s in enumerate(series):
        scores = [100 * score for score in s.each_layer.values()]
        axes.plot(list(s.each_layer), scores, **line_style(i), label=s.label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def plot_exits(series: Sequence[Series]) -> Figure:
    """The share of samples that exit at each layer, for each threshold; one panel for each series."""
    figure = Figure(figsize=(5.4, 0.6 + 3.2 * len(series)), layout="constrained")
    for axes, s in zip(figure.subplots(len(series), squeeze=False)[:, 0], series, strict=True):
        draw_exits(axes, s)
        axes.set(xlabel=threshold_name(s.sweep), ylabel="samples that exit (%)")
        axes.set_title(s.label, fontsize=10)
        layer_legend(axes)
    return figure


def draw_exits(axes, s: Series) -> None:
    """A bar for each threshold, divided by the layers at which samples exit."""
    exits = pd.DataFrame([row.exits for row in s.sweep], index=[f"{row.threshold:g}" for row in s.sweep])
    shares = 100 * exits.div(exits.sum(axis=1), axis=0)
    look = {"width": 0.8, "edgecolor": "white", "colormap": "viridis", "rot": 0}
    shares.plot.bar(ax=axes, stacked=True, legend=False, **look)
    axes.set_ylim(0, 100)
    axes.grid(visible=False)


def layer_legend(axes) -> None:
    """The legend of `draw_exits`, in reverse, so that it is stacked like the bars."""
    handles, names = (entries[::-1] for entries in axes.get_legend_handles_labels())
    columns, place = 1 + len(names) // 13, {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
    axes.legend(handles, names, title="exit layer", ncols=columns, **place)


def plot_savings(series: Sequence[Series]) -> Figure:
    """Measured time saved against cost (or layers) saved. On the diagonal, time is saved as expected."""
    figure = Figure(figsize=(4.6, 4.2), layout="constrained")
    axes = figure.subplots()
    draw_savings(axes, series)
    if len(series) == 1:
        timed = series[0].timed
        axes.set_title(f"numbers: {threshold_name(timed)}", fontsize=9, loc="left")
        annotate_thresholds(axes, timed, percent(timed, "cost_saved"), percent(timed, "time_saved"))
    measured = time_label(series).replace(", measured", "")
    axes.set(xlabel=f"expected: {unit(series)} saved (%)", ylabel=f"measured: {measured}")
    axes.margins(0.08)
    axes.legend(loc="upper left")
    return figure


def draw_savings(axes, series: Sequence[Series]) -> None:
    """Measured time saved against cost (or layers) saved, and the diagonal."""
    ends = [0, max(value for s in series for value in percent(s.timed, "cost_saved"))]
    axes.plot(ends, ends, color="0.5", linewidth=1, label=f"time saved = {unit(series)} saved")
    for i, s in enumerate(series):
        expected, measured = percent(s.timed, "cost_saved"), percent(s.timed, "time_saved")
        spread = [50 * (row.time_saved_spread or 0) for row in s.timed]
        axes.errorbar(expected, measured, yerr=spread, **line_style(i) | {"linestyle": ""}, capsize=2, label=s.label)


def save(figure: Figure, stem: Path) -> list[Path]:
    """Writes a figure as PNG and PDF and returns their paths."""
    written = [stem.with_name(f"{stem.name}.{suffix}") for suffix in ("png", "pdf")]
    for path in written:
        with replacing(path, "wb") as file:
            figure.savefig(file, format=path.suffix[1:], dpi=150)
    return written


def draw(series: Sequence[Series], output_dir: Path) -> list[Path]:
    """Draws every figure that there is data for and returns the files written."""
    swept = [s for s in series if s.sweep]
    layered, timed = [s for s in series if s.each_layer], [s for s in series if s.timed]
    plots = ((plot_tradeoff, swept), (plot_layers, layered), (plot_exits, swept), (plot_savings, timed))
    with mpl.rc_context(STYLE):
        figures = {name: plot(some) for name, (plot, some) in zip(results.FIGURES, plots, strict=True) if some}
        return [path for name, figure in figures.items() for path in save(figure, output_dir / name)]
