"""One pass that stores every exit's answer, what follows from it without the model, and timed early-exit passes.

Shapes: S samples of a data set, N layers, C labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from deebert.data.batching import Collator, map_batches
from deebert.data.features import Features, load_features
from deebert.data.tasks import Task, eval_splits, label_order
from deebert.evaluation.metrics import scores
from deebert.evaluation.results import SweepRow
from deebert.modeling.checkpoints import max_tokens
from deebert.modeling.early_exit import first_exit_layer
from deebert.modeling.exit_rules import NO_EXIT, ExitRule, entropy, make_rule
from deebert.utils.cli import InputError
from deebert.utils.files import replacing

UNTIMED_BATCH_SIZE = 32  # of the all-exits pass, whose answers do not depend on it


@dataclass(frozen=True)
class AllExits:
    """The answers of every exit for every sample, and the rule by which samples leave.

    logits: (S, N, C) float32. labels: (S,), None for unlabelled data.
    certainties: (S, N-1) of the learning-to-exit head, None where the model has none.
    rule, tolerance: see `exit_rules.make_rule`.
    """

    logits: np.ndarray
    labels: np.ndarray | None
    certainties: np.ndarray | None = None
    rule: str = "entropy"
    tolerance: float = 0.5

    def save(self, path: Path) -> None:
        """Writes an npz file without pickles."""
        with replacing(path, "wb") as file:
            values = {field.name: getattr(self, field.name) for field in fields(self)}
            np.savez(file, **{name: value for name, value in values.items() if value is not None})

    @classmethod
    def load(cls, path: Path) -> "AllExits":
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: array.item() if array.ndim == 0 else array for name, array in arrays.items()}
            return cls(**{"labels": None, **found})

    @property
    def num_layers(self) -> int:
        return self.logits.shape[1]

    @property
    def exit_rule(self) -> ExitRule:
        return make_rule(self.rule, self.logits.shape[2], self.tolerance)

    def take(self, rows: np.ndarray) -> "AllExits":
        """These samples only."""
        arrays = {name: getattr(self, name) for name in ("logits", "labels", "certainties")}
        return replace(self, **{name: array[rows] for name, array in arrays.items() if array is not None})

    def halves(self, seed: int) -> tuple["AllExits", "AllExits"]:
        """Two disjoint random halves: one to fit on, one to report on."""
        order = np.random.default_rng(seed).permutation(len(self.logits))
        return self.take(order[: len(order) // 2]), self.take(order[len(order) // 2 :])

    def cutoffs(self, threshold: float | Sequence[float]) -> list[float]:
        """(N-1,) see `ExitRule.cutoffs`. Raises ValueError."""
        return self.exit_rule.cutoffs(threshold, self.num_layers)

    def exit_layers(self, threshold: float | Sequence[float]) -> np.ndarray:
        """(S,) the 1-based layer at which each sample leaves. Raises ValueError (see `ExitRule.cutoffs`)."""
        return first_exit_layer(torch.from_numpy(self.uncertainties), self.cutoffs(threshold)).numpy()

    def answers(self, exit_layers: np.ndarray) -> np.ndarray:
        """(S, C) the logits with which samples leave at these layers."""
        return self.logits[np.arange(len(self.logits)), exit_layers - 1]

    @cached_property
    def uncertainties(self) -> np.ndarray:
        """(S, N-1) what the rule measures behind each off-ramp."""
        certainties = None if self.certainties is None else torch.from_numpy(self.certainties)
        return self.exit_rule.uncertainties(torch.from_numpy(self.logits), certainties).numpy()


def dev_features(task: Task, data_dir: str | Path, config, tokenizer, max_seq_length: int) -> Features:
    """A task's (first) dev set as a model of this config reads it. Raises InputError."""
    split, labels = next(iter(eval_splits(task))), label_order(task, config.model_type, config.id2label)
    return load_features(task, data_dir, split, labels, tokenizer, min(max_seq_length, max_tokens(config)))


def run_all_exits(
    model,
    features: Features,
    collate: Collator,
    batch_size: int = UNTIMED_BATCH_SIZE,
    progress: bool = True,
    accelerator: Accelerator | None = None,
) -> AllExits:
    """One full pass over the features, shared by the accelerator's processes; all of them get the result.

    Raises InputError where an exit's answer has no entropy: NaN, +inf, all -inf.
    """
    model.eval()
    num_layers, num_labels = model.config.num_hidden_layers, model.config.num_labels
    logits = np.empty((len(features), num_layers, num_labels), np.float32)
    certainties = None

    def ask(batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        output = model(**batch, output_all_exits=True, exit_threshold=NO_EXIT)
        return output.all_logits, *([] if output.all_certainties is None else [output.all_certainties])

    name = "all exits" if progress else None
    for index, *found in map_batches(ask, features, collate, batch_size, model.device, accelerator, name):
        logits[index] = found[0]
        if len(found) > 1:
            certainties = np.empty((len(features), num_layers - 1), np.float32) if certainties is None else certainties
            certainties[index] = found[1]
    exits = AllExits(
        logits,
        features.labels,
        certainties,
        model.config.exit_rule,
        model.config.patience_tolerance,
    )
    bad = np.argwhere(entropy(torch.from_numpy(logits)).isnan().numpy())
    if len(bad):
        sample, layer = bad[0]
        raise InputError(
            f"the model answers {logits[sample, layer].tolist()} at exit {layer + 1} for sample {sample + 1} "
            f"({len(np.unique(bad[:, 0]))} of {len(features)} samples have such an answer); its weights are not usable"
        )
    return exits


def layer_scores(task: Task, exits: AllExits) -> list[dict[str, float]]:
    """The metrics of each exit, layer 1..N; the N-th is the final classifier's."""
    return [scores(task, exits.logits[:, layer], exits.labels) for layer in range(exits.num_layers)]


def sweep(task: Task, exits: AllExits, thresholds: Sequence[float]) -> list[SweepRow]:
    """Score, exits and layer cost of each threshold, without running the model."""
    full_score = scores(task, exits.logits[:, -1], exits.labels)[task.primary_metric]
    rows = []
    for threshold in thresholds:
        exit_layers = exits.exit_layers(threshold)
        score = scores(task, exits.answers(exit_layers), exits.labels)[task.primary_metric]
        rows.append(
            SweepRow(
                threshold=threshold,
                score=score,
                score_change=score - full_score,
                layers_run=float(exit_layers.mean() / exits.num_layers),
                exits=tuple(np.bincount(exit_layers, minlength=exits.num_layers + 1)[1:].tolist()),
                rule=exits.rule,
            )
        )
    return rows


def dense_thresholds(exits: AllExits, points: int = 100) -> list[float]:
    """From 0, where nobody leaves, up, safest first: the rule's grid, and quantiles of the uncertainties."""
    rule = exits.exit_rule
    if not rule.supported:
        return [0.0]
    thresholds = [0.0, *rule.grid(points, exits.num_layers)]
    if not rule.stateful:  # the grid of a rule that counts holds all there is
        thresholds += np.quantile(exits.uncertainties, np.linspace(0, 1, points)).tolist()
    return sorted({float(f"{value:.6g}") for value in thresholds if value >= 0}, key=rule.cutoff)
