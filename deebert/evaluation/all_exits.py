"""One full pass that stores the logits of every exit, and all that follows from them without running the model again.

From the stored logits follow, exactly: the score of each exit, and for every threshold the exit layers, the score,
the layers run and the cost. Only times have to be measured (see timing.py).
Shapes: S samples of a data set, N layers, E exits (N, or N+1 with one before the first layer), C labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from torch import Tensor

from deebert.data.batching import UNTIMED_BATCH_SIZE, Collator, Features, map_batches
from deebert.data.tasks import Task
from deebert.evaluation.cost import Costs, costs_of
from deebert.evaluation.metrics import class_scores, primary_score, scores
from deebert.evaluation.results import SweepRow
from deebert.modeling.config import has_several_labels
from deebert.modeling.early_exit import first_exit_layer
from deebert.modeling.exit_rules import NO_EXIT, ExitRule, entropy, make_rule
from deebert.utils.errors import InputError
from deebert.utils.files import replacing

PER_SAMPLE = ("logits", "labels", "layer_operations", "off_ramp_operations")  # arrays (S, ...)


@dataclass(frozen=True)
class AllExits:
    """The logits of every exit for every sample, and the rule by which samples exit.

    logits: (S, E, C) float32.
    labels: (S,), or (S, C) of 0 and 1 where a sample may have several; None for unlabelled data.
    rule, tolerance, several_labels: the arguments of `exit_rules.make_rule`.
    layer_operations, off_ramp_operations: (S, N) and (S, E-1), see `Costs`; None: each layer counts 1, off-ramps 0.
    first_layer: the layer of the first exit: 1, or 0 where it is before the first layer.
    """

    logits: np.ndarray
    labels: np.ndarray | None
    rule: str = "entropy"
    tolerance: float = 0.5
    layer_operations: np.ndarray | None = None
    off_ramp_operations: np.ndarray | None = None
    first_layer: int = 1
    several_labels: bool = False

    def save(self, path: Path) -> None:
        """Writes an npz file without pickles."""
        with replacing(path, "wb") as file:
            values = {field.name: getattr(self, field.name) for field in fields(self)}
            np.savez(file, **{name: value for name, value in values.items() if value is not None})

    @classmethod
    def load(cls, path: Path) -> "AllExits":
        """Reads a file of `save`. Raises InputError."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                values = {name: array.item() if array.ndim == 0 else array for name, array in arrays.items()}
            return cls(**{"labels": None, **values})
        except Exception as error:  # a damaged file can raise almost anything
            raise InputError(f"{path}: not a file of all exits ({error}); run scripts/eval_deebert.sh again") from None

    @property
    def num_exits(self) -> int:
        """E, the final classifier included."""
        return self.logits.shape[1]

    @property
    def layers(self) -> range:
        """The layer of each exit (see `HighwayConfig.exit_layers`)."""
        return range(self.first_layer, self.first_layer + self.num_exits)

    @property
    def num_layers(self) -> int:
        """N."""
        return self.layers[-1]

    @property
    def exit_rule(self) -> ExitRule:
        """The rule for this number of labels."""
        return make_rule(self.rule, self.logits.shape[2], self.tolerance, self.several_labels)

    def take(self, rows: np.ndarray) -> "AllExits":
        """A copy with these samples only: their indices, or a mask (S,)."""
        arrays = {name: getattr(self, name) for name in PER_SAMPLE}
        return replace(self, **{name: array[rows] for name, array in arrays.items() if array is not None})

    def cutoffs(self, threshold: float | Sequence[float]) -> list[float]:
        """The cut-offs (E-1,) of a threshold, or of one per off-ramp. Raises ValueError (see `ExitRule.cutoffs`)."""
        return self.exit_rule.cutoffs(threshold, self.num_exits)

    def exits_early(self, threshold: float | Sequence[float]) -> bool:
        """Whether a sample can exit early at this threshold."""
        return max(self.cutoffs(threshold), default=0) > 0

    def exit_layers(self, threshold: float | Sequence[float]) -> np.ndarray:
        """The exit layer (S,) of each sample. Raises ValueError (see `ExitRule.cutoffs`)."""
        uncertainties = torch.from_numpy(self.uncertainties)
        return first_exit_layer(uncertainties, self.cutoffs(threshold), self.first_layer).numpy()

    def logits_at(self, exit_layers: np.ndarray) -> np.ndarray:
        """The logits (S, C) of samples that exit at these layers (S,)."""
        return self.logits[np.arange(len(self.logits)), exit_layers - self.first_layer]

    @property
    def costs(self) -> Costs:
        """The operations of each part of the model, for each sample."""
        if self.layer_operations is None:
            samples = len(self.logits)
            return Costs(np.ones((samples, self.num_layers)), np.zeros((samples, self.num_exits - 1)))
        return Costs(self.layer_operations, self.off_ramp_operations)

    def operations(self, exit_layers: np.ndarray, threshold: float | Sequence[float]) -> np.ndarray:
        """(S,) of samples that exit at these layers (S,) with this threshold; the off-ramps that run are included."""
        rule, cutoffs = self.exit_rule, self.cutoffs(threshold)
        return self.costs.of(exit_layers, [rule.consults(cutoffs, i) for i in range(len(cutoffs))])

    def cost(self, exit_layers: np.ndarray, threshold: float | Sequence[float]) -> float:
        """`operations`, summed over the samples, as a share of the full model's, summed, too.

        It is 1 exactly where all samples run every layer and no off-ramp, and above 1 where off-ramps run and hardly
        any sample exits.
        """
        return float(self.operations(exit_layers, threshold).sum() / self.costs.full.sum())

    def full_score(self, task: Task) -> float:
        """The primary metric of the full model."""
        return primary_score(task, self.logits[:, -1], self.labels)

    @cached_property
    def uncertainties(self) -> np.ndarray:
        """The rule's uncertainty (S, E-1) of each sample after each off-ramp."""
        return self.exit_rule.uncertainties(torch.from_numpy(self.logits)).numpy()


def run_all_exits(
    model,
    features: Features,
    collate: Collator,
    batch_size: int = UNTIMED_BATCH_SIZE,
    progress: bool = True,
    accelerator: Accelerator | None = None,
) -> AllExits:
    """Runs one full pass over the features. The accelerator's processes share the work, and each gets the result.

    Raises InputError where an exit's logits have no entropy: NaN, +inf, or -inf for all labels.
    """
    model.eval()
    layers = model.config.exit_layers
    logits = np.empty((len(features), len(layers), model.config.num_labels), np.float32)

    def forward_fn(batch: dict[str, Tensor]) -> tuple[Tensor]:
        return (model(**batch, output_all_exits=True, exit_threshold=NO_EXIT).all_logits,)

    name = "all exits" if progress else None
    batches = map_batches(forward_fn, features, collate, model.device, accelerator, name, batch_size)
    for index, batch_logits in batches:
        logits[index] = batch_logits
    _check_logits(logits, layers)
    config, costs = model.config, costs_of(model.config, features.lengths)
    return AllExits(
        logits=logits,
        labels=features.labels,
        rule=config.exit_rule,
        tolerance=config.patience_tolerance,
        layer_operations=costs.layers,
        off_ramp_operations=costs.off_ramps,
        first_layer=layers[0],
        several_labels=has_several_labels(config),
    )


def _check_logits(logits: np.ndarray, layers: range) -> None:
    """Raises InputError where logits (S, E, C) of the exits at these layers have no entropy."""
    bad = np.argwhere(entropy(torch.from_numpy(logits)).isnan().numpy())
    if len(bad):
        sample, i = bad[0]
        raise InputError(
            f"the model's logits are {logits[sample, i].tolist()} at exit {layers[i]} for sample {sample + 1} "
            f"({len(np.unique(bad[:, 0]))} of {len(logits)} samples have such logits); its weights are not usable"
        )


def layer_scores(task: Task, exits: AllExits) -> dict[int, dict[str, float]]:
    """The task's metrics of each exit, by its layer; that of the last layer is the final classifier."""
    return {layer: scores(task, exits.logits[:, i], exits.labels) for i, layer in enumerate(exits.layers)}


def classes(exits: AllExits, names: Sequence[str], threshold: float | Sequence[float]) -> pd.DataFrame:
    """A line for each class: its name, texts, and precision, recall and F1, NaN for a class that never occurs.

    The columns precision_full, ... are of the full model, precision_early, ... at the threshold: NaN where nothing
    exits early.
    """
    counts = exits.labels.sum(axis=0) if exits.several_labels else np.bincount(exits.labels, minlength=len(names))
    full = class_scores(exits.logits[:, -1], exits.labels)
    early = dict.fromkeys(full, np.nan)
    if exits.exits_early(threshold):
        early = class_scores(exits.logits_at(exits.exit_layers(threshold)), exits.labels)
    columns = {"label": names, "texts": counts.astype(int)}
    for at, scores_at in (("full", full), ("early", early)):
        columns |= {f"{name}_{at}": values for name, values in scores_at.items()}
    return pd.DataFrame(columns)


def sweep(task: Task, exits: AllExits, thresholds: Sequence[float | Sequence[float]]) -> list[SweepRow]:
    """The score, exits, layers run and cost of each threshold, without running the model."""
    rows, full_score = [], exits.full_score(task)
    for threshold in thresholds:
        exit_layers = exits.exit_layers(threshold)
        score = primary_score(task, exits.logits_at(exit_layers), exits.labels)
        rows.append(
            SweepRow(
                threshold=threshold,
                score=score,
                score_change=score - full_score,
                layers_run=float(exit_layers.mean() / exits.num_layers),
                exits={layer: int((exit_layers == layer).sum()) for layer in exits.layers},
                rule=exits.rule,
                cost=exits.cost(exit_layers, threshold),
            )
        )
    return rows


def spread_thresholds(exits: AllExits) -> list[float]:
    """A few thresholds, safest first: 0, and those that save about 10, 20, ... 90 % of the cost of these samples."""
    rows = []
    for threshold in dense_thresholds(exits):
        threshold = float(f"{threshold:.2g}")
        rows.append((threshold, 1 - exits.cost(exits.exit_layers(threshold), threshold)))
    chosen = [next((x for x, saved in rows if saved >= share), None) for share in np.arange(1, 10) / 10]
    return list(dict.fromkeys([0.0, *(threshold for threshold in chosen if threshold is not None)]))


def dense_thresholds(exits: AllExits, points: int = 100) -> list[float]:
    """Many thresholds from 0, where no sample exits, safest first: the rule's grid and quantiles of uncertainties."""
    rule = exits.exit_rule
    if not rule.supported:
        return [0.0]
    thresholds = [0.0, *rule.grid(points, exits.num_exits)]
    if not rule.stateful:  # a stateful rule counts, and its grid holds every count
        thresholds += np.quantile(exits.uncertainties, np.linspace(0, 1, points)).tolist()
    return sorted({float(f"{value:.6g}") for value in thresholds if value >= 0}, key=rule.cutoff)
