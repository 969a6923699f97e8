"""Result files, in and out: the original's npy files, and the same numbers as CSV, which needs no pickle.

`deebert results RESULT_DIR ...` prints the sweep of each folder as a table.
"""

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path, PurePath

import numpy as np

from deebert.utils.cli import InputError
from deebert.utils.files import replacing

EACH_LAYER, SWEEP, CURVE = "each_layer.csv", "entropy_sweep.csv", "entropy_curve.csv"


@dataclass(frozen=True)
class SweepRow:
    """What one threshold gives on a dev set. Times are None until they have been measured.

    score: the task's primary metric. score_change: against the full model.
    layers_run: layers run / layers of the full model, over all samples.
    seconds: the model's forward passes over the whole set, median over the repeats; full_seconds: the same samples in
        the same run by the full model without off-ramps. time_saved: 1 - seconds / full_seconds, median likewise.
    time_saved_spread: largest minus smallest time_saved of the repeats.
    other_exits: samples that left elsewhere in the timed pass than all_exits predicts (float ties).
    exits: samples that leave behind layer 1..N.
    rule: the exit rule that the threshold is for.
    """

    threshold: float
    score: float
    score_change: float
    layers_run: float
    exits: tuple[int, ...]
    seconds: float | None = None
    full_seconds: float | None = None
    time_saved: float | None = None
    time_saved_spread: float | None = None
    other_exits: int | None = None
    rule: str = "entropy"

    @property
    def layers_saved(self) -> float:
        return 1 - self.layers_run


def result_dir(plot_data_dir: str | Path, model_name_or_path: str, suffix: str = "") -> Path:
    """{plot_data_dir}/{model_name_or_path}{suffix}; what would lead out of plot_data_dir ('/', '..') is dropped."""
    path = PurePath(model_name_or_path)
    parts = [part for part in path.parts if part not in (path.anchor, "..", ".")]
    if not parts:
        raise InputError(f"--model_name_or_path {model_name_or_path}: give the folder's name, results are filed by it")
    return Path(plot_data_dir, *parts[:-1], parts[-1] + suffix)


def write_each_layer(folder: Path, layer_scores: Sequence[dict[str, float]]) -> None:
    """each_layer.npy: the primary metric of the exits 1..N, as the original writes it. each_layer.csv: all metrics."""
    with replacing(folder / "each_layer.npy", "wb") as file:
        np.save(file, np.array([next(iter(scores.values())) for scores in layer_scores]))
    with replacing(folder / EACH_LAYER) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["layer", *layer_scores[0]])
        writer.writerows([layer, *scores.values()] for layer, scores in enumerate(layer_scores, 1))


def read_each_layer(folder: Path) -> tuple[str, list[float]]:
    """The primary metric's name and its value for each layer."""
    header, *rows = _read(folder / EACH_LAYER)
    return header[1], [float(row[1]) for row in rows]


def write_entropy(folder: Path, row: SweepRow) -> None:
    """entropy_{threshold}.npy: [{layer: samples}, seconds, layers run, score], an object array as the original's.

    For another exit rule its name takes the place of "entropy".
    """
    exits = dict(enumerate(row.exits, 1))
    with replacing(folder / f"{row.rule}_{float(row.threshold)}.npy", "wb") as file:
        np.save(file, np.array([exits, row.seconds, row.layers_run, row.score], dtype=object))


SCALARS = tuple(field.name for field in fields(SweepRow) if field.name not in ("exits", "rule"))


def write_sweep(folder: Path, rows: Iterable[SweepRow], name: str = SWEEP) -> None:
    """One line per threshold: SweepRow's fields, layers_saved, and a column exits_{layer} for each layer."""
    rows = list(rows)
    with replacing(folder / name) as file:
        writer = csv.writer(file, lineterminator="\n")
        exits = [f"exits_{i}" for i in range(1, len(rows[0].exits) + 1)]
        writer.writerow([*SCALARS, "layers_saved", *exits, "rule"])
        for row in rows:
            scalars = [getattr(row, field) for field in SCALARS]
            writer.writerow(
                ["" if value is None else value for value in scalars] + [row.layers_saved, *row.exits, row.rule]
            )


def read_sweep(folder: Path, name: str = SWEEP) -> list[SweepRow]:
    """The rows that `write_sweep` wrote. Raises InputError where the file is missing or not such a file."""
    header, *lines = _read(folder / name)
    try:
        return [_sweep_row(dict(zip(header, line, strict=True))) for line in lines]
    except (KeyError, ValueError) as error:
        raise InputError(
            f"{folder / name}: not a sweep of this version ({error}); run scripts/entropy_eval.sh"
        ) from None


def _sweep_row(cells: dict[str, str]) -> SweepRow:
    scalars = {name: float(cells[name]) if cells[name] else None for name in SCALARS}
    exits = tuple(int(v) for name, v in cells.items() if name.startswith("exits_"))
    return SweepRow(**scalars, exits=exits, rule=cells.get("rule", "entropy"))  # files of version 0.1 have no rule


def _read(path: Path) -> list[list[str]]:
    if not path.is_file():
        raise InputError(f"{path}: no such file; run scripts/eval_deebert.sh and scripts/entropy_eval.sh first")
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def write_eval_results(folder: Path, scores: dict[str, float]) -> None:
    """eval_results.txt: `key = value` lines, sorted by key as the original's."""
    with replacing(folder / "eval_results.txt") as file:
        file.writelines(f"{key} = {value}\n" for key, value in sorted(scores.items()))


def write_json(path: Path, facts: dict) -> None:
    with replacing(path) as file:
        json.dump(facts, file, indent=2, default=str)
        file.write("\n")


def read_json(path: Path) -> dict:
    """What `write_json` wrote. Raises InputError where it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: damaged ({error}); remove it") from None


def percents(layer_scores: Sequence[dict[str, float]]) -> str:
    """The primary metric of each layer, in per cent."""
    return " ".join(f"{100 * next(iter(scores.values())):.2f}" for scores in layer_scores)


def threshold_name(rows: Sequence[SweepRow]) -> str:
    """What the numbers of a sweep are thresholds of."""
    return "threshold (nats)" if rows[0].rule == "entropy" else f"threshold ({rows[0].rule})"


def sweep_table(rows: Sequence[SweepRow]) -> str:
    """A Markdown table of a sweep, in per cent and seconds."""
    lines = [
        f"| {threshold_name(rows)} | score (%) | change (points) | layers run (%) | time (s) | time saved (%) |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        time = f"{row.seconds:.2f} | {100 * row.time_saved:.1f}" if row.seconds is not None else "- | -"
        lines.append(
            f"| {row.threshold:g} | {100 * row.score:.2f} | {100 * row.score_change:+.2f} "
            f"| {100 * row.layers_run:.1f} | {time} |"
        )
    return "\n".join(lines)


def summary(rows: Sequence[SweepRow], drop: float = 0.005) -> str:
    """In a sentence: the largest saving at a score within `drop` of the full model's, on the samples of the sweep."""
    best = max(
        (row for row in rows if row.score_change >= -drop - 1e-9), key=lambda row: row.layers_saved, default=None
    )
    if best is None:
        return f"No threshold keeps the score within {100 * drop:g} points of the full model's."
    time = "" if best.time_saved is None else f" and {100 * best.time_saved:.1f} % of the time"
    saved = f"On this dev set threshold {best.threshold:g} saves {100 * best.layers_saved:.1f} % of the layers{time}"
    return f"{saved}; the score changes by {100 * best.score_change:+.2f} points."
