"""Table 1 of the paper, with the paper's own numbers beside ours: as text, as Markdown and as CSV.

Ours are scores of dev sets, the paper's are scores of test sets. Scores, changes and savings are shares, as everywhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from deebert.data.tasks import Task
from deebert.evaluation.all_exits import AllExits, dense_thresholds, sweep
from deebert.evaluation.metrics import exits_at_chance
from deebert.evaluation.results import SweepRow, read_sweep
from deebert.evaluation.tables import markdown
from deebert.utils.files import replacing

PAPER = Path(__file__).parent / "paper_table1.csv"
# Limits of the score's drop: each threshold saves the most below one of them. The first limit is the paper's.
DROPS = (0.005, 0.02, 0.04)
BASE = {"bert": "BERT-base", "roberta": "RoBERTa-base"}  # the models of Table 1, by their type
NONE = "-"


@dataclass(frozen=True)
class Point:
    """Early exit at one threshold. change: of the score. time_saved: a share. row: ours, None of the paper's."""

    change: float
    time_saved: float
    row: SweepRow | None = None


@dataclass(frozen=True)
class Result:
    """One model on one data set: the full model's score and seconds, and a point for each of DROPS.

    points: empty for regression, where nothing exits by entropy. at_chance: whether the full model is no better than
        always the most frequent label, so that exits cannot lose anything.
    """

    score: float
    seconds: float
    points: tuple[Point, ...] = ()
    at_chance: bool = False


@dataclass(frozen=True)
class Block:
    """The rows of one model. ours, paper: for each task the results on its data sets, of which MNLI has two."""

    model: str
    model_type: str
    layers: int
    ours: dict[str, list[Result]]

    @property
    def paper(self) -> dict[str, list[Result]]:
        return read_paper().get(self.model_type, {})


def choose_thresholds(task: Task, exits: AllExits) -> list[float]:
    """For each of DROPS the threshold that saves the most layers at a drop below it; none for regression."""
    if not exits.exit_rule.supported:
        return []
    candidates = sorted({float(f"{threshold:.4g}") for threshold in dense_thresholds(exits, 1000)})
    rows = sweep(task, exits, candidates)
    within = [[row for row in rows if row.score_change > -drop + 1e-9] for drop in DROPS]  # always threshold 0
    return [max(rows_within, key=lambda row: row.layers_saved).threshold for rows_within in within]


def read_result(folder: Path, thresholds: Sequence[float]) -> Result:
    """Our result from the sweep in a folder, which has a row for each of the chosen thresholds. Raises InputError."""
    rows = {row.threshold: row for row in read_sweep(folder)}
    first = next(iter(rows.values()))
    chosen = [rows[threshold] for threshold in thresholds]
    points = tuple(Point(row.score_change, row.time_saved, row) for row in chosen)
    exits = AllExits.load(folder / "all_exits.npz")
    at_chance = bool(points) and bool(exits_at_chance(exits.logits[:, -1:], exits.labels))
    return Result(first.score - first.score_change, first.full_seconds, points, at_chance)


def read_paper() -> dict[str, dict[str, list[Result]]]:
    """The paper's results, by type of the model and task."""
    paper: dict[str, dict[str, list[Result]]] = {}
    for row in pd.read_csv(PAPER, comment="#").itertuples():
        points = [(row.change_1, row.saved_1), (row.change_2, row.saved_2), (row.change_3, row.saved_3)]
        points = tuple(Point(round(change / 100, 4), saved / 100) for change, saved in points)
        result = Result(round(row.score / 100, 4), row.seconds, points)
        paper.setdefault(row.model_type, {}).setdefault(row.task.removesuffix("-MM"), []).append(result)
    return paper


def baseline_cell(parts: Sequence[Result]) -> str:
    """'93.6, 36.72 s', or '83.9/83.0, 202.84 s' of two data sets, whose time is the first one's."""
    if not parts:
        return NONE
    seconds = parts[0].seconds
    time = f"{seconds:.2f} s" if seconds < 1000 else f"{seconds / 60:.0f} min"
    return f"{'/'.join(f'{100 * part.score:.1f}' for part in parts)}, {time}"


def point_cell(parts: Sequence[Result], i: int) -> str:
    """'-0.2/-21 %': the change of the score in points and of the time; '-0.0,-0.1/-14 %' of two data sets."""
    if not parts or not parts[0].points:
        return NONE
    changes = ",".join(f"{100 * part.points[i].change:+.1f}" for part in parts)
    return f"{changes}/{-100 * parts[0].points[i].time_saved:+.0f} %"


def table_rows(blocks: Sequence[Block], tasks: Sequence[Task]) -> list[list[str]]:
    """The header, and for each model pairs of rows: ours and the paper's."""
    rows = [["", *(f"{task.name} {task.primary_metric}" for task in tasks)]]
    for block in blocks:
        limits = [f"{block.model}, drop < {100 * drop:g}" for drop in DROPS]
        for number, name in enumerate([block.model, *limits]):
            for label, results in ((name, block.ours), (f"  paper, {BASE.get(block.model_type)}", block.paper)):
                parts = [results.get(task.name, ()) for task in tasks]
                cells = [point_cell(part, number - 1) if number else baseline_cell(part) for part in parts]
                if results is block.ours or any(cell != NONE for cell in cells):
                    rows.append([label, *cells])
    return rows


def as_text(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells in columns of equal width, the first one to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(others, widths[1:], strict=True))]
        lines.append("   ".join(cells).rstrip())
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


COLUMNS = (
    "model task data_set metric limit threshold score change seconds time_saved layers_saved paper_model paper_score"
)
COLUMNS += " paper_change paper_seconds paper_time_saved"


def csv_lines(block: Block, task: Task) -> list[dict]:
    """For each data set of the task a line for the full model, and one for each threshold, by names of COLUMNS."""
    lines, papers = [], block.paper.get(task.name)
    for i, (split, ours) in enumerate(zip(task.dev_splits, block.ours[task.name], strict=True)):
        about = {"model": block.model, "task": task.name, "data_set": split, "metric": task.primary_metric}
        beside = {}
        if paper := papers and papers[i]:
            about["paper_model"] = BASE[block.model_type]
            beside = {"paper_score": paper.score, "paper_seconds": paper.seconds}
        lines.append(about | {"score": ours.score, "seconds": ours.seconds} | beside)
        for j, (limit, point) in enumerate(zip(DROPS, ours.points, strict=False)):  # none for regression
            row, line = point.row, about | {"limit": limit}
            line |= {"threshold": row.threshold, "score": row.score, "change": row.score_change}
            line |= {"seconds": row.seconds, "time_saved": row.time_saved, "layers_saved": row.layers_saved}
            if paper:
                line |= {"paper_change": paper.points[j].change, "paper_time_saved": paper.points[j].time_saved}
            lines.append(line)
    return lines


def notes(blocks: Sequence[Block], tasks: Sequence[Task], device: str) -> list[str]:
    """What a reader of the table has to know."""
    said = [
        "Scores in per cent, and seconds for the data set, one sample at a time, padded as in the paper; for each "
        "threshold the change of the score in points / the change of the time.",
        f"Ours are dev sets, timed on {device}; the paper's are test sets, scored by the GLUE server and timed on a "
        "P100. Compare changes and savings, not seconds; scores of dev and test sets differ by some points.",
        "Each threshold saves the most layers at a drop below its limit on the dev set; 0.5 is the paper's limit, 2 "
        "and 4 stand for its moderate drops. Ours are scored on that same dev set, so that they keep the "
        "limit by construction; the paper's are scored on the test set.",
    ]
    if any(len(results) > 1 for block in blocks for results in block.ours.values()):
        said.append("MNLI: matched/mismatched; time and thresholds of the matched set.")
    if regression := [task.name for task in tasks if not task.labels]:
        said.append(f"{', '.join(regression)}: regression has no entropy, so that nothing exits early.")
    for block in blocks:
        if useless := [name for name, parts in block.ours.items() if any(part.at_chance for part in parts)]:
            said.append(
                f"{block.model}, {', '.join(useless)}: no better than always the most frequent label; "
                "its exits lose nothing, and their savings mean nothing; train longer, or on more data."
            )
        if block.paper and block.layers != 12:
            said.append(f"{block.model} has {block.layers} layers, the paper's {BASE[block.model_type]} 12.")
    if others := [block.model for block in blocks if not block.paper]:
        said.append(f"{', '.join(others)}: not in the paper's table.")
    return said


def write_table(folder: Path, blocks: Sequence[Block], tasks: Sequence[Task], notes: Sequence[str]) -> str:
    """Writes table1.txt, table1.md and table1.csv, and returns the text."""
    rows = table_rows(blocks, tasks)
    text = "\n".join([as_text(rows), "", *notes])
    as_markdown = "\n\n".join([markdown([[cell.strip() for cell in row] for row in rows]), *notes])
    for name, content in (("txt", text), ("md", as_markdown)):
        with replacing(folder / f"table1.{name}") as file:
            file.write(content + "\n")
    lines = [line for block in blocks for task in tasks if task.name in block.ours for line in csv_lines(block, task)]
    with replacing(folder / "table1.csv") as file:
        pd.DataFrame(lines, columns=COLUMNS.split()).to_csv(file, index=False)
    return text
