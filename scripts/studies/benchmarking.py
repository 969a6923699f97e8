"""The benchmark's measurements: several systems side by side, as rows of a table, CSV and figure."""

import csv
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.utils.benchmark import Timer
from transformers import PreTrainedConfig
from transformers.utils import ModelOutput

from deebert.data.batching import collator
from deebert.data.features import Features
from deebert.evaluation import plotting
from deebert.evaluation.cost import costs_of, operations
from deebert.evaluation.metrics import predictions, scores
from deebert.evaluation.tables import markdown
from deebert.evaluation.timing import Timing, timed_passes
from deebert.modeling.config import config_cutoffs
from deebert.modeling.exit_rules import NO_EXIT
from deebert.utils.files import replacing

CPU = torch.device("cpu")
GEMM_SECONDS = 0.3  # of measuring the rate of matrix products


@dataclass(frozen=True)
class System:
    """A way to classify a batch.

    threshold: None for a model without off-ramps.
    smaller: the config of a smaller model; None for the benchmarked model and its full model.
    """

    name: str
    threshold: float | None
    forward: Callable[[dict], ModelOutput]
    smaller: PreTrainedConfig | None = None


@dataclass
class Row:
    """What one system gives. Shares from 0 to 1, times in milliseconds.

    layers_run: of the full model's.
    cost: of what ran, off-ramps included (see cost.py); None for a model without off-ramps, which is not ours.
    agreement: share of the samples with the label that PyTorch gives at batch size 1: at the same threshold; for a
        smaller model, the full model's.
    p50, p90, p99: latency at batch size 1, over the samples, of each one's median over the repeats.
    per_sample: by batch size, median over the repeats.
    floor: the matrix products of the layers that ran, mean over the samples, at the rate that PyTorch reaches for such
        products in fp32 at batch size 1.
    """

    system: str
    threshold: float | None
    score: float
    layers_run: float
    cost: float | None
    p50: float
    p90: float
    p99: float
    floor: float
    agreement: float = 1.0
    per_sample: dict[int, float] = field(default_factory=dict)


def gemm_rate(config, tokens: float, device: torch.device) -> float:
    """Floating-point operations per second of matrix products of a layer's shape, for this many tokens."""
    states = torch.randn(max(round(tokens), 1), config.hidden_size, device=device)
    weights = torch.randn(config.hidden_size, 4 * config.hidden_size, device=device)
    timer = Timer(
        "states @ weights", globals={"states": states, "weights": weights}, num_threads=torch.get_num_threads()
    )
    return 2 * states.numel() * weights.shape[1] / timer.blocked_autorange(min_run_time=GEMM_SECONDS).median


def measure(
    systems: list[System],
    features: Features,
    task,
    config,
    batch_sizes: list[int],
    repeats: int,
    device: torch.device = CPU,
) -> list[Row]:
    """Runs all systems side by side at every batch size; 1 comes first, as labels are compared with PyTorch's there."""
    rows: list[Row] = []
    reference: dict[float, np.ndarray] = {}  # PyTorch's labels (S,) at each threshold
    for size in batch_sizes:
        forwards = [system.forward for system in systems]
        *_, timings = timed_passes(forwards, features, collator(config), device, size, repeats)
        if size == 1:
            rate = gemm_rate(config, features.lengths.mean(), device)
            rows = [
                latency(system, timing, features, task, config, rate)
                for system, timing in zip(systems, timings, strict=True)
            ]
        for row, timing in zip(rows, timings, strict=True):
            labels = predictions(timing.logits)
            expected = reference.setdefault(NO_EXIT if row.threshold is None else row.threshold, labels)
            row.agreement = min(row.agreement, float((labels == expected).mean()))
            row.per_sample[size] = per_sample(timing)
    return rows


def per_sample(timing: Timing) -> float:
    """Milliseconds for each sample, the median over the repeats."""
    return 1e3 * float(np.median(timing.seconds)) / len(timing.logits)


def latency(system: System, timing: Timing, features: Features, task, config, rate: float) -> Row:
    """The row of one system, from its passes at batch size 1."""
    layers, ran = timing.exit_layers, system.smaller or config
    if layers is None:  # every sample runs all layers
        layers = np.full(len(features), ran.num_hidden_layers)
    short = system.threshold is not None and config.first_token_only  # early exit computes only what is classified
    last = 1 if short else features.lengths
    p50, p90, p99 = np.percentile(1e3 * np.median(timing.batch_seconds, axis=0), [50, 90, 99])
    return Row(
        system=system.name,
        threshold=system.threshold,
        score=scores(task, timing.logits, features.labels)[task.primary_metric],
        layers_run=layers.mean() / config.num_hidden_layers,
        cost=None if system.threshold is None else cost_of(config, features.lengths, layers, system.threshold),
        p50=p50,
        p90=p90,
        p99=p99,
        floor=1e3 * float(operations(ran, features.lengths, layers, last).mean()) / rate,
    )


def cost_of(config, lengths: np.ndarray, exit_layers: np.ndarray, threshold: float) -> float:
    """The cost of samples of these lengths (S,) in tokens that exit at these layers (S,)."""
    rule, cutoffs = config_cutoffs(config, threshold)
    consulted = [rule.consults(cutoffs, i) for i in range(len(cutoffs))]
    costs = costs_of(config, lengths)
    return float(costs.of(exit_layers, consulted).sum() / costs.full.sum())


def table(rows: list[Row]) -> str:
    """Markdown; the floor beside the latency it is for."""
    sizes = list(rows[0].per_sample)
    heads = ["system", "threshold", "score (%)", "layers run (%)", "cost (%)", "same label (%)"]
    heads += ["p50", "p90", "p99", "floor"]
    heads += [f"batch {size}" for size in sizes]
    lines = [heads]
    for row in rows:
        threshold = "-" if row.threshold is None else "never" if row.threshold <= 0 else f"{row.threshold:g}"
        values = (row.p50, row.p90, row.p99, row.floor, *row.per_sample.values())
        times = ["-" if value is None else f"{value:.2f}" for value in values]
        shares = (row.score, row.layers_run, row.cost, row.agreement)
        shares = ["-" if value is None else f"{100 * value:.1f}" for value in shares]
        lines.append([row.system, threshold, *shares, *times])
    return markdown(lines)


def write_csv(path: Path, rows: list[Row]) -> None:
    """One line for each system and threshold; times in milliseconds."""
    flat = []
    for row in rows:
        times = {f"batch_{size}": ms for size, ms in row.per_sample.items()}
        flat.append({name: value for name, value in asdict(row).items() if not isinstance(value, dict)} | times)
    with replacing(path) as file:
        writer = csv.DictWriter(file, list(flat[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)


def plot(rows: list[Row], metric: str) -> Figure:
    """Score against time per sample, a panel for each batch size, a curve for each system, with its thresholds."""
    sizes = list(rows[0].per_sample)
    figure = Figure(figsize=(4.2 * len(sizes) + 2.6, 4), layout="constrained")
    panels = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
    for axes, size in zip(panels, sizes, strict=True):
        for i, name in enumerate(dict.fromkeys(row.system for row in rows)):
            mine = [row for row in rows if row.system == name]
            look = plotting.line_style(i) | {"markersize": 5, "linewidth": 1}
            axes.plot([row.per_sample[size] for row in mine], [100 * row.score for row in mine], **look, label=name)
            early = [row for row in mine if (row.threshold or NO_EXIT) > 0]
            across, up = [row.per_sample[size] for row in early], [100 * row.score for row in early]
            plotting.annotate_thresholds(axes, early, across, up)
        axes.margins(x=0.08, y=0.08)  # room for the thresholds
        axes.set_title("numbers: threshold", fontsize=9, loc="left")
        axes.set(xlabel=f"ms per sample, batch size {size}", xlim=(0, None))
    panels[0].set_ylabel(f"score ({metric}, %)")
    panels[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
