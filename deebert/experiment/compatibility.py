"""What two trainings must agree on: to resume one, or to share a first stage.

Each flag declares what it decides (flags.py). The training files count by their content, not by their place.
"""

import hashlib
import os
from dataclasses import fields
from pathlib import Path

from deebert.data.tasks import eval_splits
from deebert.experiment.arguments import Arguments
from deebert.utils.files import read_bytes


def first_stage_settings(args: Arguments) -> dict:
    """All that decides the model after stage 1 of two_stage. Raises InputError where a data file is missing."""
    return _flags(args, "first_stage") | _data_hashes(args) | _launch()


def training_settings(args: Arguments) -> dict:
    """All that decides the model after all stages. Raises InputError where a data file is missing."""
    return first_stage_settings(args) | _flags(args, "training")


def first_difference(recorded: dict, wanted: dict) -> str | None:
    """The first setting that was another one in an earlier training, in words; None where all agree."""
    for name, value in wanted.items():
        if recorded.get(name) != value:
            return f"{name}, {recorded.get(name)}; this run has {value}"
    return None


def _flags(args: Arguments, decides: str) -> dict:
    """The values of the flags that decide this result, by name."""
    chosen = [field for field in fields(args) if field.metadata["decides"] == decides]
    switches = {field.name: field.metadata["only_with"] for field in chosen}
    return {name: getattr(args, name) for name, needs in switches.items() if needs is None or getattr(args, needs)}


def _data_hashes(args: Arguments) -> dict:
    """The SHA-256 of each data file that decides the weights; the dev files do if the best weights are kept."""
    task = args.task
    splits = ["train", *(s for s in eval_splits(task) if args.load_best_model_at_end and s != "test")]
    files = {f"{split}.tsv": task.file(args.data_dir, split) for split in splits}
    if args.own_data and args.label_names:
        files["label_names"] = Path(args.label_names)
    return {name: hashlib.sha256(read_bytes(file)).hexdigest() for name, file in files.items()}


def _launch() -> dict:
    """What torchrun or accelerate launch set: the number of processes and the precision."""
    return {
        "WORLD_SIZE": os.environ.get("WORLD_SIZE", "1"),
        "ACCELERATE_MIXED_PRECISION": os.environ.get("ACCELERATE_MIXED_PRECISION"),
    }
