"""Results as text: the Markdown table of a sweep, and its summary in one sentence. Needs neither torch nor a model."""

from collections.abc import Sequence

from deebert.evaluation.results import CLASSES, COST, ClassRow, SweepRow, primary_scores, saving_unit


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of rows of cells, the header first: column 1 to the left, others to the right."""
    header, *body = (f"| {' | '.join(cells)} |" for cells in rows)
    return "\n".join([header, f"| --- |{' ---: |' * (len(rows[0]) - 1)}", *body])


def percents(layer_scores: dict[int, dict[str, float]]) -> str:
    """The primary metric of each exit, in per cent; that of exit 0 with its number."""
    scores = primary_scores(layer_scores).items()
    return " ".join(f"{'0: ' if layer == 0 else ''}{100 * score:.2f}" for layer, score in scores)


def threshold_name(rows: Sequence[SweepRow]) -> str:
    """The name of a sweep's thresholds with their unit, for tables and axes."""
    return "threshold (nats)" if rows[0].rule == "entropy" else f"threshold ({rows[0].rule})"


def sweep_table(rows: Sequence[SweepRow]) -> str:
    """A Markdown table of a sweep, in per cent and seconds."""
    columns = "score (%) | change (points) | layers run (%) | cost (%) | time (s) | time saved (%)"
    lines = [f"| {threshold_name(rows)} | {columns} |", "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for row in rows:
        change = "-" if row.score_change is None else f"{100 * row.score_change:+.2f}"
        cost = "-" if row.cost is None else f"{100 * row.cost:.1f}"
        seconds = "-" if row.seconds is None else f"{row.seconds:.2f}"
        time_saved = "-" if row.time_saved is None else f"{100 * row.time_saved:.1f}"
        lines.append(
            f"| {row.threshold:g} | {100 * row.score:.2f} | {change} | {100 * row.layers_run:.1f} "
            f"| {cost} | {seconds} | {time_saved} |"
        )
    return "\n".join(lines)


def class_table(rows: Sequence[ClassRow], macro: ClassRow, most: int = 10) -> str:
    """A Markdown table of F1, in per cent: the classes that early exit costs most, and in the last row macro F1."""
    early = macro.early is not None
    rows = [row for row in rows if row.texts]
    header = "| class | texts | F1, full model (%) |" + (" F1, early exit (%) | change |" if early else "")
    lines = [header, "| --- | ---: | ---: |" + (" ---: | ---: |" if early else "")]
    shown = sorted(rows, key=lambda row: (row.early - row.full, row.full) if early else row.full)[:most]
    for row in (*shown, macro):
        change = f" {100 * row.early:.1f} | {100 * (row.early - row.full):+.1f} |" if early else ""
        lines.append(f"| {row.label} | {row.texts} | {100 * row.full:.1f} |{change}")
    if len(rows) > most:
        lines.append(f"These are the {'costliest' if early else 'lowest'} {most} of {len(rows)}; {CLASSES} has all.")
    return "\n".join(lines)


def summary(rows: Sequence[SweepRow], drop: float = 0.01) -> str:
    """One sentence: the largest saving at a score within `drop` of the full model's, on the samples of the sweep."""
    compared = [row for row in rows if row.score_change is not None]
    if not compared:
        return "The full model's score is not known: there is neither each_layer.npy nor a sweep at threshold 0."
    within, points = [row for row in compared if row.score_change >= -drop - 1e-9], f"{100 * drop:g} point"
    points += "" if drop == 0.01 else "s"
    if not within:
        return f"No threshold keeps the score within {points} of the full model's."
    unit = saving_unit(compared)
    best = max(within, key=lambda row: row.saved(unit))
    savings = [f"{100 * best.layers_saved:.1f} % of the layers"]
    if unit == COST:
        savings.insert(0, f"{100 * best.cost_saved:.1f} % of the cost")
    if best.time_saved is not None:
        savings.append(f"{100 * best.time_saved:.1f} % of the time")
    saved = f"On this dev set threshold {best.threshold:g} saves {in_words(savings)}"
    limit = f"no faster one of these thresholds stays within {points}"
    return f"{saved}; the score changes by {100 * best.score_change:+.2f} points, and {limit}."


def in_words(parts: Sequence[str]) -> str:
    """'a', 'a and b', or 'a, b and c'."""
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last
