"""Own data: a task that is made from files of any columns and labels. docs/own_data.md states its rules."""

from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from deebert.data.columns import Columns, Line, choose_columns, read_lines
from deebert.data.label_values import (
    MULTI_LABEL,
    REGRESSION,
    SINGLE_LABEL,
    doubts,
    guess_problem_type,
    listing,
    named,
    parse,
    read_label_names,
    sorted_labels,
)
from deebert.data.splitting import shared_texts, validation_rows
from deebert.data.table_files import read_table
from deebert.data.tasks import Example, Task
from deebert.utils.errors import InputError

METRICS = {
    SINGLE_LABEL: ("acc", "f1_macro"),
    MULTI_LABEL: ("f1_micro", "f1_macro"),
    REGRESSION: ("spearmanr", "pearson"),
}


@dataclass(frozen=True, kw_only=True)
class OwnFiles:
    """The flags about own files; their help texts say what they mean.

    labels, problem_type: at an evaluation those of the trained model; in a training labels is None.
    """

    train: Path | None = None
    validation: Path | None = None
    test: Path | None = None
    text_column: str | None = None
    text_pair_column: str | None = None
    label_column: str | None = None
    column_names: tuple[str, ...] = ()
    label_names: Path | None = None
    label_separator: str | None = None
    problem_type: str | None = None
    validation_split: float = 0.1
    labels: tuple[str, ...] | None = None


@dataclass(frozen=True)
class OwnTask(Task):
    """A task of own files. examples, files: by split; a dev set without a file is a part of the training's.

    notes: lines for the user: what was read, and warnings.
    """

    examples: dict[str, list[Example]] = field(default_factory=dict, repr=False, compare=False)
    files: dict[str, Path] = field(default_factory=dict, compare=False)

    def file(self, data_dir: str | Path | None, split: str) -> Path:
        return self.files[split]

    def read(self, data_dir: str | Path | None, split: str, labels: tuple[str, ...] | None = None) -> list[Example]:
        if labels in (None, self.labels):
            return self.examples[split]
        old = [self.labels.index(label) for label in labels]  # by the new index
        if self.problem_type == MULTI_LABEL:
            return [replace(x, label=tuple(x.label[i] for i in old)) for x in self.examples[split]]
        return [replace(x, label=old.index(x.label)) for x in self.examples[split]]

    def content(self, data_dir: str | Path | None, split: str) -> bytes:
        return repr(self.examples[split]).encode()


@dataclass(frozen=True)
class Part:
    """The lines of one file."""

    path: Path
    columns: Columns
    lines: list[Line]

    @classmethod
    def read(cls, path: Path, files: OwnFiles) -> "Part":
        table = read_table(path, files.column_names)
        columns = choose_columns(table, files.text_column, files.text_pair_column, files.label_column)
        return cls(path, columns, read_lines(table, columns))

    @cached_property
    def texts(self) -> list[tuple[str, str | None]]:
        return [line.text for line in self.lines]

    def parsed(self, problem_type: str, separator: str | None, names: tuple[str, ...]) -> list:
        """The label, labels or number of each line."""
        values = []
        for line in self.lines:
            try:
                value = parse(line.value, problem_type, separator)
                if names and problem_type != REGRESSION:
                    value = named(value, names) if isinstance(value, str) else tuple(named(x, names) for x in value)
            except ValueError as error:
                raise InputError(f"{self.path}, line {line.number}, column {self.columns.label!r}: {error}") from None
            values.append(value)
        return values

    def examples(self, values: list, labels: tuple[str, ...]) -> list[Example]:
        """Raises InputError for a label that is none of `labels`."""
        index, examples = {label: i for i, label in enumerate(labels)}, []
        for line, value in zip(self.lines, values, strict=True):
            unknown = [label for label in as_labels(value) if label not in index]
            if unknown:
                raise InputError(
                    f"{self.path}, line {line.number}: label {unknown[0]!r} is unknown to the training, which has "
                    f"{listing(labels)}"
                )
            if isinstance(value, tuple):
                value = tuple(int(label in value) for label in labels)
            examples.append(Example(line.text_a, line.text_b, index[value] if isinstance(value, str) else value))
        return examples

    def empty_texts(self) -> list[str]:
        """A warning where there are any."""
        empty = [line.number for line in self.lines if not all(text is None or text.strip() for text in line.text)]
        where = f"{self.path}: {len(empty)} empty texts, the first in line {empty[0]}" if empty else ""
        return [f"warning: {where}; they are kept, as texts without words"] if empty else []


def own_task(files: OwnFiles) -> OwnTask:
    """Reads all files, and makes the task. Raises InputError with file and line."""
    named_files = {"train": files.train, "dev": files.validation, "test": files.test}
    parts = {split: Part.read(path, files) for split, path in named_files.items() if path is not None}
    split, first = next(iter(parts.items()))
    problem_type = files.problem_type or guess_problem_type([line.value for line in first.lines], files.label_separator)
    names = read_label_names(files.label_names) if files.label_names else ()
    values = {split: part.parsed(problem_type, files.label_separator, names) for split, part in parts.items()}
    labels = ()
    if problem_type != REGRESSION:
        present = sorted_labels({label for value in values[split] for label in as_labels(value)})
        labels = files.labels or names or present
        if "train" in parts:
            check_labels(first, present)
    examples = {split: part.examples(values[split], labels) for split, part in parts.items()}
    notes = [f"{first.path}: {len(first.lines)} lines, {first.columns}, {kind(problem_type, labels)}"]
    paths = {split: part.path for split, part in parts.items()}
    if "dev" not in parts and "train" in parts:
        held_out = validation_rows(first.texts, strata(values["train"]), files.validation_split)
        lines, paths["dev"] = examples["train"], first.path
        examples["dev"] = [example for example, chosen in zip(lines, held_out, strict=True) if chosen]
        examples["train"] = [example for example, chosen in zip(lines, held_out, strict=True) if not chosen]
        sizes = f"{len(examples['dev'])} of its lines are the dev set, {len(examples['train'])} the training set"
        notes.append(f"{first.path}: {sizes} (--validation_split {files.validation_split:g})")
    return OwnTask(
        name=first.path.absolute().parent.name if first.path.stem == "train" else first.path.stem,
        text_columns=(first.columns.text, *([first.columns.pair] if first.columns.pair else [])),
        label_column=first.columns.label,
        labels=labels,
        metrics=METRICS[problem_type],
        dev_splits=tuple((split, suffix) for split, suffix in (("dev", ""), ("test", "-test")) if split in paths),
        several_labels=problem_type == MULTI_LABEL,
        notes=(*notes, *warnings(parts, problem_type, labels)),
        examples=examples,
        files=paths,
    )


def as_labels(value: str | tuple[str, ...] | float) -> tuple[str, ...]:
    """The labels of one line; a number has none."""
    return value if isinstance(value, tuple) else (value,) if isinstance(value, str) else ()


def check_labels(part: Part, labels: tuple[str, ...]) -> None:
    if len(labels) < 2:
        found = f"one label only, {labels[0]!r}" if labels else "no label in any line"
        raise InputError(f"{part.path}: column {part.columns.label!r} has {found}; a classifier needs two labels")


def kind(problem_type: str, labels: tuple[str, ...]) -> str:
    if problem_type == REGRESSION:
        return "a number each"
    number = "any number" if problem_type == MULTI_LABEL else "one"
    return f"{number} of {len(labels)} labels each: {listing(labels)}"


def strata(values: list) -> list[str]:
    """For each line the label by which a split is stratified: the rarest one, if there are several."""
    counts = Counter(label for value in values for label in as_labels(value))
    return [min(as_labels(value), key=lambda label: (counts[label], label), default="") for value in values]


def warnings(parts: dict[str, Part], problem_type: str, labels: tuple[str, ...]) -> list[str]:
    """Lines about what is probably not meant."""
    lines = [line for part in parts.values() for line in part.empty_texts()]
    if problem_type == SINGLE_LABEL and "train" in parts:
        lines += [f"warning: {doubt}" for doubt in doubts(labels, len(parts["train"].lines))]
    for split in ("dev", "test"):
        if "train" in parts and split in parts:
            shared = shared_texts(parts[split].texts, parts["train"].texts)
            if shared:
                lines.append(
                    f"warning: {shared} of {len(parts[split].lines)} texts in {parts[split].path} are in "
                    f"{parts['train'].path}, too, so that scores come out too high"
                )
    return lines
