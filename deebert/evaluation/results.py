"""Writes and reads result files: the original's npy files, and the same numbers and more as CSV.

Reading prefers the CSV, which holds what npy files do not: all metrics, the spread of the times, the full model's time.
Folders with npy files only, such as the original's, are read too. This module needs neither torch nor a model.
"""

import math
import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path, PurePath

import numpy as np
import pandas as pd
from numpy.lib import format as npy_format

from deebert.modeling.exit_rules import EXIT_RULES
from deebert.utils.errors import InputError
from deebert.utils.files import no_formula, replacing

EACH_LAYER, SWEEP, CURVE, CLASSES = "each_layer.csv", "entropy_sweep.csv", "entropy_curve.csv", "classes.csv"
EACH_LAYER_NPY = "each_layer.npy"  # the original's file; beside it entropy_{threshold}.npy
ALL_EXITS, THRESHOLD, EVAL_RESULTS = "all_exits.npz", "threshold.json", "eval_results.txt"
FIGURES = ("score_by_saving", "score_by_layer", "exits_by_threshold", "expected_and_measured_saving")  # png and pdf
WRITTEN = (EACH_LAYER, SWEEP, CURVE, CLASSES, EACH_LAYER_NPY, ALL_EXITS, THRESHOLD, EVAL_RESULTS)
RERUN = "remove it, or run scripts/eval_deebert.sh and scripts/entropy_eval.sh again"
# What pickles of numbers and dicts name, of numpy 1 and 2
KNOWN = {("numpy", "dtype"), ("numpy", "ndarray"), ("_codecs", "encode")}
KNOWN |= {(f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")}


@dataclass(frozen=True)
class SweepRow:
    """The results of one threshold on a dev set. Times are None where they were not measured.

    score: the task's primary metric, in [0, 1].
    score_change: score minus the full model's; None where no file holds the full model's.
    layers_run: layers run / layers of the full model, over all samples.
    exits: how many samples exit after each layer, by layer; 0: before the first layer, where the model has that exit.
    seconds: time of the forward passes over the data set, the median over the repeats.
    full_seconds: the same for the full model without off-ramps, timed in the same turns.
    time_saved: 1 - seconds / full_seconds, the median over the repeats; of npy files, which hold no full_seconds,
        1 - seconds / seconds at threshold 0.
    time_saved_spread: the largest minus the smallest time_saved of the repeats.
    other_exits: samples that exit at another layer in the timed pass than in the all-exits pass (rounding).
    rule: the exit rule that the threshold belongs to.
    cost: floating-point operations that ran / those of the full model (see cost.py); None in npy files.
    """

    threshold: float
    score: float
    score_change: float | None
    layers_run: float
    exits: dict[int, int]
    seconds: float | None = None
    full_seconds: float | None = None
    time_saved: float | None = None
    time_saved_spread: float | None = None
    other_exits: int | None = None
    rule: str = "entropy"
    cost: float | None = None

    @property
    def layers_saved(self) -> float:
        return 1 - self.layers_run

    @property
    def cost_saved(self) -> float:
        """1 - cost, below 0 where off-ramps cost more than early exit saves; the layers saved where it is not known."""
        return self.layers_saved if self.cost is None else 1 - self.cost


def write_classes(folder: Path, classes: pd.DataFrame) -> None:
    """Writes classes.csv, a line for each class, from a table of `all_exits.classes`."""
    with replacing(folder / CLASSES) as file:
        classes.assign(label=classes["label"].map(no_formula)).to_csv(file, index=False)


def result_dir(plot_data_dir: str | Path, model_name_or_path: str, suffix: str = "") -> Path:
    """{plot_data_dir}/{model_name_or_path}{suffix}, without parts that lead out ('/', '..'). Raises InputError."""
    path = PurePath(model_name_or_path)
    parts = [part for part in path.parts if part not in (path.anchor, "..", ".")]
    if not parts:
        raise InputError(f"{path}: give the name of the model's folder; the results' folder is named after it")
    return Path(plot_data_dir, *parts[:-1], parts[-1] + suffix)


def remove_results(folder: Path) -> None:
    """Removes result files and figures, so that nobody takes them for a new model's. All else stays."""
    sweeps = [file for rule in EXIT_RULES for file in entropy_files(folder, rule).values()]
    figures = [f"{name}.{kind}" for name in FIGURES for kind in ("png", "pdf")]
    for file in (*(folder / name for name in (*WRITTEN, *figures)), *sweeps):
        file.unlink(missing_ok=True)


def primary_scores(layer_scores: dict[int, dict[str, float]]) -> dict[int, float]:
    """The primary metric, which is the first, of each exit, by its layer."""
    return {layer: next(iter(scores.values())) for layer, scores in layer_scores.items()}


def write_each_layer(folder: Path, layer_scores: dict[int, dict[str, float]]) -> None:
    """Writes each_layer.csv, all metrics of each exit, and each_layer.npy, the primary metric of exits 1..N.

    The npy file is the original's, and its first entry is layer 1: the exit before the first layer is in the CSV only.
    """
    with replacing(folder / EACH_LAYER_NPY, "wb") as file:
        np.save(file, np.array([score for layer, score in primary_scores(layer_scores).items() if layer > 0]))
    with replacing(folder / EACH_LAYER) as file:
        pd.DataFrame.from_dict(layer_scores, orient="index").to_csv(file, index_label="layer")


def each_layer_file(folder: Path) -> Path | None:
    """The folder's file with the score of each exit, the CSV where there are both; None where there is none."""
    return next((path for path in (folder / EACH_LAYER, folder / EACH_LAYER_NPY) if path.is_file()), None)


def read_each_layer(folder: Path) -> tuple[str, dict[int, float]]:
    """The primary metric's name, "" of an npy file, and its value for each exit, by layer. Raises InputError."""
    path = each_layer_file(folder) or folder / EACH_LAYER
    with _reading(path):
        if path.suffix == ".npy":
            metric, lines = "", list(enumerate(read_objects(path), 1))
        else:
            table = pd.read_csv(path, encoding="utf-8-sig", index_col=False)
            metric, lines = table.columns[1], table.iloc[:, :2].to_numpy().tolist()
        scores = {int(layer): float(score) for layer, score in lines}
        if not scores or [*scores] != [layer for layer, _ in lines] or not all(map(math.isfinite, scores.values())):
            raise ValueError("not one score for each layer")
        return metric, scores


def write_entropy(folder: Path, row: SweepRow) -> None:
    """Writes {rule}_{threshold}.npy, the original's object array [{layer: samples}, seconds, layers run, score]."""
    with replacing(folder / f"{row.rule}_{float(row.threshold)}.npy", "wb") as file:
        np.save(file, np.array([row.exits, row.seconds, row.layers_run, row.score], dtype=object))


def write_sweep(folder: Path, rows: Iterable[SweepRow], name: str = SWEEP) -> None:
    """Writes one line per threshold: SweepRow's fields, what is saved, and a column exits_{layer} for each layer."""
    records = []
    for row in rows:
        record = asdict(row)
        exits = {f"exits_{layer}": count for layer, count in record.pop("exits").items()}
        saved = {"layers_saved": row.layers_saved, "cost_saved": row.cost_saved}
        records.append(record | saved | exits)
    with replacing(folder / name) as file:
        pd.DataFrame(records).to_csv(file, index=False)


def read_sweep(folder: Path, name: str = SWEEP) -> list[SweepRow]:
    """Reads the CSV of `write_sweep`; where there is none, the entropy_*.npy files. Raises InputError."""
    if name == SWEEP and not (folder / SWEEP).is_file() and entropy_files(folder):
        return _read_entropy_files(folder)
    with _reading(folder / name):
        rows = pd.read_csv(folder / name, encoding="utf-8-sig", index_col=False).to_dict("records")
        if not rows:
            raise ValueError("no line in it")
        return [_sweep_row(row) for row in rows]


def entropy_files(folder: Path, rule: str = "entropy") -> dict[float, Path]:
    """The folder's {rule}_{threshold}.npy files, by rising threshold."""
    files = {}
    for path in folder.glob(f"{rule}_*.npy"):
        with suppress(ValueError):  # another file of a similar name
            files[float(path.stem.removeprefix(f"{rule}_"))] = path
    return {threshold: files[threshold] for threshold in sorted(files) if not math.isnan(threshold)}


def _read_entropy_files(folder: Path) -> list[SweepRow]:
    """The sweep as far as npy files hold it, compared with the full model's score and with the time at threshold 0."""
    rows = [_entropy_row(threshold, path) for threshold, path in entropy_files(folder).items()]
    if len({tuple(row.exits) for row in rows}) > 1:
        raise InputError(f"{folder}: its entropy_*.npy files are of models of different depth; move some of them away")
    full = [(row.score, row.seconds) for row in rows if row.threshold <= 0]
    full_score, full_seconds = full[-1] if full else (None, None)
    if each_layer_file(folder):
        *_, full_score = read_each_layer(folder)[1].values()
    if full_score is not None:
        rows = [replace(row, score_change=row.score - full_score) for row in rows]
    if full_seconds is None:
        return rows
    return [replace(row, time_saved=None if row.seconds is None else 1 - row.seconds / full_seconds) for row in rows]


def _entropy_row(threshold: float, path: Path) -> SweepRow:
    """One npy file, which holds neither score_change nor time_saved. Raises InputError."""
    with _reading(path):
        exits, seconds, layers_run, score = read_objects(path)
        first = 0 if 0 in exits else 1
        counts = {layer: exits[layer] for layer in range(first, first + len(exits))}
        return _checked(SweepRow(threshold, score, None, layers_run, counts, seconds))


def _sweep_row(record: dict) -> SweepRow:
    """One line of a CSV. Raises KeyError or what `_checked` raises."""
    values = {field.name: record[field.name] for field in fields(SweepRow) if field.name != "exits"}
    values = {name: None if pd.isna(value) else value for name, value in values.items()}
    exits = {int(name.removeprefix("exits_")): count for name, count in record.items() if name.startswith("exits_")}
    return _checked(SweepRow(**values, exits=exits))


def _checked(row: SweepRow) -> SweepRow:
    """The row. Raises TypeError or ValueError where a number is missing or cannot be."""
    numbers = {name: value for name, value in asdict(row).items() if name not in ("threshold", "exits", "rule")}
    needed = (row.threshold, row.score, row.layers_run)
    if None in needed or not all(math.isfinite(value) for value in numbers.values() if value is not None):
        raise ValueError("a number is missing or infinite")
    counts = {layer: int(count) for layer, count in row.exits.items()}
    if counts != row.exits or min(counts.values()) < 0 or not sum(counts.values()):
        raise ValueError("the exits are not numbers of samples")
    if row.seconds is not None and row.seconds <= 0:
        raise ValueError("it took no time")
    return replace(row, exits=counts)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Raises InputError, one line, where the block cannot read the file."""
    if not path.is_file():
        inside = path.parent / "results"
        fix = f"give {inside}" if inside.is_dir() else "run scripts/eval_deebert.sh and scripts/entropy_eval.sh first"
        raise InputError(f"{path}: no such file; {fix}")
    try:
        yield
    except Exception as error:  # a damaged file can raise almost anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{path}: not a result file ({reason}); {RERUN}") from None


def write_eval_results(folder: Path, scores: dict[str, float]) -> None:
    """Writes eval_results.txt: `key = value` lines, sorted by key as in the original."""
    with replacing(folder / EVAL_RESULTS) as file:
        file.writelines(f"{key} = {value}\n" for key, value in sorted(scores.items()))


class _Named:
    """Stands for all that a pickle names: it keeps the arguments and the state, and does nothing with them."""

    def __init__(self, *arguments):
        self.arguments, self.state = arguments, ()

    def __setstate__(self, state):
        self.state = state


class _Unpickler(pickle.Unpickler):
    """A pickle is a program that calls what it names. Here it names nothing but `_Named`."""

    def find_class(self, module: str, name: str) -> type[_Named]:
        if (module, name) not in KNOWN:
            raise pickle.UnpicklingError(f"it names {f'{module}.{name}'!a}, and result files hold only numbers")
        return _Named


def _plain(value):
    """The value, where numpy's scalars have become Python numbers."""
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if not isinstance(value, _Named):
        return value
    dtype, data = value.arguments
    if isinstance(data, _Named):  # pickles of protocol 2 write bytes as text
        data = data.arguments[0].encode("latin1")
    return np.frombuffer(data, np.dtype(dtype.arguments[0]).newbyteorder(dtype.state[1]), count=1).item()


def read_objects(path: Path) -> list:
    """The items of a one-dimensional npy array: numbers, None, and dicts of them. Raises any exception for others."""
    with path.open("rb") as file:
        npy_format.read_magic(file)
        shape, _, dtype = npy_format.read_array_header_1_0(file)
        if dtype.hasobject:
            items = [_plain(item) for item in _Unpickler(file).load().state[4]]
        else:
            file.seek(0)
            items = npy_format.read_array(file, allow_pickle=False).tolist()
    if len(shape) != 1 or len(items) != shape[0]:
        raise ValueError("not a list")
    return items
