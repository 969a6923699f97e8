"""One model on one task of the paper: the training, the evaluation, and which files they write."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from paper_table import choose_thresholds

import run_glue_deebert
from deebert.data.batching import Collator, collator
from deebert.data.tasks import Task
from deebert.evaluation import results
from deebert.evaluation.all_exits import AllExits
from deebert.experiment.arguments import Arguments, parse_args
from deebert.experiment.earlier_run import first_difference, read_record, training_settings
from deebert.experiment.experiment import Experiment
from deebert.experiment.run import evaluate, make_accelerator
from deebert.utils.files import read_json, write_json


@dataclass(frozen=True)
class Run:
    """One model on one task. name: of the model, as the user gives it. folder: of all files. epochs: of each stage.

    flags: of all runs.
    """

    name: str
    config: object
    task: Task
    data_dir: Path
    folder: Path
    epochs: float
    flags: Sequence[str]

    def argv(self, *work: str) -> list[str]:
        """A command line of run_glue_deebert.py."""
        data = ["--task_name", self.task.name, "--data_dir", str(self.data_dir), "--recipe", "paper"]
        files = ["--output_dir", str(self.folder / "model"), "--num_train_epochs", str(self.epochs)]
        return [*data, *files, *self.flags, *work]

    @property
    def training(self) -> list[str]:
        """The first command: trains, and scores all exits, from which thresholds are chosen."""
        work = ["--do_train", "--resume", "--do_eval", "--eval_each_highway"]
        return self.argv(*work, "--model_name_or_path", self.name, "--plot_data_dir", str(self.folder / "scores"))

    def evaluation(self, thresholds: Sequence[float]) -> list[str]:
        """The second command, the paper's protocol: one sample at a time, padded. It writes the folder `results`."""
        timed = ["--do_eval", "--eval_each_highway", "--eval_highway", "--exit_threshold", *map(str, thresholds)]
        place = ["--model_name_or_path", "results", "--plot_data_dir", str(self.folder)]
        return self.argv(*timed, "--per_gpu_eval_batch_size", "1", *place)

    @cached_property
    def args(self) -> Arguments:
        """The flags of the training. Raises InputError."""
        return parse_args(self.training)

    @property
    def trained(self) -> dict | None:
        """The record of the finished training with these flags and data, None where there is none."""
        record = read_record(self.folder / "model")
        if not record or first_difference(record["settings"], training_settings(self.args, self.task)):
            return None
        return record if record["finished"] else None

    @property
    def record(self) -> Path:
        """What the evaluation was of, and what it took. It is written last."""
        return self.folder / "evaluated.json"

    @property
    def evaluated(self) -> dict | None:
        """The record of the evaluation, None where there is none of this model with these flags."""
        if not self.record.is_file() or not self.trained:
            return None
        record = read_json(self.record)
        same = record["trained"] == self.trained["started"] and record["argv"] == self.evaluation([])
        return record if same else None

    @property
    def results(self) -> list[Path]:
        """The folder of results of each dev set."""
        return [self.folder / f"results{suffix}" for suffix in self.task.dev_splits.values()]

    def execute(self) -> None:
        """Trains unless that is done, chooses thresholds and times them. Raises InputError, Interrupted."""
        with self.log():
            run_glue_deebert.main(self.training)
            scores = results.result_dir(self.folder / "scores", str(self.folder / "model")) / results.ALL_EXITS
            chosen = choose_thresholds(self.task, AllExits.load(scores))
            evaluate_padded(self.evaluation(sorted({*timed_thresholds(self.task.num_labels), *chosen})))
        facts = {"trained": self.trained["started"], "argv": self.evaluation([]), "thresholds": chosen}
        facts |= {"device": device_name(self.args)}
        write_json(self.record, facts)

    @contextmanager
    def log(self) -> Iterator[None]:
        """What the driver prints goes to log.txt; its progress bars go to the terminal."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "log.txt").open("a", encoding="utf-8") as file, redirect_stdout(file):
            yield


class PaddedExperiment(Experiment):
    """Its inputs are all padded to the same length, as the paper's are."""

    @cached_property
    def collate(self) -> Collator:
        return collator(self.config, self.config.max_seq_length)


def evaluate_padded(argv: Sequence[str]) -> None:
    """The driver's evaluation of padded inputs."""
    args = parse_args(argv)
    experiment = PaddedExperiment.from_args(args, make_accelerator(args))
    evaluate(experiment, experiment.output_dir)


def timed_thresholds(num_labels: int) -> list[float]:
    """The thresholds that the figures show: 0, 0.1 ... up to the first at which every sample exits, in nats."""
    return [i / 10 for i in range(int(10 * math.log(num_labels)) + 2)] if num_labels > 1 else [0.0]


def label(name: str) -> str:
    """A model's name in tables, figures and folders: without its owner, or the path to its folder."""
    return Path(name).resolve().name if Path(name).exists() else name.split("/")[-1]


def device_name(args: Arguments) -> str:
    """The device of the driver, in words."""
    if torch.cuda.is_available() and not args.run.no_cuda:
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"{threads} CPU thread{'' if threads == 1 else 's'}"
