"""Results as text: the Markdown table of a sweep, and its summary in one sentence. Needs neither torch nor a model."""

from collections.abc import Sequence

from deebert.evaluation.results import CLASSES, ClassRow, SweepRow, primary_scores
from deebert.utils.files import printable


def markdown(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table of rows of cells, the header first: this many columns to the left, the others to the right."""
    header, *body = (f"| {' | '.join(cells)} |" for cells in rows)
    return "\n".join([header, f"|{' --- |' * left}{' ---: |' * (len(rows[0]) - left)}", *body])


def percents(layer_scores: dict[int, dict[str, float]]) -> str:
    """The primary metric of each exit, in per cent; that of exit 0 with its number."""
    scores = primary_scores(layer_scores).items()
    return " ".join(f"{'0: ' if layer == 0 else ''}{100 * score:.2f}" for layer, score in scores)


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


def class_table(rows: Sequence[ClassRow], macro: ClassRow, most: int = 10) -> str:
    """A Markdown table of F1, in per cent: the classes that early exit costs most, and in the last row macro F1."""
    early = macro.early is not None
    rows = [each for each in rows if each.texts]
    lines = [["class", "texts", "F1, full model (%)", *(("F1, early exit (%)", "change") if early else ())]]
    shown = sorted(rows, key=lambda each: (each.early - each.full, each.full) if early else each.full)[:most]
    for each in (*shown, macro):
        change = (f"{100 * each.early:.1f}", f"{100 * (each.early - each.full):+.1f}") if early else ()
        lines.append([printable(each.label), str(each.texts), f"{100 * each.full:.1f}", *change])
    if len(rows) <= most:
        return markdown(lines)
    which = "costliest" if early else "lowest"
    return f"{markdown(lines)}\nThese are the {which} {most} of {len(rows)}; {CLASSES} has all."


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
    return f"{saved}; the score changes by {100 * best.score_change:+.2f} points, and {limit}."
