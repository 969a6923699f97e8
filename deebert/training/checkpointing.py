"""Checkpoints of a training that is not finished yet, and how one stops so that it can go on."""

import random
import re
import shutil
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError

from deebert.modeling.checkpoints import save_model
from deebert.utils.cli import InputError
from deebert.utils.files import complete_folder

STATE = "training_state.pt"  # beside the model's files: optimizer, schedule, random states, position
LEFTOVERS = (".saving-*", ".features-*", ".checkpoint-*.partial")  # of a process that was killed


def checkpoint_folder(output_dir: Path, stage: int, updates: int) -> Path:
    return output_dir / f"checkpoint-stage{stage}-{updates}"


def saved_steps(output_dir: Path) -> list[Path]:
    """The folders checkpoint-stage{1,2}-{step}, in the order they were written."""
    names = [re.fullmatch(r"checkpoint-stage(\d)-(\d+)", file.parent.name) for file in output_dir.glob("*/config.json")]
    return [output_dir / match[0] for match in sorted(filter(None, names), key=lambda m: (int(m[1]), int(m[2])))]


def newest_checkpoint(output_dir: Path) -> Path | None:
    """The latest that a training can go on from. A folder has its name only once it is complete."""
    return next((folder for folder in reversed(saved_steps(output_dir)) if (folder / STATE).is_file()), None)


def write_checkpoint(folder: Path, model, tokenizer, training, accelerator: Accelerator) -> None:
    """Model, tokenizer and all that an identical continuation needs. Every process calls it, the first one writes."""
    states = gather_object([random_state()])
    if accelerator.is_main_process:
        state = {"stage": training.stage, "training": training.state_dict(), "random": states}
        try:
            with complete_folder(folder) as partial:
                save_model(model, tokenizer, partial)
                torch.save(state, partial / STATE)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise InputError(
                f"{folder}: the checkpoint cannot be written ({error}); those before it are complete, and the same "
                "command with --resume goes on from the newest"
            ) from None
    accelerator.wait_for_everyone()


def read_state(folder: Path) -> dict:
    """What `write_checkpoint` stored: stage, training (StageTraining.state_dict), random (one for each process)."""
    try:
        return torch.load(folder / STATE, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{folder / STATE}: cannot be read ({error}); remove {folder} to go on from before") from None


def keep_newest(output_dir: Path, limit: int | None) -> None:
    """Removes the oldest checkpoints beyond the limit. None: none."""
    for folder in saved_steps(output_dir)[: -limit if limit else 0]:
        shutil.rmtree(folder)


def remove_checkpoints(output_dir: Path, keep_models: bool = False) -> None:
    """Once nothing goes on from them. keep_models: they become plain models, a third of the size."""
    for folder in saved_steps(output_dir):
        if keep_models:
            (folder / STATE).unlink(missing_ok=True)
        else:
            shutil.rmtree(folder)
    for folder in output_dir.glob("best-stage*"):
        shutil.rmtree(folder)


def remove_leftovers(output_dir: Path) -> None:
    for pattern in LEFTOVERS:
        for folder in output_dir.glob(pattern):
            shutil.rmtree(folder)


def random_state() -> dict:
    """The state of every generator that a training may draw from, of types that torch.load takes for safe."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
