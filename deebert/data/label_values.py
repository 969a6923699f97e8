"""Own files: which columns hold texts and labels, and what kind of problem the labels are, their names and order."""

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from deebert.data.tables import Record, read_lines
from deebert.utils.errors import InputError
from deebert.utils.files import printable

# Hugging Face's names of problem types
SINGLE_LABEL, MULTI_LABEL, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
PROBLEM_TYPES = (SINGLE_LABEL, MULTI_LABEL, REGRESSION)
BITS = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}
MISSING = ("nan", "null", "n/a", "#n/a", "<na>")  # what programs write where there is no value
SHOWN = 10  # labels that a message lists
# Names of columns that are taken for what they are called. In a file of two columns the other one follows.
TEXT_NAMES = ("text", "sentence", "content", "body", "message", "review", "comment", "tweet", "question", "utterance")
PAIR_NAMES = (("text", "text_pair"), ("text1", "text2"), ("text_a", "text_b"), ("sentence1", "sentence2"))
PAIR_NAMES += (("question1", "question2"), ("premise", "hypothesis"))
LABEL_NAMES = ("label", "labels", "category", "categories", "class", "target", "intent", "topic", "sentiment", "score")


@dataclass(frozen=True)
class Columns:
    """texts: one column, or two of pairs. labels: one column, or several that hold 0 or 1, one for each label."""

    texts: tuple[str, ...]
    labels: tuple[str, ...]

    def __str__(self) -> str:
        texts, labels = (" and ".join(map(repr, names)) for names in (self.texts, self.labels))
        return f"{'text' if len(self.texts) == 1 else 'pairs'} from {texts}, label from {labels}"


def choose_columns(
    path: Path, records: Sequence[Record], text: str | None, label: str | None, labelled: bool = True
) -> Columns:
    """The columns that are given, or else plain by their names. text, label: one column, or several with commas.

    labelled: whether there have to be labels. Raises InputError, which lists the columns of the file.
    """
    columns = tuple(dict.fromkeys(chain.from_iterable(row for _, row in records)))  # a JSON line may lack some
    has = f"the file has {', '.join(columns)}{advice(path, records, () if label else columns)}"
    given = []
    for what, name in (("text_column", text), ("label_column", label)):
        names = () if name is None else (name,) if name in columns else tuple(map(str.strip, name.split(",")))
        for each in names:
            if each not in columns:
                raise InputError(f"{path}: {what} {each}: no such column; {has}")
            if [*names, *chain(*given)].count(each) > 1:
                raise InputError(f"{path}: {what} {each}: this column is given twice; {has}")
        given.append(names)
    texts, labels = given
    by_name = {name.lower(): name for name in columns if name not in labels}
    pairs = (tuple(by_name[name] for name in names) for names in PAIR_NAMES if by_name.keys() >= {*names})
    texts = texts or next(pairs, ())
    if len(texts) > 2:
        raise InputError(f"{path}: text_column {text}: give one column, or the two of pairs; {has}")

    def guess(what: str, names: Sequence[str], taken: Sequence[str]) -> tuple[str, ...]:
        """The one column with one of these names; else, in a file of two columns, the one beside the taken one."""
        free = [name for name in columns if name not in taken]
        named = [name for name in free if name.lower() in names]
        if len(named) > 1:
            raise InputError(f"{path}: {' and '.join(named)} could be the {what}; name one ({what}_column); {has}")
        return tuple(named or (free if len(columns) == 2 and len(free) == 1 else ()))

    texts = texts or guess("text", TEXT_NAMES, labels)
    labels = labels or guess("label", LABEL_NAMES, texts)
    texts = texts or guess("text", (), labels)
    for what, names in (("text", texts), ("label", labels or not labelled)):
        if not names:
            raise InputError(f"{path}: which column holds the {what}? Name it ({what}_column); {has}")
    return Columns(texts, labels)


def advice(path: Path, records: Sequence[Record], columns: Sequence[str]) -> str:
    """What may help where columns are unclear. columns: that may hold labels."""
    bits = [name for name in columns if all(as_bit(row.get(name)) is not None for _, row in records)]
    header = " (a file without a header line needs column_names)" if path.suffix.lower() in (".csv", ".tsv") else ""
    each = f"; label_column {','.join(bits)} makes a label of each column of 0 and 1" if len(bits) > 1 else ""
    one = "; tabs separate the columns of a .tsv, commas, semicolons, tabs or bars those of a .csv"
    return header + each + one * (bool(header) and len(columns) == 1)


@dataclass(frozen=True)
class LabelFormat:
    """How the values of a data set's label columns are read.

    names: of labels that are numbers in the files, by their numbers. vectors: whether a line has 0 or 1 for each name.
    """

    problem_type: str
    separator: str | None = None
    names: tuple[str, ...] = ()
    vectors: bool = False

    def parse(self, value: Any) -> str | tuple[str, ...] | float:
        """A value as a label, the labels of a line, or a number. Raises ValueError, whose message names no line."""
        if self.problem_type == REGRESSION:
            return number_in(value)
        if self.problem_type == SINGLE_LABEL:
            return self._named(label_name(value, f"; several need the problem_type {MULTI_LABEL}"))
        parts = items(value, self.separator)
        if scores := [part for part in parts if isinstance(part, float) and math.isfinite(part) and part % 1]:
            raise ValueError(f"{scores[0]} is a score, not a label; give 0 or 1 for each label, or the names of labels")
        if not self.vectors:
            return tuple(dict.fromkeys(self._named(label_name(part)) for part in parts))
        if parts and len(parts) != len(self.names):
            raise ValueError(f"{len(parts)} numbers, where there are {len(self.names)} labels, each with 0 or 1")
        if other := [part for part in parts if as_bit(part) is None]:
            raise ValueError(f"{other[0]!r} is neither 0 nor 1")
        return tuple(name for name, part in zip(self.names, parts, strict=False) if as_bit(part))

    def _named(self, label: str) -> str:
        """The name of a label that is a number in the file; other labels are names themselves."""
        if not self.names:
            return label
        if not label.isdecimal() or int(label) >= len(self.names):
            raise ValueError(f"label {label!r} is no number from 0 to {len(self.names) - 1}, which label_names names")
        return self.names[int(label)]


def guess_format(
    values: Sequence[Any], problem_type: str | None, separator: str | None, names: Sequence[str], known: Sequence[str]
) -> LabelFormat:
    """The format of these values. Several labels a line where there is a separator or lists; else a single one.

    known: a model's labels, if there is one. Lists of 0 and 1 are vectors where one repeats a number, or all have the
    length of one. Without any names a vector's labels are their numbers from 0.
    """
    filled = [value for value in values if value not in (None, "")]
    lists = [isinstance(value, list) or looks_like_list(value) for value in filled]
    several = separator is not None or any(isinstance(value, list) for value in filled) or (filled and all(lists))
    plain = LabelFormat(problem_type or (MULTI_LABEL if several else SINGLE_LABEL), separator, tuple(names))
    try:
        lists = [parts for value in filled if plain.problem_type == MULTI_LABEL and (parts := items(value, separator))]
    except ValueError:  # `parse` says which
        return plain
    if not lists or any(as_bit(part) is None for parts in lists for part in parts):
        return plain
    size, count = Counter(map(len, lists)).most_common(1)[0]
    labels, repeats = tuple(names or known or map(str, range(size))), any(len({*parts}) < len(parts) for parts in lists)
    vectors = size > 1 and (repeats or (count == len(lists) and size == len(labels)))
    return LabelFormat(MULTI_LABEL, separator, labels, vectors=True) if vectors else plain


def as_bit(value: Any) -> bool | None:
    """0 or 1 as numbers, truth values or text; None for anything else."""
    return BITS.get(str(value).strip().lower())


def looks_like_list(value: Any) -> bool:
    return isinstance(value, str) and value.strip().startswith("[") and value.strip().endswith("]")


def items(value: Any, separator: str | None) -> list:
    """The labels of one line: a list, a JSON list as text, or text with a separator; nothing is no label."""
    if looks_like_list(value):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError(f'{value} is not a JSON list, such as ["a", "b"]') from None
    if not isinstance(value, str):
        return value if isinstance(value, list) else [] if value is None else [value]
    parts = value.split(separator) if separator else [value]
    return [part for part in parts if part.strip()]


def label_name(value: Any, advice: str = "") -> str:
    """The name of a label; numbers and truth values as JSON writes them. Raises ValueError, of a list with advice."""
    if isinstance(value, list | dict):
        raise ValueError(f"{json.dumps(value)[:40]} is not one label{advice}")
    name = "" if value is None else value.strip() if isinstance(value, str) else json.dumps(value)
    if not name or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError("there is no label")
    return name


def number_in(value: Any) -> float:
    """A finite number. Raises ValueError."""
    if not is_number(value):
        raise ValueError(f"{value!r} is not a number")
    return float(value)


def is_number(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False


def read_label_names(path: Path) -> tuple[str, ...]:
    """The names of a file with one label in each line: line 1 names label 0. Raises InputError."""
    names = tuple(line.strip() for line in read_lines(path) if line.strip())
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated or len(names) < 2:
        reason = f"{repeated[0]!r} occurs more than once" if repeated else f"{len(names)} names; two are needed"
        raise InputError(f"{path}: {reason}")
    return names


def sorted_labels(labels: set[str]) -> tuple[str, ...]:
    """In the order of numbers where all are integers, else of the alphabet."""
    numbers = all(re.fullmatch(r"-?[0-9]{1,18}", label) for label in labels)
    return tuple(sorted(labels, key=(lambda label: (int(label), label)) if numbers else None))


def listing(labels: Sequence[str], most: int = SHOWN) -> str:
    """The first labels, and how many more there are."""
    more = f" and {len(labels) - most} more" if len(labels) > most else ""
    return printable(", ".join(labels[:most])) + more


def doubts(labels: Sequence[str], lines: int | None) -> Iterable[str]:
    """What labels may be instead. lines: how many have one; None where a line may have several."""
    if missing := [label for label in labels if label.casefold() in MISSING]:
        yield f"{missing[0]!r} is a label here; if it stands for no label, remove its lines"
    first: dict[str | float, str] = {}
    alike = [(other, label) for label in labels if (other := first.setdefault(folded(label), label)) != label]
    for pair in alike[:SHOWN]:
        same = len({unicodedata.normalize("NFKC", label) for label in pair}) == 1  # they may look the same
        one, other = map(ascii if same else repr, pair)
        yield f"the labels {one} and {other} differ only in how they are written: are they one label?"
    if lines is not None and (lists := [label for label in labels if re.fullmatch(r"\(.*,.*\)|\{.*,.*\}", label)]):
        yield f"labels such as {lists[0]!r} seem to be several labels: write them as JSON lists, such as [1, 0]"
    elif lines is not None and (separator := hidden_separator(labels)):
        yield f"labels with {separator!r} seem to be several labels: give it as label_separator"
    if lines is not None and any("." in label for label in labels) and all(map(is_number, labels)):
        yield f"labels such as {labels[0]!r} are classes here: to predict numbers, give problem_type {REGRESSION}"
    elif lines is not None and 2 * len(labels) > lines > 2 * SHOWN:
        yield f"{len(labels)} labels in {lines} lines: is label_column the right one?"


def folded(label: str) -> str | float:
    """What labels have in common that differ by case, space, invisible characters, Unicode form or form of a number."""
    text = unicodedata.normalize("NFKC", label).casefold()
    visible = "".join(c for c in text if unicodedata.category(c) not in ("Cc", "Cf") and not "\ufe00" <= c <= "\ufe0f")
    return float(visible) if is_number(visible) else " ".join(visible.split())


def hidden_separator(labels: Sequence[str]) -> str | None:
    """A separator that seems to stand between several labels: the parts of a label are labels, or all 0 or 1."""
    names = {*labels, *BITS}
    for label in labels:
        for separator, known in ((",", names), (";", names), ("|", names), (" ", {*BITS})):
            parts = [part.strip() for part in label.split(separator)]
            if len(parts) > 1 and known.issuperset(parts):
                return separator
    return None
