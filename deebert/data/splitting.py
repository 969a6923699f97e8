"""A validation part of a training file, and texts that two parts share."""

from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np
from sklearn.model_selection import train_test_split

from deebert.utils.errors import InputError

SEED = 42  # not the training's: models of all seeds get the same part, and no evaluation sees texts of the training


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
        raise InputError(
            f"validation_split {share}: {len(first_of_text)} different texts are too few to hold out a part; give "
            "more, or a validation file"
        )
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
