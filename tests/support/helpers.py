"""What several test modules do: run a script, train a stage, simulate exits, look at files."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from filelock import FileLock
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from deebert.data.batching import collator
from deebert.evaluation.all_exits import AllExits
from deebert.training.stage import StageTraining
from deebert.training.train_data import TokenData

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "VIRTUAL_ENV",
    "CONDA_PREFIX",
    "PATH_TO_DATA",
    "DATASET",
    "TRAIN_FILE",
    "VALIDATION_FILE",
    "TEST_FILE",
    "MODEL_TYPE",
    "MODEL_SIZE",
    "MODEL_NAME",
    "EPOCHS",
}
SETTINGS |= {"OUTPUT_DIR", "RESULTS_DIR", "FIGURES_DIR", "SUBMISSION_DIR", "ENTROPIES"}


def script(name: str, folder, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    inherited = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / name), *arguments],
        cwd=folder,
        env=inherited | {"PYTHON": sys.executable} | environment,
        capture_output=True,
        text=True,
    )


def started_by(name: str, folder: Path, *arguments: str, **environment: str) -> list[str]:
    """The program that a script starts, and its arguments: a stand-in for Python prints them, and runs -c only."""
    stand_in = folder / "python_stand_in"
    stand_in.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exec {sys.executable} "$@"\nprintf "%s\\n" "$@"\n')
    stand_in.chmod(0o755)
    done = script(name, folder, *arguments, PYTHON=str(stand_in), **environment)
    assert done.returncode == 0, done.stderr
    unbuffered, *started = done.stdout.splitlines()
    assert unbuffered == "-u"
    return started


def once_for_all_workers(tmp_path_factory, name: str, make) -> Path:
    """A folder that make(folder) fills, once for all processes of pytest-xdist. Tests only read it."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root  # a worker's own lies in the one of the run
    with FileLock(root / f"{name}.lock"):
        if not (root / name).exists():
            partial = tmp_path_factory.mktemp(name)
            make(partial)
            partial.rename(root / name)
    return root / name


def train(stage: int, model, features, settings, **callbacks) -> StageTraining:
    """One stage on the CPU."""
    data = TokenData(features, collator(model.config))
    training = StageTraining(stage, model, data, settings, Accelerator(cpu=True))
    training.run(**callbacks)
    return training


def snapshot_files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def counted_by_pytorch(run, *inputs, **named_inputs) -> tuple[int, object]:
    """The operations of the matrix products that run(...) computes, and its result."""
    plain = sdpa_kernel(SDPBackend.MATH)  # whose products are counted
    with FlopCounterMode(display=False) as counter, torch.no_grad(), plain:
        result = run(*inputs, **named_inputs)
    return counter.get_total_flops(), result


def simulated(n: int, seed: int, layers: int = 5, noise: float = 1.5) -> AllExits:
    """Off-ramps that know more with each layer: evidence for the label plus noise, the surer the better."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n)
    difficulty = rng.exponential(1.0, n)
    evidence = (2 * labels - 1)[:, None] * np.linspace(0.4, 2.0, layers) / (0.2 + difficulty[:, None])
    margin = evidence + noise * rng.normal(size=(n, layers)) * np.linspace(1, 0.3, layers)
    return AllExits(np.stack([-margin, margin], axis=-1).astype(np.float32), labels)


def with_costs(exits: AllExits, off_ramp: float = 0.1) -> AllExits:
    """The exits of a model whose off-ramps cost that share of a layer, and whose last layer costs less than others."""
    layers = np.ones(exits.logits.shape[:2])
    layers[:, -1] = np.random.default_rng(0).uniform(0.1, 0.4, len(layers))
    return replace(exits, layer_operations=layers, off_ramp_operations=np.full_like(layers[:, 1:], off_ramp))
