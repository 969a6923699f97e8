"""Predictions for GLUE's test sets as its server takes them: a TSV file for each test set, and all of them in a zip.

Names, header, label words and sizes are GLUE's (gluebenchmark.com).
"""

import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from deebert.data.tasks import DIAGNOSTIC, TASKS, Task
from deebert.utils.files import replacing

# the files that the server wants, and how many predictions are in each
SIZES = {
    "CoLA": 1063,
    "SST-2": 1821,
    "MRPC": 1725,
    "STS-B": 1379,
    "QQP": 390965,
    "MNLI-m": 9796,
    "MNLI-mm": 9847,
    "QNLI": 5463,
    "RTE": 3000,
    "WNLI": 146,
    "AX": 1104,
}
MNLI_TESTS = {"test_matched": "MNLI-m", "test_mismatched": "MNLI-mm", DIAGNOSTIC: "AX"}
LARGEST_SCORE = 5.0  # of STS-B, whose scores begin at 0
DATE = (1980, 1, 1, 0, 0, 0)  # of the files in a zip: the same predictions make the same zip


def test_sets(task: Task) -> dict[str, str]:
    """The name in a submission of each test split that the task's model predicts; {} for a task that is not GLUE's."""
    if task == TASKS["MNLI"]:
        return MNLI_TESTS
    return {"test": task.name} if task.name in SIZES else {}


def as_words(logits: np.ndarray, labels: Sequence[str]) -> list[str]:
    """Logits (S, C) as GLUE writes predictions: a label, or a number from 0 to 5. labels: by output, () for numbers."""
    if labels:
        return [labels[i] for i in logits.argmax(axis=-1).tolist()]
    return [f"{min(max(0.0, value), LARGEST_SCORE):.3f}" for value in logits[:, 0].tolist()]


def write_predictions(path: Path, indices: Iterable[int], words: Iterable[str]) -> None:
    """Writes the file of one test set: a line for each index."""
    with replacing(path) as file:
        file.write("index\tprediction\n")
        file.writelines(f"{index}\t{word}\n" for index, word in zip(indices, words, strict=True))


def write_zip(folder: Path) -> dict[str, int]:
    """Packs the folder's predictions into a zip beside it; returns how many there are of each test set."""
    files = {name: folder / f"{name}.tsv" for name in SIZES if (folder / f"{name}.tsv").is_file()}
    with replacing(folder.with_name(f"{folder.name}.zip"), "wb") as file, zipfile.ZipFile(file, "w") as packed:
        for path in files.values():
            packed.writestr(zipfile.ZipInfo(path.name, DATE), path.read_bytes(), zipfile.ZIP_DEFLATED)
    return {name: path.read_bytes().count(b"\n") - 1 for name, path in files.items()}
