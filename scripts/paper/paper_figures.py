"""Figures 2 to 6 of the paper from our results, each in a file named after its number.

Models of LARGE layers and more are in figure 5, all others in the other figures.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from deebert.evaluation.plotting import (
    STYLE,
    Series,
    draw_exits,
    draw_layers,
    draw_savings,
    draw_time_tradeoff,
    layer_legend,
    read_series,
    save,
    without_cost,
)
from deebert.evaluation.tables import threshold_name

LARGE = 24  # layers
WIDE, HIGH = 3.1, 2.6  # inches of a panel
ENTRY_INCHES = 1.8  # that an entry of a legend takes
TIME, LAYER, EXITS = "time saved (%)", "exit layer", "samples that exit (%)"


@dataclass(frozen=True)
class Shown:
    """The results of one model on one task. series: its label is the model. in_row: the thresholds of figure 6."""

    task: str
    series: Series
    in_row: Sequence[float]

    @property
    def model(self) -> str:
        return self.series.label

    @property
    def title(self) -> str:
        """The task with its metric, over a panel."""
        return f"{self.task} ({self.series.metric})"

    @property
    def exits(self) -> bool:
        """Whether samples exit early at all: not in regression."""
        return len(self.series.sweep) > 1


def read_shown(task: str, model: str, folder: Path, in_row: Sequence[float]) -> Shown:
    """Reads a folder of results. Raises InputError."""
    (series,) = read_series([folder])
    return Shown(task, replace(series, label=model), in_row)


def by(attribute: str, shown: Sequence[Shown]) -> dict[str, list[Shown]]:
    """The results in groups that have this attribute in common, in the order in which they come."""
    groups: dict[str, list[Shown]] = {}
    for each in shown:
        groups.setdefault(getattr(each, attribute), []).append(each)
    return groups


def grid(names: Sequence[str], draw: Callable, x: str, y: str, columns: int = 3) -> Figure:
    """A figure with a panel for each name, which draw(axes, name) fills, and one legend."""
    columns = min(columns, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(max(WIDE * columns, 4), HIGH * rows + 0.6), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes, name in zip(panels, names, strict=False):
        draw(axes, name)
        axes.set_title(name, fontsize=10)
    for axes in list(panels)[len(names) :]:
        axes.set_axis_off()
    figure.supxlabel(x, fontsize=10)
    figure.supylabel(y, fontsize=10)
    legend(figure)
    return figure


def legend(figure: Figure) -> None:
    """One legend above all panels: the same label stands for the same line in each."""
    entries = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    columns = max(1, int(figure.get_figwidth() / ENTRY_INCHES))
    figure.legend(entries.values(), entries, loc="outside upper center", ncols=min(len(entries), columns))


def tradeoff(shown: Sequence[Shown]) -> Figure:
    """Figure 2: score against time saved, a panel for each task and a line for each model."""
    tasks, across = by("title", shown), f"{TIME}; horizontal lines: the full models"
    return grid(list(tasks), lambda axes, task: draw_time_tradeoff(axes, series_of(tasks[task])), across, "score (%)")


def savings(shown: Sequence[Shown]) -> Figure:
    """Figure 3: time saved as measured against layers saved (equation 2), a panel for each model."""
    models = by("model", shown)

    def draw(axes, model: str) -> None:
        in_layers = [in_unit_of_layers(each) for each in models[model]]
        draw_savings(axes, in_layers)

    return grid(list(models), draw, "expected: layers saved (%, equation 2)", f"measured: {TIME}")


def layers(shown: Sequence[Shown]) -> Figure:
    """Figure 4: the score of each exit, a panel for each task and a line for each model."""
    tasks = by("title", shown)
    return grid(list(tasks), lambda axes, task: draw_layers(axes, series_of(tasks[task])), LAYER, "score (%)")


def large(shown: Sequence[Shown]) -> Figure:
    """Figure 5: figures 2 and 4 for large models, a column for each task."""
    tasks = by("title", shown)
    figure = Figure(figsize=(max(WIDE * len(tasks), 4), 2 * HIGH + 0.8), layout="constrained")
    panels = figure.subplots(2, len(tasks), squeeze=False)
    for (task, of_task), above, below in zip(tasks.items(), *panels, strict=True):
        draw_time_tradeoff(above, series_of([each for each in of_task if each.exits]))
        draw_layers(below, series_of(of_task))
        above.set_title(task, fontsize=10)
        above.set_xlabel(TIME)
        below.set_xlabel(LAYER)
    for axes in panels[:, 0]:
        axes.set_ylabel("score (%)")
    legend(figure)
    return figure


def exits(shown: Sequence[Shown]) -> Figure:
    """Figure 6: the share of samples that exit at each layer. Rows of panels are tasks, columns are models."""
    tasks, models = list(by("task", shown)), list(by("model", shown))
    size = (WIDE * len(models) + 1.2 * len(models), HIGH * len(tasks) + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(tasks), len(models), squeeze=False)
    for each in shown:
        axes = panels[tasks.index(each.task), models.index(each.model)]
        rows = [row for row in each.series.sweep if row.threshold in each.in_row]
        draw_exits(axes, replace(each.series, sweep=rows))
        axes.set_title(f"{each.task}, {each.model}", fontsize=10)
        if each.task == tasks[0]:
            layer_legend(axes)  # that of its column: models may have different numbers of layers
    for axes in panels.flat:
        axes.set_axis_off() if not axes.has_data() else None
    figure.supxlabel(threshold_name(shown[0].series.sweep), fontsize=10)
    figure.supylabel(EXITS, fontsize=10)
    return figure


def series_of(shown: Sequence[Shown]) -> list[Series]:
    return [each.series for each in shown]


def in_unit_of_layers(each: Shown) -> Series:
    """The series without costs, so that its savings are layers, as the paper counts them; its label is the task."""
    return replace(each.series, label=each.task, sweep=without_cost(each.series.sweep), curve=[])


def draw_figures(folder: Path, shown: Sequence[Shown]) -> tuple[list[Path], list[str]]:
    """Writes figure2 to figure6 (PNG and PDF), and returns the files, and a line for each figure that is left out."""
    is_large = [max(each.series.each_layer) >= LARGE for each in shown]
    base = [each for each, is_one in zip(shown, is_large, strict=True) if not is_one]
    big = [each for each, is_one in zip(shown, is_large, strict=True) if is_one]
    with_exits = [each for each in base if each.exits]
    plans = {2: (tradeoff, with_exits), 3: (savings, with_exits), 4: (layers, base), 5: (large, big)}
    plans[6] = (exits, with_exits)
    written, left_out = [], []
    with mpl.rc_context(STYLE):
        for number, (plot, usable) in plans.items():
            if usable:
                written += save(plot(usable), folder / f"figure{number}")
            else:
                why = (
                    f"no model of {LARGE} layers or more" if number == 5 else "no results of a smaller model with exits"
                )
                left_out.append(f"Figure {number} is left out: {why} among MODELS.")
    return written, left_out
