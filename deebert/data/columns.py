"""Which columns of a table hold the texts and the labels: those that are named, or else plain by their names."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from deebert.data.label_values import as_bit
from deebert.data.tables import Record
from deebert.utils.errors import InputError

# Names of columns that are taken for what they are called. In a file of two columns the other one follows.
TEXT_NAMES = ("text", "sentence", "content", "body", "message", "review", "comment", "tweet", "question", "utterance")
PAIR_NAMES = (
    ("text", "text_pair"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
)
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

    labelled: whether there have to be labels.

    Raises InputError, which lists the columns of the file.
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
    texts, labels = given[0] or pair_of(columns, given[1]), given[1]
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


def pair_of(columns: Sequence[str], labels: Sequence[str]) -> tuple[str, ...]:
    """The columns of a pair whose names say so; none where none do."""
    by_name = {name.lower(): name for name in columns if name not in labels}
    pairs = (tuple(by_name[name] for name in names if name in by_name) for names in PAIR_NAMES)
    return next((pair for pair in pairs if len(pair) == 2), ())


def advice(path: Path, records: Sequence[Record], columns: Sequence[str]) -> str:
    """What may help where columns are unclear. columns: that may hold labels."""
    bits = [name for name in columns if all(as_bit(row.get(name)) is not None for _, row in records)]
    header = " (a file without a header line needs column_names)" if path.suffix.lower() in (".csv", ".tsv") else ""
    each = f"; label_column {','.join(bits)} makes a label of each column of 0 and 1" if len(bits) > 1 else ""
    return header + each
