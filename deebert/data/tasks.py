"""The GLUE tasks, and Ratings: the format of their TSV files, how to read them, and their metrics.

Own data, in files of any columns, become a task in own_data.py. `deebert download` fetches GLUE's files from the hub,
and scripts/predict_glue.sh writes predictions for its test sets.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

from deebert.data.label_values import MULTI_LABEL, REGRESSION, SINGLE_LABEL, folded, number_in
from deebert.data.tables import read_lines
from deebert.utils.errors import InputError


@dataclass(frozen=True)
class Example:
    """One line of a file.

    texts: the text, or the pair.
    label: an index into the task's labels; a float for regression; 0 or 1 for each of the task's labels, where a line
        has several; None without a label.
    """

    texts: tuple[str, ...]
    label: int | float | tuple[int, ...] | None


@dataclass(frozen=True)
class Task:
    """A GLUE task, its columns as the GLUE download names them, and its metrics, the primary one first."""

    name: str
    text_columns: tuple[str, ...]
    label_column: str
    labels: tuple[str, ...]  # () for regression
    metrics: tuple[str, ...] = ("acc",)
    headerless: tuple[str, ...] = ()  # columns of train and dev files without a header line (CoLA)
    short_rows: bool = False  # the download has a few: they are counted, and skipped unless it is a test file (QQP)
    splits: tuple[tuple[str, str], ...] = (("train", "train"), ("dev", "validation"), ("test", "test"))  # file, hub
    hub_columns: tuple[str, ...] = ()  # the hub's names of the text columns, if they differ
    # what is scored, and the suffix of its results' folder
    dev_splits: dict[str, str] = field(default_factory=lambda: {"dev": ""}, hash=False)
    several_labels: bool = False  # whether a line may have any number of labels
    notes: tuple[str, ...] = ()  # lines for the user about the data

    @property
    def num_labels(self) -> int:
        return len(self.labels) or 1

    @property
    def primary_metric(self) -> str:
        return self.metrics[0]

    @property
    def problem_type(self) -> str:
        if not self.labels:
            return REGRESSION
        return MULTI_LABEL if self.several_labels else SINGLE_LABEL

    def file(self, data_dir: str | Path, split: str) -> Path:
        """The file of a split; GLUE's download has the diagnostic set in a folder beside. Raises InputError."""
        folder, name = Path(data_dir), f"{split}.tsv"
        if not folder.is_dir():
            raise InputError(f"{data_dir}: no such directory; it should hold the task's TSV files")
        path, beside = folder / name, folder.absolute().parent / DIAGNOSTIC / name
        if split == DIAGNOSTIC and not path.is_file() and beside.is_file():
            return beside
        if not path.is_file():
            raise InputError(f"{path}: no such file; this folder should hold the task's TSV files as GLUE names them")
        return path

    def read(self, data_dir: str | Path, split: str, labels: tuple[str, ...] | None = None) -> list[Example]:
        """The examples of a split. labels: in the order of a model's outputs; the task's own by default.

        The files are tab separated without quoting: a quote character is text. Raises InputError with file and line.
        """
        path, labels = self.file(data_dir, split), self.labels if labels is None else labels
        lines = enumerate(read_lines(path, newline="\n"), 1)
        rows = ((number, line.rstrip("\r\n").split("\t")) for number, line in lines if line.strip())
        header = list(self.headerless) if self.headerless and not is_test(split) else next(rows, (1, []))[1]
        labelled = self.label_column in header or not is_test(split)
        columns = [*self.text_columns, *([self.label_column] if labelled else [])]
        if missing := [column for column in columns if column not in header]:
            has = f"the file has {', '.join(header) or 'none'}"
            raise InputError(f"{path}, line 1: no column {', '.join(map(repr, missing))}; {has}")
        examples, short = [], 0
        for number, fields in rows:
            row = dict(zip(header, fields, strict=False))
            if any(column not in row for column in columns):
                if not self.short_rows:
                    raise InputError(f"{path}, line {number}: {len(fields)} columns where {len(header)} are expected")
                short += 1
                if not is_test(split):
                    continue
                row = dict.fromkeys(columns, "") | row  # a submission needs a prediction for each line
            label = _label(row[self.label_column], labels, f"{path}, line {number}") if labelled else None
            examples.append(Example(tuple(row[column] for column in self.text_columns), label))
        if short:
            print(f"{path}: {'filled up' if is_test(split) else 'skipped'} {short} short rows")
        if not examples:
            raise InputError(f"{path}: no examples in it")
        return examples


BINARY = ("0", "1")
ENTAILMENT = ("entailment", "not_entailment")
PAIR = ("sentence1", "sentence2")
SUFFIXES = {"dev": "", "dev_matched": "", "dev_mismatched": "-MM", "test": "-test"}  # of results' folders, by split
MNLI_FILES = ("train", "dev_matched", "dev_mismatched", "test_matched", "test_mismatched")
DIAGNOSTIC = "diagnostic"  # a test set of GLUE without a task of its own: MNLI's model predicts it
INDEX_COLUMNS = ("index", "id")  # of test files; QQP's is called id
TASKS = {
    task.name: task
    for task in (
        Task("CoLA", ("sentence",), "label", BINARY, ("mcc",), headerless=("source", "label", "note", "sentence")),
        Task("SST-2", ("sentence",), "label", BINARY),
        Task("MRPC", ("#1 String", "#2 String"), "Quality", BINARY, ("f1", "acc"), hub_columns=PAIR),
        Task("STS-B", PAIR, "score", (), ("spearmanr", "pearson")),
        Task("QQP", ("question1", "question2"), "is_duplicate", BINARY, ("f1", "acc"), short_rows=True),
        Task(
            "MNLI",
            PAIR,
            "gold_label",
            ("contradiction", "entailment", "neutral"),
            splits=tuple((name, name.replace("dev", "validation")) for name in MNLI_FILES),
            hub_columns=("premise", "hypothesis"),
            dev_splits={split: SUFFIXES[split] for split in MNLI_FILES if split.startswith("dev")},
        ),
        Task("QNLI", ("question", "sentence"), "label", ENTAILMENT),
        Task("RTE", PAIR, "label", ENTAILMENT),
        Task("WNLI", PAIR, "label", BINARY),
        Task("Ratings", ("sentence",), "score", (), ("spearmanr", "pearson")),  # not GLUE: a number for each sentence
    )
}


def get_task(name: str) -> Task:
    """The task of that name in any case; MNLI-mm is MNLI, which is scored on both dev sets. Raises InputError."""
    by_lower_case = {key.lower(): task for key, task in TASKS.items()} | {"mnli-mm": TASKS["MNLI"]}
    if name.lower() not in by_lower_case:
        raise InputError(f"{name}: no such GLUE task; choose one of {', '.join(TASKS)}")
    return by_lower_case[name.lower()]


def label_order(task: Task, model_type: str, id2label: dict[int, str] | None = None) -> tuple[str, ...]:
    """The task's labels in the order of a model's outputs.

    If the checkpoint names the task's labels, its order counts. Otherwise RoBERTa's MNLI order, inherited from
    fairseq, has entailment and neutral exchanged; the original's RoBERTa checkpoints have it too.
    """
    if order := order_of_names(task, id2label or {}):
        return order
    if task == TASKS["MNLI"] and model_type == "roberta":
        return ("contradiction", "neutral", "entailment")
    return task.labels


def order_of_names(task: Task, id2label: dict[int, str]) -> tuple[str, ...]:
    """The task's labels in the order of these names, which may differ in case or form; () where they do not match."""
    names = [str(id2label[i]) for i in sorted(id2label)]
    for form in (str, folded):  # labels may differ in form only
        by_form = {form(label): label for label in task.labels}
        order = tuple(by_form[form(name)] for name in names if form(name) in by_form)
        if sorted(order) == sorted(task.labels) and len(names) == len(by_form):
            return order
    return ()


def names_other_labels(task: Task, id2label: dict[int, str]) -> bool:
    """Whether a classifier's outputs have names, and not those of the task's labels: it is of another task."""
    named = not all(re.fullmatch("LABEL_[0-9]+", str(name)) for name in id2label.values())
    return bool(task.labels) and named and not order_of_names(task, id2label)


def check_num_labels(task: Task, num_labels: int, name: str) -> None:
    """Raises InputError where a model, or its results, of this name cannot be of the task."""
    if num_labels != task.num_labels:
        raise InputError(
            f"{name}: a model of {num_labels} labels, but {task.name} has {task.num_labels}; "
            "was it trained for another task?"
        )


def is_test(split: str) -> bool:
    """Whether this is a test split: GLUE does not publish its labels, and its lines have an index instead."""
    return split.startswith("test") or split == DIAGNOSTIC


def _label(text: str, labels: tuple[str, ...], place: str) -> int | float:
    if labels and text not in labels:
        raise InputError(f"{place}: unknown label {text!r}; the task has {', '.join(labels)}")
    try:
        return labels.index(text) if labels else number_in(text)
    except ValueError as error:
        raise InputError(f"{place}: {error}") from None
