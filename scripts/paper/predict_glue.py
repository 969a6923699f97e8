"""What a trained model predicts for GLUE's test sets, as files for GLUE's server. scripts/predict_glue.sh runs it.

One pass gives the logits of all exits, and with them the predictions of the full model and those at every threshold.
SUBMISSION_DIR/NAME/TASK.tsv holds the predictions of one task; SUBMISSION_DIR/NAME.zip packs those of all tasks so far.
NAME: full (no early exit), stored (the threshold that the model stores), or the exit rule and one of --exit_threshold.
File names, header, label words and sizes are GLUE's (gluebenchmark.com). Takes seconds to minutes a task.
Shapes: S samples, C labels.
"""

import argparse
import sys
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import numpy as np
import torch

from deebert.data.batching import collator, tokenize
from deebert.data.tasks import DIAGNOSTIC, INDEX_COLUMNS, TASKS, Task, check_num_labels, get_task, label_order
from deebert.evaluation.all_exits import AllExits, run_all_exits
from deebert.modeling.checkpoints import load_config, load_model, load_tokenizer, max_tokens, quiet_transformers
from deebert.modeling.config import config_cutoffs, longest_text
from deebert.modeling.exit_rules import EXIT_RULES, NO_EXIT
from deebert.utils import cli
from deebert.utils.cli import positive
from deebert.utils.errors import InputError
from deebert.utils.files import make_folder, read_json, replacing

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
FULL, STORED = "full", "stored"
DATE = (1980, 1, 1, 0, 0, 0)  # of the files in a zip: the same predictions make the same zip

Threshold = float | list[float]


def test_sets(task: Task) -> dict[str, str]:
    """The name in a submission of each test split that the task's model predicts. Raises InputError."""
    if task == TASKS["MNLI"]:
        return MNLI_TESTS
    if task.name not in SIZES:
        raise InputError(f"--task_name {task.name}: not one of GLUE's tasks; for its texts: python -m deebert predict")
    return {"test": task.name}


def present_splits(task: Task, data_dir: Path) -> list[str]:
    """The test splits to predict; MNLI's diagnostic set only if it is there. Raises InputError for the others."""
    splits = list(test_sets(task))
    for split in list(splits):
        try:
            task.file(data_dir, split)
        except InputError:
            if split != DIAGNOSTIC:
                raise
            splits.remove(split)
    return splits


def read_bytes(path: Path) -> bytes:
    """What is in a file. Raises InputError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def read_indices(path: Path) -> list[int]:
    """The index of each line of a test file, as GLUE counts them; without such a column, from 0.

    Raises InputError for an index that is not a whole number or occurs twice.
    """
    text = read_bytes(path).decode("utf-8-sig", errors="replace")
    rows = [(n, line.rstrip("\r").split("\t")) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    (_, header), *rows = rows
    column = next((header.index(name) for name in INDEX_COLUMNS if name in header), None)
    if column is None:
        return list(range(len(rows)))
    lines: dict[str, int] = {}
    for line, fields in rows:
        index = fields[column] if column < len(fields) else ""
        if not index.isdecimal():
            raise InputError(f"{path}, line {line}: the index {index!r} is not a whole number")
        if index in lines:
            raise InputError(f"{path}, line {line}: the index {index} is that of line {lines[index]}, too")
        lines[index] = line
    return [int(index) for index in lines]


def as_words(logits: np.ndarray, labels: Sequence[str]) -> list[str]:
    """Logits (S, C) as GLUE writes predictions: a label, or a number from 0 to 5. labels: by output, () for numbers."""
    if labels:
        return [labels[i] for i in logits.argmax(axis=-1).tolist()]
    return [f"{min(max(0.0, value), LARGEST_SCORE):.3f}" for value in logits[:, 0].tolist()]


def thresholds(config, given: Sequence[float]) -> dict[str, Threshold]:
    """By name of the submission: no early exit, the threshold that the model stores, and the given ones.

    Raises InputError for a threshold that the model's exit rule does not take.
    """
    chosen: dict[str, Threshold] = {FULL: NO_EXIT}
    if max(config_cutoffs(config)[1]) > 0:
        chosen[STORED] = config.exit_threshold
    for value in given:
        try:
            config_cutoffs(config, value)
        except ValueError as error:
            raise InputError(f"--exit_threshold {value:g}: {error}") from None
        if value > 0:
            chosen[f"{config.exit_rule}_{value}"] = value
    return chosen


def predictions(exits: AllExits, threshold: Threshold, labels: Sequence[str]) -> tuple[list[str], str]:
    """The predictions at a threshold as GLUE writes them, and in words what they change and save."""
    full = as_words(exits.logits[:, -1], labels)
    if threshold == NO_EXIT:
        return full, ""
    exit_layers = exits.exit_layers(threshold)
    words = as_words(exits.logits_at(exit_layers), labels)
    changed = sum(word != other for word, other in zip(words, full, strict=True))
    layers = exit_layers.mean() / exits.num_layers
    return words, f"; {changed:,} changed, {100 * (1 - layers):.1f} % of the layers saved"


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


def pack(folders: Sequence[Path]) -> None:
    """A zip of each folder, with what was predicted in this run and in earlier ones; a line says what is missing."""
    zips: dict[tuple, list[str]] = {}
    for folder in folders:
        zips.setdefault(tuple(write_zip(folder).items()), []).append(f"{folder}.zip")
    for sizes, names in zips.items():
        packed = dict(sizes)
        missing = [name for name in SIZES if name not in packed]
        partly = [name for name in packed if packed[name] != SIZES[name]]
        wanted = f"; GLUE's server also wants {', '.join(missing)}" if missing else ""
        wanted += f"; not all samples are in {', '.join(partly)}" if partly else ""
        print(f"{', '.join(packed)} in {', '.join(names)}{wanted or ': all that GLUE wants'}")


def report_gaps(task: Task, data_dir: Path, indices: dict[str, list[int]]) -> None:
    """A line for each test set that is missing or not complete."""
    for split, name in test_sets(task).items():
        if split not in indices:
            print(f"note: no predictions for {name}: there is no {split}.tsv in {data_dir}, nor in ../{split}")
        elif len(indices[split]) != SIZES[name]:
            count = f"{len(indices[split]):,} samples here; GLUE's server wants predictions for {SIZES[name]:,}"
            print(f"note: {name} has {count}")


def check_task(model: Path, task: Task) -> None:
    """Raises InputError where the model was trained on another task: a loop over tasks may name one model for all."""
    record = model / "run.json"
    trained = read_json(record).get("arguments", {}).get("task_name") if record.is_file() else None
    if trained and get_task(trained) != task:
        raise InputError(
            f"{model}: trained on {trained}, so it does not predict {task.name}; give the model of {task.name}"
        )


def parse_args() -> argparse.Namespace:
    parser = cli.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a trained model")
    parser.add_argument("--task_name", required=True, help="the GLUE task that it was trained for")
    parser.add_argument("--data_dir", type=Path, required=True, help="folder with the task's TSV files")
    parser.add_argument("--submission_dir", type=Path, required=True, help="for the files; tasks share it")
    parser.add_argument("--exit_threshold", "--early_exit_entropy", type=float, nargs="+", default=[])
    parser.add_argument("--exit_rule", choices=EXIT_RULES, help="default: the model's")
    parser.add_argument("--max_seq_length", type=positive, help="default: that of the training")
    parser.add_argument("--no_cuda", action="store_true", help="use the CPU, even where there is a GPU")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    quiet_transformers()
    task, config = get_task(args.task_name), load_config(str(args.model))
    indices = {split: read_indices(task.file(args.data_dir, split)) for split in present_splits(task, args.data_dir)}
    check_num_labels(task, config.num_labels, str(args.model))
    check_task(args.model, task)
    if args.exit_rule not in (None, config.exit_rule):  # a threshold of another rule has no meaning
        config.exit_rule, config.exit_threshold = args.exit_rule, NO_EXIT
    wanted, labels = thresholds(config, args.exit_threshold), label_order(task, config.model_type, config.id2label)
    longest = min(longest_text(config, args.max_seq_length), max_tokens(config))
    tokenizer = load_tokenizer(str(args.model))
    features = {split: tokenize(task.read(args.data_dir, split, labels), tokenizer, longest) for split in indices}
    folders = [args.submission_dir / name for name in wanted]
    for folder in folders:
        make_folder(folder)
    device = "cuda" if torch.cuda.is_available() and not args.no_cuda else "cpu"
    model = load_model(str(args.model), config).to(device)
    report_gaps(task, args.data_dir, indices)
    for split, of_split in features.items():
        exits, name = run_all_exits(model, of_split, collator(config)), test_sets(task)[split]
        for folder, threshold in zip(folders, wanted.values(), strict=True):
            words, facts = predictions(exits, threshold, labels)
            write_predictions(folder / f"{name}.tsv", indices[split], words)
            print(f"{folder.name}: {len(words):,} predictions for {name}{facts}", flush=True)
    pack(folders)


if __name__ == "__main__":
    cli.run(main)
