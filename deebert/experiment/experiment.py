"""What the steps of run_glue_deebert.py share: arguments, task, config, tokenizer and data, checked before the work."""

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    set_seed,
)

import deebert
from deebert.data.batching import collator
from deebert.data.features import Features, load_features
from deebert.data.tasks import data_file, eval_splits, get_task, label_order
from deebert.evaluation import results
from deebert.experiment.compatibility import first_difference, first_stage_settings, training_settings
from deebert.modeling.checkpoints import (
    any_shape_attention,
    check_threshold,
    load_config,
    load_tokenizer,
    max_tokens,
    quiet_transformers,
    set_labels,
)
from deebert.modeling.early_exit import config_rule
from deebert.modeling.exit_rules import NO_EXIT
from deebert.training.cached_features import cached_features
from deebert.training.checkpointing import newest_checkpoint
from deebert.training.stage import TokenData, TrainData
from deebert.training.strategies import STRATEGIES
from deebert.utils.cli import InputError
from deebert.utils.files import check_writable

MIN_TOKENS = 8  # the special tokens of a pair, and something between them


class Run:
    """A run of the driver. Raises InputError for what is wrong with the input, before anything is written."""

    def __init__(self, args):
        self.args, self.task, self.output_dir = args, get_task(args.task_name), Path(args.output_dir)
        self.target = args.target
        self.check_files()
        quiet_transformers()
        self.accelerator = make_accelerator(args)
        set_seed(args.seed)

        # --do_eval alone is about the model that was saved in output_dir
        source = args.model_name_or_path if args.do_train else args.output_dir
        self.config = self.load_config(args.config_name if args.do_train and args.config_name else source)
        self.labels = label_order(self.task, args.model_type, self.config.id2label)
        if args.do_train:
            set_labels(self.config, self.labels)
            self.config.exit_threshold = NO_EXIT  # one chosen for a model before this training means nothing for it
            self.config.exit_temperatures = None
            self.config.highway_pooling = args.highway_pooling or self.config.highway_pooling
        self.check_config(self.config, source)
        self.tokenizer = load_tokenizer(args.tokenizer_name or source, args.do_lower_case, args.cache_dir)
        self.collate = collator(self.config, args.max_seq_length if args.pad_to_max_length else None)
        self.eval_features = {split: self.features(split) for split in self.dev_splits()}
        self.train_features = self.features("train") if args.do_train else None
        self.facts = {}  # what run.json says

    def check_files(self) -> None:
        args, folder = self.args, self.output_dir
        if not (args.do_train or args.do_eval):
            raise InputError("nothing to do: give --do_train, --do_eval or both")
        if folder.name in ("", ".."):
            raise InputError(f"--output_dir {folder}: give a folder's name, results are named after it")
        results.result_dir(args.plot_data_dir, args.model_name_or_path)  # to hear now of a name that it can't use
        for split in [*self.dev_splits(), *(["train"] if args.do_train else [])]:
            data_file(args.data_dir, split)
        if args.calibrate and not args.do_eval:
            raise InputError("--calibrate is a part of the evaluation: add --do_eval")
        if args.first_stage and (not args.do_train or args.train_strategy != "two_stage"):
            raise InputError(
                f"--first_stage {args.first_stage}: there is one in --do_train with the strategy two_stage"
            )
        if args.first_stage and Path(args.first_stage).resolve() == folder.resolve():
            raise InputError(f"--first_stage {args.first_stage}: give another folder than --output_dir")
        if args.load_best_model_at_end and not (args.evaluate_during_training and args.logging_steps > 0):
            raise InputError("--load_best_model_at_end needs scores: add --evaluate_during_training (--logging_steps)")
        if args.cache_features and args.train_strategy != "two_stage":
            raise InputError(
                f"--cache_features: in --train_strategy {args.train_strategy} no stage freezes the backbone"
            )
        if args.resume and not args.do_train:
            raise InputError("--resume is about --do_train")
        self.check_output_dir()
        if args.first_stage and Path(args.first_stage).exists() and not (self.first_stage_is_there() or self.resumes):
            raise InputError(f"--first_stage {args.first_stage}: no model after stage 1 there; give a new folder")
        if self.first_stage_is_there():
            found = results.read_json(self.first_stage_record)
            if other := first_difference(found, first_stage_settings(args)):
                raise InputError(f"--first_stage {args.first_stage}: trained with another {other}")

    def check_output_dir(self) -> None:
        """Whether there is a training to go on with, and that nothing is overwritten that was not meant to be."""
        args, folder = self.args, self.output_dir
        record = folder / "run.json"
        found = results.read_json(record) if record.is_file() else None
        other = (
            first_difference(found.get("settings", {}), training_settings(args)) if found and args.do_train else None
        )
        self.resumes = bool(args.resume and found and not other)
        self.found = found if self.resumes else None
        if not args.do_train:
            if not (folder / "config.json").is_file():
                raise InputError(f"--output_dir {folder}: no trained model there; train one with --do_train")
            return
        if args.overwrite_output_dir or self.resumes or not folder.is_dir() or not any(folder.iterdir()):
            return
        if args.resume and found:
            raise InputError(
                f"--resume: the training in {folder} had another {other}; --overwrite_output_dir begins a new one"
            )
        if found and not found["finished"]:
            raise InputError(
                f"--output_dir {folder}: a training that is not finished; --resume goes on with it, "
                "--overwrite_output_dir begins anew"
            )
        raise InputError(
            f"--output_dir {folder}: the folder is not empty; choose another or add --overwrite_output_dir"
        )

    @property
    def finished(self) -> bool:
        """Whether a training to be resumed has nothing left to do."""
        whole = all((self.output_dir / name).is_file() for name in ("config.json", "model.safetensors"))
        return self.resumes and self.found["finished"] and whole

    def checkpoint(self) -> Path | None:
        """What the training goes on from."""
        return newest_checkpoint(self.output_dir) if self.resumes else None

    @contextmanager
    def train_data(self, model, stage: int) -> Iterator[TrainData]:
        plan = STRATEGIES[self.args.train_strategy][stage - 1]
        if self.args.cache_features and not plan.backbone:
            with cached_features(model, self.train_features, self.collate, self.accelerator, self.output_dir) as reads:
                yield reads
        else:
            yield TokenData(self.train_features, self.collate, self.args.dataloader_num_workers)

    def dev_splits(self) -> list[str]:
        args = self.args
        wanted = args.do_eval or args.eval_after_first_stage or args.evaluate_during_training
        return list(eval_splits(self.task)) if wanted else []

    @property
    def first_stage_record(self) -> Path:
        """Written when the model in --first_stage is whole: the settings that it was trained with."""
        return Path(self.args.first_stage, "first_stage.json")

    def first_stage_is_there(self) -> bool:
        return bool(self.args.first_stage) and self.first_stage_record.is_file()

    def load_config(self, name_or_path: str):
        """A checkpoint's config, with the exit rule asked for; its threshold means nothing for another rule."""
        config = load_config(name_or_path, self.args.model_type, self.args.cache_dir)
        if self.args.exit_rule not in (None, config.exit_rule):
            config.exit_rule, config.exit_threshold = self.args.exit_rule, NO_EXIT
        config.patience_tolerance = self.args.patience_tolerance or config.patience_tolerance
        return config

    def check_config(self, config, name: str) -> None:
        """Whether this model, the one to be trained or a checkpoint, fits the flags and the task."""
        args, limit = self.args, max_tokens(config)
        if not MIN_TOKENS <= args.max_seq_length <= limit:
            raise InputError(f"--max_seq_length {args.max_seq_length}: this model takes {MIN_TOKENS} to {limit} tokens")
        if args.cache_features and config.highway_pooling == "attention":
            raise InputError(
                "--cache_features: off-ramps with --highway_pooling attention learn what to read; leave one of them out"
            )
        if config.num_hidden_layers < 2:
            raise InputError(f"{name}: a model of one layer has no off-ramps")
        if config.num_labels != self.task.num_labels:
            raise InputError(
                f"{name}: a model of {config.num_labels} labels, but {self.task.name} has {self.task.num_labels}; "
                "was it trained for another task?"
            )
        if args.highway_pooling not in (None, config.highway_pooling):
            raise InputError(
                f"--highway_pooling {args.highway_pooling}: {name} has {config.highway_pooling}; leave it out"
            )
        if (args.calibrate or config.exit_temperatures) and args.risk is not None:
            raise InputError(
                "--risk: exit_temperatures were fitted to the samples that the guarantee would be drawn from; "
                "leave out --calibrate, and set them to null in the model's config.json"
            )
        if self.target and not config_rule(config).supported:
            raise InputError(
                f"{self.task.name}: no threshold can be chosen for the exit rule {config.exit_rule}, with one label "
                "every sample is sure; use --exit_rule patience or learned"
            )
        if args.calibrate and config.num_labels == 1:
            raise InputError(f"{self.task.name}: --calibrate scales probabilities, and a regression model has none")
        for threshold in args.exit_threshold:
            check_threshold(threshold, config)

    def features(self, split: str) -> Features:
        """Tokenized by a machine's first process; the others find it in the cache."""
        with self.accelerator.local_main_process_first():
            return load_features(
                self.task,
                self.args.data_dir,
                split,
                self.labels,
                self.tokenizer,
                self.args.max_seq_length,
                overwrite_cache=self.args.overwrite_cache and self.accelerator.is_local_main_process,
            )

    def say(self, text: str) -> None:
        self.accelerator.print(text, flush=True)

    def check_places(self) -> None:
        """Raises InputError where results could not be written hours from now."""
        if not self.accelerator.is_main_process:
            return
        check_writable(self.output_dir, "--output_dir")
        if self.args.do_eval and (self.args.eval_each_highway or self.args.eval_highway or self.target):
            check_writable(Path(self.args.plot_data_dir), "--plot_data_dir")

    def record(self) -> None:
        """Arguments, versions and git revision: to stdout and beside the results."""
        versions = {
            "deebert": deebert.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        facts = {"versions": versions, "git": git_revision(), "device": str(self.accelerator.device)}
        facts |= {"processes": self.accelerator.num_processes, "mixed_precision": self.accelerator.mixed_precision}
        shown = ", ".join(f"{name} {version}" for name, version in versions.items())
        self.say(f"{self.task.name}, {self.args.model_name_or_path}, on {facts['device']}: {shown}, git {facts['git']}")
        self.facts = {"arguments": asdict(self.args), "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **facts}
        if self.args.do_train:
            before = self.found or {"stages": {}}
            self.facts |= {"settings": training_settings(self.args), "stages": before["stages"], "finished": False}
            self.facts["resumed"] = before.get("resumed", 0) + self.resumes
        self.write_facts()

    def write_facts(self) -> None:
        if self.accelerator.is_main_process:
            name = "run.json" if self.args.do_train else "run_eval.json"  # evaluating keeps the training's record
            results.write_json(self.output_dir / name, self.facts)


def make_accelerator(args) -> Accelerator:
    """Devices and processes as torchrun or accelerate launch set them up. Raises InputError for what is unsupported."""
    if args.fp16 and args.bf16:
        raise InputError("--fp16 and --bf16: choose one")
    if args.fp16 and (args.no_cuda or not torch.cuda.is_available()):
        raise InputError("--fp16 needs a GPU; leave it out, or take --bf16")
    any_shape_attention()
    accelerator = Accelerator(
        cpu=args.no_cuda,
        mixed_precision="fp16" if args.fp16 else "bf16" if args.bf16 else None,  # None: what accelerate launch says
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # TrainBatches cuts the updates
        kwargs_handlers=[
            # every other update leaves the off-ramps out
            DistributedDataParallelKwargs(find_unused_parameters=args.train_strategy == "alternating"),
            InitProcessGroupKwargs(timeout=timedelta(hours=6)),  # others wait while the first one times exits
        ],
    )
    kind = accelerator.distributed_type
    if kind not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise InputError(f"accelerate's {kind.value} is not supported; use its MULTI_GPU, MULTI_CPU or NO")
    return accelerator


def git_revision() -> str | None:
    """The checkout's revision, None outside of one."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():  # installed, perhaps inside another repository
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
