"""What frontier.py measured, as tables, CSV and figure: at equal score, how many times as fast is early exit?

A threshold is chosen on one half of the texts and scored and timed on the other; then the halves change places.
Shapes: M contenders, S texts, U batches, R resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from baselines import RESAMPLES, resampled_scores
from frontier_contenders import EARLY, FP32, FULL, INT8, OTHER, PYTORCH, STATIC, Contender
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from deebert.data.tasks import Task
from deebert.evaluation import plotting
from deebert.evaluation.metrics import score
from deebert.evaluation.tables import markdown
from deebert.utils.files import replacing

LOST = 0.01  # of the full model's score
LOOKS = {PYTORCH: ("o", ":"), FP32: ("s", "-"), INT8: ("^", "--"), OTHER: ("*", "")}


@dataclass(frozen=True)
class Run:
    """Predictions (S,) and the seconds (U,) of batches of one size: a contender's, or of thresholds by halves."""

    predicted: np.ndarray
    seconds: np.ndarray
    thresholds: tuple[float, ...] = ()


@dataclass(frozen=True)
class Measured:
    """predicted: (M, S). labels, half: (S,). By size of a batch: batches, U arrays of texts; seconds: (M, U)."""

    task: Task
    contenders: list[Contender]
    predicted: np.ndarray
    labels: np.ndarray
    half: np.ndarray
    batches: dict[int, list[np.ndarray]]
    seconds: dict[int, np.ndarray]

    def run(self, i: int, size: int) -> Run:
        return Run(self.predicted[i], self.seconds[size][i])

    def index(self, kind: str, model: str, runtime: str) -> int:
        """The contender of this kind without a threshold."""
        return next(i for i, c in enumerate(self.contenders) if (c.kind, c.model, c.runtime) == (kind, model, runtime))

    def score(self, predicted: np.ndarray, texts: np.ndarray | slice) -> float:
        return score(self.task, self.task.primary_metric, self.labels[texts], predicted[texts])

    def choose(self, model: str, runtime: str, size: int, reference: np.ndarray, lost: float = 0.0) -> Run | None:
        """The fastest threshold of a model that scores no less than reference (S,) minus `lost`; None if none does."""
        pool = [i for i, c in enumerate(self.contenders) if (c.kind, c.model, c.runtime) == (EARLY, model, runtime)]
        predicted, seconds, thresholds = reference.copy(), np.zeros(len(self.batches[size])), []
        of_batch = np.array([self.half[rows[0]] for rows in self.batches[size]])
        for part in (0, 1):
            floor = self.score(reference, self.half != part) - lost - 1e-9
            good = [i for i in pool if self.score(self.predicted[i], self.half != part) >= floor]
            if not good:
                return None
            best = min(good, key=lambda i: self.seconds[size][i, of_batch != part].sum())
            predicted[self.half == part] = self.predicted[best, self.half == part]
            seconds[of_batch == part] = self.seconds[size][best, of_batch == part]
            thresholds.append(self.contenders[best].threshold)
        return Run(predicted, seconds, tuple(thresholds))

    def counts(self, number: int) -> np.ndarray:
        """(1 + R, number) how often each of them is drawn: observed, and resampled."""
        drawn = np.random.default_rng(0).multinomial(number, np.full(number, 1 / number), RESAMPLES)
        return np.concatenate([np.ones((1, number), int), drawn])

    def scores(self, *predicted: np.ndarray) -> np.ndarray:
        """(1 + R, ...) of predictions (S,)."""
        return resampled_scores(self.task, np.stack(predicted), self.labels, self.counts(len(self.labels)))

    def lost_points(self, early: Run, reference: np.ndarray) -> np.ndarray:
        """(1 + R,) the score of early exit minus that of the reference (S,), in points."""
        return 100 * np.subtract(*self.scores(early.predicted, reference).T)

    def times_as_fast(self, fast: Run, slow: Run) -> np.ndarray:
        """(1 + R,) a ratio of sums."""
        counts = self.counts(len(fast.seconds))
        return (counts @ slow.seconds) / (counts @ fast.seconds)


def with_interval(values: np.ndarray, form: str) -> str:
    """Such as "1.52 (1.40 to 1.66)", of values (1 + R,)."""
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return f"{values[0]:{form}} ({low:{form}} to {high:{form}})"


def cells(measured: Measured, model: str, runtime: str, size: int, rival: int) -> str:
    """How many times as fast as a rival early exit is at no lower score, and what the scores then differ by."""
    slow = measured.run(rival, size)
    if (early := measured.choose(model, runtime, size, slow.predicted)) is None:
        return "-"
    points = measured.lost_points(early, slow.predicted)[0]
    return f"{with_interval(measured.times_as_fast(early, slow), '.2f')}, {points:+.1f}"


def equal_scores(measured: Measured, model: str) -> str:
    """A table of all smaller models and peers beside early exit of one model in the same runtime; of both if none."""
    ways = [(runtime, size) for runtime in (FP32, INT8) for size in measured.batches]
    rows = [["in its place", "score (%)", *(f"{runtime}, batch {size}" for runtime, size in ways)]]
    rivals = dict.fromkeys((c.kind, c.model) for c in measured.contenders if c.kind not in (EARLY, FULL))
    for kind, name in rivals:
        of_runtime = {c.runtime: i for i, c in enumerate(measured.contenders) if (c.kind, c.model) == (kind, name)}
        scores = [f"{100 * measured.score(measured.predicted[i], slice(None)):.1f}" for i in of_runtime.values()]
        shown = [
            cells(measured, model, runtime, size, of_runtime.get(runtime, next(iter(of_runtime.values()))))
            for runtime, size in ways
        ]
        rows.append([", ".join(filter(None, (kind, name))), " / ".join(scores), *shown])
    return markdown(rows)


def beside_full(measured: Measured) -> str:
    """A table of each model's early exit at most LOST below its full model in PyTorch."""
    rows = [
        ["early exit of", "batch", "thresholds", "score, change", "over its strongest full graph", "over Hugging Face"]
    ]
    for model in dict.fromkeys(c.model for c in measured.contenders if c.kind == FULL):
        stock = measured.index(FULL, model, PYTORCH)
        for runtime in (PYTORCH, FP32, INT8):
            for size in measured.batches:
                full, row = measured.index(FULL, model, runtime), [f"{model}, {runtime}", str(size)]
                early = measured.choose(model, runtime, size, measured.predicted[stock], LOST)
                if early is None:
                    rows.append([*row, "-", "-", "-", "-"])
                    continue
                changed = with_interval(measured.lost_points(early, measured.predicted[stock]), "+.1f")
                fast = [
                    with_interval(measured.times_as_fast(early, measured.run(i, size)), ".2f") for i in (full, stock)
                ]
                rows.append([*row, " / ".join(f"{x:g}" for x in early.thresholds), changed, *fast])
    return markdown(rows)


def points(measured: Measured) -> pd.DataFrame:
    """A line for each contender and size of a batch: score, and milliseconds a text, with 95 % intervals over texts."""
    lines, scores = [], measured.scores(*measured.predicted)
    for i, c in enumerate(measured.contenders):
        for size, batches in measured.batches.items():
            counts, texts = measured.counts(len(batches)), np.array([len(rows) for rows in batches])
            ms = 1e3 * (counts @ measured.seconds[size][i]) / (counts @ texts)
            facts = {"kind": c.kind, "model": c.model, "runtime": c.runtime, "threshold": c.threshold, "batch": size}
            for name, values in (("score", scores[:, i]), ("ms", ms)):
                low, high = np.quantile(values[1:], [0.025, 0.975])
                facts |= {name: values[0], f"{name}_low": low, f"{name}_high": high}
            lines.append(facts)
    return pd.DataFrame(lines)


def points_table(lines: pd.DataFrame) -> str:
    return markdown([[*lines.columns], *lines.map(lambda x: f"{x:.3g}" if isinstance(x, float) else str(x)).to_numpy()])


def family(line: pd.Series) -> str:
    """What shares a colour: thresholds of a model, and smaller models NAME-LAYERS of one NAME."""
    name = line.model.rpartition("-")[0] or line.model if line.kind == STATIC else line.model
    return ", ".join(filter(None, (line.kind, name)))


def plot(lines: pd.DataFrame, metric: str) -> Figure:
    """Score over milliseconds a text, a panel for each size of a batch: colours for models, marks for runtimes."""
    families, sizes = lines.apply(family, axis=1), lines["batch"].unique()
    shades = mpl.colormaps["tab20"].colors
    colors = dict(zip(families.unique(), shades[::2] + shades[1::2], strict=False))
    figure = Figure(figsize=(5.2 * len(sizes) + 2.2, 5), layout="constrained")
    panels = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
    for axes, size in zip(panels, sizes, strict=True):
        for (name, runtime), some in lines[lines["batch"] == size].groupby([families, "runtime"], sort=False):
            marker, line = LOOKS[runtime]
            axes.plot(some.ms, 100 * some.score, color=colors[name], marker=marker, linestyle=line, markersize=4)
        axes.set(xlabel=f"ms a text, batch {size}", xscale="log")
    panels[0].set_ylabel(f"score ({metric}, %)")
    keys = [Line2D([], [], color=color, linewidth=3, label=name) for name, color in colors.items()]
    used = {way: look for way, look in LOOKS.items() if way in set(lines.runtime)}
    keys += [Line2D([], [], color="0.3", marker=m, linestyle=dashes, label=way) for way, (m, dashes) in used.items()]
    panels[-1].legend(handles=keys, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def write(measured: Measured, folder: Path, about: str) -> Sequence[Path]:
    """Writes frontier.md, .csv, .png and .pdf, and returns their paths."""
    lines, models = points(measured), dict.fromkeys(c.model for c in measured.contenders if c.kind == FULL)
    timed = sum(len(rows) for rows in measured.batches[1])
    text = [
        f"# {measured.task.name}: score ({measured.task.primary_metric}) over milliseconds a text",
        f"{len(measured.labels):,} texts are scored, {timed} of them timed, with their tokenization, in {about}, in "
        "which all take random turns. In parentheses: 95 % intervals over the texts (times: the timed batches), by "
        "bootstrap. Thresholds are chosen on one half of the texts, scored and timed on the other, both ways.",
        f"## At most {100 * LOST:g} point below the full model: change in points, and how many times as fast",
        beside_full(measured),
    ]
    for model in models:
        text += [
            f"## At equal score: how many times as fast is early exit of {model}",
            "The fastest threshold whose score is at least that of what would run in its place, in the same runtime; "
            "after the comma, by how many points the scores then differ. -: on one half no threshold scores as much.",
            equal_scores(measured, model),
        ]
    text += ["## All points", points_table(lines)]
    with replacing(folder / "frontier.md") as file:
        file.write("\n\n".join(text) + "\n")
    print("\n\n".join(text[:-2]) + "\n")
    with replacing(folder / "frontier.csv") as file:
        lines.to_csv(file, index=False)
    with mpl.rc_context(plotting.STYLE):
        figures = plotting.save(plot(lines, measured.task.primary_metric), folder / "frontier")
    return [folder / "frontier.md", folder / "frontier.csv", *figures]
