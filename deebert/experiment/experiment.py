"""What the steps of run_glue_deebert.py share: the flags, the task, the model's config, tokenizer, data and devices."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    set_seed,
)
from transformers import PreTrainedTokenizerBase

from deebert.data.batching import collator
from deebert.data.features import Features, fingerprint, load_features
from deebert.data.tasks import Task, label_order
from deebert.experiment import checks
from deebert.experiment.arguments import OFF_RAMP_FLAGS, Arguments
from deebert.experiment.dev_sets import DevSets
from deebert.experiment.record import RunRecord, decide_resume
from deebert.modeling.checkpoints import (
    disable_cudnn_attention,
    load_config,
    load_final_classifier,
    load_model,
    load_tokenizer,
    quiet_transformers,
    set_labels,
)
from deebert.modeling.exit_rules import NO_EXIT
from deebert.training.cached_features import cached_features
from deebert.training.checkpointing import TEACHER_LOGITS, newest_checkpoint, saved_steps
from deebert.training.strategies import STRATEGIES
from deebert.training.train_data import TaughtData, TokenData, TrainData, final_logits
from deebert.utils.errors import InputError
from deebert.utils.files import replacing


@dataclass(frozen=True)
class Experiment:
    """One run of the driver, with checked input.

    config: of the model to be trained, or of the one in output_dir. train_features: None without --do_train.
    dev_sets: a test file of own data is one of them.
    previous_record: run.json of the training that this run resumes, None if it resumes none.
    """

    args: Arguments
    task: Task
    accelerator: Accelerator
    config: object
    tokenizer: PreTrainedTokenizerBase
    train_features: Features | None
    dev_sets: DevSets
    previous_record: dict | None
    record: RunRecord

    @classmethod
    def from_args(cls, args: Arguments) -> "Experiment":
        """Checks the input and loads config, tokenizer and data. Writes nothing. Raises InputError."""
        task = args.task
        checks.check_flags(args, task)
        previous_record = decide_resume(args)
        checks.check_output_dir(args, resumes=previous_record is not None)
        checks.check_first_stage(args, resumes=previous_record is not None)
        checks.check_split(args)
        quiet_transformers()
        accelerator = make_accelerator(args)
        set_seed(args.seed)
        for note in task.notes:
            accelerator.print(note, flush=True)

        source = args.model_name_or_path if args.do_train else args.output_dir
        config = config_with_rule(args, args.config_name if args.do_train and args.config_name else source)
        labels = label_order(task, config.model_type, config.id2label)
        if args.do_train:
            checks.check_head(args, config, source)
            set_labels(config, labels, task.problem_type)
            config.exit_threshold = NO_EXIT  # a threshold chosen before this training has no meaning after it
            config.exit_histogram = None
            config.max_seq_length = args.max_seq_length
            for name in OFF_RAMP_FLAGS:
                if getattr(args, name) is not None:
                    setattr(config, name, getattr(args, name))
        checks.check_config(args, task, config, source)
        if args.teacher and args.teacher != "first_stage":
            checks.check_teacher_config(args, config, load_config(args.teacher, args.model_type))
        tokenizer = load_tokenizer(args.tokenizer_name or source, args.do_lower_case, args.cache_dir)
        if previous_record is not None:
            checks.check_tokenizer(args, previous_record["tokenizer"], fingerprint(tokenizer))

        def features(split: str) -> Features:
            with accelerator.local_main_process_first():  # the others find the features in the cache
                overwrite = args.overwrite_cache and accelerator.is_local_main_process
                return load_features(
                    task, args.data_dir, split, labels, tokenizer, args.max_seq_length, overwrite_cache=overwrite
                )

        collate = collator(config, args.max_seq_length if args.pad_to_max_length else None)
        dev_features = {split: features(split) for split in checks.dev_splits(args, task)}
        return cls(
            args=args,
            task=task,
            accelerator=accelerator,
            config=config,
            tokenizer=tokenizer,
            train_features=features("train") if args.do_train else None,
            dev_sets=DevSets(task, dev_features, collate, accelerator),
            previous_record=previous_record,
            record=RunRecord(args, accelerator, fingerprint(tokenizer)),
        )

    @property
    def output_dir(self) -> Path:
        return Path(self.args.output_dir)

    @property
    def finished(self) -> bool:
        """Whether the training that this run resumes has nothing left to do."""
        complete = all((self.output_dir / name).is_file() for name in ("config.json", "model.safetensors"))
        return self.previous_record is not None and self.previous_record["finished"] and complete

    @property
    def num_stages(self) -> int:
        return len(STRATEGIES[self.args.train_strategy])

    def checkpoint_to_resume(self) -> Path | None:
        """The checkpoint that the training continues from, None for a start from the beginning."""
        return newest_checkpoint(self.output_dir) if self.previous_record is not None else None

    def models_to_evaluate(self) -> list[Path]:
        """The model in output_dir; before it, with --eval_all_checkpoints, the checkpoints of its training."""
        return [*(saved_steps(self.output_dir) if self.args.eval_all_checkpoints else []), self.output_dir]

    def load_trained(self, folder: Path):
        """A trained model, on the device. Raises InputError if it does not fit the flags."""
        config = config_with_rule(self.args, str(folder))
        checks.check_config(self.args, self.task, config, str(folder))
        return load_model(str(folder), config).to(self.accelerator.device)

    @contextmanager
    def train_data(self, model, stage: int) -> Iterator[TrainData]:
        """The data of a stage: tokens, or with --cache_features and a frozen backbone the off-ramps' pooled states.

        In the last stage the logits of --teacher come with them.
        """
        args, collate = self.args, self.dev_sets.collate
        teach = (
            partial(TaughtData, teacher_logits=self.teacher_logits(model)) if self.has_teacher(stage) else lambda d: d
        )
        if args.cache_features and not STRATEGIES[args.train_strategy][stage - 1].backbone:
            with cached_features(model, self.train_features, collate, self.accelerator, self.output_dir) as features:
                yield teach(features)
        else:
            yield teach(TokenData(self.train_features, collate, args.dataloader_num_workers))

    def has_teacher(self, stage: int) -> bool:
        """Whether --teacher teaches in this stage."""
        return self.args.teacher is not None and stage == self.num_stages

    def teacher_logits(self, model) -> np.ndarray:
        """The teacher's logits (S, C) for the training samples. They are stored: later, the model is another one."""
        file = self.output_dir / TEACHER_LOGITS
        if file.is_file():  # a training that is resumed
            return np.load(file)
        if self.args.teacher != "first_stage":
            config = load_config(self.args.teacher, self.args.model_type)
            model = load_final_classifier(self.args.teacher, config).to(self.accelerator.device)
        logits = final_logits(model, self.train_features, self.dev_sets.collate, self.accelerator)
        if self.accelerator.is_main_process:
            with replacing(file, "wb") as opened:
                np.save(opened, logits)
        self.accelerator.wait_for_everyone()
        return logits

    def say(self, text: str) -> None:
        """Prints in the first process only."""
        self.accelerator.print(text, flush=True)


def config_with_rule(args: Arguments, name_or_path: str):
    """A checkpoint's config with the exit rule of the flags. A threshold for another rule is removed."""
    config = load_config(name_or_path, args.model_type, args.cache_dir)
    if args.exit_rule not in (None, config.exit_rule):
        config.exit_rule, config.exit_threshold = args.exit_rule, NO_EXIT
    config.patience_tolerance = args.patience_tolerance or config.patience_tolerance
    return config


def make_accelerator(args: Arguments) -> Accelerator:
    """Devices and processes as torchrun or accelerate launch set them up. Raises InputError if they are unsupported."""
    if args.fp16 and args.bf16:
        raise InputError("--fp16 and --bf16: choose one")
    if args.fp16 and (args.no_cuda or not torch.cuda.is_available()):
        raise InputError("--fp16 needs a GPU; leave it out, or use --bf16")
    disable_cudnn_attention()
    accelerator = Accelerator(
        cpu=args.no_cuda,
        mixed_precision="fp16" if args.fp16 else "bf16" if args.bf16 else None,  # None: as accelerate launch says
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # TrainBatches divides the steps
        kwargs_handlers=[
            # in every second step the off-ramps have no gradient
            DistributedDataParallelKwargs(find_unused_parameters=args.train_strategy == "alternating"),
            InitProcessGroupKwargs(timeout=timedelta(hours=6)),  # the others wait while the first one times exits
        ],
    )
    kind = accelerator.distributed_type
    if kind not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise InputError(f"accelerate's {kind.value} is not supported; use its MULTI_GPU, MULTI_CPU or NO")
    return accelerator
