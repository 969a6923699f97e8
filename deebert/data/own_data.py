"""Own data: a task that is made from files of any columns and labels. docs/own_data.md states its rules."""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.model_selection import train_test_split

from deebert.data.label_values import (
    MULTI_LABEL,
    REGRESSION,
    SINGLE_LABEL,
    Columns,
    LabelFormat,
    choose_columns,
    doubts,
    guess_format,
    listing,
    read_label_names,
    sorted_labels,
)
from deebert.data.tables import read_table, text_of, value_of
from deebert.data.tasks import SUFFIXES, Example, Task
from deebert.utils.errors import InputError

METRICS = {
    SINGLE_LABEL: ("acc", "f1_macro"),
    MULTI_LABEL: ("f1_micro", "f1_macro"),
    REGRESSION: ("spearmanr", "pearson"),
}
# Of the split, not of the training: models of all seeds get the same part, and no evaluation sees texts of the training
SEED = 42


@dataclass(frozen=True, kw_only=True)
class OwnFiles:
    """Own files, and how they are read; docs/own_data.md says what is done where a field is None.

    text_column: one, or the two of pairs with a comma. label_column: one, or with commas several that hold 0 or 1, one
    for each label.
    labels, problem_type: at an evaluation those of the trained model; in a training labels is None.
    """

    train: Path | None = None
    validation: Path | None = None
    test: Path | None = None
    text_column: str | None = None
    label_column: str | None = None
    column_names: tuple[str, ...] = ()
    label_names: Path | None = None
    label_separator: str | None = None
    problem_type: str | None = None
    validation_split: float = 0.1
    labels: tuple[str, ...] | None = None


@dataclass(frozen=True)
class OwnTask(Task):
    """A task of own files.

    lines: by split; of each line its text or pair, and its label, labels or number. files: by split; a dev set without
    a file is a part of the training's. notes: lines for the user: what was read, and warnings.
    """

    lines: dict[str, list[tuple[tuple[str, ...], Any]]] = field(default_factory=dict, repr=False, compare=False)
    files: dict[str, Path] = field(default_factory=dict, compare=False)

    def file(self, data_dir: str | Path | None, split: str) -> Path:
        return self.files[split]

    def read(self, data_dir: str | Path | None, split: str, labels: tuple[str, ...] | None = None) -> list[Example]:
        index, examples = {label: i for i, label in enumerate(labels or self.labels)}, []
        for texts, value in self.lines[split]:
            label = index[value] if isinstance(value, str) else value
            if isinstance(value, tuple):
                label = tuple(int(name in value) for name in index)
            examples.append(Example(texts, label))
        return examples


@dataclass(frozen=True, eq=False)
class Part:
    """The records of one file: of each its place, its text or pair, and the value of its label column or columns."""

    path: Path
    columns: Columns
    places: list[str]
    texts: list[tuple[str, ...]]
    values: list[Any]

    @classmethod
    def read(cls, path: Path, files: OwnFiles) -> "Part":
        records = read_table(path, files.column_names)
        columns = choose_columns(path, records, files.text_column, files.label_column)
        texts = [tuple(text_of(row, name, place) for name in columns.texts) for place, row in records]
        values = [[value_of(row, name, place) for name in columns.labels] for place, row in records]
        values = [value[0] for value in values] if len(columns.labels) == 1 else values
        return cls(path, columns, [place for place, _ in records], texts, values)

    def label_format(self, files: OwnFiles) -> LabelFormat:
        names = read_label_names(files.label_names) if files.label_names else ()
        if len(self.columns.labels) == 1:
            return guess_format(self.values, files.problem_type, files.label_separator, names, files.labels or ())
        if files.problem_type not in (None, MULTI_LABEL):
            raise InputError(f"{self.path}: {len(self.columns.labels)} label columns need problem_type {MULTI_LABEL}")
        return LabelFormat(MULTI_LABEL, names=names or self.columns.labels, vectors=True)

    def parsed(self, label_format: LabelFormat) -> list:
        """The label, labels or number of each record."""
        parsed = []
        for place, value in zip(self.places, self.values, strict=True):
            try:
                parsed.append(label_format.parse(value))
            except ValueError as error:
                raise InputError(f"{place}, column {' or '.join(map(repr, self.columns.labels))}: {error}") from None
        return parsed

    def check_labels(self, values: list, labels: tuple[str, ...]) -> None:
        """Raises InputError for a label that is none of `labels`."""
        known = {*labels}
        for place, value in zip(self.places, values, strict=True):
            if unknown := [label for label in as_labels(value) if label not in known]:
                has = f"the training, which has {listing(labels)}"
                raise InputError(f"{place}: label {unknown[0]!r} is unknown to {has}")


def own_task(files: OwnFiles) -> OwnTask:
    """Reads all files, and makes the task. Raises InputError with file and line."""
    paths = {"train": files.train, "dev": files.validation, "test": files.test}
    paths = {split: path for split, path in paths.items() if path is not None}
    parts = {split: Part.read(path, files) for split, path in paths.items()}
    split, first = next(iter(parts.items()))
    label_format = first.label_format(files)
    values = {split: part.parsed(label_format) for split, part in parts.items()}
    labels, present = (), Counter(label for value in values[split] for label in as_labels(value))
    if label_format.problem_type != REGRESSION:
        labels = files.labels or label_format.names or sorted_labels({*present})
        if "train" in parts and len(present) < 2:
            has = f"one label only, {next(iter(present))!r}" if present else "no label in any line"
            raise InputError(f"{first.path}: {first.columns} has {has}; a classifier needs two labels")
    for split, part in parts.items():
        part.check_labels(values[split], labels)
    lines = {split: list(zip(part.texts, values[split], strict=True)) for split, part in parts.items()}
    notes = [f"{first.path}: {len(first.places)} lines, {first.columns}, {kind(label_format, labels)}"]
    if "train" in parts and "dev" not in parts:
        stratum = [min(as_labels(value), key=lambda x: (present[x], x), default="") for value in values["train"]]
        held_out = validation_rows(first.texts, stratum, files.validation_split)  # of several labels the rarest counts
        for split, chosen in (("dev", held_out), ("train", ~held_out)):
            lines[split] = [lines["train"][row] for row in chosen.nonzero()[0]]
        paths["dev"] = first.path
        sizes = f"{len(lines['dev'])} of its lines are the dev set, {len(lines['train'])} the training set"
        notes.append(f"{first.path}: {sizes} (validation_split {files.validation_split:g})")
    seen = {label for _, value in lines.get("dev", ()) for label in as_labels(value)}
    if "train" in parts and (unseen := [label for label in labels if label not in seen]):
        which = f"{len(unseen)} of {len(labels)} labels, which no score and no threshold counts: {listing(unseen)}"
        notes.append(f"warning: the dev set has no text of {which}; hold out more, or give a validation_file")
    return OwnTask(
        name=first.path.absolute().parent.name if first.path.stem == "train" else first.path.stem,
        text_columns=first.columns.texts,
        label_column=",".join(first.columns.labels),
        labels=labels,
        metrics=METRICS[label_format.problem_type],
        dev_splits={split: SUFFIXES[split] for split in ("dev", "test") if split in paths},
        several_labels=label_format.problem_type == MULTI_LABEL,
        notes=(*notes, *(f"warning: {line}" for line in warnings(parts, label_format, labels))),
        lines=lines,
        files=paths,
    )


def as_labels(value: str | tuple[str, ...] | float) -> tuple[str, ...]:
    """The labels of one line; a number has none."""
    return value if isinstance(value, tuple) else (value,) if isinstance(value, str) else ()


def kind(label_format: LabelFormat, labels: tuple[str, ...]) -> str:
    if label_format.problem_type == REGRESSION:
        return "a number each"
    number = "any number" if label_format.problem_type == MULTI_LABEL else "one"
    return f"{number} of {len(labels)} labels each{', by 0 and 1' * label_format.vectors}: {listing(labels)}"


def warnings(parts: dict[str, Part], label_format: LabelFormat, labels: tuple[str, ...]) -> list[str]:
    """Lines about what is probably not meant."""
    lines, training = [], parts.get("train")
    for part in parts.values():
        empty = [place for place, texts in zip(part.places, part.texts, strict=True) if not all(map(str.strip, texts))]
        if empty:
            lines.append(f"{len(empty)} empty texts, the first in {empty[0]}; they are kept, as texts without words")
        if training not in (None, part) and (shared := shared_texts(part.texts, training.texts)):
            where = f"{shared} of {len(part.texts)} texts in {part.path} are in {training.path}"
            lines.append(f"{where}, too, so that scores come out too high")
    if training is not None:
        lines += doubts(labels, len(training.places) if label_format.problem_type == SINGLE_LABEL else None)
    return lines


def validation_rows(texts: Sequence[Hashable], strata: Sequence[str], share: float) -> np.ndarray:
    """(S,) bool: which samples are held out, about this share of the texts, in each stratum alike.

    A text that occurs more than once is held out with all its copies or with none. The first text of each stratum is
    never held out, so that a training sees each. Strata too small for a part of their own are taken together.
    Raises InputError where there are too few texts.
    """
    first_of_text, first_of_stratum = {}, {}
    for row, (text, stratum) in enumerate(zip(texts, strata, strict=True)):
        if text not in first_of_text:
            first_of_text[text] = row
            first_of_stratum.setdefault(stratum, row)
    candidates = [row for row in first_of_text.values() if first_of_stratum[strata[row]] != row]
    count = round(share * len(first_of_text))
    if not 1 <= count < len(candidates):
        labels = f" with {len(first_of_stratum)} labels, each of which keeps one," if len(first_of_stratum) > 1 else ""
        given = f"{len(first_of_text)} different texts{labels} are too few to hold out a part"
        raise InputError(f"validation_split {share}: {given}; give more, or a validation file")
    counts = Counter(strata[row] for row in candidates)
    rare = {stratum for stratum, n in counts.items() if n * count < len(candidates)}
    if sum(counts[stratum] for stratum in rare) * count < len(candidates):  # together they are too small, too
        rare |= {counts.most_common(1)[0][0]}
    if len(counts) > len(candidates) - count:  # too few would remain for each
        rare = set(counts)
    groups = ["" if strata[row] in rare else f"stratum {strata[row]}" for row in candidates]
    _, held_out = train_test_split(candidates, test_size=count, random_state=SEED, stratify=groups)
    chosen = {texts[row] for row in held_out}
    return np.array([text in chosen for text in texts])


def shared_texts(texts: Sequence[Hashable], others: Sequence[Hashable]) -> int:
    """How many of the texts occur in others."""
    known = set(others)
    return sum(text in known for text in texts)
