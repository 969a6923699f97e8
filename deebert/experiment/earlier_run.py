"""run.json: the settings and versions of a training, beside its model, and what a later run may do with that folder."""

import os
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator

import deebert
from deebert.data.tasks import Task
from deebert.experiment.arguments import VALIDATION_SPLIT, Arguments, OwnDataArguments, RunArguments
from deebert.training.stage import StageTraining
from deebert.training.strategies import RECIPES
from deebert.utils.errors import InputError
from deebert.utils.files import LOCK, checksum, read_json, write_json

TRAINING, EVALUATION = "run.json", "run_eval.json"  # neither overwrites the other
# what is read of a record, and what a field is where an older version did not write it
FIELDS = {"arguments": {}, "settings": {}, "stages": {}, "finished": False, "resumed": 0, "tokenizer": ""}
FIELDS |= {"from_hub": False}

# Flags that change no weight, so that a training may be resumed with other values. Data files count by their content.
FREE = {"do_train", "do_eval", "output_dir", "overwrite_output_dir", "resume", "plot_data_dir", "no_cuda", "cache_dir"}
FREE |= {"model_type", "data_dir", "train_file", "validation_file", "test_file", "label_names", "overwrite_cache"}
FREE |= {"save_steps", "save_total_limit", "exit_rule"}


def read_record(folder: Path) -> dict | None:
    """The record of the training in a folder, None if there is none. Raises InputError where it is damaged."""
    file = folder / TRAINING
    if not file.is_file():
        return None
    record = FIELDS | read_json(file)
    for name, default in FIELDS.items():
        if type(record[name]) is not type(default):
            raise InputError(f"{file}: damaged ({name} is {str(record[name])[:20]!r}); remove it")
    return record


def training_settings(args: Arguments, task: Task) -> dict:
    """All that decides the trained model: flags, the content of data files, the launch. Raises InputError."""
    best = args.checkpoints.load_best_model_at_end  # then the dev set decides, too
    free = FREE | set(vars(args.evaluation)) - ({"metric"} if best else set())
    settings = {name: value for name, value in args.as_dict().items() if name not in free}
    splits = ["train", *(split for split in task.dev_splits if best and split != "test")]
    files = {f"{split}.tsv": task.file(args.data.data_dir, split) for split in splits}
    if args.own.label_names:
        files["label_names"] = Path(args.own.label_names)
    hashes = {name: checksum(file) for name, file in files.items()}
    return settings | hashes | {"processes": os.environ.get("WORLD_SIZE", "1"), "mixed_precision": precision(args)}


def precision(args: Arguments) -> str:
    """The mixed precision of a training: that of --fp16, of accelerate launch, or of the recipe on this device."""
    if args.run.fp16:
        return "fp16"
    if launched := os.environ.get("ACCELERATE_MIXED_PRECISION"):
        return launched
    if torch.cuda.is_available() and not args.run.no_cuda:
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # a CPU without products in bfloat16 is slower with it; PyTorch has no public name for the question
        fast = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    return "bf16" if RECIPES[args.model.recipe].bf16 and args.run.do_train and fast else "no"


def first_difference(recorded: dict, wanted: dict) -> str | None:
    """The first setting that was another one in an earlier training, in words; None where all agree."""
    for name, value in wanted.items():
        if recorded.get(name) != value:
            before, now = ("the default" if x is None else x for x in (recorded.get(name), value))
            return f"{name}, {before}; this run has {now}"
    return None


def not_resumed(run: RunArguments, settings: dict) -> str:
    """Why --resume starts a training from the beginning; "" where there was none before."""
    record = read_record(Path(run.output_dir))
    if record is None:
        return ""
    if other := first_difference(record["settings"], settings):
        return f"{run.output_dir}: its training is not resumed but overwritten: it had another {other}"
    return f"{run.output_dir}: no checkpoint to resume from; the training starts from the beginning"


def training_to_resume(run: RunArguments, settings: dict) -> dict | None:
    """The record of the training that is resumed, None at a start. Raises InputError before results are overwritten."""
    folder = Path(run.output_dir)
    record = read_record(folder)
    other = record and first_difference(record["settings"], settings)
    if run.resume and record and not other:
        return record
    if run.overwrite_output_dir or not folder.is_dir() or {path.name for path in folder.iterdir()} <= {LOCK}:
        return None
    if run.resume and record:
        raise InputError(
            f"--resume: the training in {folder} had another {other}; --overwrite_output_dir starts a new one"
        )
    if record and not record["finished"]:
        raise InputError(
            f"--output_dir {folder}: a training that is not finished; --resume goes on with it, "
            "--overwrite_output_dir starts again"
        )
    raise InputError(f"--output_dir {folder}: the folder is not empty; choose another or add --overwrite_output_dir")


def data_of_training(own: OwnDataArguments, record: dict | None) -> OwnDataArguments:
    """For an evaluation: what is not given about own data, as in the training; its files if no others are given."""
    trained = dict(record["arguments"]) if record else {}
    if trained.get("text_pair_column"):  # of 0.10
        trained["text_column"] = f"{trained['text_column']},{trained['text_pair_column']}"
    train_file = trained.get("train_file") or ""
    names = {name for name, value in vars(own).items() if value is None}
    files = ("train_file", "validation_file", "test_file")
    if own.validation_file or own.train_file not in (None, train_file):
        names -= set(files)
        if own.validation_file and not own.train_file and Path(train_file).is_file():
            names.add("train_file")  # so that texts which the model has seen are named
    elif own.test_file:  # the others may have been moved since the training
        dev_set = Path(trained.get("validation_file") or train_file)
        names -= {name for name in files if not (dev_set.is_file() and Path(trained.get(name) or "").is_file())}
    return replace(own, **{name: trained[name] for name in names if trained.get(name) is not None})


def check_held_out_part(own: OwnDataArguments, task: Task, folder: Path, record: dict | None) -> None:
    """A dev set that is a part of train_file must be the part that the model was not trained on."""
    trained = record["arguments"] if record else {}
    if not own.files or own.validation_file or not trained.get("train_file"):
        return
    share = trained.get("validation_split") or VALIDATION_SPLIT
    same = share == (own.validation_split or VALIDATION_SPLIT) and not trained.get("validation_file")
    content = checksum(task.file(None, "train"))
    if not same or record["settings"].get("train.tsv") != content:
        raise InputError(
            f"--train_file {own.train_file}: the model in {folder} was trained with other files, or another "
            "--validation_split, so that a part of this one may hold texts that it has seen; give --validation_file"
        )


class RunRecord:
    """The record of one run, which its first process writes.

    tokenizer: its fingerprint. settings: of a training. facts: the content, empty before `begin`.
    """

    def __init__(self, args: Arguments, accelerator: Accelerator, tokenizer: str, settings: dict):
        self.args, self.accelerator, self.tokenizer, self.settings = args, accelerator, tokenizer, settings
        self.file = Path(args.run.output_dir, TRAINING if args.run.do_train else EVALUATION)
        self.facts: dict = {}

    def begin(self, task: Task, previous: dict | None = None) -> None:
        """Writes arguments, versions and git revision, also to stdout. previous: the record of a resumed training."""
        accelerator, args, start = self.accelerator, self.args, self.args.model.model_name_or_path
        packages = {"deebert": deebert, "torch": torch, "transformers": transformers}
        versions = {name: package.__version__ for name, package in packages.items()}
        git, device = git_revision(), str(accelerator.device)
        shown = ", ".join(f"{name} {version}" for name, version in versions.items())
        accelerator.print(f"{task.name}, {start}, on {device}: {shown}, git {git}", flush=True)
        self.facts = {
            "arguments": args.as_dict(),
            "from_hub": not Path(start).exists(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "versions": versions,
            "git": git,
            "device": device,
            "processes": accelerator.num_processes,
            # scores and times are in fp32
            "mixed_precision": precision(args) if args.run.do_train else "no",
        }
        if args.run.do_train:
            before = previous or FIELDS
            self.facts |= {"settings": self.settings, "tokenizer": self.tokenizer, "stages": dict(before["stages"])}
            self.facts |= {"finished": False, "resumed": before["resumed"] + (previous is not None)}
        self.write()

    def add_stage(self, training: StageTraining, preparation: float) -> None:
        """Adds a finished stage. preparation: seconds before its first step."""
        self.facts["stages"][str(training.stage)] = {
            "updates": training.steps,
            "mean_loss": training.mean_loss,
            "preparation_seconds": preparation,
            "seconds": training.seconds,
            "samples_per_second": training.samples_per_second,
            "gpu_memory_gib": torch.cuda.max_memory_allocated() / 2**30,  # at most, since the start; 0 on a CPU
            "best_dev_score": training.best,
            "kept_update": training.best_step,
        }
        self.write()

    def finish(self) -> None:
        """Marks the training as finished: nothing is left to resume."""
        self.facts["finished"] = True
        self.write()

    def write(self) -> None:
        if self.accelerator.is_main_process:
            write_json(self.file, self.facts)


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
