"""Reads result folders as series: what a figure shows of one model on one task. Needs neither torch nor a model."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from deebert.evaluation.results import (
    CURVE,
    EACH_LAYER,
    EACH_LAYER_NPY,
    SWEEP,
    SweepRow,
    entropy_files,
    read_each_layer,
    read_sweep,
)
from deebert.utils.errors import InputError


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
        has_layers = any((folder / name).is_file() for name in (EACH_LAYER, EACH_LAYER_NPY))
        has_sweep = (folder / SWEEP).is_file() or bool(entropy_files(folder))
        if not has_layers and not has_sweep:
            raise InputError(
                f"{folder}: no results there; run scripts/eval_deebert.sh and scripts/entropy_eval.sh first"
            )
        metric, each_layer = read_each_layer(folder) if has_layers else ("", {})
        sweep = read_sweep(folder) if has_sweep else []
        curve = read_sweep(folder, CURVE) if (folder / CURVE).is_file() else []
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
    if not paths:
        return []
    if len(paths) == 1:
        return ["/".join(paths[0].parts[1:][-3:]).removesuffix("/two_stage")]
    shared = Path(os.path.commonpath(paths))
    return [
        (path.relative_to(shared).as_posix() if path != shared else path.name).removesuffix("/two_stage")
        for path in paths
    ]
