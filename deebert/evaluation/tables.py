"""Results as text: the Markdown table of a sweep, and its summary in one sentence. Needs neither torch nor a model."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from deebert.evaluation.results import CLASSES, SweepRow, primary_scores
from deebert.utils.files import printable


def markdown(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table of rows of cells, the header first: this many columns to the left, the others to the right."""
    header, *body = (f"| {' | '.join(cells)} |" for cells in rows)
    return "\n".join([header, f"|{' --- |' * left}{' ---: |' * (len(rows[0]) - left)}", *body])


def percents(layer_scores: dict[int, dict[str, float]]) -> str:
    """The primary metric of each exit, by its layer, in per cent."""
    return ", ".join(f"{layer}: {100 * score:.2f}" for layer, score in primary_scores(layer_scores).items())


def threshold_name(rows: Sequence[SweepRow]) -> str:
    """The name of a sweep's thresholds with their unit, for tables and axes."""
    return "threshold (nats)" if rows[0].rule == "entropy" else f"threshold ({rows[0].rule})"


def sweep_table(rows: Sequence[SweepRow]) -> str:
    """A Markdown table of a sweep, in per cent and seconds."""
    columns = ("score (%)", "change (points)", "layers run (%)", "cost (%)", "time (s)", "time saved (%)")
    lines = [[threshold_name(rows), *columns]]
    for at in rows:
        shown = ((at.score, ".2f"), (at.score_change, "+.2f"), (at.layers_run, ".1f"), (at.cost, ".1f"))
        percents = ["-" if share is None else f"{100 * share:{form}}" for share, form in shown]
        seconds = "-" if at.seconds is None else f"{at.seconds:.2f}"
        time_saved = "-" if at.time_saved is None else f"{100 * at.time_saved:.1f}"
        lines.append([f"{at.threshold:g}", *percents, seconds, time_saved])
    return markdown(lines)


def class_table(classes: pd.DataFrame, folder: Path, most: int = 10) -> str:
    """A Markdown table of `all_exits.classes`, in per cent: those whose F1 early exit changes most, and the average.

    folder: of the file with all of them. Where nothing exits early, those with the lowest F1.
    """
    early = bool(classes["f1_early"].notna().any())
    seen = classes[classes["texts"] > 0]
    order = (seen["f1_full"] - seen["f1_early"]).abs().mul(-1) if early else seen["f1_full"]
    shown = seen.loc[order.sort_values(kind="stable").index[:most]].to_dict("records")
    average = classes.mean(numeric_only=True).to_dict() | {"label": "macro average", "texts": classes["texts"].sum()}
    lines = [["class", "texts", "precision", "recall", "F1", *(["change of F1"] if early else [])]]
    for row in (*shown, average):
        cells = []
        for name in ("precision", "recall", "f1"):
            cells.append(" -> ".join(f"{100 * row[f'{name}_{at}']:.1f}" for at in ("full", "early")[: 1 + early]))
        change = [f"{100 * (row['f1_early'] - row['f1_full']):+.1f}"] if early else []
        lines.append([printable(row["label"]), f"{row['texts']:.0f}", *cells, *change])
    which = "whose F1 changes less" if early else "with a higher F1"
    more = f"left out, classes {which}: {len(seen) - most}; all" if len(seen) > most else "these numbers"
    return f"{markdown(lines)}\n{more} are in {folder / CLASSES}"


def summary(rows: Sequence[SweepRow], drop: float = 0.01) -> str:
    """One sentence: the largest saving at a score within `drop` of the full model's, on the samples of the sweep."""
    points = f"{100 * drop:g} point{'' if drop == 0.01 else 's'}"
    within = [row for row in rows if row.score_change is not None and row.score_change >= -drop - 1e-9]
    if not within:
        return f"No threshold is known to keep the score within {points} of the full model's."
    best = max(within, key=lambda row: row.cost_saved)
    cost = "" if best.cost is None else f"{100 * best.cost_saved:.1f} % of the cost and "
    time = "" if best.time_saved is None else f", {100 * best.time_saved:.1f} % of the time"
    saved = (
        f"On this dev set threshold {best.threshold:g} saves {cost}{100 * best.layers_saved:.1f} % of the layers{time}"
    )
    limit = f"no faster one of these thresholds stays within {points}"
    faster = f", and {limit}" if best is not max(rows, key=lambda row: row.cost_saved) else ""
    return f"{saved}; the score changes by {100 * best.score_change:+.2f} points{faster}."
