"""run.json: the settings and versions of a run, beside its results, and what each stage of training took."""

import subprocess
import time
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator

import deebert
from deebert.evaluation import results
from deebert.experiment.arguments import Arguments
from deebert.experiment.compatibility import first_difference, training_settings
from deebert.training.stage import StageTraining
from deebert.utils.errors import InputError

# none overwrites the record of another kind
TRAINING, EVALUATION = "run.json", "run_eval.json"
# what is read of a record, and what a field is where an older version did not write it
FIELDS = {
    "arguments": {},
    "settings": {},
    "stages": {},
    "finished": False,
    "resumed": 0,
    "tokenizer": "",
    "from_hub": False,
}


def read_record(output_dir: Path) -> dict | None:
    """The record of the training in a folder, None if there is none. Raises InputError where it is damaged."""
    file = output_dir / TRAINING
    if not file.is_file():
        return None
    stored = results.read_json(file)
    record = FIELDS | stored
    for name, default in FIELDS.items():
        if type(record[name]) is not type(default):
            raise InputError(f"{file}: damaged ({name} is {str(record[name])[:20]!r}); remove it")
    if "from_hub" not in stored:  # up to 0.9
        start = str(record["arguments"].get("model_name_or_path", "."))
        record["from_hub"] = not Path(start).exists() and start.count("/") <= 1
    return record


def decide_resume(args: Arguments) -> dict | None:
    """The record of the training that this run resumes; None if it does not resume one."""
    record = read_record(Path(args.output_dir)) if args.do_train and args.resume else None
    if record is None or first_difference(record["settings"], training_settings(args)):
        return None
    return record


class RunRecord:
    """The record of one run, which its first process writes.

    tokenizer: its fingerprint. facts: the content, empty before `begin`.
    """

    def __init__(self, args: Arguments, accelerator: Accelerator, tokenizer: str):
        self.args, self.accelerator, self.tokenizer, self.facts = args, accelerator, tokenizer, {}
        kind = TRAINING if args.do_train else EVALUATION
        self.file = Path(args.output_dir, kind)

    def begin(self, previous: dict | None) -> None:
        """Writes arguments, versions and git revision, also to stdout. previous: the record of a resumed training."""
        accelerator, args = self.accelerator, self.args
        versions = {
            "deebert": deebert.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        git, device = git_revision(), str(accelerator.device)
        shown = ", ".join(f"{name} {version}" for name, version in versions.items())
        accelerator.print(
            f"{args.task.name}, {args.model_name_or_path}, on {device}: {shown}, git {git}",
            flush=True,
        )
        self.facts = {
            "arguments": asdict(args),
            "from_hub": not Path(args.model_name_or_path).exists(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "versions": versions,
            "git": git,
            "device": device,
            "processes": accelerator.num_processes,
            "mixed_precision": accelerator.mixed_precision if args.do_train else "no",  # scores and times are in fp32
        }
        if args.do_train:
            before = previous or FIELDS
            self.facts |= {"settings": training_settings(args), "tokenizer": self.tokenizer}
            self.facts |= {"stages": dict(before["stages"]), "finished": False}
            self.facts["resumed"] = before["resumed"] + (previous is not None)
        self.write()

    def add_stage(self, training: StageTraining, preparation: float) -> None:
        """Adds a finished stage. preparation: seconds before its first step."""
        self.facts["stages"][str(training.stage)] = {
            "updates": training.steps,
            "mean_loss": training.mean_loss,
            "preparation_seconds": preparation,
            "seconds": training.seconds,
            "samples_per_second": training.samples_per_second,
            "peak_memory_gib": training.peak_memory / 2**30,
            "best_dev_score": training.best,
            "best_update": training.best_step,
        }
        self.write()

    def finish(self) -> None:
        """Marks the training as finished: nothing is left to resume."""
        self.facts["finished"] = True
        self.write()

    def write(self) -> None:
        if self.accelerator.is_main_process:
            results.write_json(self.file, self.facts)


def git_revision() -> str | None:
    """The checkout's revision; None if the package is not in a checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():  # installed, perhaps inside another repository
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
