"""Checkpoints of an unfinished training: the model, and all else that is needed to continue bit for bit."""

import json
import re
from pathlib import Path
from pickle import UnpicklingError

import torch
from accelerate.utils import gather_object

from deebert.modeling.checkpoints import write_model
from deebert.utils.errors import InputError, one_line
from deebert.utils.files import checksum, complete_folder, remove_folder

CHECKSUMS = "checksums.json"
STATE = "training_state.pt"  # beside the model's files: optimizer, schedule, random states, position


def saved_steps(output_dir: Path) -> list[Path]:
    """The folders checkpoint-stage{1,2}-{step}, in the order they were written."""
    names = [re.fullmatch(r"checkpoint-stage(\d)-(\d+)", file.parent.name) for file in output_dir.glob("*/config.json")]
    return [output_dir / match[0] for match in sorted(filter(None, names), key=lambda m: (int(m[1]), int(m[2])))]


def newest_checkpoint(output_dir: Path) -> Path | None:
    """The latest checkpoint that a training can continue from. Only complete folders have a checkpoint's name."""
    return next((folder for folder in reversed(saved_steps(output_dir)) if (folder / STATE).is_file()), None)


def write_checkpoint(output_dir: Path, training, tokenizer, limit: int | None) -> None:
    """Writes model, tokenizer and training state, then removes the oldest checkpoints beyond the limit (None: none).

    Every process calls it, the first one writes. Raises InputError.
    """
    folder = output_dir / f"checkpoint-stage{training.stage}-{training.steps}"
    states = gather_object([random_state()])
    if training.accelerator.is_main_process:
        state = {"stage": training.stage, "training": training.state_dict(), "random": states}
        fix = "earlier ones are complete, and a training that is resumed continues from the newest"
        with one_line(f"{folder}: the checkpoint cannot be written", fix), complete_folder(folder) as partial:
            write_model(training.model, tokenizer, partial)
            torch.save(state, partial / STATE)
            (partial / CHECKSUMS).write_text(json.dumps({file.name: checksum(file) for file in partial.iterdir()}))
        for oldest in saved_steps(output_dir)[: -limit if limit else 0]:
            remove_folder(oldest)
    training.accelerator.wait_for_everyone()


def read_state(folder: Path) -> dict:
    """The training state of a checkpoint: stage, training (StageTraining.state_dict), random (one for each process).

    Raises InputError where it cannot be read, or where a file of the checkpoint is not what was written: a training
    would go on with other weights.
    """
    fix = f"remove {folder} to continue from an earlier checkpoint"
    try:
        checksums = json.loads((folder / CHECKSUMS).read_text()) if (folder / CHECKSUMS).is_file() else {}  # up to 0.10
        damaged = [name for name, written in checksums.items() if checksum(folder / name) != written]
        state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, UnpicklingError) as error:
        raise InputError(f"{folder}: the checkpoint cannot be read ({error}); {fix}") from None
    if damaged:
        raise InputError(f"{folder / damaged[0]}: damaged; {fix}")
    return state


def remove_checkpoints(output_dir: Path, keep_models: bool = False) -> None:
    """Removes the best weights of a finished training, and its checkpoints. keep_models: only their training state."""
    for folder in saved_steps(output_dir):
        if not keep_models:
            remove_folder(folder)
            continue
        for name in (STATE, CHECKSUMS):
            (folder / name).unlink(missing_ok=True)
    for folder in output_dir.glob("best-stage*"):
        remove_folder(folder)


def random_state() -> dict:
    """The state of PyTorch's random generators, the only ones that a training draws from between two checkpoints."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"torch": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: dict) -> None:
    """Restores what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
