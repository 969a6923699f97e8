"""The benchmark's measurements: several systems side by side, as rows of a table, CSV and figure.

Shapes: S samples.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from transformers.utils import ModelOutput

from deebert.data.batching import Features, collator
from deebert.evaluation import plotting
from deebert.evaluation.cost import costs_of
from deebert.evaluation.metrics import predictions, scores
from deebert.evaluation.tables import markdown
from deebert.evaluation.timing import Timing, timed_passes
from deebert.modeling.config import config_cutoffs
from deebert.utils.files import replacing

EARLY = "early exit"
LOST = 0.01  # of the full model's score, in `verdicts`


@dataclass(frozen=True)
class System:
    """A way to classify a batch.

    runtime: what runs it. model: EARLY, "full", or the name of a static model. threshold: of EARLY, else None.
    cost: the share of the full model's operations; of EARLY it follows from the exits.
    """

    runtime: str
    model: str
    forward: Callable[[dict], ModelOutput]
    threshold: float | None = None
    cost: float = 1.0

    @property
    def name(self) -> str:
        return f"{self.runtime}, {self.model}"


@dataclass
class Row:
    """What one system gives. Shares from 0 to 1, times in milliseconds.

    cost: of the full model's operations, off-ramps included (see cost.py).
    agreement: share of the samples with the label that the same model and threshold gave first, which is PyTorch's at
        batch size 1: runtimes may only differ by rounding, int8 by more.
    p50, p99: latency at batch size 1, over the samples, of each one's median over the repeats.
    per_sample: by batch size, the time of the data set by its samples, median over the repeats.
    """

    runtime: str
    model: str
    threshold: float | None
    score: float
    cost: float
    p50: float
    p99: float
    agreement: float = 1.0
    per_sample: dict[int, float] = field(default_factory=dict)


def measure(
    systems: list[System],
    features: Features,
    task,
    config,
    batch_sizes: list[int],
    repeats: int,
    device: torch.device,
) -> list[Row]:
    """Runs all systems side by side at every batch size, of which 1 is the first."""
    rows: list[Row] = []
    first_labels: dict[tuple, np.ndarray] = {}  # (S,) by model and threshold
    for size in batch_sizes:
        forwards = [system.forward for system in systems]
        *_, timings = timed_passes(forwards, features, collator(config), device, size, repeats)
        if size == 1:
            rows = [make_row(*each, features, task, config) for each in zip(systems, timings, strict=True)]
        for row, timing in zip(rows, timings, strict=True):
            labels = predictions(timing.logits)
            expected = first_labels.setdefault((row.model, row.threshold), labels)
            row.agreement = min(row.agreement, float((labels == expected).mean()))
            row.per_sample[size] = 1e3 * float(np.median(timing.seconds)) / len(timing.logits)
    return rows


def make_row(system: System, timing: Timing, features: Features, task, config) -> Row:
    """The row of one system, from its passes at batch size 1."""
    p50, p99 = np.percentile(1e3 * np.median(timing.batch_seconds, axis=0), [50, 99])
    cost = system.cost
    if system.threshold is not None:
        rule, cutoffs = config_cutoffs(config, system.threshold)
        costs = costs_of(config, features.lengths)
        consulted = [rule.consults(cutoffs, i) for i in range(len(cutoffs))]
        cost = float(costs.of(timing.exit_layers, consulted).sum() / costs.full.sum())
    score = scores(task, timing.logits, features.labels)[task.primary_metric]
    return Row(system.runtime, system.model, system.threshold, score, cost, p50, p99)


def table(rows: list[Row]) -> str:
    """Markdown, in per cent and milliseconds."""
    heads = ["system", "threshold", "score (%)", "cost (%)", "same label (%)", "p50", "p99"]
    lines = [heads + [f"batch {size}" for size in rows[0].per_sample]]
    for row in rows:
        threshold = "-" if row.threshold is None else "never" if row.threshold <= 0 else f"{row.threshold:g}"
        shares = [f"{100 * value:.1f}" for value in (row.score, row.cost, row.agreement)]
        times = [f"{value:.2f}" for value in (row.p50, row.p99, *row.per_sample.values())]
        lines.append([f"{row.runtime}, {row.model}", threshold, *shares, *times])
    return markdown(lines)


def verdicts(rows: list[Row]) -> str:
    """For each runtime and batch size, in a line: early exit at no more than LOST, beside what scores as much.

    The thresholds are chosen on the samples that are scored.
    """
    lines = []
    for size in rows[0].per_sample:
        for runtime in dict.fromkeys(row.runtime for row in rows):
            mine = [row for row in rows if row.runtime == runtime]
            full = next((row for row in mine if row.model == "full"), None)
            early = [row for row in mine if full and row.model == EARLY and row.score >= full.score - LOST - 1e-9]
            if not early:
                continue
            best = min(early, key=lambda row: row.per_sample[size])
            line = f"{runtime}, batch {size}: early exit at {best.threshold:g} scores {100 * best.score:.1f} %, "
            line += f"{times_as_fast(full, best, size)} as the full model ({100 * full.score:.1f} %)"
            rivals = [row for row in mine if row.model not in (EARLY, "full") and row.score >= best.score - 1e-9]
            if rivals:
                rival = min(rivals, key=lambda row: row.per_sample[size])
                line += f", {times_as_fast(rival, best, size)} as {rival.model} ({100 * rival.score:.1f} %)"
            elif len({row.model for row in mine}) > 2:
                line += "; no static model scores as much"
            lines.append(f"- {line}")
    return "\n".join(lines)


def times_as_fast(slow: Row, fast: Row, size: int) -> str:
    return f"{slow.per_sample[size] / fast.per_sample[size]:.2f} times as fast"


def write_csv(path: Path, rows: list[Row]) -> None:
    """One line for each system and threshold; times in milliseconds."""
    lines = [
        {name: value for name, value in asdict(row).items() if name != "per_sample"}
        | {f"batch_{size}": ms for size, ms in row.per_sample.items()}
        for row in rows
    ]
    with replacing(path) as file:
        pd.DataFrame(lines).to_csv(file, index=False)


def plot(rows: list[Row], metric: str) -> Figure:
    """Score against time per sample, a panel for each batch size, a curve for each system, with its thresholds."""
    sizes = list(rows[0].per_sample)
    figure = Figure(figsize=(4.2 * len(sizes) + 2.6, 4), layout="constrained")
    panels = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
    for axes, size in zip(panels, sizes, strict=True):
        for i, name in enumerate(dict.fromkeys((row.runtime, row.model) for row in rows)):
            mine = [row for row in rows if (row.runtime, row.model) == name]
            look = plotting.line_style(i) | {"markersize": 5, "linewidth": 1}
            across, up = [row.per_sample[size] for row in mine], [100 * row.score for row in mine]
            axes.plot(across, up, **look, label=", ".join(name))
            if mine[0].threshold is not None:
                plotting.annotate_thresholds(axes, mine, across, up)
        axes.margins(x=0.08, y=0.08)  # room for the thresholds
        axes.set_title("numbers: threshold", fontsize=9, loc="left")
        axes.set(xlabel=f"ms per sample, batch size {size}", xlim=(0, None))
    panels[0].set_ylabel(f"score ({metric}, %)")
    panels[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
